"""LoRAs with random weights in every layer, under published keys."""

from __future__ import annotations

import torch
from torch import Tensor

LAYERS = {
    "lora_unet_double_blocks_0_img_attn_qkv": (3, 1),
    "lora_unet_double_blocks_0_txt_attn_qkv": (3, 1),
    "lora_unet_double_blocks_0_img_attn_proj": (1, 1),
    "lora_unet_double_blocks_0_txt_attn_proj": (1, 1),
    "lora_unet_double_blocks_0_img_mlp_0": (4, 1),
    "lora_unet_double_blocks_0_img_mlp_2": (1, 4),
    "lora_unet_double_blocks_0_txt_mlp_0": (4, 1),
    "lora_unet_double_blocks_0_txt_mlp_2": (1, 4),
    "lora_unet_double_blocks_0_img_mod_lin": (6, 1),
    "lora_unet_double_blocks_0_txt_mod_lin": (6, 1),
    "lora_unet_single_blocks_1_linear1": (7, 1),
    "lora_unet_single_blocks_1_linear2": (1, 5),
    "lora_unet_single_blocks_1_modulation_lin": (3, 1),
    "lora_unet_time_in_in_layer": (1, 2),
    "lora_unet_final_layer_adaLN_modulation_1": (2, 1),
}
"""Published name -> out and in features, in multiples of the hidden size."""
TEXT_LAYERS = (
    "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
    "lora_te1_text_model_encoder_layers_0_mlp_fc1",
    "lora_te3_encoder_block_2_layer_0_SelfAttention_q",
    "lora_te3_encoder_block_2_layer_1_DenseReluDense_wi_0",
)


def random_lora(
    *,
    rank: int = 4,
    alpha: float = 1.0,
    hidden: int = 32,
    dtype: torch.dtype = torch.float32,
    names: tuple[str, ...] | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """alpha (float), down and up of FLUX's and the text encoders' layers, or of `names`."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    for name in names if names is not None else (*LAYERS, *TEXT_LAYERS):
        wide_out, wide_in = LAYERS.get(name, (1, 1))
        down = torch.randn(rank, wide_in * hidden, generator=generator)
        up = torch.randn(wide_out * hidden, rank, generator=generator)
        state |= published(name, down.to(dtype), up.to(dtype), torch.tensor(alpha, dtype=dtype))
    return state


def published(name: str, down: Tensor, up: Tensor, alpha: Tensor) -> dict[str, Tensor]:
    return {f"{name}.alpha": alpha, f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}


def deltas(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What each adapter of a published state adds to its layer's weight."""
    names = [key.removesuffix(".lora_down.weight") for key in state if key.endswith(".lora_down.weight")]
    return {
        name: (state[f"{name}.lora_up.weight"].double() @ state[f"{name}.lora_down.weight"].double())
        * (float(state[f"{name}.alpha"]) / state[f"{name}.lora_down.weight"].shape[0])
        for name in names
    }


def assert_same_tensors(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same keys, number types and bits."""
    assert set(ours) == set(expected)
    for key, tensor in expected.items():
        assert ours[key].dtype == tensor.dtype, key
        assert torch.equal(ours[key], tensor), key
