"""Batches that are read ahead by threads are those that each step reads for itself."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.tiny import TinyModels, make_tiny_dataset
from trainer.data.batches import BatchPlan, epoch_batches
from trainer.schema.cli import parse_command_line
from trainer.schema.events import EventReader, EventWriter
from trainer.schema.options import Options
from trainer.train.check import CheckedRun, check_run
from trainer.train.engine import Engine
from trainer.train.latents_phase import LoadedBatch, loaded_batches, prepare_latents
from trainer.train.recipe import train
from trainer.train.reporting import Reporter
from trainer.train.text_plan import caption_course


def words(models: TinyModels, folder: Path, *more: str) -> list[str]:
    return [
        *models.arguments(),
        f"--dataset_config={make_tiny_dataset(folder, count=3, num_repeats=2)}",
        f"--output_dir={folder / 'out'}",
        "--device=cpu",
        "--seed=5",
        "--network_dim=4",
        "--network_train_unet_only",
        "--cache_text_encoder_outputs",
        "--t5xxl_max_token_length=16",
        "--max_train_steps=4",
        "--shuffle_caption",
        "--caption_separator= ",
        "--caption_dropout_rate=0.2",
        "--flip_aug",
        "--random_crop",
        *more,
    ]


def loaded(checked: CheckedRun, epoch: int, num_threads: int) -> list[tuple[BatchPlan, LoadedBatch]]:
    options: Options = checked.options
    source, _ = prepare_latents(checked, Engine.start(options), Reporter(is_main=False))
    course = caption_course(options, checked.schedule, 1)
    return list(loaded_batches(source, epoch_batches(checked.index, 5, epoch, course=course), num_threads=num_threads))


def test_an_epoch_is_the_same_with_0_and_4_data_workers(tiny_models: TinyModels, tmp_path: Path) -> None:
    checked = check_run(parse_command_line(words(tiny_models, tmp_path)), Reporter(is_main=False))
    for epoch in (1, 2):
        alone, ahead = (loaded(checked, epoch, num_threads) for num_threads in (0, 4))
        assert len(alone) == 6
        assert [plan for plan, _ in alone] == [plan for plan, _ in ahead]
        assert all(torch.equal(ours.pixels, theirs.pixels) for (_, ours), (_, theirs) in zip(alone, ahead, strict=True))
    captions = [item.caption for plan, _ in alone for item in plan.items]
    assert len(set(captions)) > 3, "captions vary"


def test_a_training_is_the_same_with_0_and_4_data_workers(tiny_models: TinyModels, tmp_path: Path) -> None:
    losses: list[list[object]] = []
    for num_workers in (0, 4):
        events = tmp_path / f"{num_workers}.jsonl"
        arguments = words(tiny_models, tmp_path, f"--max_data_loader_n_workers={num_workers}")
        train(parse_command_line(arguments), Reporter(events=EventWriter(events, 1)))
        losses.append([event["loss"] for event in EventReader(events).read_new() if event["kind"] == "step"])
    assert len(losses[0]) == 4
    assert losses[0] == losses[1]
