"""Names, retention, and files that appear whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from trainer.schema.base import UserError
from trainer.train.checkpoint import (
    checkpoint_name,
    remove_superseded,
    save_dtype,
    save_lora,
    superseded_number,
    write_file,
)

if sys.platform != "win32":
    import resource


def lora_state(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "lora_unet_single_blocks_0_linear1.lora_down.weight": torch.randn(4, 64, generator=generator).to(dtype),
        "lora_unet_single_blocks_0_linear1.lora_up.weight": torch.randn(96, 4, generator=generator).to(dtype),
        "lora_unet_single_blocks_0_linear1.alpha": torch.tensor(1),
    }


@pytest.mark.parametrize(
    ("kind", "number", "named", "unnamed"),
    [
        ("step", 100, "cat-step00000100.safetensors", "at-step00000100.safetensors"),
        ("epoch", 2, "cat-000002.safetensors", "epoch-000002.safetensors"),
        ("final", 0, "cat.safetensors", "last.safetensors"),
    ],
)
def test_names_are_the_references(kind: str, number: int, named: str, unnamed: str) -> None:
    assert kind in ("step", "epoch", "final")
    assert checkpoint_name("cat", kind, number) == named
    assert checkpoint_name(None, kind, number) == unnamed


def test_a_saved_lora_loads_with_its_tensors_types_and_metadata(tmp_path: Path) -> None:
    path, state = tmp_path / "new folder" / "cat.safetensors", lora_state()
    metadata = {"ss_steps": "20", "modelspec.title": 'Kätzchen \u2028 \\ "quoted"', "ss_training_comment": "猫"}
    save_lora(path, state, metadata)
    loaded = load_file(path)
    assert loaded.keys() == state.keys()
    for name, tensor in state.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    with safe_open(path, "pt") as file:
        stored = file.metadata()
    assert {key: stored[key] for key in metadata} == metadata
    assert stored.keys() - metadata.keys() == {"sshs_model_hash", "sshs_legacy_hash"}
    assert [entry.name for entry in path.parent.iterdir()] == ["cat.safetensors"]


@pytest.mark.parametrize("title_length", range(8))
def test_tensor_data_is_aligned_and_the_model_hash_is_its_own(tmp_path: Path, title_length: int) -> None:
    path = tmp_path / "cat.safetensors"
    save_lora(path, lora_state(), {"ss_steps": "20", "modelspec.title": "c" * title_length})
    content = path.read_bytes()
    data_start = 8 + int.from_bytes(content[:8], "little")
    assert data_start % 8 == 0
    stored = json.loads(content[8:data_start])["__metadata__"]
    assert stored["sshs_model_hash"] == hashlib.sha256(content[data_start:]).hexdigest()


def test_a_reference_file_saved_again_gets_the_references_hashes(tmp_path: Path, golden: Path) -> None:
    source, copy = golden / "e2e_lora_tiny_bf16.safetensors", tmp_path / "copy.safetensors"
    with safe_open(source, "pt") as file:
        recorded = file.metadata()
    save_lora(copy, load_file(source), {key: value for key, value in recorded.items() if "sshs" not in key})
    with safe_open(copy, "pt") as file:
        assert file.metadata() == recorded


def test_tensors_that_need_a_gradient_or_are_views_are_saved(tmp_path: Path) -> None:
    weight = torch.randn(8, 4, requires_grad=True)
    save_lora(tmp_path / "a.safetensors", {"whole": weight, "turned": weight.T}, {})
    loaded = load_file(tmp_path / "a.safetensors")
    assert torch.equal(loaded["turned"], weight.detach().T)


def test_saving_replaces_the_file_of_an_earlier_run(tmp_path: Path) -> None:
    path = tmp_path / "cat.safetensors"
    path.write_bytes(b"old")
    save_lora(path, lora_state(), {})
    assert load_file(path).keys() == lora_state().keys()


@contextmanager
def largest_file(num_bytes: int) -> Generator[None]:
    """The system refuses to let any file of this process grow beyond `num_bytes`, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on the size of files")
def test_a_disk_that_refuses_the_file_leaves_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "cat.safetensors"
    path.write_bytes(b"old")
    with largest_file(512), pytest.raises(UserError, match=r"the disk is full: cat\.safetensors needs") as caught:
        save_lora(path, lora_state(), {})
    assert caught.value.exit_code == 3
    assert str(tmp_path) in str(caught.value)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["cat.safetensors"]


def test_a_disk_that_turns_out_full_at_the_end_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(UserError, match="the disk is full"):
        save_lora(tmp_path / "cat.safetensors", lora_state(), {})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="cannot be written") as caught:
        write_file(tmp_path / "file" / "cat.safetensors", b"content")
    assert caught.value.problems[0].where == str(tmp_path / "file")


def test_saved_precision_names_a_type_and_none_keeps_the_trained_one() -> None:
    assert [save_dtype(name) for name in ("float", "fp16", "bf16", None)] == [
        torch.float32,
        torch.float16,
        torch.bfloat16,
        None,
    ]


def test_epochs_are_kept_by_their_distance() -> None:
    assert superseded_number("epoch", 10, every=2, keep_last=3) == 4
    assert superseded_number("epoch", 4, every=2, keep_last=3) is None
    assert superseded_number("epoch", 10, every=None, keep_last=3) is None
    assert superseded_number("epoch", 10, every=2, keep_last=None) is None


def test_steps_are_kept_by_their_distance_rounded_to_a_save() -> None:
    # 1000 - 200 - 1 = 799, so that 800 is still there.
    assert superseded_number("step", 1000, every=100, keep_last=200) == 700
    assert superseded_number("step", 1000, every=100, keep_last=150) == 800
    assert superseded_number("step", 100, every=100, keep_last=150) is None
    assert superseded_number("final", 1000, every=100, keep_last=150) is None


def test_saving_every_epoch_leaves_the_last_ones(tmp_path: Path) -> None:
    warnings: list[str] = []
    for epoch in range(1, 7):
        write_file(tmp_path / checkpoint_name("cat", "epoch", epoch), b"lora")
        remove_superseded(tmp_path, "cat", "epoch", epoch, every=1, keep_last=2, warn=warnings.append)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["cat-000005.safetensors", "cat-000006.safetensors"]
    assert warnings == []


def test_files_of_other_settings_and_of_a_stop_go_when_they_are_as_old(tmp_path: Path) -> None:
    for step in (30, 37, 50, 60, 100):
        write_file(tmp_path / checkpoint_name("cat", "step", step), b"lora")
    others = ["cat2-step00000030.safetensors", "cat-000001.safetensors", "cat.safetensors", "cat-step00000030-state"]
    for name in others:
        write_file(tmp_path / name, b"other")
    removed = remove_superseded(tmp_path, "cat", "step", 100, every=20, keep_last=30, warn=pytest.fail, spare={37})
    # 100 - 30 - 1 = 69, down to a save: 60.
    assert [path.name for path in removed] == [checkpoint_name("cat", "step", step) for step in (30, 50, 60)]
    kept = [checkpoint_name("cat", "step", step) for step in (37, 100)]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted([*kept, *others])


def test_an_old_file_that_cannot_be_removed_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / checkpoint_name("cat", "epoch", 1)).mkdir()
    warnings: list[str] = []
    removed = remove_superseded(tmp_path, "cat", "epoch", 2, every=1, keep_last=1, warn=warnings.append)
    assert removed == []
    assert len(warnings) == 1
    assert "cat-000001.safetensors could not be removed" in warnings[0]
