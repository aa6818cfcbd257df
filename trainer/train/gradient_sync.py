"""What the processes of a run tell each other at the end of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Wishes:
    """What is asked for after the step in progress, by commands, signals and clocks, which only some ranks have."""

    stop: bool = False
    save: bool = False
    sample: bool = False
    state: bool = False


class GradientSync:
    """Averages gradients over processes in one flat reduction; does nothing in a single process.

    `reduce` is accelerate's mean reduction of one tensor. The wishes travel along, so that every rank does the same
    after the same step: what one wishes, all do.
    """

    def __init__(self, reduce: Callable[[Tensor], Tensor], num_processes: int) -> None:
        self._reduce = reduce
        self.num_processes = num_processes

    def __call__(self, parameters: Sequence[nn.Parameter], wishes: Wishes) -> Wishes:
        if self.num_processes == 1:
            return wishes
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        flags = torch.tensor([float(flag) for flag in astuple(wishes)], device=gradients[0].device)
        flat = self._reduce(torch.cat([flags, *(g.detach().float().reshape(-1) for g in gradients)]))
        offset = len(flags)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            count = gradient.numel()
            parameter.grad = flat[offset : offset + count].view_as(gradient).to(gradient.dtype)
            offset += count
        return Wishes(*(share > 0 for share in flat[: len(flags)].tolist()))
