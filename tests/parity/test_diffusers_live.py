"""The transformer against the diffusers implementation, live, with the same weights and fresh random inputs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
from torch import Tensor, nn

from tests.tiny import TinyModels
from trainer.model.flux import Flux
from trainer.model.packing import image_ids, text_ids
from trainer.model.weights import load_flux

if TYPE_CHECKING:
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
else:
    diffusers = pytest.importorskip("diffusers")
    FluxTransformer2DModel = diffusers.FluxTransformer2DModel


def diffusers_names(state: dict[str, Tensor], dim: int) -> dict[str, Tensor]:
    """Published weights under the names of diffusers: fused projections are split, the last modulation's halves swapped."""
    renamed: dict[str, Tensor] = {}
    direct = {
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
        "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
        "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
        "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
        "final_layer.linear": "proj_out",
    }
    double = {
        "img_mod.lin": "norm1.linear",
        "txt_mod.lin": "norm1_context.linear",
        "img_attn.proj": "attn.to_out.0",
        "txt_attn.proj": "attn.to_add_out",
        "img_attn.norm.query_norm": "attn.norm_q",
        "img_attn.norm.key_norm": "attn.norm_k",
        "txt_attn.norm.query_norm": "attn.norm_added_q",
        "txt_attn.norm.key_norm": "attn.norm_added_k",
        "img_mlp.0": "ff.net.0.proj",
        "img_mlp.2": "ff.net.2",
        "txt_mlp.0": "ff_context.net.0.proj",
        "txt_mlp.2": "ff_context.net.2",
    }
    single = {
        "modulation.lin": "norm.linear",
        "linear2": "proj_out",
        "norm.query_norm": "attn.norm_q",
        "norm.key_norm": "attn.norm_k",
    }
    for name, tensor in state.items():
        path, _, leaf = name.rpartition(".")
        leaf = "weight" if leaf == "scale" else leaf
        if path in direct:
            renamed[f"{direct[path]}.{leaf}"] = tensor
        elif path == "final_layer.adaLN_modulation.1":
            shift, scale = tensor.chunk(2)
            renamed[f"norm_out.linear.{leaf}"] = torch.cat((scale, shift))
        else:
            kind, index, part = path.split(".", 2)
            target = f"transformer_blocks.{index}" if kind == "double_blocks" else f"single_transformer_blocks.{index}"
            if part in ("img_attn.qkv", "txt_attn.qkv"):
                names = ("to_q", "to_k", "to_v") if part[:3] == "img" else ("add_q_proj", "add_k_proj", "add_v_proj")
                for piece, chunk in zip(names, tensor.chunk(3), strict=True):
                    renamed[f"{target}.attn.{piece}.{leaf}"] = chunk
            elif part == "linear1":
                *qkv, mlp = tensor.split([dim, dim, dim, tensor.shape[0] - 3 * dim])
                for piece, chunk in zip(("to_q", "to_k", "to_v"), qkv, strict=True):
                    renamed[f"{target}.attn.{piece}.{leaf}"] = chunk
                renamed[f"{target}.proj_mlp.{leaf}"] = mlp
            else:
                renamed[f"{target}.{(double if kind == 'double_blocks' else single)[part]}.{leaf}"] = tensor
    return renamed


def in_diffusers(flux: Flux) -> nn.Module:
    params = flux.params
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=params.in_channels,
        num_layers=params.depth,
        num_single_layers=params.depth_single_blocks,
        attention_head_dim=params.hidden_size // params.num_heads,
        num_attention_heads=params.num_heads,
        joint_attention_dim=params.context_in_dim,
        pooled_projection_dim=params.vec_in_dim,
        guidance_embeds=params.guidance_embed,
        axes_dims_rope=cast("tuple[int, int, int]", params.axes_dim),
    )
    model.load_state_dict(diffusers_names(flux.state_dict(), params.hidden_size))
    return model.eval().requires_grad_(False)


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
