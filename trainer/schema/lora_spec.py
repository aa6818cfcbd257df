"""What a LoRA is asked to be: rank, alpha, dropouts, and which Linears get one. No torch here."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TypeVar

from trainer.schema.base import Problem, UserError
from trainer.schema.lycoris_args import lycoris_values
from trainer.schema.network_args import (
    IN_LAYERS,
    KINDS,
    LORAPLUS_KEYS,
    TYPE_DIMS,
    DoraAxis,
    NetworkKind,
    TrainBlocks,
    parse_count,
    parse_dora_axis,
    parse_in_dims,
    parse_indices,
    parse_number,
    parse_patterns,
    parse_probability,
    parse_rank,
    parse_switch,
    parse_train_blocks,
    split_pairs,
)

__all__ = ["DEFAULT_RANK", "IN_LAYERS", "LoraSpec", "parse_indices", "spec_from_network_args"]

DEFAULT_RANK = 4
DEFAULT_PISSA_NITER = 8

_BLOCK = re.compile(r"_(double|single)_blocks_(\d+)_")
_T = TypeVar("_T")


def _empty() -> Mapping[str, int]:
    return MappingProxyType({})


@dataclass(frozen=True)
class LoraSpec:
    """A LoRA's shape, or that of another kind of network.

    `alpha` keeps the type it was given in: an integer is stored as int64 in the file, as the reference does for its
    untouched default; 0 means "equal to the rank". `double_indices` and `single_indices` are 0-based; None means every
    block. `type_dims` maps `img_attn_dim` and its seven siblings to a rank, 0 leaving those layers out. `in_dims` are
    the ranks of `IN_LAYERS`; None trains none of them. `reg_dims` and `reg_lrs` are (regular expression, value), of
    which the first that is found in a published name holds. `file_ranks` and `file_alphas` come from a LoRA file
    (`dim_from_weights`) and then decide alone. For OFT, `rank` is the number of blocks and `alpha` the constraint.
    `lycoris` are the arguments of the package lycoris-lora.
    """

    rank: int = DEFAULT_RANK
    alpha: float = 1
    dropout: float = 0.0
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    train_blocks: TrainBlocks = "all"
    double_indices: frozenset[int] | None = None
    single_indices: frozenset[int] | None = None
    type_dims: Mapping[str, int] = field(default_factory=_empty)
    in_dims: tuple[int, int, int, int, int] | None = None
    verbose: bool = False
    kind: NetworkKind = "lora"
    split_qkv: bool = False
    train_t5xxl: bool = False
    reg_dims: tuple[tuple[str, int], ...] = ()
    reg_lrs: tuple[tuple[str, float], ...] = ()
    loraplus_unet_ratio: float | None = None
    loraplus_text_encoder_ratio: float | None = None
    ggpo_sigma: float | None = None
    ggpo_beta: float | None = None
    dora: bool = False
    dora_axis: DoraAxis = "in"
    rslora: bool = False
    pissa: bool = False
    pissa_niter: int = DEFAULT_PISSA_NITER
    enable_all_linear: bool = False
    file_ranks: Mapping[str, int] | None = None
    file_alphas: Mapping[str, float] = field(default_factory=_empty)
    lycoris: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}; it must be 1 or more")
        if not math.isfinite(self.alpha) or self.alpha < 0:
            raise ValueError(f"alpha is {self.alpha}; it must be 0 or more")

    def type_dim(self, name: str) -> int | None:
        """The rank that the first matching type dim gives the module with this published name; None for no match."""
        for key, words in TYPE_DIMS.items():
            if key in self.type_dims and all(word in name for word in words):
                return self.type_dims[key]
        return None

    def rank_of(self, name: str, default: int | None = None) -> int:
        """The rank of the layer with this published name, 0 for none. `default` is that of a layer before the blocks.

        In this order: the file's, the first matching regular expression, the type dim, the default; and unless an
        expression matched, 0 in blocks that are not selected.
        """
        if self.file_ranks is not None:
            return self.file_ranks.get(name, 0)
        for pattern, rank in self.reg_dims:
            if re.search(pattern, name):
                return rank
        block = _BLOCK.search(name)
        if block is not None:
            indices = self.double_indices if block[1] == "double" else self.single_indices
            if indices is not None and int(block[2]) not in indices:
                return 0
        special = self.type_dim(name)
        if special is not None:
            return special
        return self.rank if default is None else default

    def alpha_of(self, name: str, rank: int) -> float:
        """The alpha of a layer with `rank`: alpha / rank is its scale.

        rsLoRA (Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", 2023, arXiv 2312.03732)
        scales by alpha / sqrt(rank), so that the gradients' size does not depend on the rank. That is an ordinary LoRA
        with sqrt(rank) times the alpha, which is what its file says to every loader.
        """
        if name in self.file_alphas:
            return self.file_alphas[name]
        alpha = self.alpha if self.alpha != 0 else rank
        return alpha * math.sqrt(rank) if self.rslora else alpha

    def rate_of(self, name: str) -> tuple[int, float] | None:
        """Number and learning rate of the first matching expression of `network_reg_lrs`; None for no match."""
        for index, (pattern, rate) in enumerate(self.reg_lrs):
            if re.search(pattern, name):
                return index, rate
        return None


def spec_from_network_args(
    network_args: Sequence[str],
    *,
    network_dim: int | None = None,
    network_alpha: float | None = 1,
    network_dropout: float | None = None,
    network_module: str | None = None,
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
            complain(f"{option} {error}", option=option if option == "network_dropout" else "network_args")
            return default

    kind = KINDS.get(network_module, "lora")
    values = split_pairs(network_args, kind, complain)
    rank = DEFAULT_RANK if network_dim is None else network_dim
    if rank < 1:
        complain(f"network_dim is {rank}; it must be 1 or more", option="network_dim")
    alpha = 1.0 if network_alpha is None else network_alpha
    if not math.isfinite(alpha) or alpha < 0:
        complain(f"network_alpha is {alpha}; it must be 0 (equal to network_dim) or more", option="network_alpha")
    dropout = attempt("network_dropout", lambda: parse_probability(network_dropout), 0.0)

    def get(key: str, parse: Callable[[str | None], _T], default: _T) -> _T:
        return attempt(key, lambda: parse(values.get(key)), default)

    general, unet_ratio, text_encoder_ratio = (get(key, parse_number, None) for key in LORAPLUS_KEYS)
    unet_ratio = general if unet_ratio is None else unet_ratio
    text_encoder_ratio = general if text_encoder_ratio is None else text_encoder_ratio
    if kind == "lycoris":
        own = {key: value for key, value in values.items() if key not in LORAPLUS_KEYS}
        lycoris = lycoris_values(own, complain)
        if problems:
            raise UserError.many(problems, exit_code=2)
        return LoraSpec(
            rank=rank,
            alpha=alpha,
            dropout=dropout,
            kind=kind,
            lycoris=lycoris,
            loraplus_unet_ratio=unet_ratio,
            loraplus_text_encoder_ratio=text_encoder_ratio,
        )

    is_alpha_wrong = not math.isfinite(alpha) or alpha < 0
    spec = LoraSpec(
        # What is wrong with these two is noted already; the rest is read all the same, to be told at once.
        rank=max(rank, 1),
        alpha=1 if is_alpha_wrong else alpha,
        dropout=dropout,
        rank_dropout=get("rank_dropout", parse_probability, 0.0),
        module_dropout=get("module_dropout", parse_probability, 0.0),
        train_blocks=get("train_blocks", parse_train_blocks, "all"),
        double_indices=get("train_double_block_indices", parse_indices, None),
        single_indices=get("train_single_block_indices", parse_indices, None),
        type_dims=MappingProxyType(
            {key: attempt(key, lambda key=key: parse_rank(values[key]), 0) for key in TYPE_DIMS if key in values}
        ),
        in_dims=get("in_dims", parse_in_dims, None),
        verbose=get("verbose", parse_switch, False),
        kind=kind,
        split_qkv=get("split_qkv", parse_switch, False),
        train_t5xxl=get("train_t5xxl", parse_switch, False),
        reg_dims=get("network_reg_dims", _regex_dims, ()),
        reg_lrs=get("network_reg_lrs", _regex_rates, ()),
        loraplus_unet_ratio=unet_ratio,
        loraplus_text_encoder_ratio=text_encoder_ratio,
        ggpo_sigma=get("ggpo_sigma", parse_number, None),
        ggpo_beta=get("ggpo_beta", parse_number, None),
        dora=get("dora", parse_switch, False),
        dora_axis=get("dora_axis", parse_dora_axis, "in"),
        rslora=get("rslora", parse_switch, False),
        pissa=get("pissa", parse_switch, False),
        pissa_niter=get("pissa_niter", lambda raw: parse_count(raw, DEFAULT_PISSA_NITER), DEFAULT_PISSA_NITER),
        enable_all_linear=get("enable_all_linear", parse_switch, False),
    )
    for what, hint in _contradictions(spec):
        complain(what, hint)
    if "pissa_niter" in values and not spec.pissa:
        complain("pissa_niter belongs to PiSSA, which is not switched on", "Add pissa=True, or leave it out.")
    if "dora_axis" in values and not spec.dora:
        complain("dora_axis belongs to DoRA, which is not switched on", "Add dora=True, or leave it out.")
    if problems:
        raise UserError.many(problems, exit_code=2)
    return spec


def _contradictions(spec: LoraSpec) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    if (spec.ggpo_sigma is None) != (spec.ggpo_beta is None):
        found.append(("ggpo_sigma and ggpo_beta need each other", "Give both; sd-scripts suggests 0.03 and 0.01."))
    if spec.pissa and spec.ggpo_sigma is not None:
        found.append(("pissa and ggpo_sigma do not go together", "Leave one of them out."))
    if spec.kind == "oft" and spec.alpha == 0:
        found.append(("network_alpha is 0, which leaves OFT no room to move", "1e-3 is usual for OFT."))
    return found


def _regex_dims(raw: str | None) -> tuple[tuple[str, int], ...]:
    return tuple((pattern, parse_rank(value)) for pattern, value in parse_patterns(raw))


def _regex_rates(raw: str | None) -> tuple[tuple[str, float], ...]:
    return tuple((pattern, parse_number(value) or 0.0) for pattern, value in parse_patterns(raw))
