"""What FLUX.1 and Chroma have in common: two streams that become one, from the packed latents to the last block.

B batch, N image tokens, L text tokens, C hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainer.model.attention import joint_ids, joint_key_mask, rotation_table
from trainer.model.frozen_linear import FrozenLinear
from trainer.model.half import as_stream, to_compute
from trainer.schema.chroma_header import TransformerParams

Conditioning: TypeAlias = Tensor | tuple[Tensor, ...]
"""What a block is modulated by, in the form that the block takes."""

RunKeepingInputs: TypeAlias = Callable[[nn.Module, tuple[Tensor, ...], tuple[object, ...]], object]
"""Runs a block on its streams and its other inputs so that of its insides nothing is kept for backward."""


def run_again_in_backward(block: nn.Module, streams: tuple[Tensor, ...], others: tuple[object, ...]) -> object:
    """What the block gives. Kept are its inputs, on the device (non-reentrant checkpointing)."""
    return checkpoint(block, *streams, *others, use_reentrant=False)


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
        self.rotates_in_real_numbers = False
        """Whether blocks get the rotation as cosine and sine: a compiler cannot do anything for complex numbers."""
        self._num_checkpointed: int | None = None
        self._run_keeping_inputs: RunKeepingInputs = run_again_in_backward
        self._axes_dim, self._theta = params.axes_dim, params.theta

    def enable_gradient_checkpointing(
        self, enabled: bool = True, *, num_blocks: int | None = None, run: RunKeepingInputs = run_again_in_backward
    ) -> None:
        """Keep only each block's inputs for backward and run the block again there.

        With `num_blocks` only the first so many of all blocks, in the order they run: the others' activations are gone
        when backward comes to these. `run` says where the inputs wait.
        """
        self.gradient_checkpointing = enabled
        self._num_checkpointed = num_blocks
        self._run_keeping_inputs = run

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
        double_modulation: Iterable[Conditioning],
        single_modulation: Iterable[Conditioning],
    ) -> Tensor:
        """The image's part (B, N, C) of what the last block gives.

        `img` (B, N, in_channels) and `txt` (B, L, context_in_dim) as they come, with their positions (1 or B, ., 3); of
        the modulations one for each block, asked for right before the block runs.
        """
        dtype = self.input_dtype()
        img = as_stream(self.img_in(to_compute(img, dtype)))
        txt = as_stream(self.txt_in(to_compute(txt, dtype)))
        pe = rotation_table(joint_ids(txt_ids, img_ids), self._axes_dim, self._theta)
        if self.rotates_in_real_numbers:
            pe = torch.view_as_real(pe)
        key_mask = None if txt_attention_mask is None else joint_key_mask(txt_attention_mask, img.shape[1])
        num_text = txt.shape[1]
        depth = len(self.double_blocks)
        for index, (block, modulation) in enumerate(zip(self.double_blocks, double_modulation, strict=True)):
            img, txt = cast("tuple[Tensor, Tensor]", self._run(index, block, (img, txt), (modulation, pe, key_mask)))
        x = torch.cat((txt, img), dim=1)
        del img, txt
        for index, (block, modulation) in enumerate(zip(self.single_blocks, single_modulation, strict=True), depth):
            x = cast("Tensor", self._run(index, block, (x,), (modulation, pe, key_mask)))
        return x[:, num_text:]

    def _run(self, index: int, block: nn.Module, streams: tuple[Tensor, ...], others: tuple[object, ...]) -> object:
        """Block number `index` of all."""
        is_chosen = self._num_checkpointed is None or index < self._num_checkpointed
        if self.gradient_checkpointing and is_chosen and torch.is_grad_enabled():
            return self._run_keeping_inputs(block, streams, others)
        return block(*streams, *others)
