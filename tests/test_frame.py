"""The promises of the project's frame: what is pinned, what imports what, what the README says is there."""

from __future__ import annotations

import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("fluxgui", "trainer")


def python_files() -> list[Path]:
    files = [*ROOT.glob("*.py"), *(path for name in (*PACKAGES, "tests") for path in (ROOT / name).rglob("*.py"))]
    return [path for path in files if "__pycache__" not in path.parts]


def readme_tree() -> list[str]:
    """The paths in the README's file tree: indented lines of a name, two or more spaces and a description."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Work on it")[2].splitlines()
    paths: list[str] = []
    parent = ""
    for line in lines:
        entry = re.fullmatch(r"    (  )?([\w.]+/?) {2,}\S.*", line)
        if entry is None:
            continue
        nested, name = entry.groups()
        if not nested and name.endswith("/"):
            parent = name
        paths.append(parent + name if nested else name)
    return paths


def test_every_path_in_the_readme_tree_exists() -> None:
    paths = readme_tree()
    assert len(paths) > 10
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_every_program_and_package_is_in_the_readme_tree() -> None:
    packages = [path.parent for name in PACKAGES for path in (ROOT / name).rglob("__init__.py")]
    expected = {path.name for path in ROOT.glob("*.py")} | {
        f"{path.relative_to(ROOT).as_posix()}/" for path in packages
    }
    assert expected - set(readme_tree()) == set()


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-test.txt"])
def test_every_requirement_is_pinned(name: str) -> None:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    requirements = [line for line in lines if line and not line.startswith("#")]
    assert requirements
    assert [line for line in requirements if not re.match(r"[\w\-\[\]]+==[\d.]+(;|$)", line)] == []


def test_package_files_are_empty() -> None:
    files = [path for name in PACKAGES for path in (ROOT / name).rglob("__init__.py")]
    assert files
    assert [path for path in files if path.read_text().strip()] == []


def test_every_package_folder_has_its_package_file() -> None:
    folders = {path.parent for path in python_files() if path.relative_to(ROOT).parts[0] in PACKAGES}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


def test_annotations_are_never_evaluated_at_import() -> None:
    """So that newer annotation syntax works on the oldest supported Python."""
    sources = {path: path.read_text(encoding="utf-8") for path in python_files()}
    missing = [
        path for path, text in sources.items() if text.strip() and "from __future__ import annotations" not in text
    ]
    assert missing == []


def test_nothing_is_left_to_be_done_later() -> None:
    """A marker for later work belongs in the issue tracker."""
    words = ("TO" + "DO", "FIX" + "ME", "X" * 3)
    found: list[str] = []
    for path in python_files():
        with path.open("rb") as file:
            comments = [token for token in tokenize.tokenize(file.readline) if token.type == tokenize.COMMENT]
        found += [
            f"{path.relative_to(ROOT)}:{token.start[0]}"
            for token in comments
            if any(re.search(rf"\b{word}\b", token.string) for word in words)
        ]
    assert found == []


@pytest.mark.parametrize("module", ["app", "trainer.schema.options", "trainer.schema.cli", "trainer.schema.memory"])
def test_the_light_side_loads_no_model_library(module: str) -> None:
    heavy = "{'torch', 'transformers', 'safetensors', 'accelerate', 'diffusers', 'bitsandbytes'}"
    code = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


@pytest.mark.skipif(sys.platform == "win32", reason="a bash script")
def test_ci_runs_the_test_command_and_passes_its_status_on(tmp_path: Path) -> None:
    (tmp_path / ".ci").mkdir()
    script = tmp_path / ".ci" / "run"
    script.write_bytes((ROOT / ".ci" / "run").read_bytes())
    script.chmod(0o755)
    (tmp_path / "run.py").write_text("import os, sys\nprint(sys.argv[1:], os.environ['CI'])\nsys.exit(5)\n")
    result = subprocess.run([str(script)], capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "['test'] true"
    assert result.returncode == 5
