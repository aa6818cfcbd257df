"""`base_weights`: LoRA files that become part of the frozen models before anything is trained or encoded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import reduce

from torch import nn

from trainer.lora.forms import to_published
from trainer.lora.lora_file import read_lora_file
from trainer.lora.merge import WeightChange, components_of, merge_file, weight_change
from trainer.lora.naming import Component
from trainer.schema.options import Options
from trainer.train.file_hashes import files_identity


def merge_base_weights(models: Mapping[Component, nn.Module], options: Options) -> list[str]:
    """Merges every file's layers that belong to `models`, in the order of the files; a line about each file.

    Weights that are stored in fewer bits must have been merged while they were read; see `base_weights_change`.
    """
    lines: list[str] = []
    multipliers = options.base_weights_multiplier or ()
    for index, path in enumerate(options.base_weights or ()):
        multiplier = multipliers[index] if index < len(multipliers) else 1.0
        published = to_published(*read_lora_file(path), where=str(path))
        num_merged, unknown = merge_file(
            models, published.state, published.metadata, multiplier, str(path), stored_are_merged=True
        )
        left_out = f"; {len(unknown)} layers are not in this model: {', '.join(unknown[:3])}" if unknown else ""
        lines.append(f"merged {num_merged} layers of {path} at strength {multiplier:g}{left_out}")
    return lines


def base_weights_change(options: Options, component: Component) -> Callable[[str], WeightChange | None] | None:
    """What the files make of a Linear's weight, by the Linear's path; None without files.

    For weights that are merged while they are read, before they are stored in fewer bits.
    """
    multipliers = options.base_weights_multiplier or ()
    files: list[Callable[[str], WeightChange | None]] = []
    for index, path in enumerate(options.base_weights or ()):
        multiplier = multipliers[index] if index < len(multipliers) else 1.0
        published = to_published(*read_lora_file(path), where=str(path))
        if component in components_of(published.state):
            files.append(weight_change(component, published.state, published.metadata, multiplier, str(path)))
    if not files:
        return None

    def change_of(path: str) -> WeightChange | None:
        changes = [change for file in files if (change := file(path)) is not None]
        if not changes:
            return None
        return lambda weight: reduce(lambda found, change: change(found), changes, weight)

    return change_of


def base_weights_identity(options: Options, components: Collection[Component]) -> list[str]:
    """What an encoding by these components depends on besides their own files."""
    found: list[str] = []
    multipliers = options.base_weights_multiplier or ()
    for index, path in enumerate(options.base_weights or ()):
        if components_of(to_published(*read_lora_file(path), where=str(path)).state) & set(components):
            found += [
                files_identity([path], None, lambda: None),
                str(multipliers[index] if index < len(multipliers) else 1.0),
            ]
    return found
