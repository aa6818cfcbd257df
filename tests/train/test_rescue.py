"""Where a finished LoRA goes when its folder does not take it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from trainer.schema.base import UserError
from trainer.train.checkpoint import save_lora
from trainer.train.rescue import save_or_rescue


def save_into(folder: Path) -> None:
    save_lora(folder / "lora.safetensors", {"weight": torch.ones(2)}, {})


@pytest.fixture
def unusable(tmp_path: Path) -> Path:
    """A file where a folder should be: nobody can write into it."""
    path = tmp_path / "output"
    path.write_text("")
    return path


def test_a_folder_that_takes_the_file_is_the_only_one_written_to(tmp_path: Path) -> None:
    save_or_rescue(save_into, tmp_path / "output", [tmp_path / "elsewhere"])
    assert [path.name for path in tmp_path.iterdir()] == ["output"]


def test_what_the_folder_refuses_is_saved_elsewhere_and_still_an_error(unusable: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written") as error:
        save_or_rescue(save_into, unusable, [unusable / "inside", tmp_path / "elsewhere"])
    assert str(tmp_path / "elsewhere") in str(error.value)
    assert error.value.exit_code == 3
    assert load_file(tmp_path / "elsewhere" / "lora.safetensors")["weight"].tolist() == [1.0, 1.0]


def test_when_no_place_takes_it_the_first_reason_is_given(unusable: Path) -> None:
    with pytest.raises(UserError, match="cannot be written") as error:
        save_or_rescue(save_into, unusable, [unusable / "inside"])
    assert error.value.problems[0].where == str(unusable)
