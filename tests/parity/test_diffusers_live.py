"""The transformer against the diffusers implementation, live, with the same weights and fresh random inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.diffusers_flux import in_diffusers
from tests.tiny import TinyModels
from trainer.model.flux import Flux
from trainer.model.packing import image_ids, text_ids
from trainer.model.weights import load_flux


def example(flux: Flux, batch: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(11)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "img": draw(batch, 30, flux.params.in_channels).requires_grad_(),
        "txt": draw(batch, 9, flux.params.context_in_dim).requires_grad_(),
        "y": draw(batch, flux.params.vec_in_dim).requires_grad_(),
        "timesteps": torch.rand(batch, generator=generator),
        "guidance": 1 + 3 * torch.rand(batch, generator=generator),
    }


@pytest.mark.parametrize("variant", ["flux_dev", "flux_schnell"])
@pytest.mark.parametrize("batch", [1, 2])
def test_output_and_input_gradients_equal_diffusers(tiny_models: TinyModels, variant: str, batch: int) -> None:
    path: Path = getattr(tiny_models, variant)
    flux = load_flux(path, torch.float32, "cpu")
    other = in_diffusers(flux)
    given = example(flux, batch)
    ours = flux(
        given["img"],
        image_ids(5, 6),
        given["txt"],
        text_ids(9),
        given["timesteps"],
        given["y"],
        given["guidance"],
    )
    theirs = other(
        hidden_states=given["img"],
        encoder_hidden_states=given["txt"],
        pooled_projections=given["y"],
        timestep=given["timesteps"],
        img_ids=image_ids(5, 6)[0],
        txt_ids=text_ids(9)[0],
        guidance=given["guidance"] if flux.params.guidance_embed else None,
        return_dict=False,
    )[0]
    torch.testing.assert_close(ours, theirs, atol=5e-6, rtol=0)
    wanted = [given["img"], given["txt"], given["y"]]
    ours_grads = torch.autograd.grad(ours.square().mean(), wanted)
    theirs_grads = torch.autograd.grad(theirs.square().mean(), wanted)
    for ours_grad, theirs_grad in zip(ours_grads, theirs_grads, strict=True):
        torch.testing.assert_close(ours_grad, theirs_grad, atol=1e-7, rtol=1e-4)
