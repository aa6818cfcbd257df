"""The guided course of the demo's transformer: what it takes for the truth."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from trainer.model.flux import Flux
from trainer.tools.learn_flux import FINE, GUIDED, PARAMS, Course, Lessons, learn_flux, step_loss


@pytest.fixture(scope="module")
def lessons() -> Lessons:
    generator = torch.Generator().manual_seed(1)
    return Lessons(
        mean=torch.randn(4, 16, 4, 4, generator=generator),
        deviation=torch.full((4, 16, 4, 4), 0.1),
        txt=torch.randn(5, 3, PARAMS.context_in_dim, generator=generator),
        vec=torch.randn(5, PARAMS.vec_in_dim, generator=generator),
        rows=np.array([[1, 2, 3], [2, 3, 4], [3, 4, 1], [4, 1, 2]]),
    )


@pytest.fixture(scope="module")
def model() -> Flux:
    """Random, and deaf to guidance."""
    torch.manual_seed(2)
    flux = Flux(PARAMS)
    for parameter in flux.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    assert flux.guidance_in is not None
    for parameter in flux.guidance_in.parameters():
        torch.nn.init.zeros_(parameter)
    return flux.requires_grad_(False).eval()


def small(course: Course, *scales: float) -> Course:
    return dataclasses.replace(course, batch=6, guidance=scales or course.guidance)


def loss(course: Course, model: Flux, teacher: Flux | None, lessons: Lessons) -> float:
    return float(step_loss(course, model, teacher, lessons, np.random.default_rng(3), 4))


def test_at_guidance_one_the_truth_is_the_teachers_own_velocity(model: Flux, lessons: Lessons) -> None:
    """Not exactly: the teacher reads both captions in one batch, which rounds otherwise than the model's single one."""
    assert loss(small(GUIDED, 1.0, 1.0), model, model, lessons) < 1e-7


def test_at_other_scales_the_truth_is_further_from_the_empty_captions_velocity(model: Flux, lessons: Lessons) -> None:
    """A model that ignores guidance is wrong by (g - 1) (c - u): the square grows so, and is weighed with 1 / g."""
    twice, thrice = (loss(small(GUIDED, scale, scale), model, model, lessons) for scale in (2.0, 3.0))
    assert twice > 1e-4
    assert thrice / twice == pytest.approx((2**2 / 3) / (1**2 / 2), rel=1e-3)


def test_without_a_teacher_the_truth_is_the_data(model: Flux, lessons: Lessons) -> None:
    """The model's velocity has nothing to do with noise - latents, so that at least the noise's variance is missed."""
    assert loss(small(FINE), model, None, lessons) > 1.0


def test_all_courses_run_and_are_not_run_again(tmp_path_factory: pytest.TempPathFactory, lessons: Lessons) -> None:
    folder = tmp_path_factory.mktemp("state")
    made: list[int] = []

    def make() -> Lessons:
        made.append(1)
        return lessons

    lines: list[str] = []
    first = learn_flux(folder, make, seed=1, num_steps=(2, 1, 1), report=lines.append)
    again = learn_flux(folder, make, seed=1, num_steps=(2, 1, 1), report=lines.append)
    assert [line.split(" step")[0] for line in lines] == ["flux", "flux, high noise", "flux, guidance"]
    assert len(made) == 1
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
