"""The validation loss on a tiny model: the same whatever the run does besides, and no dropout in it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.data.specs import DATASET, SUBSET, one_dataset, picture
from tests.offload.poison_mover import PoisonMover
from tests.tiny import TinyModels
from trainer.data.batches import BatchPlan
from trainer.data.index import index_dataset
from trainer.data.items import Item
from trainer.data.validation import validation_batches
from trainer.lora.network import LoraNetwork
from trainer.model.flux import Flux
from trainer.model.weights import load_flux
from trainer.offload.block_swap import BlockSwap
from trainer.schema.lora_spec import LoraSpec
from trainer.train.conditioning import TextInputs
from trainer.train.masks_phase import MaskSource
from trainer.train.objective import predict_velocity
from trainer.train.reporting import Reporter
from trainer.train.validator import TIMESTEPS, Validator


class Latents:
    """Latents that are a function of the picture."""

    masks = MaskSource()

    def load(self, plan: BatchPlan) -> Tensor:
        seeds = [int(planned.item.digest[:8], 16) for planned in plan.items]
        return torch.stack([torch.randn(16, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds])

    def finish(self, loaded: Tensor, generator: torch.Generator) -> Tensor:
        return loaded


def text(captions: Sequence[str]) -> TextInputs:
    return TextInputs(torch.ones(len(captions), 3, 64), torch.ones(len(captions), 32), None)


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> tuple[Item, ...]:
    folder: Path = tmp_path_factory.mktemp("pictures")
    for number in range(4):
        picture(folder / f"{number}.png", seed=number, caption="a cat")
    like = replace(DATASET, validation_split=0.75)
    return index_dataset(one_dataset(replace(SUBSET, image_dir=folder), like=like)).validation


@pytest.fixture
def model(tiny_models: TinyModels) -> Flux:
    return load_flux(tiny_models.flux_dev, torch.float32, "cpu")


def attach(model: Flux) -> LoraNetwork:
    spec = LoraSpec(rank=4, alpha=4, dropout=0.5, rank_dropout=0.5, module_dropout=0.5)
    network = LoraNetwork.attach(model, None, spec, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    for parameter in network.training_state().values():
        parameter.data.normal_(std=0.1, generator=generator)
    return network


def validator(
    model: Flux, network: LoraNetwork, items: Sequence[Item], *, batch_size: int = 1, seed: int = 0
) -> Validator:
    return Validator(
        validation_batches(items, [batch_size]),
        seed=seed,
        latents=Latents(),
        text=text,
        model=model,
        network=network,
        guidance_scale=1.0,
        autocast=contextlib.nullcontext,
        compute_dtype=torch.float32,
        device=torch.device("cpu"),
        reporter=Reporter(is_main=False),
    )


def test_it_is_the_mean_squared_error_of_the_velocity(model: Flux, items: tuple[Item, ...]) -> None:
    network = attach(model)
    found = validator(model, network, items[:1])()
    plan = validation_batches(items[:1], [1])[0]
    latents = Latents().load(plan)
    maker = validator(model, network, items[:1])
    errors: list[Tensor] = []
    for timestep in TIMESTEPS:
        noise = maker._noise(plan.items[0], timestep, latents.shape)  # pyright: ignore[reportPrivateUsage]
        noisy = (1 - timestep) * latents + timestep * noise
        with torch.no_grad():
            velocity = predict_velocity(model, noisy, torch.tensor([timestep]), text(["a cat"]), 1.0)
        errors.append((velocity - (noise - latents)).square().mean())
    assert found == pytest.approx(torch.stack(errors).mean().item(), rel=1e-5)


def test_it_comes_out_the_same_in_any_batches_at_any_time_and_leaves_chance_alone(
    model: Flux, items: tuple[Item, ...]
) -> None:
    network = attach(model)
    expected = validator(model, network, items)()
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    network.train()
    assert validator(model, network, items)() == expected, "no dropout, though training was on"
    assert torch.equal(torch.random.get_rng_state(), before)
    assert validator(model, network, list(reversed(items)), batch_size=3)() == pytest.approx(expected, rel=1e-5)
    assert validator(model, network, items, seed=1)() != pytest.approx(expected, rel=1e-5)


def test_processes_share_the_pictures_and_come_to_the_same_loss(model: Flux, items: tuple[Item, ...]) -> None:
    network = attach(model)
    expected = validator(model, network, items)()
    sums: list[Tensor] = []

    def collect(tensor: Tensor) -> Tensor:
        sums.append(tensor)
        return tensor

    for rank in (0, 1):
        Validator(
            validation_batches(items, [1]),
            seed=0,
            latents=Latents(),
            text=text,
            model=model,
            network=network,
            guidance_scale=1.0,
            autocast=contextlib.nullcontext,
            compute_dtype=torch.float32,
            device=torch.device("cpu"),
            reporter=Reporter(is_main=False),
            rank=rank,
            num_processes=2,
            reduce_mean=collect,
        )()
    total = torch.stack(sums).mean(dim=0)
    assert [float(part[1]) for part in sums] == [8.0, 4.0]
    assert float(total[0] / total[1]) == pytest.approx(expected, rel=1e-5)


def test_it_is_the_same_under_block_swap_in_the_middle_of_training(model: Flux, items: tuple[Item, ...]) -> None:
    network = attach(model)
    expected = validator(model, network, items)()

    def train_step() -> None:
        network.train()
        noisy = torch.ones(1, 16, 8, 8)
        predict_velocity(model, noisy, torch.tensor([0.5]), text(["x"]), 1.0).square().mean().backward()

    with BlockSwap(list(model.double_blocks), list(model.single_blocks), 3, PoisonMover()):
        train_step()
        assert validator(model, network, items)() == expected
        train_step()
    assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())
