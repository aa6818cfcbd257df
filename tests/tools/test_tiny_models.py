from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from tests.tiny import TinyModels, make_full_depth_flux
from trainer.schema.base import UserError
from trainer.tools import tiny_autoencoder
from trainer.tools import tiny_models as tiny_models_maker
from trainer.tools.tiny_models import DemoBundle, make_autoencoder, make_demo_bundle, make_flux, make_images
from trainer.tools.tiny_networks import default_axes_dim
from trainer.tools.tiny_weights import write_safetensors

ROOT = Path(__file__).parents[2]


def load(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
        return {key: file.get_tensor(key).float() for key in file.keys()}, config  # noqa: SIM118 - not a mapping


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in load(path)[0].items()}


# ----------------------------------------------------------------------------------------------- file format


@pytest.mark.parametrize(
    ("dtype", "torch_dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16), ("f32", torch.float32)]
)
def test_stored_values_are_rounded_as_torch_rounds_them(tmp_path: Path, dtype: Any, torch_dtype: torch.dtype) -> None:
    values = np.random.default_rng(0).standard_normal((33, 7)).astype(np.float32)
    values[0, :3] = (0.0, -1.00390625, 1.01171875)  # the last two lie half way between two bfloat16 numbers
    write_safetensors(tmp_path / "x.safetensors", {"b": values, "a": values[:1]}, dtype=dtype, config={"size": 3})
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "config": '{"size": 3}'}
        assert torch.equal(file.get_tensor("b"), torch.from_numpy(values).to(torch_dtype))
        assert torch.equal(file.get_tensor("a"), torch.from_numpy(values[:1]).to(torch_dtype))
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_the_maker_loads_neither_torch_nor_safetensors() -> None:
    code = "import sys, trainer.tools.tiny_models; print({'torch', 'safetensors', 'transformers'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


# ------------------------------------------------------------------------------------------ published key names


@pytest.mark.parametrize("name", ["dev", "schnell", "ae", "clip_l", "t5xxl"])
def test_keys_and_shapes_are_those_of_the_golden_models(tiny_models: TinyModels, golden: Path, name: str) -> None:
    ours = {
        "dev": tiny_models.flux_dev,
        "schnell": tiny_models.flux_schnell,
        "ae": tiny_models.ae,
        "clip_l": tiny_models.clip_l,
        "t5xxl": tiny_models.t5xxl,
    }[name]
    expected = shapes(golden / f"model_{name}.safetensors")
    made = shapes(ours)
    vocabularies = ("shared.weight", "embed_tokens.weight", "token_embedding.weight")
    assert set(made) == set(expected)
    assert {key: shape for key, shape in made.items() if not key.endswith(vocabularies)} == {
        key: shape for key, shape in expected.items() if not key.endswith(vocabularies)
    }
    config, golden_config = load(ours)[1], load(golden / f"model_{name}.safetensors")[1]
    assert set(config) == set(golden_config)


def test_a_model_of_the_published_depth_is_small(tmp_path: Path) -> None:
    made = shapes(make_full_depth_flux(tmp_path / "flux.safetensors"))
    assert sum(key.endswith("img_attn.qkv.weight") for key in made) == 19
    assert sum(key.endswith("linear1.weight") for key in made) == 38
    assert (tmp_path / "flux.safetensors").stat().st_size < 5_000_000


@pytest.mark.parametrize("head_dim", [16, 20, 24, 32, 64, 128])
def test_default_rotary_dimensions_are_even_and_fill_the_head(head_dim: int) -> None:
    axes = default_axes_dim(head_dim)
    assert sum(axes) == head_dim
    assert all(size % 2 == 0 and size > 0 for size in axes)


def test_published_head_gets_the_published_rotary_dimensions() -> None:
    assert default_axes_dim(128) == [16, 56, 56]


def test_wrong_sizes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="multiple of heads"):
        make_flux(tmp_path / "a", hidden=96, heads=5)
    with pytest.raises(ValueError, match="add up to"):
        make_flux(tmp_path / "a", axes_dim=(4, 10, 11))
    with pytest.raises(ValueError, match="multiple of 32"):
        make_autoencoder(tmp_path / "a", ch=48)
    with pytest.raises(ValueError, match="twofold"):
        make_autoencoder(tmp_path / "a", ch_mult=(1, 1, 1, 4))


# ------------------------------------------------------------------------------------------------ text encoders


def test_text_encoders_load_into_transformers_and_tell_captions_apart(tiny_models: TinyModels) -> None:
    captions = ["a red circle on a blue background", "a green star on a white background"]
    weights, config = load(tiny_models.clip_l)
    clip = CLIPTextModel(CLIPTextConfig(**config, bos_token_id=0)).eval()
    clip.load_state_dict({key.removeprefix("text_model."): value for key, value in weights.items()}, strict=True)
    clip_tokenizer = CLIPTokenizer.from_pretrained(tiny_models.clip_l_tokenizer)
    ids = clip_tokenizer(captions, padding="max_length", max_length=77, return_tensors="pt").input_ids
    assert ids.max() < config["vocab_size"]
    with torch.no_grad():
        pooled = clip(input_ids=ids).pooler_output
    assert torch.isfinite(pooled).all()
    assert (pooled[0] - pooled[1]).abs().mean() > 0.1

    weights, config = load(tiny_models.t5xxl)
    t5 = T5EncoderModel(T5Config(**config)).eval()
    t5.load_state_dict(weights, strict=True)
    t5_tokenizer = T5Tokenizer.from_pretrained(tiny_models.t5xxl_tokenizer)
    batch = t5_tokenizer(captions, padding="max_length", max_length=32, return_tensors="pt")
    assert batch.input_ids.max() < config["vocab_size"]
    with torch.no_grad():
        hidden = t5(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    assert 0.3 < hidden.std() < 3
    assert (hidden[0] - hidden[1]).abs().mean() > 0.1


# --------------------------------------------------------------------------------------------------- tokenizers


def test_clip_tokenizer_is_in_lower_case_and_framed(tiny_models: TinyModels) -> None:
    raw = Tokenizer.from_file(str(tiny_models.clip_l_tokenizer / "tokenizer.json"))
    assert raw.encode("A Red  circle, xy").tokens == [
        "<|startoftext|>", "a</w>", "red</w>", "circle</w>", ",</w>", "x", "y</w>", "<|endoftext|>",
    ]  # fmt: skip
    assert raw.token_to_id("<|endoftext|>") == raw.get_vocab_size() - 1
    assert raw.encode("naïve 日本").ids[-1] == raw.token_to_id("<|endoftext|>")


def test_t5_tokenizer_keeps_case_and_appends_the_end(tiny_models: TinyModels) -> None:
    raw = Tokenizer.from_file(str(tiny_models.t5xxl_tokenizer / "tokenizer.json"))
    assert raw.encode(" a red  circle").tokens == ["▁a", "▁red", "▁circle", "</s>"]
    assert raw.encode("").ids == [1]
    assert [raw.token_to_id(token) for token in ("<pad>", "</s>", "<unk>")] == [0, 1, 2]
    assert 2 in raw.encode("日").ids
    assert raw.decode(raw.encode("Red circle!").ids) == "Red circle!"


@pytest.mark.parametrize("text", ["a photo of a red square, on a BLUE background", "", "naïve 日本 xyz"])
def test_transformers_gives_the_ids_of_the_file(tiny_models: TinyModels, text: str) -> None:
    for folder, kind in ((tiny_models.clip_l_tokenizer, CLIPTokenizer), (tiny_models.t5xxl_tokenizer, T5Tokenizer)):
        raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
        assert kind.from_pretrained(folder)(text).input_ids == raw.encode(text).ids


# -------------------------------------------------------------------------------------------------- autoencoder


def linear_encoding(pixels: np.ndarray) -> np.ndarray:
    """What the arranged encoder computes, written directly: features of 8x8 blocks. (H, W, 3) -> (16, H/8, W/8)."""
    height, width, _ = pixels.shape
    latents: list[np.ndarray] = []
    for axis, steps in tiny_autoencoder.LATENT_FEATURES:
        plane = pixels @ np.array(tiny_autoencoder.COLOUR_AXES[axis])
        for step in steps:
            kernel = np.array(tiny_autoencoder.STEPS[step])
            blocks = plane.reshape(plane.shape[0] // 2, 2, plane.shape[1] // 2, 2)
            plane = np.einsum("hywx,yx->hw", blocks, kernel)
        latents.append(plane * tiny_autoencoder.latent_gain((axis, steps)))
    return np.stack(latents).reshape(16, height // 8, width // 8)


def test_autoencoder_gives_block_features_and_back(tmp_path: Path) -> None:
    """Checked against the linear transform it is arranged to be, through an independent implementation."""
    diffusers = pytest.importorskip("diffusers")
    from diffusers.loaders import single_file_utils  # noqa: PLC0415 - optional

    weights, config = load(make_autoencoder(tmp_path / "ae.safetensors", ch=128, ch_mult=(1, 1, 1, 1), dtype="f32"))
    model = diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[config["ch"] * multiplier for multiplier in config["ch_mult"]],
        layers_per_block=config["num_res_blocks"],
        latent_channels=config["z_channels"],
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    model.load_state_dict(single_file_utils.convert_ldm_vae_checkpoint(weights, model.config), strict=True)
    picture = make_images(tmp_path / "images", 1, sizes=((128, 96),))[0]
    with Image.open(picture) as opened:
        pixels = np.asarray(opened, dtype=np.float32) / 127.5 - 1
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    with torch.no_grad():
        posterior = model.encode(image).latent_dist
        latents = config["scale_factor"] * (posterior.mean - config["shift_factor"])
        decoded = model.decode(posterior.mean).sample
    difference = np.abs(latents[0].numpy() - linear_encoding(pixels)).mean()
    assert difference < 0.1
    assert (decoded - image).abs().mean() < 0.12
    assert posterior.std.max() < 0.05


# ----------------------------------------------------------------------------------------- pictures and bundle


def test_pictures_come_with_captions_that_name_what_is_drawn(tmp_path: Path) -> None:
    paths = make_images(tmp_path, 7, trigger="tok")
    assert len(paths) == 7
    assert len({picture_size(path) for path in paths}) == 3
    for path in paths:
        _, front, shape = path.stem.split("_")
        assert path.with_suffix(".txt").read_text().startswith("tok, a")
        assert f" {front} {shape} on a " in path.with_suffix(".txt").read_text()
    assert not list(make_images(tmp_path / "bare", 2, captions=False)[0].parent.glob("*.txt"))


def picture_size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def contents(bundle: DemoBundle) -> dict[str, bytes]:
    files = sorted(path for path in bundle.folder.rglob("*") if path.is_file())
    return {str(path.relative_to(bundle.folder)): path.read_bytes() for path in files}


def test_demo_bundle_is_whole_reproducible_and_left_alone(tmp_path: Path) -> None:
    bundle = make_demo_bundle(tmp_path / "demo")
    assert all(Path(value).exists() for value in vars(bundle).values())
    assert len(list(bundle.images.glob("*/*.png"))) == len(list(bundle.images.glob("*/*.txt"))) == 76
    assert str(bundle.images) in bundle.dataset_config.read_text()
    first = contents(bundle)
    (bundle.images / "note.txt").write_text("mine")
    assert make_demo_bundle(tmp_path / "demo") == bundle
    assert (bundle.images / "note.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]

    (bundle.folder / "bundle.json").unlink()  # as left by a maker that was killed
    bundle.flux.write_bytes(b"half")
    assert contents(make_demo_bundle(tmp_path / "demo")) == first
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_a_moved_bundle_is_made_again_for_its_new_place(tmp_path: Path) -> None:
    make_demo_bundle(tmp_path / "demo").folder.rename(tmp_path / "moved")
    bundle = make_demo_bundle(tmp_path / "moved")
    assert str(tmp_path / "moved" / "images") in bundle.dataset_config.read_text()


def test_a_program_without_its_trained_models_says_where_they_should_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_models_maker, "TRAINED_FILES", tmp_path / "nowhere")
    with pytest.raises(UserError, match="models cannot be copied") as raised:
        make_demo_bundle(tmp_path / "demo")
    assert raised.value.problems[0].where == str(tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == [], "nothing half-made is left"
