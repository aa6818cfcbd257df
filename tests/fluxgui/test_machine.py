"""What is said about this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import fluxgui.machine
from fluxgui.launch import main
from fluxgui.machine import GIB, Device, about, examine
from trainer.schema.settings import change_settings


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # pyright: ignore[reportUnusedFunction]
    monkeypatch.setenv("FLUXGUI_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("fluxgui.language._chosen", ["en"])


@pytest.fixture
def old_card(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine with a GPU as its driver describes it; this one has none."""
    card = Device("NVIDIA GeForce GTX 1060", 6 * GIB, 1 * GIB)
    monkeypatch.setattr(fluxgui.machine, "nvidia_devices", lambda: ("470.57", [card]))
    monkeypatch.setattr(fluxgui.machine, "installed", lambda package: "2.13.0+cpu" if package == "torch" else "1.0")
    return iter(())


def test_a_card_that_cannot_train_is_told_with_remedies(old_card: object) -> None:
    found = {finding.text: finding for finding in examine()}
    for text in (
        "PyTorch 2.13.0+cpu cannot use the GPU",
        "The driver 470.57 is too old for this PyTorch",
        "The GPU has 6.0 GB, less than FLUX.1 needs",
        "Other programs hold 5.0 GB of the GPU's memory",
    ):
        assert found[text].verdict != "good"
        assert found[text].remedy
    assert dict(about())["Device"] == "NVIDIA GeForce GTX 1060 6.0 GB, 1.0 GB free"


def test_a_folder_that_cannot_be_written_to_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    change_settings(runs_dir=tmp_path / "file" / "runs")
    assert main(["--doctor"]) == 3
    written = capsys.readouterr().out
    assert f"WRONG  {tmp_path / 'file' / 'runs'} cannot be written to" in written
    assert "ok     All packages are there" in written
