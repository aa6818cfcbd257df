"""The stored form of a model on disk: the same weights at the second start, whatever happened to the file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainer.model.storage_cache import StorageCache
from trainer.model.stored_linear import PackedStorage, StoredLinear
from trainer.model.weights import load_flux
from trainer.schema.safetensors_header import read_header
from trainer.tools.tiny_models import make_flux


@pytest.fixture
def flux_file(tmp_path: Path) -> Path:
    return make_flux(tmp_path / "flux.safetensors", hidden=32, heads=2, depth=2, depth_single=2)


class Loads:
    """Loads of one model with one folder, each with what was told."""

    def __init__(self, flux_file: Path, folder: Path) -> None:
        self.flux_file, self.folder = flux_file, folder

    def __call__(self, storage: PackedStorage = "fp8", identity: tuple[str, ...] = ()) -> tuple[list[Tensor], str]:
        told: list[str] = []
        cache = StorageCache(self.folder, identity, told.append)
        model = load_flux(self.flux_file, torch.float32, "cpu", storage=storage, cache=cache)
        assert any(isinstance(module, StoredLinear) for module in model.modules())
        assert not list(self.folder.glob(".*")), "nothing half written is left"
        return [parameter.detach() for parameter in model.parameters()], "\n".join(told)

    @property
    def files(self) -> list[Path]:
        return sorted(self.folder.glob("*.safetensors"))


@pytest.fixture
def loads(flux_file: Path, tmp_path: Path) -> Loads:
    return Loads(flux_file, tmp_path / "kept")


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(
        torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
        for one, other in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("storage", ["fp8", "int8", "nf4"])
def test_the_second_start_reads_what_the_first_has_made(
    loads: Loads, storage: PackedStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, told = loads(storage)
    assert "is kept in" in told
    assert len(loads.files) == 1

    def never(_self: StoredLinear, _weight: Tensor) -> tuple[Tensor, Tensor]:
        raise AssertionError("nothing has to be stored again")

    monkeypatch.setattr(StoredLinear, "pack", never)
    read, told = loads(storage)
    assert "is read from" in told
    assert "kept" not in told.replace(str(loads.folder), "")
    assert same(made, read)


def test_a_model_in_the_other_fp8_type_is_kept_as_it_is(loads: Loads) -> None:
    header = read_header(loads.flux_file)
    weights = {name: tensor.to(torch.float8_e5m2) for name, tensor in load_file(loads.flux_file).items()}
    save_file(weights, loads.flux_file, metadata=dict(header.metadata))
    made, told = loads()
    assert "is kept in" in told
    assert any(tensor.dtype is torch.float8_e5m2 for tensor in made)
    read, told = loads()
    assert "is read from" in told
    assert "damaged" not in told
    assert same(made, read)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1000] ^= 4
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def no_header(path: Path) -> None:
    path.write_bytes(b"\x08\0\0\0\0\0\0\0nonsense" + path.read_bytes()[16:])


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, empty, no_header])
def test_a_damaged_file_is_made_again(loads: Loads, damage: Callable[[Path], None]) -> None:
    made, _ = loads()
    (file,) = loads.files
    whole = file.read_bytes()
    damage(file)
    again, told = loads()
    assert "is damaged and is made again" in told
    assert same(made, again)
    assert file.read_bytes() == whole
    assert "is damaged" not in loads()[1]


def test_another_model_storage_or_merged_lora_is_another_file(loads: Loads) -> None:
    loads()
    loads("int8")
    loads(identity=("a LoRA", "0.5"))
    assert len(loads.files) == 3
    os.utime(loads.flux_file, ns=(1, 1))
    loads()
    assert len(loads.files) == 4


def test_a_folder_that_cannot_be_made_costs_a_line(loads: Loads) -> None:
    loads.folder.write_text("a file")
    weights, told = loads()
    assert "is not kept" in told
    assert weights
