"""Makes `presets/vram-*.toml`: for each size of card the settings that the memory estimate picks.

    python -m trainer.tools.make_vram_presets [FOLDER]

The rule: the storage that changes the base least and fits card and main memory, unless one in fewer bits is predicted to be
more than a tenth faster; with it the fastest of the ways to trade memory for time. What a preset assumes stands in its
file. Makes the same bytes each time, so that a test can compare.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from trainer.schema.memory_phases import GIB, gib_text
from trainer.schema.memory_plan import Choice, Plan, plan_for
from trainer.schema.options import Options
from trainer.schema.presets import BUILT_IN_DIR
from trainer.schema.storage import Storage, stored_as
from trainer.schema.swap_counts import max_blocks_to_swap

RANK: Final = 32
"""The largest rank that a built-in purpose asks for, so that each of them fits."""
WORTHWHILE: Final = 1.1
"""So many times as fast must a storage in fewer bits be before it is taken without need."""
_STORAGES: Final[tuple[Storage, ...]] = ("compute", "int8", "fp8", "nf4")
_STORED: Final = {
    "compute": "the base in bf16",
    "fp8": "the base in fp8",
    "int8": "the base in int8",
    "nf4": "the base in nf4",
}


@dataclass(frozen=True)
class Card:
    """A size of card in GiB, the main memory that such a machine is taken to have, and the pictures' side."""

    vram_gb: int
    ram_gb: int
    side: int


CARDS: Final = (
    Card(6, 16, 512),
    Card(8, 16, 1024),
    Card(10, 16, 1024),
    Card(12, 16, 1024),
    Card(16, 32, 1024),
    Card(24, 32, 1024),
    Card(48, 64, 1024),
    Card(80, 64, 1024),
)


def card_options(card: Card) -> Options:
    """What every preset has in common, with the purpose that needs the most."""
    return Options.model_validate(
        {
            "mixed_precision": "bf16",
            "gradient_checkpointing": True,
            "cache_latents": True,
            "cache_text_encoder_outputs": True,
            "optimizer_type": "AdamW8bit",
            "resolution": str(card.side),
            "train_batch_size": 1,
            "network_dim": RANK,
            "network_train_unet_only": True,
            "sample_prompts": "prompts.txt",
            "sample_every_n_epochs": 1,
        }
    )


def pick(card: Card) -> tuple[Plan, Choice]:
    """The plan for a card, and the choice that its preset is made of."""
    options = card_options(card)
    plan = plan_for(options, card.vram_gb * GIB, card.ram_gb * GIB)
    fitting = [*([plan.choice] if plan.fits else []), *plan.alternatives]
    # A preset is for machines of which nobody knows how fast their disks are.
    fitting = [choice for choice in fitting if choice.changes.get("offload_modulation") != "file"] or fitting
    best: Choice | None = None
    for storage in _STORAGES:
        stored = [choice for choice in fitting if _storage(options, choice) == storage]
        if stored:
            fastest = min(stored, key=lambda choice: choice.step_seconds)
            if best is None or best.step_seconds > WORTHWHILE * fastest.step_seconds:
                best = fastest
    if best is None:
        raise ValueError(f"nothing fits a card of {card.vram_gb} GiB: {plan.impossible}")
    return plan, best


def _storage(options: Options, choice: Choice) -> Storage:
    return stored_as(options.model_copy(update=dict(choice.changes)))


def preset_text(card: Card) -> str:
    """The file of a card's preset."""
    plan, choice = pick(card)
    options = card_options(card)
    checkpointing = bool(choice.changes.get("gradient_checkpointing", options.gradient_checkpointing))
    storage, estimate = _storage(options, choice), choice.estimate
    largest = max_blocks_to_swap(19, 38)
    where = "no block swapped" if not choice.blocks_to_swap else f"{choice.blocks_to_swap} of {largest} blocks swapped"
    levers = "".join(
        f"{name} = {json.dumps(choice.changes[name])}\n"
        for name in ("checkpoint_blocks", "cpu_offload_checkpointing", "offload_modulation")
        if name in choice.changes
    )
    storage_line = "" if storage == "compute" else f'base_storage = "{storage}"\n'
    return f"""\
# Made by `python -m trainer.tools.make_vram_presets` from the memory estimate, not by hand.
# Assumed: FLUX.1-dev, {card.side} pixels, batch 1, LoRA of rank {RANK} on all Linears, samples of the pictures' size,
# {card.ram_gb} GiB of main memory, {gib_text(plan.usable_vram_bytes or 0)} of the card free for the run.
# Estimated: {gib_text(estimate.peak_bytes)} on the card, {gib_text(estimate.host_peak_bytes)} of main memory. Not measured on a GPU.
[preset]
title = "{card.vram_gb} GB"
description = "{card.side} pixels, {_STORED[storage]}, {where}; for a machine with {card.ram_gb} GB of main memory."
kind = "vram"
order = {card.vram_gb}
vram_gb = {card.vram_gb}

[options]
mixed_precision = "bf16"
{storage_line}gradient_checkpointing = {str(checkpointing).lower()}
{levers}cache_latents = true
cache_text_encoder_outputs = true
optimizer_type = "AdamW8bit"
blocks_to_swap = {choice.blocks_to_swap}
resolution = "{card.side}"
train_batch_size = 1
"""


def preset_name(card: Card) -> str:
    return f"vram-{card.vram_gb:02d}.toml"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer.tools.make_vram_presets")
    parser.add_argument("folder", type=Path, nargs="?", default=BUILT_IN_DIR, help="where to write them")
    folder: Path = parser.parse_args(arguments).folder
    for card in CARDS:
        (folder / preset_name(card)).write_text(preset_text(card), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
