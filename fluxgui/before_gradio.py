"""Prepares the process for gradio; import it before anything that imports gradio.

Two things that can only be done before: no usage reports are sent, and gradio does not rewrite the editor stubs of its
components at every import. The second parses and renders each component's source and takes half of gradio's import
time (1.5 of 3 seconds on two cores); nothing at run time reads the stubs.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Final

STUB_MODULE: Final = "gradio.component_meta"
STUB_FUNCTION: Final = "create_or_modify_pyi"


class _WithoutStubs(importlib.machinery.SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        if hasattr(module, STUB_FUNCTION):
            setattr(module, STUB_FUNCTION, _write_no_stub)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != STUB_MODULE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and spec.origin is not None and type(spec.loader) is importlib.machinery.SourceFileLoader:
            spec.loader = _WithoutStubs(fullname, spec.origin)
        return spec


def _write_no_stub(*_arguments: object) -> None:
    return None


def _prepare() -> None:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    if STUB_MODULE not in sys.modules and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


_prepare()
