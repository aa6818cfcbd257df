"""Weights stored as 8-bit numbers, plain and with scales: what is loaded is number times scale."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.diffusers_flux import diffusers_names
from trainer.model.t5_as_stored import load_t5xxl_as_stored
from trainer.model.weights import load_clip_l, load_flux, load_t5xxl
from trainer.schema.checkpoint_header import read_header


def quantise(weight: Tensor, dtype: torch.dtype, *, by_row: bool = False) -> tuple[Tensor, Tensor]:
    """Stored numbers and scale by the published rule: the largest number takes the type's largest."""
    largest = weight.float().abs().amax(dim=1, keepdim=True) if by_row else weight.float().abs().max()
    scale = largest / torch.finfo(dtype).max
    return (weight.float() / scale).to(dtype), scale


def scaled(tensors: dict[str, Tensor], style: str) -> Iterator[tuple[str, Tensor]]:
    dtype = torch.float8_e5m2 if style == "older e5m2" else torch.float8_e4m3fn
    for name, tensor in tensors.items():
        is_linear = name.endswith(".weight") and tensor.dim() == 2 and "embed" not in name and "shared" not in name
        if not is_linear or "relative_attention_bias" in name:
            yield name, tensor
            continue
        layer = name.removesuffix(".weight")
        stored, scale = quantise(tensor, dtype, by_row=style == "by row")
        if style.startswith("older"):
            yield f"{layer}.scale_weight", scale
            yield f"{layer}.scale_input", torch.tensor(1.0)
        else:
            yield f"{layer}.weight_scale", scale
            text = json.dumps({"format": "float8_e4m3fn"}).encode()
            if style != "metadata":
                yield f"{layer}.comfy_quant", torch.tensor(list(text), dtype=torch.uint8)
        yield name, stored.view(torch.uint8) if style == "bytes" else stored
    if style.startswith("older"):
        yield "scaled_fp8", torch.empty(0, dtype=dtype)


def scaled_file(source: Path, target: Path, style: str, prefix: str = "") -> Path:
    tensors = dict(scaled(load_file(source), style))
    metadata = {"config": read_header(source).metadata["config"]}
    if style == "metadata":
        layers = {
            name.removesuffix(".weight_scale"): {"format": "float8_e4m3fn"}
            for name in tensors
            if name.endswith(".weight_scale")
        }
        metadata["_quantization_metadata"] = json.dumps({"format_version": "1.0", "layers": layers})
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, target, metadata=metadata)
    return target


STYLES = ["older", "older e5m2", "marked", "metadata", "bytes", "by row"]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_scaled_fp8_weights_are_their_numbers_times_their_scale(
    golden: Path, tmp_path: Path, style: str, prefix: str
) -> None:
    source = golden / "model_dev.safetensors"
    model = load_flux(scaled_file(source, tmp_path / "a.safetensors", style, prefix), torch.float32, "cpu")
    plain = load_file(source)
    dtype = torch.float8_e5m2 if style == "older e5m2" else torch.float8_e4m3fn
    for name, parameter in model.state_dict().items():
        expected = plain[name].float()
        if expected.dim() == 2:
            stored, scale = quantise(plain[name], dtype, by_row=style == "by row")
            # Three (two) bits of mantissa: at most 1/16 (1/8) of a number is lost, and nothing but rounding.
            bound = 0.126 if dtype is torch.float8_e5m2 else 0.0626
            assert ((stored.float() * scale - expected).abs() <= bound * expected.abs() + scale / 100).all()
            expected = stored.float() * scale
        assert torch.equal(parameter, expected), name


@pytest.mark.parametrize(
    ("name", "load"),
    [("model_t5xxl", load_t5xxl), ("model_clip_l", load_clip_l)],
)
@pytest.mark.parametrize("style", ["older", "marked"])
def test_scaled_fp8_text_encoders_load(
    golden: Path, tmp_path: Path, name: str, load: Callable[..., nn.Module], style: str
) -> None:
    source = golden / f"{name}.safetensors"
    loaded = load(scaled_file(source, tmp_path / "a.safetensors", style), torch.float32, "cpu").state_dict()
    expected = cast("dict[str, Tensor]", load(source, torch.float32, "cpu").state_dict())
    assert loaded.keys() == expected.keys()
    for key, tensor in loaded.items():
        scale = expected[key].abs().max() / 448
        torch.testing.assert_close(tensor, expected[key], rtol=0.0626, atol=float(scale))


def test_scales_of_a_diffusers_file_belong_to_each_part_of_a_fused_layer(golden: Path, tmp_path: Path) -> None:
    source = golden / "model_dev.safetensors"
    plain = load_flux(source, torch.bfloat16, "cpu")
    tensors = {
        name: tensor.contiguous()
        for name, tensor in diffusers_names(plain.state_dict(), plain.params.hidden_size).items()
    }
    # Very different sizes: with another part's scale the values would be far off.
    tensors["transformer_blocks.0.attn.to_k.weight"] *= 64
    save_file(tensors, tmp_path / "plain.safetensors", metadata={"config": read_header(source).metadata["config"]})
    path = scaled_file(tmp_path / "plain.safetensors", tmp_path / "scaled.safetensors", "older")
    loaded = load_flux(path, torch.float32, "cpu").state_dict()
    expected = load_flux(tmp_path / "plain.safetensors", torch.float32, "cpu").state_dict()
    for key in ("double_blocks.0.img_attn.qkv.weight", "final_layer.adaLN_modulation.1.weight"):
        torch.testing.assert_close(loaded[key], expected[key], rtol=0.0626, atol=2e-2 if "qkv" in key else 1e-3)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_plain_fp8_of_both_kinds_is_cast(golden: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    source = golden / "model_t5xxl.safetensors"
    plain = load_file(source)
    metadata = {"config": read_header(source).metadata["config"]}
    save_file({name: tensor.to(dtype) for name, tensor in plain.items()}, tmp_path / "a.safetensors", metadata=metadata)
    for name, tensor in load_t5xxl(tmp_path / "a.safetensors", torch.bfloat16, "cpu").state_dict().items():
        assert torch.equal(tensor, plain[name].to(dtype).to(torch.bfloat16))


@pytest.mark.parametrize("style", [*STYLES, "plain e5m2", "fp16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_t5_as_stored_gives_what_t5_gives_and_takes_the_files_size(
    golden: Path, tmp_path: Path, style: str, dtype: torch.dtype
) -> None:
    source, path = golden / "model_t5xxl.safetensors", tmp_path / "t5.safetensors"
    if style in ("plain e5m2", "fp16"):
        stored_type = torch.float8_e5m2 if style == "plain e5m2" else torch.float16
        tensors = {name: tensor.to(stored_type) for name, tensor in load_file(source).items()}
        save_file(tensors, path, metadata={"config": read_header(source).metadata["config"]})
    else:
        scaled_file(source, path, style)
    whole, narrow = load_t5xxl(path, dtype, "cpu"), load_t5xxl_as_stored(path, dtype)
    is_narrower = style != "fp16" or dtype is torch.float32
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(narrow(input_ids=ids)[0], whole(input_ids=ids)[0])
            kept = sum(p.numel() for p in narrow.encoder.block.parameters() if p.dim() == 2)
            dense = sum(p.numel() for p in whole.encoder.block.parameters() if p.dim() == 2)
            assert kept < 0.1 * dense if is_narrower else kept == dense, "between two uses the blocks hold no weights"
