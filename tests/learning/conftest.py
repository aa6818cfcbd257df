"""Leaves the slow learning tests out unless they are asked for, whatever else is selected by marker."""

from __future__ import annotations

import pytest

MARKER = "learning_slow"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if MARKER in str(config.getoption("markexpr")):
        return
    slow = [item for item in items if item.get_closest_marker(MARKER)]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]
