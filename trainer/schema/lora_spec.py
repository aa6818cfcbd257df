"""What a LoRA is asked to be: rank, alpha, dropouts, and which Linears get one. No torch here."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, TypeVar

from trainer.schema.base import Problem, UserError, nearest

TrainBlocks = Literal["all", "single", "double"]

DEFAULT_RANK = 4

IN_LAYERS: tuple[str, ...] = ("img_in", "time_in", "vector_in", "guidance_in", "txt_in")
"""The layers in front of the blocks, in the order of `in_dims`."""

_TYPE_DIMS: Mapping[str, tuple[str, ...]] = MappingProxyType(
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

_SUPPORTED = (
    "verbose",
    "rank_dropout",
    "module_dropout",
    "train_blocks",
    "train_double_block_indices",
    "train_single_block_indices",
    "in_dims",
    *_TYPE_DIMS,
)
_SWITCHES_ONLY_OFF = ("split_qkv", "train_t5xxl")
_UNSUPPORTED: Mapping[str, str] = MappingProxyType(
    {
        "conv_dim": "FLUX has no convolutions; leave it out",
        "conv_alpha": "FLUX has no convolutions; leave it out",
        "dropout": "use network_dropout",
        "split_qkv": "the fused layers get one LoRA each; leave it out",
        "train_t5xxl": "T5 is not trained; leave it out",
        "ggpo_sigma": "leave it out",
        "ggpo_beta": "leave it out",
        "network_reg_dims": "use the type dims (img_attn_dim and so on) or the block indices",
        "network_reg_lrs": "use unet_lr and text_encoder_lr",
        "loraplus_lr_ratio": "leave it out",
        "loraplus_unet_lr_ratio": "leave it out",
        "loraplus_text_encoder_lr_ratio": "leave it out",
    }
)
_T = TypeVar("_T")


@dataclass(frozen=True)
class LoraSpec:
    """A LoRA's shape.

    `alpha` keeps the type it was given in: an integer is stored as int64 in the file, as the reference does for its
    untouched default; 0 means "equal to the rank". `double_indices` and `single_indices` are 0-based; None means every
    block. `type_dims` maps `img_attn_dim` and its seven siblings to a rank, 0 leaving those layers out. `in_dims` are
    the ranks of `IN_LAYERS`; None trains none of them.
    """

    rank: int = DEFAULT_RANK
    alpha: float = 1
    dropout: float = 0.0
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    train_blocks: TrainBlocks = "all"
    double_indices: frozenset[int] | None = None
    single_indices: frozenset[int] | None = None
    type_dims: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    in_dims: tuple[int, int, int, int, int] | None = None
    verbose: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}; it must be 1 or more")
        if not math.isfinite(self.alpha) or self.alpha < 0:
            raise ValueError(f"alpha is {self.alpha}; it must be 0 or more")

    def type_dim(self, name: str) -> int | None:
        """The rank that the first matching type dim gives the module with this published name; None for no match."""
        for key, words in _TYPE_DIMS.items():
            if key in self.type_dims and all(word in name for word in words):
                return self.type_dims[key]
        return None


def spec_from_network_args(
    network_args: Sequence[str],
    *,
    network_dim: int | None = None,
    network_alpha: float | None = 1,
    network_dropout: float | None = None,
) -> LoraSpec:
    """The spec that the network options describe; `network_args` are `key=value` texts.

    Raises `UserError` (exit code 2) with every problem found. Unlike the reference, unknown keys and malformed values
    are errors, and `true` or `1` mean the same as `True`.
    """
    problems: list[Problem] = []

    def complain(what: str, hint: str | None = None, option: str = "network_args") -> None:
        problems.append(Problem(what, where=f"--{option}", hint=hint, field=option))

    def attempt(option: str, parse: Callable[[], _T], default: _T) -> _T:
        try:
            return parse()
        except ValueError as error:
            complain(f"{option} {error}", option=option if option.startswith("network_") else "network_args")
            return default

    values = _split_pairs(network_args, complain)
    rank = DEFAULT_RANK if network_dim is None else network_dim
    if rank < 1:
        complain(f"network_dim is {rank}; it must be 1 or more", option="network_dim")
    alpha = 1.0 if network_alpha is None else network_alpha
    if not math.isfinite(alpha) or alpha < 0:
        complain(f"network_alpha is {alpha}; it must be 0 (equal to network_dim) or more", option="network_alpha")

    def text(key: str) -> str | None:
        return values.get(key)

    def number(option: str, raw: str | float | None) -> float:
        return attempt(option, lambda: 0.0 if raw is None else _probability(raw), 0.0)

    dropout = number("network_dropout", network_dropout)
    rank_dropout = number("rank_dropout", text("rank_dropout"))
    module_dropout = number("module_dropout", text("module_dropout"))
    train_blocks: TrainBlocks = attempt("train_blocks", lambda: _train_blocks(text("train_blocks")), "all")
    double = attempt("train_double_block_indices", lambda: parse_indices(text("train_double_block_indices")), None)
    single = attempt("train_single_block_indices", lambda: parse_indices(text("train_single_block_indices")), None)
    type_dims = {key: attempt(key, lambda key=key: _rank(values[key]), 0) for key in _TYPE_DIMS if key in values}
    in_dims = attempt("in_dims", lambda: _in_dims(text("in_dims")), None)
    verbose = attempt("verbose", lambda: _switch(text("verbose")), False)
    if problems:
        raise UserError.many(problems, exit_code=2)
    return LoraSpec(
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        rank_dropout=rank_dropout,
        module_dropout=module_dropout,
        train_blocks=train_blocks,
        double_indices=double,
        single_indices=single,
        type_dims=MappingProxyType(type_dims),
        in_dims=in_dims,
        verbose=verbose,
    )


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


def _split_pairs(network_args: Sequence[str], complain: Callable[[str, str | None], None]) -> dict[str, str]:
    values: dict[str, str] = {}
    for pair in network_args:
        key, equals, value = (piece.strip() for piece in pair.partition("="))
        if not equals:
            complain(f'"{pair}" is not of the form key=value', None)
        elif key in _SWITCHES_ONLY_OFF and value.lower() in ("false", "0"):
            continue
        elif key in _UNSUPPORTED:
            complain(f"{key} is not supported", _UNSUPPORTED[key])
        elif key not in _SUPPORTED:
            near = nearest(key, _SUPPORTED)
            complain(f'"{key}" is not a known key', f"Did you mean {near}?" if near else None)
        else:
            values[key] = value
    return values


def _probability(raw: str | float) -> float:
    try:
        value = float(raw)
    except ValueError:
        value = math.nan
    if not 0.0 <= value < 1.0:
        raise ValueError(f"is {raw}; it must be at least 0 and below 1")
    return value


def _rank(raw: str) -> int:
    if not re.fullmatch(r"\d+", raw):
        raise ValueError(f"is {raw}; it must be a whole number, 0 to leave those layers out")
    return int(raw)


def _switch(raw: str | None) -> bool:
    if raw is None or raw.lower() in ("false", "0"):
        return False
    if raw.lower() in ("true", "1"):
        return True
    raise ValueError(f"is {raw}; it must be True or False")


def _train_blocks(raw: str | None) -> TrainBlocks:
    if raw is None:
        return "all"
    if raw not in ("all", "single", "double"):
        raise ValueError(f"is {raw}; it must be all, single or double")
    return raw


def _in_dims(raw: str | None) -> tuple[int, int, int, int, int] | None:
    if raw is None:
        return None
    entries = [entry.strip() for entry in raw.strip().removeprefix("[").removesuffix("]").split(",")]
    if len(entries) != len(IN_LAYERS):
        raise ValueError(f"has {len(entries)} numbers; it needs {len(IN_LAYERS)}, for {', '.join(IN_LAYERS)}")
    first, second, third, fourth, fifth = (_rank(entry) for entry in entries)
    return first, second, third, fourth, fifth
