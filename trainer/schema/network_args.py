"""The keys of `network_args` of each network module, and how their values are read. No torch here."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Final, Literal

from trainer.schema.base import nearest

NetworkKind = Literal["lora", "oft", "lycoris"]
TrainBlocks = Literal["all", "single", "double"]
DoraAxis = Literal["in", "out"]

IN_LAYERS: tuple[str, ...] = ("img_in", "time_in", "vector_in", "guidance_in", "txt_in")
"""The layers in front of the blocks, in the order of `in_dims`."""

TYPE_DIMS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "img_attn_dim": ("img_attn",),
        "txt_attn_dim": ("txt_attn",),
        "img_mlp_dim": ("img_mlp",),
        "txt_mlp_dim": ("txt_mlp",),
        "img_mod_dim": ("img_mod",),
        "txt_mod_dim": ("txt_mod",),
        "single_dim": ("single", "linear"),
        "single_mod_dim": ("single", "modulation"),
    }
)
"""Option -> words that a published name holds when the option applies to it."""

KINDS: Final[Mapping[str | None, NetworkKind]] = MappingProxyType(
    {
        None: "lora",
        "networks.lora": "lora",
        "networks.lora_flux": "lora",
        "networks.oft_flux": "oft",
        "lycoris.kohya": "lycoris",
    }
)
"""`network_module` -> the kind of network."""

LORAPLUS_KEYS: Final = ("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio")

_LORA_KEYS: Final = (
    "verbose",
    "rank_dropout",
    "module_dropout",
    "train_blocks",
    "train_double_block_indices",
    "train_single_block_indices",
    "in_dims",
    *TYPE_DIMS,
    "split_qkv",
    "train_t5xxl",
    "ggpo_sigma",
    "ggpo_beta",
    "network_reg_dims",
    "network_reg_lrs",
    *LORAPLUS_KEYS,
    # Ours.
    "dora",
    "dora_axis",
    "rslora",
    "pissa",
    "pissa_niter",
)
_LYCORIS_KEYS: Final = (
    "algo",
    "preset",
    "conv_dim",
    "conv_alpha",
    "dropout",
    "rank_dropout",
    "module_dropout",
    "use_tucker",
    "use_cp",
    "use_conv_cp",
    "disable_conv_cp",
    "use_scalar",
    "block_size",
    "train_norm",
    "constraint",
    "rescaled",
    "dora_wd",
    "wd_on_output",
    "full_matrix",
    "bypass_mode",
    "rs_lora",
    "unbalanced_factorization",
    "decompose_both",
    "factor",
    *LORAPLUS_KEYS,
)
KEYS: Final[Mapping[NetworkKind, tuple[str, ...]]] = MappingProxyType(
    {"lora": _LORA_KEYS, "oft": ("enable_all_linear", "verbose"), "lycoris": _LYCORIS_KEYS}
)

_NOT_IN_LORA: Mapping[str, str] = MappingProxyType(
    {
        "conv_dim": "FLUX has no convolutions; leave it out",
        "conv_alpha": "FLUX has no convolutions; leave it out",
        "dropout": "use network_dropout",
        "dora_wd": "use dora",
        "rs_lora": "use rslora",
        "enable_all_linear": "it belongs to networks.oft_flux",
        "algo": "it belongs to lycoris.kohya",
    }
)

SWITCHED_ON: Final = frozenset({"true", "1"})
_SWITCHED_OFF: Final = frozenset({"false", "0"})


def fused_parts(name: str, num_in: int, num_out: int) -> tuple[int, ...]:
    """Sizes of the parts of the fused Linear with this published name; one part for every other Linear."""
    if name.endswith("_attn_qkv"):
        return (num_out // 3,) * 3
    if "_single_blocks_" in name and name.endswith("_linear1"):
        return (num_in, num_in, num_in, num_out - 3 * num_in)
    return (num_out,)


def split_pairs(
    network_args: Sequence[str], kind: NetworkKind, complain: Callable[[str, str | None], None]
) -> dict[str, str]:
    """Key -> value of the `key=value` texts that `kind` knows; the others are complained about, with the nearest key."""
    values: dict[str, str] = {}
    known = KEYS[kind]
    for pair in network_args:
        key, equals, value = (piece.strip() for piece in pair.partition("="))
        if not equals:
            complain(f'"{pair}" is not of the form key=value', None)
        elif key in known:
            values[key] = value
        elif kind == "lora" and key in _NOT_IN_LORA:
            complain(f"{key} is not supported", _NOT_IN_LORA[key])
        elif key in _LORA_KEYS:
            complain(f"{key} is a setting of networks.lora_flux; this network has none of that name", None)
        else:
            near = nearest(key, known)
            complain(f'"{key}" is not a known key', f"Did you mean {near}?" if near else None)
    return values


def parse_indices(text: str | None) -> frozenset[int] | None:
    """Block indices from `all`, `none`, nothing, or a comma list of numbers and inclusive `a-b` ranges.

    None means every block. Raises `ValueError` for anything else; whether the blocks exist is checked by the model
    that the LoRA is attached to, not against a fixed count.
    """
    if text is None or text.strip().lower() == "all":
        return None
    indices: set[int] = set()
    if text.strip().lower() in ("none", ""):
        return frozenset()
    for entry in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", entry)
        if match is None:
            raise ValueError(f'holds "{entry.strip()}"; give numbers and ranges such as 0,2,5-9, or all, or none')
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f'holds "{entry.strip()}"; a range runs from low to high')
        indices.update(range(first, last + 1))
    return frozenset(indices)


def parse_probability(raw: str | float | None) -> float:
    if raw is None:
        return 0.0
    value = _float(raw)
    if not 0.0 <= value < 1.0:
        raise ValueError(f"is {raw}; it must be at least 0 and below 1")
    return value


def parse_number(raw: str | None) -> float | None:
    """A number of 0 or more; None for nothing."""
    if raw is None:
        return None
    value = _float(raw)
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"is {raw}; it must be a number, 0 or more")
    return value


def parse_rank(raw: str) -> int:
    if not re.fullmatch(r"\d+", raw):
        raise ValueError(f"is {raw}; it must be a whole number, 0 to leave those layers out")
    return int(raw)


def parse_count(raw: str | None, default: int) -> int:
    if raw is None:
        return default
    if not re.fullmatch(r"\d+", raw):
        raise ValueError(f"is {raw}; it must be a whole number")
    return int(raw)


def parse_switch(raw: str | None) -> bool:
    if raw is None or raw.lower() in _SWITCHED_OFF:
        return False
    if raw.lower() in SWITCHED_ON:
        return True
    raise ValueError(f"is {raw}; it must be True or False")


def parse_train_blocks(raw: str | None) -> TrainBlocks:
    if raw is None:
        return "all"
    if raw not in ("all", "single", "double"):
        raise ValueError(f"is {raw}; it must be all, single or double")
    return raw


def parse_dora_axis(raw: str | None) -> DoraAxis:
    if raw is None:
        return "in"
    if raw not in ("in", "out"):
        raise ValueError(f"is {raw}; it must be in or out")
    return raw


def parse_in_dims(raw: str | None) -> tuple[int, int, int, int, int] | None:
    if raw is None:
        return None
    entries = [entry.strip() for entry in raw.strip().removeprefix("[").removesuffix("]").split(",")]
    if len(entries) != len(IN_LAYERS):
        raise ValueError(f"has {len(entries)} numbers; it needs {len(IN_LAYERS)}, for {', '.join(IN_LAYERS)}")
    first, second, third, fourth, fifth = (parse_rank(entry) for entry in entries)
    return first, second, third, fourth, fifth


def parse_patterns(raw: str | None) -> tuple[tuple[str, str], ...]:
    """(regular expression, text) pairs of `regex=text,regex=text`; so neither `,` nor `=` can be in an expression."""
    pairs: list[tuple[str, str]] = []
    for entry in (raw or "").split(","):
        if not entry.strip():
            continue
        pattern, equals, value = (piece.strip() for piece in entry.partition("="))
        if not equals or not pattern:
            raise ValueError(f'holds "{entry.strip()}"; give regex=number, several separated by commas')
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f'holds "{pattern}", which is no regular expression: {error}') from None
        pairs.append((pattern, value))
    return tuple(pairs)


def _float(raw: str | float) -> float:
    try:
        return float(raw)
    except ValueError:
        return math.nan
