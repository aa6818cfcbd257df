"""Automatic captions from the page's side: a real worker with a tiny model, and its undo."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from PIL import Image

from fluxgui.caption_jobs import caption_job, keep_for_undo, start_captions
from fluxgui.dataset_history import next_undo, undo
from fluxgui.datasets import Dataset, create_dataset
from fluxgui.jobs import JobView
from tests.tools.tiny_captioners import make_tiny_florence
from trainer.schema.base import UserError


@pytest.fixture
def cats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    monkeypatch.setenv("FLUXGUI_HOME", str(tmp_path / "data"))
    dataset = create_dataset("cats")
    for number, stem in enumerate(("a", "b")):
        Image.new("RGB", (50, 40), (90 * number, 40, 90)).save(dataset.path / f"{stem}.png")
    (dataset.path / "b.txt").write_bytes(b"caf\xe9")
    return dataset


def ended(dataset: Dataset) -> JobView:
    end = time.monotonic() + 100
    while (view := caption_job(dataset)) is None or view.is_live:
        assert time.monotonic() < end
        time.sleep(0.2)
    return view


def test_what_the_worker_wrote_is_undone_byte_by_byte(cats: Dataset, tmp_path: Path) -> None:
    model = make_tiny_florence(tmp_path / "model")
    start_captions(cats, model=str(model), mode="overwrite", prompt="")
    with pytest.raises(UserError, match="already"):
        start_captions(cats, model=str(model), mode="missing", prompt="")
    view = ended(cats)
    assert (view.state, view.error) == ("completed", "")
    assert (view.done, view.total) == (2, 2)
    assert keep_for_undo(cats, view) == 2
    assert keep_for_undo(cats, view) == 0, "once only"
    assert (cats.path / "a.txt").exists()
    assert next_undo(cats) == "automatic captions"
    undone = undo(cats)
    assert undone is not None
    assert (undone.num_files, undone.left_alone) == (2, ())
    assert not (cats.path / "a.txt").exists()
    assert (cats.path / "b.txt").read_bytes() == b"caf\xe9"


def test_no_model_is_an_error_at_once(cats: Dataset) -> None:
    with pytest.raises(UserError, match="no model"):
        start_captions(cats, model=" ", mode="missing", prompt="")
    assert caption_job(cats) is None
