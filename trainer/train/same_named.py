"""Values that stand under the same name in two places, taken over by that name."""

from __future__ import annotations

import dataclasses
from typing import Any


def same_named(kind: type[Any], source: object, *, prefix: str = "") -> dict[str, Any]:
    """For each field of the dataclass `kind` that `source` has an attribute for, called with `prefix` there, its value."""
    names = [field.name for field in dataclasses.fields(kind)]
    return {name: getattr(source, prefix + name) for name in names if hasattr(source, prefix + name)}
