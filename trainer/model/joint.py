"""What FLUX.1 and Chroma have in common: two streams that become one, from the packed latents to the last block.

B batch, N image tokens, L text tokens, C hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainer.model.attention import joint_ids, joint_key_mask, rotation_table
from trainer.model.frozen_linear import FrozenLinear
from trainer.model.half import as_stream, to_compute
from trainer.schema.chroma_header import TransformerParams


class JointTransformer(nn.Module):
    """Runs the blocks that a subclass makes. Nothing in it knows about LoRA, block swap or quantised storage: those are put
    on from outside."""

    img_in: FrozenLinear
    txt_in: FrozenLinear
    double_blocks: nn.ModuleList
    single_blocks: nn.ModuleList

    def __init__(self, params: TransformerParams) -> None:
        super().__init__()
        if sum(params.axes_dim) * params.num_heads != params.hidden_size:
            raise ValueError(f"axes_dim {params.axes_dim} times {params.num_heads} heads is not {params.hidden_size}")
        self.gradient_checkpointing = False
        self._axes_dim, self._theta = params.axes_dim, params.theta

    def enable_gradient_checkpointing(self, enabled: bool = True) -> None:
        """Keep only each block's inputs for backward and run the block again there (non-reentrant)."""
        self.gradient_checkpointing = enabled

    def blocks(self) -> Iterator[nn.Module]:
        """All blocks in the order they run."""
        yield from self.double_blocks
        yield from self.single_blocks

    def input_dtype(self) -> torch.dtype:
        """The type of the weights, to which inputs are cast."""
        # No LoRA ever wraps this Linear, so that it has its weight at hand.
        return self.get_parameter("final_layer.linear.weight").dtype

    def run_blocks(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        txt_attention_mask: Tensor | None,
        double_modulation: Sequence[Tensor],
        single_modulation: Sequence[Tensor],
    ) -> Tensor:
        """The image's part (B, N, C) of what the last block gives.

        `img` (B, N, in_channels) and `txt` (B, L, context_in_dim) as they come, with their positions (1 or B, ., 3); of
        the modulations one for each block, in the form that the block takes.
        """
        dtype = self.input_dtype()
        img = as_stream(self.img_in(to_compute(img, dtype)))
        txt = as_stream(self.txt_in(to_compute(txt, dtype)))
        pe = rotation_table(joint_ids(txt_ids, img_ids), self._axes_dim, self._theta)
        key_mask = None if txt_attention_mask is None else joint_key_mask(txt_attention_mask, img.shape[1])
        num_text = txt.shape[1]
        for block, modulation in zip(self.double_blocks, double_modulation, strict=True):
            img, txt = cast("tuple[Tensor, Tensor]", self._run(block, img, txt, modulation, pe, key_mask))
        x = torch.cat((txt, img), dim=1)
        for block, modulation in zip(self.single_blocks, single_modulation, strict=True):
            x = cast("Tensor", self._run(block, x, modulation, pe, key_mask))
        return x[:, num_text:]

    def _run(self, block: nn.Module, *inputs: Tensor | None) -> object:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)
