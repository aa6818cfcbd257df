"""Five training steps of the reference trainer, replayed: losses, gradients and weights, number by number."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from trainer.lora.network import LoraNetwork
from trainer.model.weights import load_flux
from trainer.schema.lora_spec import LoraSpec
from trainer.train.conditioning import TextInputs
from trainer.train.flow import add_noise
from trainer.train.objective import FlowObjective, FlowSettings
from trainer.train.optim import create_optimizer

SETTINGS = FlowSettings(
    timestep_sampling="flux_shift",
    sigmoid_scale=1.0,
    discrete_flow_shift=3.0,
    weighting_scheme="uniform",
    logit_mean=0.0,
    logit_std=1.0,
    mode_scale=1.29,
    model_prediction_type="raw",
    guidance_scale=3.5,
    loss_type="l2",
    huber_schedule="snr",
    huber_c=0.1,
    huber_scale=1.0,
    ip_noise_gamma=None,
    ip_noise_gamma_random_strength=False,
)


def no_text(captions: Sequence[str]) -> TextInputs:
    raise AssertionError("the replay brings its own text")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_five_adamw_steps_follow_the_reference(golden: Path, checkpointing: bool) -> None:
    recorded = load_file(golden / "replay" / "t2_default_nonzero.safetensors")
    facts = json.loads((golden / "replay" / "t2_default_nonzero.json").read_text(encoding="utf-8"))
    given = {key.removeprefix("in."): tensor for key, tensor in recorded.items() if key.startswith("in.")}
    model = load_flux(golden / "replay" / "model_dev.safetensors", torch.float32, "cpu")
    model.enable_gradient_checkpointing(checkpointing)
    network = LoraNetwork.attach(model, None, LoraSpec(rank=4, alpha=1), torch.Generator().manual_seed(0))
    network.train()
    start = {key.removeprefix("init."): tensor for key, tensor in recorded.items() if key.startswith("init.")}
    alphas = {key: value for key, value in network.published_state_dict(None).items() if key.endswith(".alpha")}
    network.load_published({**start, **alphas})
    optimizer = create_optimizer("AdamW", network.parameter_groups(1e-3, 1e-3), learning_rate=1e-3, arguments={})
    objective = FlowObjective(
        model,
        no_text,
        SETTINGS,
        autocast=contextlib.nullcontext,
        compute_dtype=torch.float32,
        device=torch.device("cpu"),
    )
    latents, noise, sigmas = given["latents"], given["noise"], given["timesteps"] / 1000
    noisy = add_noise(
        latents,
        noise,
        sigmas,
        ip_noise_gamma=None,
        ip_noise_gamma_random_strength=False,
        generator=torch.Generator(),
    )
    text = TextInputs(given["t5_out"], given["clip_pooled"], None)
    losses: list[float] = []
    for step in range(5):
        loss = objective.loss(latents, noise, sigmas, noisy, text, given["loss_weights"])
        losses.append(loss.item())
        loss.backward()
        if step == 0:
            for key, gradient in published_gradients(network).items():
                difference = (gradient - recorded[f"grad.{key}"]).abs().max()
                assert difference <= 5e-8, f"{key}: {difference}"
        optimizer.step()
        optimizer.zero_grad()
    for ours, theirs in zip(losses, facts["losses"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)
    after = network.published_state_dict(None)
    differences = torch.cat([(after[key] - recorded[f"after5.{key}"]).abs().flatten() for key in start])
    assert differences.max() <= 2e-5
    assert differences.quantile(0.999) <= 1e-6


def published_gradients(network: LoraNetwork) -> dict[str, Tensor]:
    """Gradients under the published keys: each parameter holds its gradient for the moment of the reading."""
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    values = [parameter.data for parameter in parameters]
    try:
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.data = parameter.grad
        state = network.published_state_dict(None)
        return {key: tensor.clone() for key, tensor in state.items() if not key.endswith(".alpha")}
    finally:
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data = value
