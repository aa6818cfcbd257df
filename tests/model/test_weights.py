"""Loading model files: what is accepted, what is refused and how it is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trainer.model.weights import load_autoencoder, load_clip_l, load_flux, load_t5xxl
from trainer.schema.base import UserError

Loader = Callable[[Path, torch.dtype, str], nn.Module]
LOADERS: dict[str, Loader] = {
    "model_dev": load_flux,
    "model_ae": load_autoencoder,
    "model_clip_l": load_clip_l,
    "model_t5xxl": load_t5xxl,
}


def config_of(path: Path) -> dict[str, str]:
    with safe_open(str(path), framework="pt") as file:
        return {"config": file.metadata()["config"]}


def rewritten(source: Path, target: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    """A copy of a model file with changed tensors and the same metadata."""
    save_file(change(load_file(source)), target, metadata=config_of(source))
    return target


@pytest.mark.parametrize("name", LOADERS)
def test_weights_are_frozen_and_equal_to_the_file(golden: Path, name: str) -> None:
    path = golden / f"{name}.safetensors"
    model = LOADERS[name](path, torch.bfloat16, "cpu")
    stored = {key.removeprefix("text_model."): tensor for key, tensor in load_file(path).items()}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for key, parameter in parameters.items():
        assert torch.equal(parameter, stored[key.removeprefix("text_model.")])
        assert not parameter.requires_grad
        assert parameter.data_ptr() % 16 == 0
    assert not model.training
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("name", LOADERS)
def test_weights_are_cast_to_the_type_asked_for(golden: Path, name: str) -> None:
    model = LOADERS[name](golden / f"{name}.safetensors", torch.float32, "cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_plain_fp8_is_cast(golden: Path, tmp_path: Path) -> None:
    source = golden / "model_dev.safetensors"
    path = rewritten(
        source, tmp_path / "fp8.safetensors", lambda tensors: {k: v.to(torch.float8_e4m3fn) for k, v in tensors.items()}
    )
    model = load_flux(path, torch.bfloat16, "cpu")
    expected = load_file(source)["img_in.weight"].to(torch.float8_e4m3fn).to(torch.bfloat16)
    assert torch.equal(model.img_in.weight, expected)


def test_comfyui_prefix_and_foreign_parts_give_the_same_model(golden: Path, tmp_path: Path) -> None:
    source = golden / "model_dev.safetensors"

    def prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        renamed = {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}
        return renamed | {"vae.decoder.conv_in.weight": torch.zeros(2)}

    model = load_flux(rewritten(source, tmp_path / "comfy.safetensors", prefix), torch.bfloat16, "cpu")
    plain = load_flux(source, torch.bfloat16, "cpu").state_dict()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in model.state_dict().items())


def test_single_parameters_can_go_to_another_device(golden: Path) -> None:
    model = load_flux(
        golden / "model_dev.safetensors",
        torch.bfloat16,
        "cpu",
        device_of=lambda name: "meta" if name.startswith("single_blocks.3.") else "cpu",
    )
    assert {name for name, tensor in model.state_dict().items() if tensor.is_meta} == {
        name for name in model.state_dict() if name.startswith("single_blocks.3.")
    }


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda tensors: {k: v for k, v in tensors.items() if k != "txt_in.bias"},
            r"1 tensors are missing \(txt_in.bias",
        ),
        (lambda tensors: tensors | {"extra.weight": torch.zeros(1)}, r"1 tensors do not belong to it \(extra.weight"),
        (
            lambda tensors: tensors | {"double_blocks.1.img_attn.proj.bias": torch.zeros(95)},
            r"double_blocks.1.img_attn.proj.bias \[95\] instead of \[96\]",
        ),
    ],
)
def test_a_file_that_does_not_match_is_refused(
    golden: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], expected: str
) -> None:
    path = rewritten(golden / "model_dev.safetensors", tmp_path / "odd.safetensors", change)
    with pytest.raises(UserError, match=expected) as caught:
        load_flux(path, torch.bfloat16, "cpu")
    assert "FLUX.1 dev" in str(caught.value)
    assert caught.value.exit_code == 3


def test_the_wrong_file_is_named(golden: Path) -> None:
    with pytest.raises(UserError, match="this is a CLIP text encoder"):
        load_t5xxl(golden / "model_clip_l.safetensors", torch.float32, "cpu")
    with pytest.raises(UserError, match=r"this is a FLUX\.1 autoencoder"):
        load_flux(golden / "model_ae.safetensors", torch.float32, "cpu")


def test_a_truncated_file_is_refused(golden: Path, tmp_path: Path) -> None:
    path = tmp_path / "short.safetensors"
    path.write_bytes((golden / "model_ae.safetensors").read_bytes()[:-1000])
    with pytest.raises(UserError, match="not complete"):
        load_autoencoder(path, torch.float32, "cpu")


# ---------------------------------------------------------------------------------------------------- text encoders


@pytest.mark.parametrize("kept", ["shared.weight", "encoder.embed_tokens.weight"])
def test_t5_needs_only_one_of_its_two_embedding_names(golden: Path, tmp_path: Path, kept: str) -> None:
    source = golden / "model_t5xxl.safetensors"
    names = {"shared.weight", "encoder.embed_tokens.weight"} - {kept}
    path = rewritten(
        source, tmp_path / "t5.safetensors", lambda tensors: {k: v for k, v in tensors.items() if k not in names}
    )
    model = load_t5xxl(path, torch.bfloat16, "cpu")
    assert model.shared.weight is model.encoder.embed_tokens.weight
    assert torch.equal(model.shared.weight, load_file(source)["shared.weight"])


def test_clip_files_of_every_transformers_version_load(golden: Path, tmp_path: Path) -> None:
    source = golden / "model_clip_l.safetensors"

    def newer(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}

    def older(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors | {
            "text_model.embeddings.position_ids": torch.arange(77)[None],
            "text_projection.weight": torch.zeros(32, 32),
            "vision_model.post_layernorm.bias": torch.zeros(3),
        }

    plain = load_clip_l(source, torch.float32, "cpu").state_dict()
    for number, change in enumerate((newer, older)):
        path = rewritten(source, tmp_path / f"clip{number}.safetensors", change)
        loaded = load_clip_l(path, torch.float32, "cpu").state_dict()
        assert loaded.keys() == plain.keys()
        assert all(torch.equal(tensor, plain[name]) for name, tensor in loaded.items())


def test_metadata_of_the_file_decides_what_shapes_do_not_show(golden: Path, tmp_path: Path) -> None:
    source = golden / "model_clip_l.safetensors"
    config = json.loads(config_of(source)["config"]) | {"num_attention_heads": 8}
    path = tmp_path / "clip.safetensors"
    save_file(load_file(source), path, metadata={"config": json.dumps(config)})
    assert load_clip_l(path, torch.float32, "cpu").config.num_attention_heads == 8
