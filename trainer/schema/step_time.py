"""How long a training step takes, from its floating-point operations and the bytes that block swap moves.

The work is that of the shapes: 2 operations for each parameter and token of a Linear, 4 L^2 C for a block's attention over
L tokens of width C. Backward through a frozen base computes the gradients of activations alone: as much again for the
Linears, and 2.5 times the attention, whose forward it repeats. Checkpointing adds a forward pass. Of the swapped blocks
each comes once for the forward and once for the backward pass, but the last two are still there at the turn, and so are
the first two when the next step begins. Weights that are stored in fewer bits are made dense in each pass. Copies run beside the computation: each pass takes as long as the longer of the two.

The rates are assumptions about a class of cards, not measurements; what they are used for, the ratio of two settings on
the same card, depends on them less than seconds do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from trainer.schema.chroma_header import TransformerParams
from trainer.schema.memory_phases import NUM_SLOTS, modulates_outside, num_checkpointed, text_length
from trainer.schema.parameter_counts import mlp_size
from trainer.schema.storage import Storage, block_bytes, modulation_bytes, stored_as
from trainer.schema.swap_counts import split_swap

if TYPE_CHECKING:
    from trainer.schema.options import Options

PRACTICAL_SHARE: Final = 0.5
"""Part of a card's data-sheet rate that a training step reaches. Assumed."""
FP32_SHARE: Final = 0.25
"""Rate of fp32 products as a part of bf16's. Assumed."""


@dataclass(frozen=True)
class Rates:
    """A class of cards: dense bf16 operations, bytes from the host, and bytes of its own memory, all a second."""

    name: str
    flops: float
    transfer_bytes: float
    memory_bytes: float


# Data-sheet figures of dense bf16 products with fp32 sums; the copies as measured by others over PCIe 3, 4 and 5.
_CLASSES: Final = (
    (13.0, Rates("RTX 3060 class", 25e12, 12e9, 360e9)),
    (17.0, Rates("RTX 4060 Ti class", 44e12, 12e9, 288e9)),
    (33.0, Rates("RTX 3090 class", 71e12, 25e9, 936e9)),
    (56.0, Rates("RTX A6000 class", 155e12, 25e9, 768e9)),
    (float("inf"), Rates("H100 class", 790e12, 50e9, 3350e9)),
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


def step_transfer_bytes(
    flux: TransformerParams, blocks_to_swap: int, storage: Storage, value_bytes: int, *, with_modulation: bool = True
) -> tuple[int, int]:
    """Bytes that come to the device for a forward and for a backward pass of one micro-step."""
    double, single = block_bytes(flux, storage, value_bytes, with_modulation=with_modulation)
    num_double, num_single = split_swap(blocks_to_swap)
    sizes = [double] * num_double + [single] * num_single
    return sum(sizes[NUM_SLOTS:]), sum(sizes[:-NUM_SLOTS])


def dense_traffic_bytes(flux: TransformerParams, storage: Storage, value_bytes: int) -> int:
    """What one pass reads and writes in the card's memory to make stored weights dense; 0 where they are dense."""
    if storage == "compute":
        return 0
    plain, stored = (
        sum(count * size for count, size in zip((flux.depth, flux.depth_single_blocks), sizes, strict=True))
        for sizes in (block_bytes(flux, "compute", value_bytes), block_bytes(flux, storage, value_bytes))
    )
    return plain + stored


def step_time(
    flux: TransformerParams,
    options: Options,
    *,
    width: int,
    height: int,
    batch_size: int,
    blocks_to_swap: int,
    rates: Rates,
) -> StepTime:
    """One micro-step on pictures of `width` x `height`."""
    is_fp32 = options.mixed_precision == "no"
    linear, attention = forward_flops(flux, (width // 16) * (height // 16), text_length(flux, options), batch_size)
    forward, backward = linear + attention, linear + 2.5 * attention
    # All blocks have the same work, double or single.
    num_twice = num_checkpointed(flux, options)
    share_twice = num_twice / (flux.depth + flux.depth_single_blocks)
    backward += share_twice * forward
    storage, value_bytes = stored_as(options, flux), 4 if is_fp32 else 2
    outside = modulates_outside(flux, options)
    to_forward, to_backward = step_transfer_bytes(
        flux, blocks_to_swap, storage, value_bytes, with_modulation=not outside
    )
    if outside:
        to_forward += modulation_bytes(flux, value_bytes)[0]
    if options.cpu_offload_checkpointing:
        tokens = batch_size * ((width // 16) * (height // 16) + text_length(flux, options))
        to_backward += num_twice * tokens * flux.hidden_size * value_bytes
    flops = rates.flops * PRACTICAL_SHARE * (FP32_SHARE if is_fp32 else 1)
    dense = dense_traffic_bytes(flux, storage, value_bytes) / rates.memory_bytes
    forward_seconds = forward / flops + dense
    backward_seconds = backward / flops + dense * (1 + share_twice)
    return StepTime(
        forward,
        backward,
        to_forward + to_backward,
        forward_seconds + backward_seconds,
        max(forward_seconds, to_forward / rates.transfer_bytes)
        + max(backward_seconds, to_backward / rates.transfer_bytes),
    )
