"""Files that have their weights in fp8 stay so, and give exactly the numbers that they give when they are expanded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.diffusers_flux import diffusers_names
from tests.model.test_scaled_fp8 import STYLES, scaled_file
from trainer.model.packing import image_ids, text_ids
from trainer.model.stored_linear import StoredLinear
from trainer.model.weights import load_flux
from trainer.schema.checkpoint_header import flux_params, read_header
from trainer.schema.options import Options
from trainer.schema.storage import Storage, block_bytes, stored_as

DTYPES = {"plain e4m3": torch.float8_e4m3fn, "plain e5m2": torch.float8_e5m2}


def fp8_file(source: Path, folder: Path, style: str) -> Path:
    """The model at `source` in fp8. The names of `style` are those of `scaled_file`, and some of plain files."""
    if style in STYLES:
        return scaled_file(source, folder / "fp8.safetensors", style)
    tensors, metadata = load_file(source), read_header(source).metadata
    if style == "diffusers":
        hidden = flux_params(read_header(source)).hidden_size
        tensors = {name: tensor.contiguous() for name, tensor in diffusers_names(tensors, hidden).items()}
        save_file(tensors, folder / "plain.safetensors", metadata={"config": metadata["config"]})
        return scaled_file(folder / "plain.safetensors", folder / "fp8.safetensors", "older")
    dtype = DTYPES.get(style, torch.float8_e4m3fn)
    for name, tensor in tensors.items():
        if tensor.dim() == 2 and not (style == "modulation apart" and ("mod.lin" in name or "modulation.lin" in name)):
            tensors[name] = tensor.to(dtype)
    save_file(tensors, folder / "fp8.safetensors", metadata={"config": metadata["config"]})
    return folder / "fp8.safetensors"


@pytest.mark.parametrize("style", [*STYLES, "diffusers", *DTYPES, "modulation apart"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_file_in_fp8_stays_so_and_loses_nothing(golden: Path, tmp_path: Path, style: str, dtype: torch.dtype) -> None:
    path = fp8_file(golden / "model_dev.safetensors", tmp_path, style)
    params = flux_params(read_header(path))
    assert (params.fp8_linears, params.fp8_modulation) == (True, style != "modulation apart")
    assert stored_as(Options.model_validate({}), params) == "fp8"
    kept, expanded = load_flux(path, dtype, "cpu", storage="fp8"), load_flux(path, dtype, "cpu")
    modules = dict(kept.named_modules())
    stored = {f"{name}.weight": part for name, part in modules.items() if isinstance(part, StoredLinear)}
    for name, parameter in expanded.named_parameters():
        found = stored[name].dense_weight(dtype) if name in stored else kept.get_parameter(name)
        assert found.dtype is dtype
        assert torch.equal(found, parameter), name
    for block, expected in zip(
        (kept.double_blocks[0], kept.single_blocks[0]), block_bytes(params, "fp8", 2), strict=True
    ):
        weights = [parameter for name, parameter in block.named_parameters() if name.endswith(("weight", "_scale"))]
        assert sum(weight.nbytes for weight in weights) == expected


def test_of_a_mixed_file_what_is_fp8_stays_so(golden: Path, tmp_path: Path) -> None:
    """Such as files whose first blocks or whose modulation were left in bf16."""
    source, path = golden / "model_dev.safetensors", tmp_path / "mixed.safetensors"
    tensors = load_file(source)
    for number, (name, tensor) in enumerate(sorted(tensors.items())):
        if tensor.dim() == 2:
            tensors[name] = tensor.to((torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)[number % 3])
    save_file(tensors, path, metadata={"config": read_header(source).metadata["config"]})
    assert stored_as(Options.model_validate({}), flux_params(read_header(path))) == "compute", "an upper bound"
    kept, expanded = (load_flux(path, torch.bfloat16, "cpu", storage=storage) for storage in ("file", None))
    stored = {f"{name}.weight": part for name, part in kept.named_modules() if isinstance(part, StoredLinear)}
    is_fp8 = (torch.float8_e4m3fn, torch.float8_e5m2)
    assert stored.keys() == {name for name in tensors if "_blocks." in name and tensors[name].dtype in is_fp8}
    assert any("mod" in name for name in stored)
    for name, parameter in expanded.named_parameters():
        found = stored[name].dense_weight(torch.bfloat16) if name in stored else kept.get_parameter(name)
        assert torch.equal(found, parameter), name


def test_outputs_and_gradients_are_the_same(golden: Path, tmp_path: Path) -> None:
    path = fp8_file(golden / "model_dev.safetensors", tmp_path, "older")
    outputs: list[torch.Tensor] = []
    for storage in ("fp8", None):
        model = load_flux(path, torch.float32, "cpu", storage=storage)
        params = model.params
        generator = torch.Generator().manual_seed(1)
        img = torch.randn(1, 16, params.in_channels, generator=generator, requires_grad=True)
        txt = torch.randn(1, 5, params.context_in_dim, generator=generator)
        vec = torch.randn(1, params.vec_in_dim, generator=generator)
        one = torch.tensor([0.5])
        found = model(img, image_ids(4, 4), txt, text_ids(5), one, vec, one)
        outputs += [found.detach(), *torch.autograd.grad(found.square().sum(), img)]
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[3])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "fp8"),
        ({"base_storage": "compute"}, "compute"),
        ({"base_storage": "nf4"}, "nf4"),
        ({"network_module": "lycoris.kohya"}, "compute"),
        ({"device": "mps"}, "compute"),
        ({"base_weights": ["other.safetensors"]}, "compute"),
        ({"base_weights": ["other.safetensors"], "fp8_base": True}, "fp8"),
    ],
)
def test_what_the_options_leave_open_the_file_decides(
    golden: Path, tmp_path: Path, given: dict[str, object], expected: Storage
) -> None:
    source = golden / "model_dev.safetensors"
    options = Options.model_validate(given)
    assert stored_as(options, flux_params(read_header(fp8_file(source, tmp_path, "older")))) == expected
    if not given:
        assert stored_as(options, flux_params(read_header(source))) == "compute"
