"""Packages that a few settings need and that are not installed with the program."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from trainer.schema.base import UserError

PACKAGE_OF_MODULE: Final[Mapping[str, str]] = MappingProxyType(
    {
        "came_pytorch": "came-pytorch",
        "lion_pytorch": "lion-pytorch",
        "prodigyplus": "prodigy-plus-schedule-free",
        "pytorch_optimizer": "pytorch-optimizer",
    }
)
"""Modules whose package has another name on the package index."""


def is_installed(module: str) -> bool:
    """Whether the first part of a dotted module name can be imported. Nothing is imported."""
    try:
        return importlib.util.find_spec(module.partition(".")[0]) is not None
    except (ImportError, ValueError):
        return False


def install_line(module: str) -> str:
    """The command that installs the package of `module` for this very interpreter."""
    top = module.partition(".")[0]
    python = f'"{sys.executable}"' if " " in sys.executable else sys.executable
    return f"{python} -m pip install {PACKAGE_OF_MODULE.get(top, top)}"


def not_installed(what: str, module: str, field: str) -> UserError:
    """The error for `what` (an option's value) when its package is missing."""
    top = module.partition(".")[0]
    return UserError(
        f"{what} needs the package {PACKAGE_OF_MODULE.get(top, top)}, which is not installed",
        f"--{field}",
        f"Run: {install_line(module)}",
        field=field,
        exit_code=2,
    )
