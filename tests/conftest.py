"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.shared_demo import SharedDemo
from tests.tiny import TinyModels, make_tiny_models

ROOT = Path(__file__).parents[1]

# Before any library reads them: nothing is fetched, nothing is reported, and thread counts do not fight.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session", autouse=True)
def user_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program's data folder, away from the user's own, also for every process that a test starts."""
    home = tmp_path_factory.mktemp("fluxgui-home")
    os.environ["FLUXGUI_HOME"] = str(home)
    return home


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of reference numbers; see its README for their origin."""
    return Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    """Tiny models in the published formats. Shared by all tests, so never write to them."""
    return make_tiny_models(tmp_path_factory.mktemp("tiny-models"))


@pytest.fixture(scope="session")
def shared_demo(tmp_path_factory: pytest.TempPathFactory) -> SharedDemo:
    """Where the browser test leaves the demo it has trained. One place for all processes of this test session."""
    base = tmp_path_factory.getbasetemp()
    is_one_of_several = "PYTEST_XDIST_WORKER" in os.environ
    return SharedDemo((base.parent if is_one_of_several else base) / "trained-demo")


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of a Chromium-like browser. Without one the test is skipped, and fails where CI is set."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = os.environ.get("FLUXGUI_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if found is not None:
        return found
    reason = "no chromium on the PATH and none named in FLUXGUI_CHROMIUM: the page was NOT tested"
    if os.environ.get("CI", "").lower() not in ("", "0", "false"):
        pytest.fail(reason)
    pytest.skip(reason)


LONGEST_FIRST = (
    "tests/web/test_first_visit.py",  # leaves its trained demo for tests/learning
    "tests/web/",
    "tests/learning/",
    "tests/runs/",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first, so that no core is left alone with one of them at the end."""

    def place(item: pytest.Item) -> int:
        path = item.path.relative_to(ROOT).as_posix()
        return next((place for place, start in enumerate(LONGEST_FIRST) if path.startswith(start)), len(LONGEST_FIRST))

    items.sort(key=place)  # stable: within a place, the files' own order
