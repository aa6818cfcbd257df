"""What a LoRA file does to the weights, computed densely and without any code of the network: W + scale * up * down."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def dense_weights(model: nn.Module, state: Mapping[str, Tensor], multiplier: float = 1.0) -> int:
    """Changes the weights of the untouched `model` as a loader of published keys does; gives the number of layers."""
    by_name = {
        prefix + path.replace(".", "_"): module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
        for prefix in ("lora_unet_", "oft_unet_", "lora_te3_", "lora_te1_", "lora_te1_text_model_")
    }
    names = {key.split(".")[0] for key in state}
    for name in names & by_name.keys():
        layer = by_name[name]
        changed = changed_weight(layer.weight.detach(), state, name)
        layer.weight = nn.Parameter(layer.weight + multiplier * (changed - layer.weight), requires_grad=False)
    return len(names & by_name.keys())


def changed_weight(weight: Tensor, state: Mapping[str, Tensor], name: str) -> Tensor:
    if f"{name}.oft_blocks.0" in state:
        return _rotated(weight, state, name)
    down, up = state[f"{name}.lora_down.weight"], state[f"{name}.lora_up.weight"]
    scale = float(state[f"{name}.alpha"]) / down.shape[0]
    changed = weight + scale * up @ down
    magnitude = state.get(f"{name}.dora_scale")
    if magnitude is None:
        return changed
    return changed * magnitude / changed.norm(dim=0 if magnitude.shape[0] == 1 else 1, keepdim=True)


def _rotated(weight: Tensor, state: Mapping[str, Tensor], name: str) -> Tensor:
    """The published formula, block by block, as a product of the whole rotation with the weight."""
    rows: list[Tensor] = []
    start, index = 0, 0
    while (blocks := state.get(f"{name}.oft_blocks.{index}")) is not None:
        size = blocks.shape[0] * blocks.shape[1]
        q = blocks - blocks.transpose(1, 2)
        limit = float(state[f"{name}.alpha"]) * size
        if q.norm() > limit:
            q = q * limit / q.norm()
        identity = torch.eye(blocks.shape[1])
        rotation = torch.block_diag(*((identity + block) @ torch.linalg.inv(identity - block) for block in q))
        rows.append(rotation.t() @ weight[start : start + size])
        start, index = start + size, index + 1
    return torch.cat(rows)
