"""Every layout that models are published in: each gives the model that the program which wrote it computes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from tests.diffusers_flux import diffusers_names
from trainer.model.flux import Flux
from trainer.model.packing import image_ids, text_ids
from trainer.model.weights import load_autoencoder, load_clip_l, load_flux, load_t5xxl
from trainer.schema.base import UserError
from trainer.schema.checkpoint_header import (
    FluxParams,
    autoencoder_params,
    clip_params,
    flux_params,
    read_header,
    t5_params,
)
from trainer.schema.model_shapes import autoencoder_shapes, clip_shapes, flux_shapes, t5_shapes
from trainer.schema.weight_files import folder_files, read_weights

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
else:
    diffusers = pytest.importorskip("diffusers")
    AutoencoderKL, FluxTransformer2DModel = diffusers.AutoencoderKL, diffusers.FluxTransformer2DModel

EXACT = 5e-6


def randomised(model: nn.Module, seed: int) -> Any:
    """`model` with every parameter random, so that no two layers can be confused, biases and norms included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fan_in = parameter.shape[1:].numel() if parameter.dim() > 1 else 100
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
            if parameter.dim() == 1 and name.endswith("weight"):
                parameter.add_(1)
    return model.eval().requires_grad_(False)


def make_transformer(*, guidance: bool = True, seed: int = 1) -> Any:
    return randomised(
        FluxTransformer2DModel(
            patch_size=1,
            in_channels=64,
            num_layers=2,
            num_single_layers=3,
            attention_head_dim=24,
            num_attention_heads=2,
            joint_attention_dim=40,
            pooled_projection_dim=20,
            guidance_embeds=guidance,
            axes_dims_rope=(4, 10, 10),
        ),
        seed,
    )


def outputs(ours: Flux, theirs: Any) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    img, txt, y = draw(2, 12, 64), draw(2, 5, ours.params.context_in_dim), draw(2, ours.params.vec_in_dim)
    timesteps, guidance = torch.tensor([0.3, 0.8]), torch.tensor([1.0, 3.5])
    other = theirs(
        hidden_states=img,
        encoder_hidden_states=txt,
        pooled_projections=y,
        timestep=timesteps,
        img_ids=image_ids(3, 4)[0],
        txt_ids=text_ids(5)[0],
        guidance=guidance if ours.params.guidance_embed else None,
        return_dict=False,
    )[0]
    return ours(img, image_ids(3, 4), txt, text_ids(5), timesteps, y, guidance), other


# ------------------------------------------------------------------------------------------------------------- FLUX


@pytest.mark.parametrize("guidance", [True, False])
@pytest.mark.parametrize("shard_size", ["100KB", "10GB"])
def test_a_diffusers_folder_gives_what_diffusers_computes(tmp_path: Path, guidance: bool, shard_size: str) -> None:
    theirs = make_transformer(guidance=guidance)
    theirs.save_pretrained(tmp_path, max_shard_size=shard_size)
    num_files = len(list(tmp_path.glob("*.safetensors")))
    assert (num_files > 3) == (shard_size == "100KB")
    ours = load_flux(tmp_path, torch.float32, "cpu")
    assert (ours.params.guidance_embed, ours.params.axes_dim) == (guidance, (4, 10, 10))
    result, expected = outputs(ours, theirs)
    torch.testing.assert_close(result, expected, atol=EXACT, rtol=0)


def test_index_one_shard_and_whole_repository_name_the_same_model(tmp_path: Path) -> None:
    folder = tmp_path / "repo" / "transformer"
    make_transformer().save_pretrained(folder, max_shard_size="100KB")
    (tmp_path / "repo" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}', encoding="utf-8")
    expected = load_flux(folder, torch.float32, "cpu").state_dict()
    names = (
        tmp_path / "repo",
        folder / "diffusion_pytorch_model.safetensors.index.json",
        sorted(folder.glob("*-00002-of-*.safetensors"))[0],
    )
    for path in names:
        loaded = load_flux(path, torch.float32, "cpu").state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.items())


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_diffusers_single_file_equals_the_published_one(golden: Path, tmp_path: Path, prefix: str) -> None:
    source = golden / "model_dev.safetensors"
    plain = load_flux(source, torch.bfloat16, "cpu")
    path = tmp_path / "flux.safetensors"
    tensors = diffusers_names(plain.state_dict(), plain.params.hidden_size)
    config = {"config": read_header(source).metadata["config"]}
    save_file({prefix + name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=config)
    loaded = load_flux(path, torch.bfloat16, "cpu")
    assert loaded.params == plain.params
    state = plain.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())


def test_norm_scales_may_be_called_weight(golden: Path, tmp_path: Path) -> None:
    source = golden / "model_dev.safetensors"
    renamed = {
        f"{name.removesuffix('.scale')}.weight" if name.endswith(".scale") else name: tensor
        for name, tensor in load_file(source).items()
    }
    save_file(renamed, tmp_path / "a.safetensors", metadata={"config": read_header(source).metadata["config"]})
    loaded = load_flux(tmp_path / "a.safetensors", torch.bfloat16, "cpu").state_dict()
    expected = load_flux(source, torch.bfloat16, "cpu").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.items())


def test_a_hub_id_is_read_from_the_local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--someone--flux-tiny" / "snapshots" / "0123abcd"
    theirs = make_transformer()
    theirs.save_pretrained(snapshot / "transformer", max_shard_size="100KB")
    refs = tmp_path / "models--someone--flux-tiny" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0123abcd", encoding="utf-8")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    result, expected = outputs(load_flux(Path("someone/flux-tiny"), torch.float32, "cpu"), theirs)
    torch.testing.assert_close(result, expected, atol=EXACT, rtol=0)
    with pytest.raises(UserError, match="nor a model in the local Hugging Face cache"):
        read_weights(Path("someone/other"), "flux")


def test_only_the_needed_files_of_a_repository_are_chosen() -> None:
    flux_dev = [
        "README.md",
        "ae.safetensors",
        "flux1-dev.safetensors",
        "model_index.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "text_encoder_2/config.json",
        "text_encoder_2/model-00001-of-00002.safetensors",
        "text_encoder_2/model-00002-of-00002.safetensors",
        "text_encoder_2/model.safetensors.index.json",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
    ]
    assert folder_files(flux_dev, "flux") == ["flux1-dev.safetensors"]
    assert folder_files(flux_dev, "autoencoder") == ["vae/config.json", "vae/diffusion_pytorch_model.safetensors"]
    assert folder_files(flux_dev, "clip_l") == ["text_encoder/config.json", "text_encoder/model.safetensors"]
    assert len(folder_files(flux_dev, "t5xxl")) == 4
    assert folder_files(["clip_l.safetensors", "t5xxl_fp16.safetensors"], "t5xxl") == ["t5xxl_fp16.safetensors"]
    assert folder_files(["model.safetensors", "vocab.json"], "clip_l") == ["model.safetensors"]
    assert folder_files(["pytorch_model.bin"], "flux") == []


def test_of_a_chroma_repository_t5_is_the_one_text_encoder() -> None:
    chroma = [
        "Chroma1-HD.safetensors",
        "model_index.json",
        "text_encoder/config.json",
        "text_encoder/model-00001-of-00002.safetensors",
        "text_encoder/model-00002-of-00002.safetensors",
        "text_encoder/model.safetensors.index.json",
        "tokenizer/spiece.model",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    assert folder_files(chroma, "t5xxl") == chroma[2:6]
    assert folder_files(chroma, "chroma") == chroma[7:9]
    assert folder_files(chroma[:2], "chroma") == chroma[:1]
    assert folder_files(chroma[:2], "t5xxl") == [], "17 GB of another model are not fetched"


# ------------------------------------------------------------------------------------------------------ autoencoder


@pytest.mark.parametrize("old_names", [False, True])
def test_a_diffusers_autoencoder_gives_what_diffusers_computes(tmp_path: Path, old_names: bool) -> None:
    # Its annotations allow one level only.
    theirs = randomised(
        cast("Any", AutoencoderKL)(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(32, 64, 64),
            layers_per_block=2,
            latent_channels=16,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        2,
    )
    theirs.save_pretrained(tmp_path)
    if old_names:
        _rename_attention(tmp_path / "diffusion_pytorch_model.safetensors")
    ours = load_autoencoder(tmp_path, torch.float32, "cpu")
    images = torch.rand(1, 3, 32, 40, generator=torch.Generator().manual_seed(1)) * 2 - 1
    moments = theirs.encode(images).latent_dist.parameters
    torch.testing.assert_close(ours.encode_moments(images), moments, atol=EXACT, rtol=1e-5)
    mean = moments.chunk(2, dim=1)[0]
    latents = (mean - 0.1159) * 0.3611
    torch.testing.assert_close(ours.encode(images, sample=False), latents, atol=EXACT, rtol=1e-5)
    torch.testing.assert_close(ours.decode(latents), theirs.decode(mean).sample, atol=2e-5, rtol=1e-5)


def _rename_attention(path: Path) -> None:
    names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    renamed: dict[str, Tensor] = {}
    for name, tensor in load_file(path).items():
        old = next((name.replace(new, old) for new, old in names.items() if new in name), name)
        renamed[old] = tensor
    save_file(renamed, path)


def test_an_autoencoders_attention_may_be_stored_as_matrices(golden: Path, tmp_path: Path) -> None:
    source = golden / "model_ae.safetensors"
    tensors = {
        name: tensor.squeeze(-1, -2) if "attn_1" in name and tensor.dim() == 4 else tensor
        for name, tensor in load_file(source).items()
    }
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "ae.safetensors")
    loaded = load_autoencoder(tmp_path / "ae.safetensors", torch.float32, "cpu").state_dict()
    expected = load_autoencoder(source, torch.float32, "cpu").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.items())


# ---------------------------------------------------------------------------------------------------- text encoders


def make_t5() -> T5EncoderModel:
    config = T5Config(
        d_model=48,
        d_ff=64,
        d_kv=8,
        num_heads=3,
        num_layers=3,
        vocab_size=90,
        feed_forward_proj="gated-gelu",
        relative_attention_max_distance=64,
        is_encoder_decoder=False,
        dropout_rate=0.0,
    )
    return randomised(T5EncoderModel(config), 4)


@pytest.mark.parametrize("shard_size", ["20KB", "10GB"])
def test_a_transformers_t5_folder_gives_what_transformers_computes(tmp_path: Path, shard_size: str) -> None:
    theirs = make_t5()
    theirs.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 3) == (shard_size == "20KB")
    ours = load_t5xxl(tmp_path, torch.float32, "cpu")
    ids = torch.arange(80)[None]
    torch.testing.assert_close(
        ours(input_ids=ids).last_hidden_state, theirs(input_ids=ids).last_hidden_state, atol=EXACT, rtol=1e-5
    )


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_a_transformers_clip_folder_gives_what_transformers_computes(tmp_path: Path, activation: str) -> None:
    theirs = randomised(
        CLIPTextModel(
            CLIPTextConfig(
                hidden_size=36,
                intermediate_size=50,
                num_attention_heads=3,
                num_hidden_layers=2,
                vocab_size=70,
                max_position_embeddings=20,
                layer_norm_eps=1e-4,
                hidden_act=activation,
                eos_token_id=2,
                bos_token_id=1,
                pad_token_id=0,
            )
        ),
        5,
    )
    theirs.save_pretrained(tmp_path)
    ours = load_clip_l(tmp_path, torch.float32, "cpu", activation)
    ids = torch.tensor([[68, *range(3, 20), 69, 69]])
    result, expected = ours(input_ids=ids), theirs(input_ids=ids)
    torch.testing.assert_close(result.last_hidden_state, expected.last_hidden_state, atol=EXACT, rtol=1e-5)
    torch.testing.assert_close(result.pooler_output, expected.pooler_output, atol=EXACT, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------------ whole


def test_the_tables_of_shapes_describe_the_modules(golden: Path) -> None:
    header = read_header(golden / "model_schnell.safetensors")
    flux = load_flux(header.path, torch.bfloat16, "cpu")
    assert flux_shapes(flux_params(header)) == {n: tuple(p.shape) for n, p in flux.named_parameters()}
    header = read_header(golden / "model_ae.safetensors")
    autoencoder = load_autoencoder(header.path, torch.bfloat16, "cpu")
    assert autoencoder_shapes(autoencoder_params(header)) == {
        n: tuple(p.shape) for n, p in autoencoder.named_parameters()
    }
    header = read_header(golden / "model_t5xxl.safetensors")
    t5 = load_t5xxl(header.path, torch.bfloat16, "cpu")
    assert t5_shapes(t5_params(header)) == {n: tuple(p.shape) for n, p in t5.named_parameters()}
    header = read_header(golden / "model_clip_l.safetensors")
    clip = load_clip_l(header.path, torch.bfloat16, "cpu")
    named = {n.removeprefix("text_model."): tuple(p.shape) for n, p in clip.named_parameters()}
    assert clip_shapes(clip_params(header)) == named


@pytest.mark.parametrize("mlp", [27, 54, 55])
def test_an_mlp_of_any_width_is_counted_to_the_last_row(mlp: int) -> None:
    """The ratio of two widths, times one of them, is the other only when it is rounded."""
    params = FluxParams(64, 64, 8, 16, 98, mlp / 98, 7, 1, 1, (2, 6, 6), 10_000, True, True)
    shapes = flux_shapes(params)
    assert shapes["double_blocks.0.img_mlp.0.weight"] == (mlp, 98)
    with torch.device("meta"):
        model = Flux(params)
    assert shapes == {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def test_a_repository_folder_holds_all_four_models(tmp_path: Path, golden: Path) -> None:
    for kind, folder in (
        ("dev", "transformer"),
        ("ae", "vae"),
        ("clip_l", "text_encoder"),
        ("t5xxl", "text_encoder_2"),
    ):
        (tmp_path / folder).mkdir()
        shutil.copy(golden / f"model_{kind}.safetensors", tmp_path / folder / "model.safetensors")
    assert load_flux(tmp_path, torch.bfloat16, "cpu").params.depth == 2
    assert load_autoencoder(tmp_path, torch.bfloat16, "cpu").params.z_channels == 16
    assert load_clip_l(tmp_path, torch.bfloat16, "cpu").config.num_attention_heads == 4
    assert load_t5xxl(tmp_path, torch.bfloat16, "cpu").config.num_layers == 2


def test_a_chroma_repository_has_its_t5_where_others_have_clip(tmp_path: Path, golden: Path) -> None:
    (tmp_path / "text_encoder").mkdir()
    shutil.copy(golden / "model_t5xxl.safetensors", tmp_path / "text_encoder" / "model.safetensors")
    assert load_t5xxl(tmp_path, torch.bfloat16, "cpu").config.num_layers == 2
    # A repository of FLUX.1 that is not whole has CLIP-L there, which must not pass for what is missing.
    shutil.copy(golden / "model_clip_l.safetensors", tmp_path / "text_encoder" / "model.safetensors")
    with pytest.raises(UserError, match="no T5 text encoder: text_encoder_2 is missing, and text_encoder holds a CLIP"):
        read_weights(tmp_path, "t5xxl")
