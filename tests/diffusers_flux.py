"""The same transformer in diffusers: names, weights and construction, for parity tests and the benchmark."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import pytest
import torch
from torch import Tensor, nn

from trainer.model.chroma import Chroma
from trainer.model.flux import Flux

if TYPE_CHECKING:
    from diffusers.models.transformers.transformer_chroma import ChromaTransformer2DModel
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
else:
    diffusers = pytest.importorskip("diffusers")
    ChromaTransformer2DModel = diffusers.ChromaTransformer2DModel
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
        if path.startswith("distilled_guidance_layer."):
            path = path.replace("in_layer", "linear_1").replace("out_layer", "linear_2")
            renamed[f"{path}.{leaf}"] = tensor
        elif path in direct:
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


def chroma_in_diffusers(chroma: Chroma) -> nn.Module:
    params = chroma.params
    model = ChromaTransformer2DModel(
        patch_size=1,
        in_channels=params.in_channels,
        num_layers=params.depth,
        num_single_layers=params.depth_single_blocks,
        attention_head_dim=params.hidden_size // params.num_heads,
        num_attention_heads=params.num_heads,
        joint_attention_dim=params.context_in_dim,
        axes_dims_rope=params.axes_dim,
        approximator_num_channels=params.approximator_in_dim,
        approximator_hidden_dim=params.approximator_hidden_size,
        approximator_layers=params.approximator_depth,
    )
    model.load_state_dict(diffusers_names(chroma.state_dict(), params.hidden_size))
    # The published code has 1e-6 here as everywhere; diffusers leaves it to torch, whose default depends on the type.
    for norm in model.distilled_guidance_layer.norms:
        cast("nn.RMSNorm", norm).eps = 1e-6
    return model.eval().requires_grad_(False)


def diffusers_lora(state: dict[str, Tensor], dim: int) -> dict[str, Tensor]:
    """A published LoRA's FLUX part under diffusers' names, alpha / rank folded into `lora_A`.

    The same map that diffusers' own loader applies; that one knows only the published width for `linear1` of the single
    blocks. A fused projection shares its `lora_A`, and its `lora_B` is cut like the weight.
    """
    renamed: dict[str, Tensor] = {}
    for key, down in state.items():
        if not (key.startswith("lora_unet_") and key.endswith(".lora_down.weight")):
            continue
        name = key.removesuffix(".lora_down.weight")
        up = state[f"{name}.lora_up.weight"]
        scale = float(state[f"{name}.alpha"]) / down.shape[0]
        path = published_path(name)
        # The stand-in has the shape of the Linear's weight up to the columns, so the weight's own map cuts it.
        for target, piece in diffusers_names({f"{path}.weight": up}, dim).items():
            module = f"transformer.{target.removesuffix('.weight')}"
            renamed[f"{module}.lora_A.weight"] = down.float() * scale
            renamed[f"{module}.lora_B.weight"] = piece.float().contiguous()
    return renamed


def published_path(name: str) -> str:
    """Module path in the published model of an adapter's name: lora_unet_double_blocks_3_img_attn_qkv and the like."""
    kind, index, part = name.removeprefix("lora_unet_").split("_blocks_")[0], *name.split("_blocks_")[1].split("_", 1)
    attention = {"img_attn_qkv": "img_attn.qkv", "txt_attn_qkv": "txt_attn.qkv"}
    parts = {
        **attention,
        **{f"{stream}_attn_proj": f"{stream}_attn.proj" for stream in ("img", "txt")},
        **{f"{stream}_mlp_{layer}": f"{stream}_mlp.{layer}" for stream in ("img", "txt") for layer in (0, 2)},
        **{f"{stream}_mod_lin": f"{stream}_mod.lin" for stream in ("img", "txt")},
        "modulation_lin": "modulation.lin",
        "linear1": "linear1",
        "linear2": "linear2",
    }
    return f"{kind}_blocks.{index}.{parts[part]}"
