"""The library without a browser: what is listed, found, renamed, deleted and taken back; what jobs are started with."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from fluxgui.jobs import look_at_job
from fluxgui.library import (
    Entry,
    add_folder,
    delete,
    find_entry,
    list_entries,
    loras_dir,
    remove_folder,
    rename,
    restore,
    save_notes,
)
from fluxgui.library_jobs import made_picture, options_for, start_tool, start_try, usual_prompts
from fluxgui.library_view import cards, details, metadata_table, try_grid
from tests.lora.random_lora import random_lora
from trainer.schema.base import UserError
from trainer.schema.folders import bin_dir, runs_dir
from trainer.schema.run_folder import RunFolder
from trainer.schema.run_liveness import WorkerLock
from trainer.train.checkpoint import save_lora

METADATA = {
    "ss_network_dim": "4",
    "ss_network_alpha": "1",
    "ss_sd_model_name": "flux1-dev.safetensors",
    "ss_steps": "20",
}
NAMES = ("lora_unet_double_blocks_0_img_attn_qkv",)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLUXGUI_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def write_lora(path: Path, *, rank: int = 4, age: float = 0.0) -> Path:
    save_lora(path, random_lora(rank=rank, names=NAMES, dtype=torch.bfloat16), METADATA)
    os.utime(path, (1_700_000_000 - age, 1_700_000_000 - age))
    return path


@pytest.fixture
def run() -> RunFolder:
    run = RunFolder.create(
        runs_dir(),
        "cat",
        config_toml='pretrained_model_name_or_path = "/models/flux.safetensors"\nclip_l = "/models/clip.safetensors"\n'
        't5xxl = "/models/t5.safetensors"\nae = "/models/ae.safetensors"\nmixed_precision = "bf16"\nlearning_rate = 1e-4\n',
        dataset_toml='[[datasets]]\n[[datasets.subsets]]\ncaption_prefix = "kelvo, "\n',
        sample_prompts="# prompts\nkelvo on a wall --w 64\n",
        info={},
    )
    write_lora(run.checkpoints_dir / "cat-step00000010.safetensors", age=100)
    write_lora(run.checkpoints_dir / "cat.safetensors")
    Image.new("RGB", (8, 8)).save(run.samples_dir / "cat_000010_00.png")
    return run


def only() -> Entry:
    (entry,) = list_entries()
    return entry


def test_a_run_is_one_card_with_its_last_lora_and_all_its_checkpoints(run: RunFolder) -> None:
    entry = only()
    assert entry.path.name == "cat.safetensors"
    assert [path.name for path in entry.checkpoints] == ["cat-step00000010.safetensors", "cat.safetensors"]
    assert (entry.facts.rank, entry.facts.alpha, entry.facts.base) == (4, "1", "flux1-dev.safetensors")
    assert entry.facts.trigger == "kelvo"
    assert entry.preview == run.samples_dir / "cat_000010_00.png"
    assert usual_prompts(entry) == "kelvo on a wall --w 64"
    options = options_for(entry)
    assert options["ae"] == "/models/ae.safetensors"
    assert options["mixed_precision"] == "bf16"
    assert "learning_rate" not in options


def test_added_folders_are_shown_searched_and_sorted(run: RunFolder, home: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    with pytest.raises(UserError, match="Settings"):
        add_folder(str(outside))
    with pytest.raises(UserError, match="no folder"):
        add_folder("nowhere")
    folder = home / "datasets" / "loras"
    folder.mkdir(parents=True)
    write_lora(folder / "a wide one.safetensors", rank=8, age=50)
    (folder / "broken.safetensors").write_bytes(b"no")
    Image.new("RGB", (8, 8)).save(folder / "a wide one.preview.png")
    add_folder(str(folder))
    assert [entry.title for entry in list_entries()] == ["cat", "a wide one"]
    assert [entry.title for entry in list_entries(order="rank")] == ["a wide one", "cat"]
    assert [entry.title for entry in list_entries("kelvo FLUX1")] == ["cat"]
    assert list_entries("nothing like it") == []
    wide = list_entries("wide")[0]
    assert wide.preview == folder / "a wide one.preview.png"
    renamed = rename(wide, "narrow / one")
    assert renamed == folder / "narrow_one.safetensors"
    assert (folder / "narrow_one.preview.png").is_file()
    assert list_entries("narrow")[0].title == "narrow / one"
    write_lora(folder / "x.safetensors")
    with pytest.raises(UserError, match="already"):
        rename(list_entries("narrow")[0], "x")
    remove_folder(str(folder))
    assert [entry.title for entry in list_entries()] == ["cat"]


def test_a_runs_file_keeps_its_name_and_gets_a_title(run: RunFolder) -> None:
    rename(only(), "My cat")
    save_notes(only(), "good at 0.8")
    assert (run.checkpoints_dir / "cat.safetensors").is_file()
    assert (only().title, only().notes) == ("My cat", "good at 0.8")
    assert [entry.title for entry in list_entries("0.8")] == ["My cat"]


def test_delete_goes_to_the_bin_and_back(run: RunFolder) -> None:
    entry = only()
    content = entry.path.read_bytes()
    name = delete(entry)
    assert not entry.path.exists()
    assert (bin_dir() / name / "cat.safetensors").read_bytes() == content
    assert only().path.name == "cat-step00000010.safetensors"
    assert restore(name) == entry.path
    assert only().path.read_bytes() == content
    with pytest.raises(UserError):
        restore(name)
    with pytest.raises(UserError):
        restore("../runs")
    with WorkerLock(run), pytest.raises(UserError, match="at work"):
        delete(only())


def test_text_of_files_is_escaped(home: Path) -> None:
    path = loras_dir() / "x.safetensors"
    save_lora(path, random_lora(names=NAMES), {"ss_sd_model_name": "<script>alert(1)</script>", "ss_x": "<b>"})
    entry = only()
    for html in (cards([entry], None, is_search=False), details(entry), metadata_table(entry.facts.metadata)):
        assert "<script>" not in html
        assert "<b>" not in html


def test_what_cannot_be_started_says_why(run: RunFolder, home: Path) -> None:
    entry = only()
    usual = {"seed": 1, "size": 64, "steps": 2, "options": options_for(entry)}
    for prompts, strengths, word in (("", [1.0], "prompt"), ("a", [], "strength"), ("a\n" * 300, [1.0], "300")):
        with pytest.raises(UserError, match=word):
            start_try(entry, [entry.path], prompts=prompts, strengths=strengths, **usual)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="ae"):
        start_try(
            entry, [entry.path], prompts="a", strengths=[1.0], seed=1, size=64, steps=2,
            options={**options_for(entry), "ae": ""},
        )  # fmt: skip
    with pytest.raises(UserError, match="rank"):
        start_tool(entry, "resize", name="")
    write_lora(loras_dir() / "there.safetensors")
    with pytest.raises(UserError, match="already"):
        start_tool(entry, "convert", name="there")
    assert not (home / "jobs").exists()


def test_a_grid_shows_what_is_made_and_serves_nothing_else(run: RunFolder, home: Path) -> None:
    folder = home / "jobs" / "20260101-000000-try-abcdef"
    (folder / "output").mkdir(parents=True)
    subject = {"entry": only().entry_id, "prompts": ["a <cat>"], "strengths": [0, 1], "checkpoints": ["cat"]}
    (folder / "job.json").write_text(json.dumps({"kind": "try", "title": "cat", "created": 1, "subject": subject}))
    (folder / "output" / "0.png").write_bytes(b"x")
    cell = {"prompt": 0, "checkpoint": 0, "strength": 0.0}
    events = [{"kind": "started"}, {"kind": "result", "path": "output/0.png", "cells": [cell]}]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (folder / "secret.png").write_bytes(b"x")
    from trainer.schema.job_folder import JobFolder  # noqa: PLC0415

    view = look_at_job(JobFolder(folder))
    html = try_grid(view)
    assert html.count("<img") == 1
    assert html.count("waiting-cell") == 1
    assert "0 (base model)" in html
    assert "<cat>" not in html
    assert made_picture(view, "0.png") == folder / "output" / "0.png"
    assert made_picture(view, "secret.png") is None
    assert find_entry("../../x") is None
