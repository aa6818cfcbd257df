"""OFT: a rotation of the Linear's outputs, block by block (`networks.oft_flux`), after Qiu et al., "Controlling
Text-to-Image Diffusion by Orthogonal Finetuning" (2023), arXiv 2306.07280, with the file format of kohya-ss/sd-scripts.

Q = P - P', its norm held below alpha * (size of the part); R = (I + Q) (I - Q)^-1, which is orthogonal; the outputs of a
block, as a row, are multiplied with multiplier * (R - I) + I. The bias is not rotated. K blocks, S block size, I in and O
out features; a fused Linear has blocks for each of its parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from trainer.lora.adapter import Adapter, Trained, product_without_bias, wrong_part
from trainer.lora.half import held
from trainer.lora.split import part_slices
from trainer.schema.base import UserError

_TINY = 1e-8


class OftLinear(Adapter):
    """Stands in the place of the Linear that it holds as `base`. `blocks_0`, `blocks_1`, ... (K, S, S) train, one for each
    part.

    Rotating the output instead of the weight costs little and needs the weight for nothing but its product, so that it
    may be swapped out.
    """

    def __init__(self, base: nn.Linear, num_blocks: int, alpha: float, splits: tuple[int, ...]) -> None:
        super().__init__(base)
        self.num_blocks = num_blocks
        self._alpha = alpha
        self.parts = part_slices(splits)
        for index, size in enumerate(splits):
            if size % num_blocks:
                raise UserError(
                    f"OFT divides each layer into network_dim blocks, but {size} cannot be divided by {num_blocks}",
                    "--network_dim",
                    "Use a power of two, such as 4.",
                    field="network_dim",
                    exit_code=2,
                )
            side = size // num_blocks
            blocks = torch.zeros(num_blocks, side, side, device=base.weight.device)
            self.register_parameter(f"blocks_{index}", nn.Parameter(blocks))

    @property
    def alpha(self) -> float:
        return self._alpha

    @alpha.setter
    def alpha(self, alpha: float) -> None:
        self._alpha = alpha

    def trained(self) -> tuple[Trained, ...]:
        return tuple(Trained(f"blocks_{index}", "blocks", blocks) for index, blocks in enumerate(self.blocks()))

    def blocks(self) -> Sequence[nn.Parameter]:
        return [cast("nn.Parameter", getattr(self, f"blocks_{index}")) for index in range(len(self.parts))]

    def turns(self) -> list[Tensor]:
        """multiplier * (R - I), (K, S, S), of each part."""
        device = self.base.weight.device.type
        with torch.autocast(device, enabled=False):
            return [
                self.multiplier * _cayley_change(blocks, self.alpha * (part.stop - part.start))
                for blocks, part in zip(self.blocks(), self.parts, strict=True)
            ]

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        if self.multiplier == 0:
            return self.base(x)
        output = held(product_without_bias(self.base, x))
        turned = [
            # What is added is small beside the output: in a low precision it is kept apart until the end.
            torch.einsum(
                "...kn,knm->...km", output[..., part].unflatten(-1, (self.num_blocks, -1)), turn.to(output.dtype)
            ).flatten(-2)
            for part, turn in zip(self.parts, self.turns(), strict=True)
        ]
        output = output + held(torch.cat(turned, dim=-1))
        return output if self.bias is None else output + self.bias.to(output.dtype)

    def published(self) -> dict[str, Tensor]:
        state = {f"oft_blocks.{index}": blocks.detach() for index, blocks in enumerate(self.blocks())}
        return {"alpha": torch.tensor(self.alpha), **state}

    def load(self, tensors: Mapping[str, Tensor], name: str, where: str) -> None:
        for index, blocks in enumerate(self.blocks()):
            tensor = tensors.get(f"oft_blocks.{index}")
            if tensor is None:
                raise wrong_part(f"{name} has no oft_blocks.{index}", where, "The file is incomplete.")
            if tensor.shape != blocks.shape:
                raise wrong_part(
                    f"{name} has blocks {list(tensor.shape)} in the file and {list(blocks.shape)} here",
                    where,
                    f"Use --network_dim={tensor.shape[0]}, or the model that the file belongs to.",
                )
            blocks.data.copy_(tensor)
        if "alpha" in tensors:
            self._alpha = cast("float", tensors["alpha"].item())


def rotated_weight(weight: Tensor, blocks: Sequence[Tensor], alpha: float, parts: Sequence[slice]) -> Tensor:
    """The weight (O, I) that gives the rotated outputs."""
    rows: list[Tensor] = []
    for one, part in zip(blocks, parts, strict=True):
        turn = _cayley_change(one, alpha * (part.stop - part.start))
        grouped = weight[part].unflatten(0, (one.shape[0], -1))
        rows.append((grouped + torch.einsum("knm,kni->kmi", turn, grouped)).flatten(0, 1))
    return torch.cat(rows)


def _cayley_change(blocks: Tensor, limit: float) -> Tensor:
    """R - I = 2 Q (I - Q)^-1 for Q = P - P' with its norm held below `limit`."""
    # No format of 16 bit has a solver, or would keep the blocks orthogonal.
    q = (blocks - blocks.transpose(1, 2)).float()
    norm = q.norm()
    q = q * ((norm.clamp(max=limit) + _TINY) / (norm + _TINY))
    identity = torch.eye(q.shape[-1], device=q.device)
    return torch.linalg.solve(identity - q, 2 * q, left=False)
