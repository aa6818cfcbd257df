"""How long a training step takes, from its floating-point operations and the bytes that block swap moves.

The work is that of the shapes: 2 operations for each parameter and token of a Linear, 4 L^2 C for a block's attention over
L tokens of width C. Backward through a frozen base computes the gradients of activations alone: as much again for the
Linears, and 2.5 times the attention, whose forward it repeats. Checkpointing adds a forward pass. Of the swapped blocks
each comes once for the forward and once for the backward pass, but the last two are still there at the turn, and so are
the first two when the next step begins. Copies run beside the computation: each pass takes as long as the longer of the two.

The rates are assumptions about a class of cards, not measurements; what they are used for, the ratio of two settings on
the same card, depends on them less than seconds do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from trainer.schema.chroma_header import TransformerParams
from trainer.schema.memory_phases import NUM_SLOTS, text_length
from trainer.schema.parameter_counts import flux_counts, mlp_size
from trainer.schema.swap_counts import split_swap

if TYPE_CHECKING:
    from trainer.schema.options import Options

PRACTICAL_SHARE: Final = 0.5
"""Part of a card's data-sheet rate that a training step reaches. Assumed."""
FP32_SHARE: Final = 0.25
"""Rate of fp32 products as a part of bf16's. Assumed."""


@dataclass(frozen=True)
class Rates:
    """A class of cards: dense bf16 operations and bytes from the host, both a second."""

    name: str
    flops: float
    transfer_bytes: float


# Data-sheet figures of dense bf16 products with fp32 sums; the copies as measured by others over PCIe 3, 4 and 5.
_CLASSES: Final = (
    (13.0, Rates("RTX 3060 class", 25e12, 12e9)),
    (17.0, Rates("RTX 4060 Ti class", 44e12, 12e9)),
    (33.0, Rates("RTX 3090 class", 71e12, 25e9)),
    (56.0, Rates("RTX A6000 class", 155e12, 25e9)),
    (float("inf"), Rates("H100 class", 790e12, 50e9)),
)


def rates_for(vram_bytes: int | None) -> Rates:
    """The assumed rates of a card of this size: those of the slower usual card. None is taken as 24 GiB."""
    gib = 24.0 if vram_bytes is None else vram_bytes / 2**30
    return next(rates for limit, rates in _CLASSES if gib < limit)


@dataclass(frozen=True)
class StepTime:
    """One micro-step. `seconds` has what of the copies the computation does not hide."""

    forward_flops: float
    backward_flops: float
    transfer_bytes: int
    compute_seconds: float
    seconds: float


def forward_flops(flux: TransformerParams, num_image: int, num_text: int, batch_size: int) -> tuple[float, float]:
    """Operations of the blocks' Linears and of their attention in one forward pass. Modulation, once a sample, is left out."""
    c, m = flux.hidden_size, mlp_size(flux)
    tokens = num_image + num_text
    double = 4 * c * c + 2 * c * m
    single = c * (3 * c + m) + (c + m) * c
    linear = 2.0 * tokens * (flux.depth * double + flux.depth_single_blocks * single)
    attention = 4.0 * tokens * tokens * c * (flux.depth + flux.depth_single_blocks)
    return batch_size * linear, batch_size * attention


def step_transfer_bytes(flux: TransformerParams, blocks_to_swap: int, value_bytes: float) -> tuple[int, int]:
    """Bytes that come to the device for a forward and for a backward pass of one micro-step."""
    counts = flux_counts(flux)
    num_double, num_single = split_swap(blocks_to_swap)
    sizes = [counts.double_linear] * num_double + [counts.single_linear] * num_single
    return round(value_bytes * sum(sizes[NUM_SLOTS:])), round(value_bytes * sum(sizes[:-NUM_SLOTS]))


def step_time(
    flux: TransformerParams,
    options: Options,
    *,
    width: int,
    height: int,
    batch_size: int,
    blocks_to_swap: int,
    rates: Rates,
    value_bytes: float | None = None,
) -> StepTime:
    """One micro-step on pictures of `width` x `height`; `value_bytes` is what a stored base weight takes."""
    is_fp32 = options.mixed_precision == "no"
    linear, attention = forward_flops(flux, (width // 16) * (height // 16), text_length(flux, options), batch_size)
    forward, backward = linear + attention, linear + 2.5 * attention
    if options.gradient_checkpointing:
        backward += forward
    to_forward, to_backward = step_transfer_bytes(
        flux, blocks_to_swap, value_bytes if value_bytes is not None else 4 if is_fp32 else 2
    )
    flops = rates.flops * PRACTICAL_SHARE * (FP32_SHARE if is_fp32 else 1)
    return StepTime(
        forward,
        backward,
        to_forward + to_backward,
        (forward + backward) / flops,
        max(forward / flops, to_forward / rates.transfer_bytes)
        + max(backward / flops, to_backward / rates.transfer_bytes),
    )
