from __future__ import annotations

import os
from pathlib import Path

import pytest

from trainer.__main__ import main
from trainer.data.cache_files import CACHE_FOLDER
from trainer.tools.cache_command import clean_caches

NOW = 1_000 * 86_400.0


def entry(folder: Path, kind: str, number: int, *, days: float, size: int = 1000, more: str = ".safetensors") -> Path:
    path = folder / CACHE_FOLDER / f"{kind}-{number:040x}{more}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)
    os.utime(path, (NOW - days * 86_400, NOW - days * 86_400))
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two folders of caches beside things that are none of ours."""
    for number in range(4):
        entry(tmp_path / "a", "latents", number, days=10 * number)
    entry(tmp_path / "a" / "b", "text", 1, days=35, size=5000)
    entry(tmp_path / "a", "latents", 9, days=40, more=".12.ab.part")
    entry(tmp_path / "a", "latents", 8, days=0.5, more=".12.ab.part")
    (tmp_path / "a" / CACHE_FOLDER / "notes.txt").write_text("mine")
    (tmp_path / "a" / f"latents-{1:040x}.safetensors").write_text("not in a cache folder")
    (tmp_path / "a" / CACHE_FOLDER / f"text-{5:040x}.safetensors").symlink_to(
        tmp_path / "a" / CACHE_FOLDER / "notes.txt"
    )
    return tmp_path


def everything(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if not path.is_dir()}


def test_listing_removes_nothing_and_says_what_would_go(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = everything(pictures)
    lines = clean_caches([str(pictures)], now=NOW)
    assert lines[0] == f"{pictures / 'a' / CACHE_FOLDER}: 6 latents 6.0 kB; last used 0 days ago"
    assert lines[1].endswith("1 text 5.0 kB; last used 35 days ago")
    assert lines[2] == "7 files, 11.0 kB together"
    assert clean_caches([str(pictures), "--list", "--unused_days=15"], now=NOW)[-1].startswith(
        "--prune would remove 4 "
    )
    assert main(["cache", str(pictures)]) == 0
    assert "7 files, 11.0 kB together" in capsys.readouterr().out
    assert everything(pictures) == before


@pytest.mark.parametrize(
    ("options", "left"),
    [
        (["--unused_days=15"], {"a": [0, 1], "b": []}),
        (["--max_gb=0.000003"], {"a": [0, 1, 2], "b": []}),
        (["--max_gb=0.0000085"], {"a": [0, 1, 2, 3], "b": []}),
        (["--unused_days=32", "--max_gb=0.000002"], {"a": [0, 1], "b": []}),
        (["--unused_days=0"], {"a": [], "b": []}),
    ],
)
def test_pruning_removes_the_longest_unused_and_nothing_else(
    pictures: Path, options: list[str], left: dict[str, list[int]]
) -> None:
    foreign = {
        path for path in everything(pictures) if path.is_symlink() or "text" in path.suffix or "txt" in path.name
    }
    clean_caches([str(pictures / "a"), "--prune", *options], now=NOW)
    kept = {path for path in everything(pictures) if path.parent.name == CACHE_FOLDER and path.suffix == ".safetensors"}
    expected = {pictures / "a" / CACHE_FOLDER / f"latents-{number:040x}.safetensors" for number in left["a"]}
    expected |= {pictures / "a" / "b" / CACHE_FOLDER / f"text-{number:040x}.safetensors" for number in left["b"]}
    assert {path for path in kept if not path.is_symlink()} == expected
    assert foreign <= everything(pictures)
    assert (pictures / "a" / f"latents-{1:040x}.safetensors").is_file()
    assert [path.name[-21:] for path in (pictures / "a" / CACHE_FOLDER).glob("*.part")] == [f"{8:010x}.12.ab.part"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "this folder does not exist"),
        ([".", "--prune"], "--prune needs a measure"),
        ([".", "--prune", "--list", "--max_gb=1"], "exclude each other"),
    ],
)
def test_mistakes_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", *arguments]) == 2
    assert message in capsys.readouterr().err
