"""run.py as a user starts it: a real process, real virtual environments, no network.

Each test works on a copy of run.py with requirement files of its own, so that making an environment takes seconds.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import run

ROOT = Path(__file__).parents[1]
# These decide where pip looks; each test says for itself. No configuration file of this machine is read either.
CLEAN = {key: value for key, value in os.environ.items() if not key.startswith(("PIP_", "FLUXGUI_"))}
CLEAN["PIP_CONFIG_FILE"] = os.devnull


@dataclass(frozen=True)
class Checkout:
    """A folder with run.py and small stand-ins for what it starts."""

    folder: Path

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(self.folder / "run.py"), *arguments],
            env={**CLEAN, **variables},
            cwd=self.folder.parent,
            capture_output=True,
            text=True,
            timeout=100,
        )

    @property
    def venv(self) -> Path:
        return self.folder / ".venv"

    @property
    def stamp(self) -> Path:
        return self.venv / "fluxgui-stamp.json"


SHOW = "import json, os, sys\nprint(json.dumps([os.path.basename(__file__), sys.prefix, *sys.argv[1:]]))\n"


def new_checkout(folder: Path) -> Checkout:
    folder.mkdir()
    shutil.copy(ROOT / "run.py", folder)
    (folder / "requirements.txt").write_text("# nothing\n")
    (folder / "requirements-test.txt").write_text("# nothing\n")
    (folder / "app.py").write_text(SHOW)
    (folder / "flux_train_network.py").write_text(SHOW + "sys.exit(3)\n")
    return Checkout(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A checkout whose environment is made. Tests that change it leave it ready again."""
    checkout = new_checkout(tmp_path_factory.mktemp("run") / "checkout")
    result = checkout.run("setup")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "the environment is ready" in result.stdout
    return checkout


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return unused.getsockname()[1]


def test_each_command_starts_its_program_in_the_environment(made: Checkout) -> None:
    python = str(made.venv)
    assert json.loads(made.run("--port=1", "--no-browser").stdout) == ["app.py", python, "--port=1", "--no-browser"]
    assert json.loads(made.run("demo", "--port=1").stdout) == ["app.py", python, "--demo", "--port=1"]
    assert json.loads(made.run("doctor").stdout) == ["app.py", python, "--doctor"]
    train = made.run("train", "--learning_rate=1e-4")
    assert json.loads(train.stdout) == ["flux_train_network.py", python, "--learning_rate=1e-4"]
    assert train.returncode == 3


def test_a_second_start_takes_less_than_two_seconds(made: Checkout) -> None:
    before = os.times()
    assert made.run().returncode == 0
    after = os.times()
    # Of the processor, whatever else runs; it waits for nothing.
    assert after.children_user + after.children_system - before.children_user - before.children_system < 2.0


def test_a_second_set_up_does_nothing(made: Checkout) -> None:
    before = made.stamp.stat().st_mtime_ns
    result = made.run("setup")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert made.stamp.stat().st_mtime_ns == before


def test_an_interrupted_set_up_is_made_again(made: Checkout) -> None:
    made.stamp.unlink()  # written last, so this is what an interruption leaves
    left_over = made.venv / "left-over"
    left_over.touch()
    result = made.run("setup")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "unfinished or out of date" in result.stdout
    assert made.stamp.exists()
    assert not left_over.exists()


def test_changed_requirements_or_removed_packages_are_noticed(made: Checkout) -> None:
    requirements = made.folder / "requirements.txt"
    environment = run.Environment(made.venv)
    assert run.is_current(environment, made.stamp, requirements)

    requirements.write_text("# something else\n")
    assert not run.is_current(environment, made.stamp, requirements)
    requirements.write_text("# nothing\n")

    package = next(made.venv.glob("[Ll]ib/**/site-packages/pip"))
    package.rename(package.with_name("~pip"))
    assert not run.is_current(environment, made.stamp, requirements)
    package.with_name("~pip").rename(package)

    stamp = made.stamp.read_text()
    for broken in ("", "[]", "{", json.dumps({**json.loads(stamp), "scheme": 0})):
        made.stamp.write_text(broken)
        assert not run.is_current(environment, made.stamp, requirements)
    made.stamp.write_text(stamp)
    assert run.is_current(environment, made.stamp, requirements)


@pytest.mark.parametrize("how", ["closed port", "no index, and that for torch does not answer"])
def test_no_network_is_one_clear_line(tmp_path: Path, closed_port: int, how: str) -> None:
    checkout = new_checkout(tmp_path / "checkout")
    (checkout.folder / "requirements.txt").write_text("torch==2.13.0\n")
    index = f"http://127.0.0.1:{closed_port}/torch"
    if how == "closed port":
        where = {"PIP_INDEX_URL": f"http://127.0.0.1:{closed_port}/simple", "PIP_RETRIES": "0"}
        said = "the package index does not answer"
    else:
        where = {"PIP_NO_INDEX": "1", "FLUXGUI_TORCH_INDEX": index}
        said = "has no torch==2.13.0"
    result = checkout.run("setup", **where)
    assert result.returncode == 3
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert said in result.stderr
    assert (f"{index} does not answer; trying without it" in result.stdout) is (how != "closed port")
    assert "--extra-index-url" not in (checkout.venv / "setup.log").read_text()
    assert "Traceback" not in result.stdout + result.stderr
    assert not checkout.stamp.exists()
    assert "torch==2.13.0" in (checkout.venv / "setup.log").read_text()


def test_a_folder_that_is_no_environment_is_never_removed(made: Checkout, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    result = made.run("--venv", str(tmp_path), "setup")
    assert result.returncode == 3
    assert "is not a virtual environment" in result.stderr
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_wrong_use_and_help_make_no_environment(tmp_path: Path) -> None:
    checkout = new_checkout(tmp_path / "checkout")
    unknown = checkout.run("tests")
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert "tests is not a command" in unknown.stderr
    assert checkout.run("--venv").returncode == 2
    assert "python run.py demo" in checkout.run("--help").stdout
    assert not checkout.venv.exists()


def test_arguments_after_test_go_to_pytest_alone(made: Checkout) -> None:
    result = made.run("test", "tests/some_test.py")
    assert "No module named pytest" in result.stderr  # this checkout installs none
    assert "ruff" not in result.stdout


def test_failing_checks_make_the_test_command_fail(made: Checkout) -> None:
    result = made.run("test", FLUXGUI_CHROMIUM="/bin/true")
    assert result.returncode == 1
    assert "FAILED: ruff format, ruff check, import rules, tests, types" in result.stdout


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ("WARNING: Retrying ... Failed to establish a new connection: [Errno 111]", "cannot be downloaded"),
        ("ERROR: Could not install packages: [Errno 28] No space left on device", "The disk is full"),
        ("ERROR: No matching distribution found for numpy==9", "has no numpy==9"),
        ("noise\nERROR: something new", "pip failed: ERROR: something new"),
        ("", "pip failed: no message."),
    ],
)
def test_pip_messages_become_one_line(messages: str, expected: str) -> None:
    line = run.explain(messages, Path("setup.log"))
    assert expected in line
    assert line.endswith("setup.log")
    assert "\n" not in line


@pytest.mark.skipif(sys.platform == "win32", reason="no such signal")
def test_a_signal_reaches_the_program_and_its_exit_code_comes_back(made: Checkout) -> None:
    program = made.folder / "app.py"
    program.write_text(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n"
        "print('up', flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, str(made.folder / "run.py")], env=CLEAN, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.terminate()
        assert process.wait(20) == 7
    program.write_text(SHOW)
