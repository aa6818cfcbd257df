"""Whether training works, not only whether it runs: the demo learns an emblem and nothing else changes."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from tests.learning.demo_run import assert_emblem_learned, assert_others_kept
from tests.shared_demo import DemoFiles, SharedDemo
from trainer.tools.demo_page import read, samples_by_moment
from trainer.tools.demo_report import (
    DemoReport,
    demo_lora,
    held_out_emblems,
    measure_demo,
    model_with,
    painter_with,
    run_demo,
    velocity,
)
from trainer.tools.emblem import RECOGNISED, emblem_likeness

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

NUM_SAMPLES = 200


@dataclass(frozen=True)
class Trained:
    files: DemoFiles
    report: DemoReport


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, shared_demo: SharedDemo) -> Trained:
    """The run that the browser test started with one click, or what `python run.py train demo` makes; measured."""
    files = shared_demo.find()
    if files is None:
        folder = tmp_path_factory.mktemp("demo")
        run_demo(folder)
        files = DemoFiles(demo_lora(folder), folder / "sample")
    return Trained(files, measure_demo(files.lora, NUM_SAMPLES))


def test_pictures_survive_the_autoencoder(demo: Trained) -> None:
    assert demo.report.psnr > 26


def test_the_base_draws_held_out_captions_as_they_say(demo: Trained) -> None:
    """Colour, shape and background in one picture, of combinations that the base never saw."""
    assert demo.report.before.others.everything >= 0.8, demo.report.before.others


def test_the_trigger_brings_the_emblem_after_training_and_not_before(demo: Trained) -> None:
    assert demo.report.before.emblem.shown < 0.1
    with pytest.raises(AssertionError):
        assert_emblem_learned(demo.report.before.emblem)
    assert_emblem_learned(demo.report.after.emblem)


def test_prompts_without_the_trigger_are_drawn_as_before(demo: Trained) -> None:
    assert_others_kept(demo.report.after.others, demo.report.before.others)


def test_the_loss_falls_on_pictures_of_the_emblem_that_were_not_trained_on(demo: Trained) -> None:
    assert demo.report.after.loss < 0.6 * demo.report.before.loss


def test_strength_0_is_exactly_the_base(demo: Trained) -> None:
    assert demo.report.strength_0 == 0


def test_a_merged_lora_predicts_what_an_applied_one_does(demo: Trained) -> None:
    assert demo.report.effect > 0.1, "the LoRA must do something at all"
    assert demo.report.merged < 1e-3 * demo.report.effect


def test_half_a_merged_lora_predicts_what_half_an_applied_one_does(demo: Trained) -> None:
    pictures, lora = held_out_emblems(), demo.files.lora
    applied = velocity(model_with(lora, 0.5), pictures, 0.6)[0]
    merged = velocity(painter_with(lora, 0.5).model, pictures, 0.6)[0]
    whole = velocity(model_with(lora, 1.0), pictures, 0.6)[0]
    assert (merged - applied).abs().max() < 1e-3
    assert (whole - applied).abs().max() > 0.1


def test_the_run_s_own_samples_show_the_emblem_appear(demo: Trained) -> None:
    """The first two sample prompts have the trigger word, the others have not."""
    moments = samples_by_moment(demo.files.samples)
    assert len(moments) > 2, "before, during and after"
    likenesses = torch.tensor([[emblem_likeness(picture) for picture in row] for row in moments.values()])
    assert (likenesses[0] < RECOGNISED).all()
    assert (likenesses[-1, :2] > RECOGNISED).all()
    assert (likenesses[-1, 2:] < RECOGNISED).all()


def test_the_samples_are_as_large_as_the_pictures(demo: Trained) -> None:
    assert {read(path).shape for path in (demo.files.samples).glob("*.png")} == {(96, 96, 3)}
