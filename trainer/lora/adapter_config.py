"""The configuration of PEFT that diffusers keeps in a LoRA's metadata, under one key: alphas that stand nowhere else.

Read as `LoraConfig` and `LoraLayer` of PEFT understand it: a module's alpha is that of the first pattern that ends its
path, else `lora_alpha`; it is divided by the rank, or with `use_rslora` by the rank's root.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, cast

CONFIG_KEY: Final = "lora_adapter_metadata"
_PARTS: Final = ("transformer", "text_encoder", "text_encoder_2")
_DEFAULT_ALPHA: Final = 8


@dataclass(frozen=True)
class AdapterConfig:
    """`text` as it stands in the metadata, and the values in it by their path, such as `transformer.lora_alpha`."""

    text: str
    values: Mapping[str, object]

    @classmethod
    def of(cls, metadata: Mapping[str, str]) -> AdapterConfig | None:
        """None when the metadata have no such configuration, or one that cannot be read."""
        try:
            values: object = json.loads(metadata.get(CONFIG_KEY, "null"))
        except ValueError:
            return None
        return cls(metadata[CONFIG_KEY], cast("dict[str, object]", values)) if isinstance(values, dict) else None

    def alpha_of(self, module: str, rank: int) -> float | None:
        """The alpha, to be divided by `rank`, of a module by its name in the file; None where this says nothing."""
        part, _, path = module.partition(".")
        own = {key.removeprefix(f"{part}."): value for key, value in self.values.items() if key.startswith(f"{part}.")}
        if part not in _PARTS or not own:
            return None
        alpha = own.get("lora_alpha", _DEFAULT_ALPHA)
        patterns = own.get("alpha_pattern")
        for pattern, special in cast("dict[str, object]", patterns if isinstance(patterns, dict) else {}).items():
            if re.match(rf"(.*\.)?({pattern})$", path):
                alpha = special
                break
        if not isinstance(alpha, (int, float)):
            return None
        return alpha * math.sqrt(rank) if own.get("use_rslora") else float(alpha)
