"""Masks and preserved samples in the loss of a batch, on a tiny model."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from tests.offload.poison_mover import PoisonMover
from tests.tiny import TinyModels, make_full_depth_flux
from trainer.lora.network import LoraNetwork
from trainer.model.flux import Flux
from trainer.model.weights import load_flux
from trainer.offload.block_swap import BlockSwap
from trainer.schema.cli import parse_command_line
from trainer.schema.lora_spec import LoraSpec
from trainer.train.conditioning import TextInputs
from trainer.train.engine import Engine
from trainer.train.flow import sample_losses
from trainer.train.network_setup import network_off
from trainer.train.objective import FlowBatch, FlowObjective
from trainer.train.planned_batches import flow_objective

BATCH = 3


def trained_network(model: Flux) -> LoraNetwork:
    """A LoRA that changes what the model predicts."""
    network = LoraNetwork.attach(model, None, LoraSpec(rank=2, alpha=2), torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return network


def objective_of(model: Flux, network: LoraNetwork, *more: str) -> FlowObjective:
    options = parse_command_line(
        ["--device=cpu", "--model_prediction_type=raw", "--timestep_sampling=sigmoid", "--mixed_precision=no", *more]
    ).options
    width, vector = model.params.context_in_dim, model.params.vec_in_dim

    def text(captions: object) -> TextInputs:
        generator = torch.Generator().manual_seed(7)
        txt = torch.randn(BATCH, 5, width, generator=generator)
        return TextInputs(txt, torch.randn(BATCH, vector, generator=generator), None)

    return flow_objective(options, model, network, text, Engine.start(options))


def draw(objective: FlowObjective, *, mask: Tensor | None = None, preserved: Tensor | None = None) -> FlowBatch:
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(BATCH, 16, 4, 6, generator=generator)
    weights = torch.tensor([1.0, 0.5, 2.0])
    return objective.draw(latents, ["a"] * BATCH, weights, generator, mask=mask, preserved=preserved)


@pytest.fixture(scope="module")
def flux(tiny_models: TinyModels) -> Flux:
    return load_flux(tiny_models.flux_dev, torch.float32, "cpu")


@pytest.fixture(scope="module")
def network(flux: Flux) -> LoraNetwork:
    return trained_network(flux)


def test_what_a_mask_hides_changes_nothing(flux: Flux, network: LoraNetwork) -> None:
    objective = objective_of(flux, network)
    mask = torch.zeros(BATCH, 1, 4, 6)
    mask[:, :, :2] = 1.0
    mask[0, :, :, :3] = 0.25
    batch = draw(objective, mask=mask)
    comparison = objective.compare(batch)
    errors = (comparison.prediction - comparison.target).square()
    expected = ((errors * mask).mean(dim=(1, 2, 3)) * batch.loss_weights).mean()
    assert objective.loss(batch).item() == pytest.approx(expected.item(), rel=1e-6)
    whole = objective.loss(draw(objective)).item()
    assert objective.loss(draw(objective, mask=torch.ones(BATCH, 1, 4, 6))).item() == pytest.approx(whole, rel=1e-6)
    assert objective.loss(draw(objective, mask=torch.zeros(BATCH, 1, 4, 6))).item() == 0.0


def test_on_request_a_small_mask_is_learnt_as_strongly_as_a_large_one(flux: Flux, network: LoraNetwork) -> None:
    plain, by_area = objective_of(flux, network), objective_of(flux, network, "--masked_loss_normalize")
    mask = torch.full((BATCH, 1, 4, 6), 0.125)
    whole = plain.loss(draw(plain)).item()
    assert plain.loss(draw(plain, mask=mask)).item() == pytest.approx(whole / 8, rel=1e-6)
    assert by_area.loss(draw(by_area, mask=mask)).item() == pytest.approx(whole, rel=1e-6)
    assert by_area.loss(draw(by_area, mask=torch.zeros_like(mask))).item() == 0.0
    assert by_area.loss(draw(by_area)).item() == pytest.approx(whole, rel=1e-6)


def test_masked_gradients_come_from_what_is_shown_alone() -> None:
    prediction = torch.randn(2, 16, 4, 4, requires_grad=True)
    mask = torch.zeros(2, 1, 4, 4)
    mask[1, :, :2] = 1.0
    sample_losses(
        prediction,
        torch.zeros(2, 16, 4, 4),
        torch.tensor([0.5, 0.5]),
        loss_type="l2",
        huber_schedule="constant",
        huber_c=0.1,
        huber_scale=1.0,
        weighting=None,
        loss_weights=torch.ones(2),
        mask=mask,
    ).mean().backward()
    assert prediction.grad is not None
    assert torch.equal(prediction.grad != 0, mask.expand_as(prediction) > 0)


@pytest.mark.parametrize("kind", ["raw", "additive", "sigma_scaled"])
def test_preserved_samples_have_the_base_models_prediction_as_target(
    flux: Flux, network: LoraNetwork, kind: str
) -> None:
    objective = objective_of(flux, network, f"--model_prediction_type={kind}")
    usual = objective.compare(draw(objective))
    batch = draw(objective, preserved=torch.tensor([False, True, False]))
    comparison = objective.compare(batch)
    assert torch.equal(comparison.prediction, usual.prediction), "the network is back on"
    assert torch.equal(comparison.target[0], usual.target[0])
    assert torch.equal(comparison.target[2], usual.target[2])
    with network_off(network), torch.no_grad():
        base = objective.compare(draw(objective)).prediction
    torch.testing.assert_close(comparison.target[1], base[1], atol=2e-5, rtol=1e-5)
    assert not comparison.target.requires_grad
    assert (base[1] - comparison.prediction[1]).abs().max() > 1e-3, "the LoRA changes something"


def test_a_network_that_does_nothing_yet_loses_nothing_on_preserved_samples(tiny_models: TinyModels) -> None:
    model = load_flux(tiny_models.flux_schnell, torch.float32, "cpu")
    network = LoraNetwork.attach(model, None, LoraSpec(rank=2, alpha=2), torch.Generator().manual_seed(1))
    objective = objective_of(model, network)
    assert objective.loss(draw(objective, preserved=torch.ones(BATCH, dtype=torch.bool))).item() < 1e-8


def test_the_second_forward_pass_works_with_swapped_blocks_and_checkpointing(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path = make_full_depth_flux(tmp_path_factory.mktemp("deep") / "flux.safetensors")
    gradients: list[list[Tensor]] = []
    for num_swapped in (0, 6):
        model = load_flux(path, torch.float32, "cpu")
        network = trained_network(model)
        model.enable_gradient_checkpointing(True)
        objective = objective_of(model, network)
        batch = draw(objective, preserved=torch.tensor([True, False, True]))
        if num_swapped:
            with BlockSwap(list(model.double_blocks), list(model.single_blocks), num_swapped, PoisonMover()):
                objective.loss(batch).backward()
        else:
            objective.loss(batch).backward()
        gradients.append([parameter.grad for parameter in network.parameters() if parameter.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_the_network_is_on_again_after_an_error(network: LoraNetwork) -> None:
    off = partial(network_off, network)
    with pytest.raises(RuntimeError, match="inside"), off():
        raise RuntimeError("inside")
    assert {adapter.multiplier for adapter in network._adapters.values()} == {1.0}  # pyright: ignore[reportPrivateUsage]
