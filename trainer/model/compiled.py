"""The blocks of a transformer through torch.compile, each by itself."""

from __future__ import annotations

import warnings
from typing import Final

import torch

from trainer.model.joint import JointTransformer

RECOMPILE_LIMIT: Final = 64


def compile_blocks(model: JointTransformer, *, backend: str, mode: str | None = None) -> None:
    """Compiles what each block computes when it first runs. Blocks of one kind share what is compiled.

    The adapters must be in place. Hooks and checkpointing stay outside of what is compiled, so that weights may still
    come and go between the blocks. What is compiled keeps weights for backward, so that a block whose weights leave
    the device before its backward pass must be checkpointed.
    """
    # The compiler looks at every input's `.grad`, and torch warns of that where the input is no leaf.
    warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor that is not a leaf")
    # One for each size of bucket: past the limit, 8 by itself, blocks would run uncompiled.
    config = torch._dynamo.config  # pyright: ignore[reportPrivateUsage]
    config.recompile_limit = max(config.recompile_limit, RECOMPILE_LIMIT)
    model.rotates_in_real_numbers = True
    for block in model.blocks():
        block.forward = torch.compile(block.forward, backend=backend, mode=mode)
