"""The check of a dataset: each fault is made, and found by its name."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from fluxgui import dataset_doctor
from fluxgui.dataset_doctor import (
    Bucketing,
    Report,
    bucketing_of,
    crop_of,
    estimate_tokens,
    examine,
    look_at,
    token_counts,
)
from fluxgui.datasets import Dataset
from fluxgui.doctor_view import report as report_html
from tests.tiny import TinyModels

SQUARE = Bucketing((256, 256), min_side=128, max_side=512)


def scene(number: int, size: tuple[int, int] = (320, 320)) -> Image.Image:
    """A picture that differs from those of other numbers in shapes and colours."""
    image = Image.new("RGB", size, ((90 * number) % 256, (50 + 40 * number) % 256, (200 - 60 * number) % 256))
    draw = ImageDraw.Draw(image)
    for index in range(6):
        x, y = (97 * index * (number + 1)) % size[0], (61 * index * (number + 2)) % size[1]
        draw.ellipse((x, y, x + 90, y + 60), fill=((70 * index) % 256, (120 * number + 30 * index) % 256, 30 * index))
    return image


def examined(folder: Path, bucketing: Bucketing | None = SQUARE) -> Report:
    counts = token_counts(None, None)
    *progress, report = examine(Dataset("set", folder), bucketing, counts)
    assert isinstance(report, Report)
    assert [step[0] for step in progress if not isinstance(step, Report)] == list(range(1, report.num_pictures + 1))
    return report


def found(report: Report) -> dict[str, list[tuple[str, ...]]]:
    by_kind: dict[str, list[tuple[str, ...]]] = {}
    for finding in report.findings:
        by_kind.setdefault(finding.kind, []).append(finding.names)
    return by_kind


def caption(folder: Path, stem: str, text: str = "a cat") -> None:
    (folder / f"{stem}.txt").write_text(text, encoding="utf-8")


def test_every_fault_is_found(tmp_path: Path) -> None:
    for number, stem in enumerate(("good", "damaged", "missing", "empty")):
        scene(number).save(tmp_path / f"{stem}.png")
    data = (tmp_path / "damaged.png").read_bytes()
    (tmp_path / "damaged.png").write_bytes(data[: len(data) // 2])
    scene(4, (100, 100)).save(tmp_path / "small.png")
    scene(5, (1600, 300)).save(tmp_path / "long.png")
    scene(6, (1000, 330)).save(tmp_path / "wide.png")
    see_through = scene(7).convert("RGBA")
    see_through.putpixel((3, 3), (0, 0, 0, 0))
    see_through.save(tmp_path / "holes.png")
    scene(8).convert("RGBA").save(tmp_path / "opaque.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    scene(9).save(tmp_path / "turned.jpg", exif=exif)
    scene(0, (320, 320)).resize((300, 300)).save(tmp_path / "good-again.jpg", quality=80)
    for stem in ("good", "damaged", "small", "long", "wide", "holes", "opaque", "turned", "good-again"):
        caption(tmp_path, stem)
    caption(tmp_path, "empty", "  \n")
    caption(tmp_path, "opaque", "word " * 600)
    caption(tmp_path, "turned", "word " * 100)
    report = examined(tmp_path, Bucketing((256, 256), min_side=128, max_side=448))
    assert found(report) == {
        "corrupt": [("damaged.png",)],
        "missing": [("empty.png",), ("missing.png",)],
        "duplicate": [("good-again.jpg", "good.png")],
        "small": [("small.png",)],
        "cropped": [("long.png",)],
        "aspect": [("long.png",), ("wide.png",)],
        "long_t5": [("opaque.png",)],
        "long_clip": [("turned.jpg",)],
        "transparent": [("holes.png",)],
        "rotated": [("turned.jpg",)],
    }
    assert sum(count for _, count in report.buckets) == report.num_pictures - 1
    assert report.buckets[0] == ((256, 256), 8)


def test_a_picture_is_looked_at_again_when_its_file_changed(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    scene(1).save(path)
    assert look_at(path).size == (320, 320)
    scene(1, (64, 48)).save(path)
    assert look_at(path).size == (64, 48)
    path.write_bytes(b"nothing")
    assert look_at(path).error is not None


def test_different_plain_pictures_are_no_duplicates(tmp_path: Path) -> None:
    """The hash knows only edges: two plain pictures have the same one."""
    for name, colour in (("red", (200, 0, 0)), ("blue", (0, 0, 200)), ("red2", (202, 1, 0))):
        Image.new("RGB", (300, 300), colour).save(tmp_path / f"{name}.png")
        caption(tmp_path, name)
    assert found(examined(tmp_path)) == {"duplicate": [("red.png", "red2.png")]}


def test_no_bucket_is_a_finding_of_its_own(tmp_path: Path) -> None:
    scene(1, (900, 20)).save(tmp_path / "line.png")
    caption(tmp_path, "line")
    never_larger = Bucketing((256, 256), no_upscale=True)
    assert found(examined(tmp_path, never_larger)) == {"no_bucket": [("line.png",)], "aspect": [("line.png",)]}


def test_the_crop_is_what_the_trainer_cuts(tmp_path: Path) -> None:
    path = tmp_path / "wide.png"
    scene(1, (400, 200)).save(path)
    kept = crop_of(path, Bucketing((256, 256), enable_bucket=False))
    assert kept is not None
    assert kept.bucket == (256, 256)
    assert (kept.left, kept.top, kept.width, kept.height) == (0.25, 0.0, 0.5, 1.0)
    assert kept.lost == 0.5
    assert crop_of(tmp_path / "gone.png", SQUARE) is None


def test_the_forms_values_decide_the_buckets() -> None:
    values = {"resolution": "512", "enable_bucket": True, "bucket_no_upscale": False}
    limits = {"min_bucket_reso": 256, "max_bucket_reso": None}
    assert bucketing_of({**values, **limits}) == Bucketing((512, 512))
    for wrong in ({"resolution": None}, {"resolution": "big"}, {"min_bucket_reso": "x"}):
        assert bucketing_of({**values, **limits, **wrong}) is None


def test_tokens_are_counted_by_the_given_tokenizers(tiny_models: TinyModels, tmp_path: Path) -> None:
    counts = token_counts(tiny_models.clip_l_tokenizer, tiny_models.t5xxl_tokenizer)
    assert not counts.is_estimate
    assert counts.clip("cat cat cat") > counts.clip("cat")
    assert token_counts(tmp_path, None).is_estimate
    assert estimate_tokens("") == 2
    assert estimate_tokens("a red cat, sitting") == 2 + 3 + 1 + 2
    assert estimate_tokens("一只红猫") == 2 + 4


def test_names_and_captions_are_escaped(tmp_path: Path) -> None:
    dataset = Dataset("a&b", tmp_path)
    finding = dataset_doctor.Finding("missing", ("<img>.png",), "<script>")
    html = report_html(dataset, Report((finding,), (), 1, is_estimate=True), {})
    assert "<img>.png" not in html
    assert "<script>" not in html


@pytest.mark.parametrize("kind", dataset_doctor.KINDS)
def test_every_kind_has_its_words(kind: dataset_doctor.Kind, tmp_path: Path) -> None:
    finding = dataset_doctor.Finding(kind, ("a.png",), "detail")
    html = report_html(Dataset("set", tmp_path), Report((finding,), (), 1, is_estimate=False), {})
    assert f'data-kind="{kind}"' in html
