"""The keys of `network_args` that the package lycoris-lora takes, and how their values are read. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Final

from trainer.schema.base import nearest
from trainer.schema.network_args import parse_number, parse_probability, parse_switch

ALGORITHMS: Final = (
    "lora",
    "locon",
    "loha",
    "lokr",
    "dylora",
    "glora",
    "full",
    "diag-oft",
    "boft",
    "ia3",
    "tlora",
)
PRESETS: Final = (
    "full",
    "full-lin",
    "attn-mlp",
    "attn-only",
    "unet-only",
    "unet-transformer-only",
    "unet-convblock-only",
    "ia3",
)


def _whole(raw: str) -> int:
    try:
        return int(raw)
    except ValueError:
        raise ValueError(f"is {raw}; it must be a whole number") from None


def _algorithm(raw: str) -> str:
    if raw.lower() not in ALGORITHMS:
        raise ValueError(f"is {raw}; it must be one of {', '.join(ALGORITHMS)}{_suggestion(raw, ALGORITHMS)}")
    return raw.lower()


def _preset(raw: str) -> str:
    if raw not in PRESETS and not Path(raw).is_file():
        names = ", ".join(PRESETS)
        suggestion = _suggestion(raw, PRESETS)
        raise ValueError(f"is {raw}; it must be one of {names}, or a TOML file that exists{suggestion}")
    return raw


def _suggestion(raw: str, known: Sequence[str]) -> str:
    near = nearest(raw.lower(), known)
    return f". Did you mean {near}?" if near else ""


_READERS: Final[Mapping[str, Callable[[str], object]]] = MappingProxyType(
    {
        "algo": _algorithm,
        "preset": _preset,
        **dict.fromkeys(("conv_dim", "block_size", "factor"), _whole),
        **dict.fromkeys(("conv_alpha", "constraint"), parse_number),
        **dict.fromkeys(("dropout", "rank_dropout", "module_dropout"), parse_probability),
    }
)
"""Every other key is a switch."""


def lycoris_values(values: Mapping[str, str], complain: Callable[[str], None]) -> Mapping[str, object]:
    """Key -> value as the package takes it, of the `key=value` texts; what cannot be read is complained about."""
    found: dict[str, object] = {}
    for key, text in values.items():
        try:
            found[key] = _READERS.get(key, parse_switch)(text)
        except ValueError as error:
            complain(f"{key} {error}")
    return MappingProxyType(found)
