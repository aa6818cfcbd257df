"""Automatic captions: the command with real models of transformers whose few weights are random."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import cast

import pytest
from PIL import Image

from tests.tools.tiny_captioners import WORDS, make_tiny_florence, make_tiny_vision_encoder_decoder
from trainer.schema.base import UserError
from trainer.tools.caption import main


@pytest.fixture(scope="module")
def florence(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_florence(tmp_path_factory.mktemp("florence"))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, name in enumerate(("a.png", "b.jpg", "c.webp")):
        Image.new("RGB", (60 + number, 40), (80 * number, 30, 200)).save(folder / name)
    (folder / "b.txt").write_text("kept", encoding="utf-8")
    (folder / "c.txt").write_text(" \n", encoding="utf-8")
    return folder


def caption(model: Path | str, folder: Path, *more: str) -> int:
    return main([f"--model={model}", f"--image_dir={folder}", "--device=cpu", "--max_tokens=6", *more])


def text(folder: Path, stem: str) -> str:
    return (folder / f"{stem}.txt").read_text(encoding="utf-8")


def events(job: Path, kind: str) -> list[dict[str, object]]:
    lines = (job / "events.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for line in lines if (event := cast("dict[str, object]", json.loads(line)))["kind"] == kind]


def test_only_missing_captions_are_written(florence: Path, pictures: Path, tmp_path: Path) -> None:
    job = tmp_path / "job"
    job.mkdir()
    assert caption(florence, pictures, f"--job_dir={job}") == 0
    assert text(pictures, "b") == "kept"
    for stem in ("a", "c"):
        assert set(text(pictures, stem).split()) <= set(WORDS)
        assert text(pictures, stem)
    written = events(job, "result")
    assert [event["image"] for event in written] == ["a.png", "c.webp"]
    assert [event["after"] for event in written] == [text(pictures, "a"), text(pictures, "c")]
    assert written[0]["before"] is None
    assert base64.b64decode(str(written[1]["before"])) == b" \n"
    assert events(job, "progress")[-1]["done"] == 2
    assert events(job, "finished")[0]["outcome"] == "completed"
    assert not list(pictures.glob(".*"))


def test_captions_are_overwritten_or_continued(florence: Path, pictures: Path, tmp_path: Path) -> None:
    wanted = tmp_path / "wanted.txt"
    wanted.write_text("b.jpg\n", encoding="utf-8")
    assert caption(florence, pictures, "--mode=overwrite", f"--pictures={wanted}") == 0
    assert text(pictures, "b") != "kept"
    assert not (pictures / "a.txt").exists(), "only the named pictures are touched"
    assert caption(florence, pictures, "--mode=overwrite") == 0
    said = text(pictures, "b")
    assert said
    assert said != "kept"
    (pictures / "b.txt").write_text("kept", encoding="utf-8")
    assert caption(florence, pictures, "--mode=append") == 0
    assert text(pictures, "b") == f"kept, {said}", "the same picture and no chance: the same answer"


def test_a_cancelled_job_keeps_what_it_wrote(florence: Path, pictures: Path, tmp_path: Path) -> None:
    job = tmp_path / "job"
    job.mkdir()
    (job / "cancel").touch()
    assert caption(florence, pictures, f"--job_dir={job}") == 130
    assert not (pictures / "a.txt").exists()
    assert events(job, "finished")[0]["outcome"] == "cancelled"


def test_a_broken_picture_is_named_and_left_out(florence: Path, pictures: Path, tmp_path: Path) -> None:
    (pictures / "a.png").write_bytes((pictures / "a.png").read_bytes()[:50])
    job = tmp_path / "job"
    job.mkdir()
    assert caption(florence, pictures, f"--job_dir={job}") == 0
    assert not (pictures / "a.txt").exists()
    assert text(pictures, "c").strip()
    assert "a.png" in str(events(job, "warning")[0]["message"])


def test_a_model_of_two_halves(pictures: Path, tmp_path: Path) -> None:
    assert caption(make_tiny_vision_encoder_decoder(tmp_path / "model"), pictures) == 0
    assert set(text(pictures, "a").split()) <= set(WORDS)


@pytest.mark.parametrize("prompt", ["<CAPTION>", "a red"])
def test_a_prompt_of_ones_own(florence: Path, pictures: Path, prompt: str) -> None:
    assert caption(florence, pictures, f"--prompt={prompt}") == 0
    assert text(pictures, "a")


def test_what_cannot_be_used_is_named(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="folder cannot be read"):
        caption("nothing", tmp_path / "gone")
    wanted = tmp_path / "wanted.txt"
    with pytest.raises(UserError, match="list of pictures cannot be read"):
        caption("nothing", pictures, f"--pictures={wanted}")
    wanted.write_text("z.png\na.png\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"not in the folder: z\.png"):
        caption("nothing", pictures, f"--pictures={wanted}")
    empty = tmp_path / "model"
    empty.mkdir()
    (empty / "config.json").write_text(json.dumps({"model_type": "bert"}), encoding="utf-8")
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        caption(empty, pictures)
    assert "florence-community" in str(caught.value)
    assert not (pictures / "a.txt").exists()


def test_nothing_to_do_needs_no_model(pictures: Path) -> None:
    for stem in ("a", "c"):
        (pictures / f"{stem}.txt").write_text("there", encoding="utf-8")
    assert caption("no/such/model", pictures) == 0
