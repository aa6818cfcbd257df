"""Bad input in a process of its own: exit code 2 or 3, before anything heavy loads, with nothing left behind.

The many kinds of it are tested in one process, in `test_wrong_inputs.py`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.runs.commands import run_command, train
from tests.runs.in_process import answer
from tests.tiny import TinyModels, make_tiny_dataset

pytestmark = [pytest.mark.timeout(120), pytest.mark.slow]

Arguments = dict[str, str]


def missing_model(arguments: Arguments, folder: Path) -> None:
    arguments["pretrained_model_name_or_path"] = str(folder / "nowhere.safetensors")


def unknown_dataset_key(arguments: Arguments, folder: Path) -> None:
    config = folder / "dataset.toml"
    config.write_text(config.read_text(encoding="utf-8").replace("num_repeats", "num_repeat"), encoding="utf-8")


@pytest.mark.parametrize(
    ("spoil", "code", "pieces"),
    [
        (missing_model, 3, ["nowhere.safetensors", "does not exist"]),
        (unknown_dataset_key, 2, ["num_repeat", "num_repeats"]),
    ],
)
def test_bad_input_is_named_before_anything_heavy_loads(
    tiny_models: TinyModels,
    tmp_path: Path,
    spoil: Callable[[Arguments, Path], None],
    code: int,
    pieces: list[str],
) -> None:
    config = make_tiny_dataset(tmp_path, count=2)
    arguments = dict(argument.removeprefix("--").split("=", 1) for argument in tiny_models.arguments())
    arguments |= {
        "dataset_config": str(config),
        "output_dir": str(tmp_path / "output"),
        "output_name": "lora",
        "network_module": "networks.lora_flux",
        "max_train_steps": "1",
    }
    spoil(arguments, tmp_path)
    finished = train(*(f"--{name}={value}" for name, value in arguments.items()))
    assert finished.code == code, finished.output
    for piece in pieces:
        assert piece in finished.output
    assert "Traceback" not in finished.output
    assert not (tmp_path / "output").exists() or not list((tmp_path / "output").iterdir())


def test_all_problems_are_reported_together(tiny_models: TinyModels, tmp_path: Path) -> None:
    make_tiny_dataset(tmp_path, count=3)
    for picture in sorted((tmp_path / "images").glob("*.png"))[:2]:
        picture.write_bytes(b"no picture")
    finished = answer(
        *tiny_models.arguments()[1:],
        f"--pretrained_model_name_or_path={tmp_path / 'nowhere.safetensors'}",
        f"--dataset_config={tmp_path / 'dataset.toml'}",
        f"--output_dir={tmp_path / 'output'}",
        "--network_module=networks.lora_flux",
    )
    assert finished.code == 3, finished.output
    assert "nowhere.safetensors" in finished.output
    for picture in sorted((tmp_path / "images").glob("*.png"))[:2]:
        assert picture.name in finished.output


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_folder_without_permission_is_named(tiny_models: TinyModels, tmp_path: Path) -> None:
    config = make_tiny_dataset(tmp_path, count=2)
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    finished = answer(*tiny_models.arguments(), f"--dataset_config={config}", f"--output_dir={locked / 'out'}")
    assert finished.code == 3
    assert "locked" in finished.output


def test_a_wrong_option_is_answered_without_loading_torch() -> None:
    program = """
import runpy, sys
sys.argv = ["flux_train_network.py", "--no_such_option=1"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as ending:
    print("ended with", ending.code, "torch" in sys.modules)
"""
    finished = run_command([sys.executable, "-c", program])
    assert "ended with 2 False" in finished.output, finished.output


def test_a_picture_that_is_larger_than_its_header_says_is_found(tiny_models: TinyModels, tmp_path: Path) -> None:
    """The whole picture is decoded, not only its header."""
    config = make_tiny_dataset(tmp_path, count=2)
    picture = sorted((tmp_path / "images").glob("*.png"))[0]
    Image.new("RGB", (300, 300), "red").save(tmp_path / "whole.jpg", quality=95)
    picture.unlink()
    cut = tmp_path / "images" / "cut.jpg"
    cut.write_bytes((tmp_path / "whole.jpg").read_bytes()[:-200])
    finished = answer(*tiny_models.arguments(), f"--dataset_config={config}", f"--output_dir={tmp_path / 'out'}")
    assert finished.code == 3
    assert "cut.jpg" in finished.output
