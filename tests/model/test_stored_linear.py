"""Frozen weights in fewer bits: how near the numbers are, what backward keeps, and how files get there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import bitsandbytes.functional
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.model.test_scaled_fp8 import scaled_file
from trainer.model.chroma import Chroma
from trainer.model.flux import Flux
from trainer.model.packing import image_ids, text_ids
from trainer.model.stored_linear import PackedStorage, StoredLinear
from trainer.model.transformer import load_transformer
from trainer.model.weights import load_flux
from trainer.schema.checkpoint_header import FluxParams, read_header
from trainer.schema.storage import linear_bytes, stored_shapes
from trainer.tools.tiny_chroma import make_chroma
from trainer.tools.tiny_models import make_flux

STORAGES: tuple[PackedStorage, ...] = ("fp8", "int8", "nf4")
# Relative errors of normally distributed weights: a float with 3 bits behind the point is off by 2^-4 at most, and by
# 0.026 in the mean square; 8 bit of a row's range, and the 4-bit numbers, by what they are spaced.
WEIGHT_ERROR: Mapping[PackedStorage, float] = {"fp8": 0.028, "int8": 0.012, "nf4": 0.095}
OUTPUT_ERROR: Mapping[PackedStorage, float] = {"fp8": 0.05, "int8": 0.02, "nf4": 0.16}
"""Bounds of the relative error (root mean square) of the tiny model's output."""


@pytest.fixture(scope="module")
def flux_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_flux(tmp_path_factory.mktemp("flux") / "flux.safetensors", hidden=96, heads=4, depth=3, depth_single=6)


@pytest.fixture(scope="module")
def chroma_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chroma(tmp_path_factory.mktemp("chroma") / "chroma.safetensors")


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def stored(storage: PackedStorage, weight: Tensor, bias: Tensor | None = None) -> StoredLinear:
    linear = StoredLinear(weight.shape[1], weight.shape[0], bias=bias is not None, storage=storage)
    linear.set_stored(*linear.pack(weight))
    if bias is not None:
        linear.bias = torch.nn.Parameter(bias, requires_grad=False)
    return linear


def weight_of(rows: int, columns: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-4, 1, rows)[:, None]
    return sizes * torch.randn(rows, columns, generator=generator)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("shape", [(64, 128), (5, 7), (3, 1), (1, 130)])
def test_bytes_are_those_of_the_arithmetic(storage: PackedStorage, shape: tuple[int, int]) -> None:
    linear = stored(storage, weight_of(*shape))
    assert linear.weight.nbytes + linear.weight_scale.nbytes == linear_bytes(shape, storage, 4)
    assert linear.dense_weight(torch.float32).shape == shape


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_come_back_within_the_forms_precision(storage: PackedStorage, dtype: torch.dtype) -> None:
    weight = weight_of(96, 256)
    dense = stored(storage, weight).dense_weight(dtype)
    assert dense.dtype is dtype
    for row, expected in zip(dense, weight, strict=True):
        assert error(row, expected) < 1.35 * WEIGHT_ERROR[storage]
    assert error(dense, weight) < 1.1 * WEIGHT_ERROR[storage]


@pytest.mark.parametrize("storage", STORAGES)
def test_a_row_of_zeros_stays_zeros(storage: PackedStorage) -> None:
    weight = weight_of(4, 64)
    weight[2] = 0
    dense = stored(storage, weight).dense_weight(torch.float32)
    assert torch.equal(dense[2], torch.zeros(64))
    assert dense.isfinite().all()


def test_weights_made_of_fp8_numbers_come_back_exactly() -> None:
    weight = weight_of(64, 128).clamp(-400, 400).to(torch.float8_e4m3fn).float()
    linear = stored("fp8", weight)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(linear.dense_weight(dtype).float(), weight)


def test_fp8_uses_the_types_whole_range() -> None:
    largest = stored("fp8", weight_of(64, 128)).weight.float().abs().amax(dim=1)
    assert ((largest > 208) & (largest <= 448)).all()


def test_int8_gives_the_numbers_of_bitsandbytes() -> None:
    weight = weight_of(32, 64).half()
    theirs, statistics, _ = bitsandbytes.functional.int8_vectorwise_quant(weight)
    linear = stored("int8", weight.float())
    torch.testing.assert_close(linear.weight_scale.data * 127, statistics)
    assert (linear.weight.int() - theirs.int()).abs().max() <= 1  # theirs rounds halves in half precision


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_step_is_that_of_the_dense_weight_and_keeps_no_copy_of_it(storage: PackedStorage, autocast: bool) -> None:
    linear = stored(storage, weight_of(24, 64), torch.randn(24, generator=torch.Generator().manual_seed(2)))
    dense = torch.nn.Linear(64, 24)
    dense.weight.data, dense.bias.data = linear.dense_weight(torch.float32), linear.bias.data
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    results: list[tuple[Tensor, Tensor]] = []
    for module in (linear, dense.requires_grad_(False)):
        x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(3)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if module is linear:
                with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                    output = module(x)
            else:
                output = module(x)
        output.float().square().sum().backward()
        results.append((output, cast("Tensor", x.grad)))
    assert not kept
    for found, expected in zip(*results, strict=True):
        assert found.dtype is expected.dtype
        torch.testing.assert_close(found, expected, atol=2e-2 if autocast else 1e-4, rtol=2e-2 if autocast else 1e-5)


def output_of(model: Flux | Chroma) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    params = model.params
    given = [
        torch.randn(2, 16, params.in_channels, generator=generator),
        image_ids(4, 4),
        torch.randn(2, 6, params.context_in_dim, generator=generator),
        text_ids(6),
        torch.tensor([0.6, 0.2]),
    ]
    if isinstance(params, FluxParams):
        given += [torch.randn(2, params.vec_in_dim, generator=generator), torch.tensor([1.0, 3.5])]
        return model(*given)
    return model(*given, torch.zeros(2))


@pytest.mark.parametrize("storage", STORAGES)
def test_the_models_output_is_near_that_of_whole_weights(flux_file: Path, storage: PackedStorage) -> None:
    with torch.no_grad():
        expected = output_of(load_flux(flux_file, torch.float32, "cpu"))
        model = load_flux(flux_file, torch.float32, "cpu", storage=storage)
        found = error(output_of(model), expected)
    assert 0.0005 < found < OUTPUT_ERROR[storage]


@pytest.mark.parametrize("storage", STORAGES)
def test_chroma_too(chroma_file: Path, storage: PackedStorage) -> None:
    with torch.no_grad():
        expected = output_of(load_transformer(chroma_file, "chroma", torch.float32, "cpu"))
        model = load_transformer(chroma_file, "chroma", torch.float32, "cpu", storage=storage)
        assert 0.0001 < error(output_of(model), expected) < OUTPUT_ERROR[storage]


@pytest.mark.parametrize("storage", STORAGES)
def test_only_the_blocks_linears_without_modulation_are_stored(flux_file: Path, storage: PackedStorage) -> None:
    plain = load_flux(flux_file, torch.bfloat16, "cpu")
    model = load_flux(flux_file, torch.bfloat16, "cpu", storage=storage)
    names = {name for name, module in model.named_modules() if isinstance(module, StoredLinear)}
    params = model.params
    double, single = stored_shapes(params)
    assert len(names) == params.depth * len(double) + params.depth_single_blocks * len(single)
    for name, module in plain.named_modules():
        if name not in names:
            other = model.get_submodule(name)
            for own, parameter in module.named_parameters(recurse=False):
                assert torch.equal(parameter, other.get_parameter(own)), name
        else:
            assert module.get_parameter("bias").dtype is torch.bfloat16
    expected = sum(linear_bytes(shape, storage, 2) for shape in double) * params.depth
    expected += sum(linear_bytes(shape, storage, 2) for shape in single) * params.depth_single_blocks
    linears = [cast("StoredLinear", model.get_submodule(name)) for name in names]
    assert sum(linear.weight.nbytes + linear.weight_scale.nbytes for linear in linears) == expected


def test_a_plain_fp8_file_keeps_its_own_numbers(flux_file: Path, tmp_path: Path) -> None:
    tensors = {key: tensor.float().to(torch.float8_e4m3fn) for key, tensor in load_file(flux_file).items()}
    path = tmp_path / "fp8.safetensors"
    save_file(tensors, path, {"config": read_header(flux_file).metadata["config"]})
    model = load_flux(path, torch.float32, "cpu", storage="fp8")
    for name, module in model.named_modules():
        if isinstance(module, StoredLinear):
            assert torch.equal(module.weight.view(torch.uint8), tensors[f"{name}.weight"].view(torch.uint8))
            assert (module.weight_scale == 1).all()
    with torch.no_grad():
        assert torch.equal(output_of(model), output_of(load_flux(path, torch.float32, "cpu")))


@pytest.mark.parametrize("style", ["older", "metadata", "bytes", "by row"])
def test_a_scaled_fp8_file_keeps_numbers_and_scales(golden: Path, tmp_path: Path, style: str) -> None:
    path = scaled_file(golden / "model_dev.safetensors", tmp_path / "a.safetensors", style)
    with torch.no_grad():
        expected = load_flux(path, torch.float32, "cpu")
        model = load_flux(path, torch.float32, "cpu", storage="fp8")
        for name, module in model.named_modules():
            if isinstance(module, StoredLinear):
                dense = expected.get_submodule(name).get_parameter("weight")
                assert torch.equal(module.dense_weight(torch.float32), dense)
        assert torch.equal(output_of(model), output_of(expected))
