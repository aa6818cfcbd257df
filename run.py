"""One command for everything: makes the environment when it is missing or out of date, then starts what was asked.

    python run.py                start the page (options go to app.py: --no-browser, --port, --listen ...)
    python run.py demo           start the page with the demo run already training
    python run.py train ...      train from the command line; the options are those of flux_train_network.py
    python run.py setup          only make the environment
    python run.py doctor         say what keeps this machine from training, and what to do about it
    python run.py test           all checks and tests; with arguments: pytest with these arguments, nothing else

Before the command: --venv DIR uses DIR instead of .venv (also: FLUXGUI_VENV).
FLUXGUI_TORCH_INDEX=URL takes torch from that package index, FLUXGUI_TORCH_INDEX=none from no extra one.
pip's own configuration and PIP_* variables stay in force.

Exit codes: 0 fine, 2 wrong use, 3 the environment cannot be made, otherwise that of the program started.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 10):  # noqa: UP036 - this file is what tells the user that the interpreter is too old
    sys.exit("run.py needs Python 3.10 or newer; this is {}.{}.".format(*sys.version_info[:2]))

import contextlib
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

ROOT = Path(__file__).resolve().parent
REQUIREMENTS = ROOT / "requirements.txt"
TEST_REQUIREMENTS = ROOT / "requirements-test.txt"
# Raised when the way an environment is made changes, so that older ones are made again.
SCHEME = 1
EXIT_USAGE = 2
EXIT_SETUP = 3

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
CUDA_INDEX = "https://download.pytorch.org/whl/cu130"
PROBE_SECONDS = 3.0


class SetupError(Exception):
    """The environment cannot be made; the text is the one line that the user sees."""


# -------------------------------------------------------------------------------------------------- environment


@dataclass(frozen=True)
class Environment:
    """A virtual environment and the stamps in it, which are written last and say what it was made from."""

    path: Path

    @property
    def python(self) -> Path:
        return self.path / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    @property
    def stamp(self) -> Path:
        return self.path / "fluxgui-stamp.json"

    @property
    def test_stamp(self) -> Path:
        return self.path / "fluxgui-test-stamp.json"

    @property
    def marker(self) -> Path:
        """Present from the first moment on: this folder is ours to remake."""
        return self.path / "fluxgui-environment"

    @property
    def log(self) -> Path:
        return self.path / "setup.log"

    def installed(self) -> list[str]:
        """Names of what lies in site-packages; a folder listing, so that checking it costs a millisecond."""
        folders = (
            [self.path / "Lib" / "site-packages"] if os.name == "nt" else self.path.glob("lib/python*/site-packages")
        )
        names = {entry.name for folder in folders if folder.is_dir() for entry in folder.iterdir()}
        return sorted(name for name in names if not name.startswith(("__pycache__", "~", ".")))


def is_current(environment: Environment, stamp: Path, requirements: Path) -> bool:
    """Whether `stamp` was written for the present requirements and interpreter, and nothing was removed since."""
    try:
        found = json.loads(stamp.read_text(encoding="utf-8"))
        expected = stamp_values(requirements)
        if any(found.get(key) != value for key, value in expected.items()):
            return False
        # A GPU that appeared needs another torch. One that is not seen today is no reason to throw a build away.
        if has_nvidia() and not found.get("nvidia") and "FLUXGUI_TORCH_INDEX" not in os.environ:
            return False
        return environment.python.exists() and set(found["installed"]) <= set(environment.installed())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def stamp_values(requirements: Path) -> dict[str, object]:
    return {
        "scheme": SCHEME,
        "python": f"{platform.python_implementation()} {sys.version_info[0]}.{sys.version_info[1]} {platform.machine()}",
        "requirements": hashlib.sha256(requirements.read_bytes()).hexdigest(),
    }


def write_stamp(environment: Environment, stamp: Path, requirements: Path) -> None:
    values = {**stamp_values(requirements), "nvidia": has_nvidia(), "installed": environment.installed()}
    part = stamp.with_suffix(".part")
    part.write_text(json.dumps(values, indent=1), encoding="utf-8")
    part.replace(stamp)


def prepare(environment: Environment, *, with_tests: bool) -> None:
    """Make the environment what the requirement files say. Does nothing, quickly, when it already is."""
    ready = is_current(environment, environment.stamp, REQUIREMENTS)
    tests_ready = not with_tests or is_current(environment, environment.test_stamp, TEST_REQUIREMENTS)
    if ready and tests_ready:
        return
    with building(environment):
        if not is_current(environment, environment.stamp, REQUIREMENTS):
            make(environment)
        if with_tests and not is_current(environment, environment.test_stamp, TEST_REQUIREMENTS):
            environment.test_stamp.unlink(missing_ok=True)
            say(f"installing what the tests need ({TEST_REQUIREMENTS.name})")
            pip_install(environment, ["-r", str(REQUIREMENTS), "-r", str(TEST_REQUIREMENTS)])
            write_stamp(environment, environment.test_stamp, TEST_REQUIREMENTS)


def make(environment: Environment) -> None:
    """Make the environment from the beginning. Whatever was left by an interrupted or older set-up is removed."""
    if environment.path.exists():
        check_ours(environment)
        say(f"{environment.path} is unfinished or out of date; making it again")
        shutil.rmtree(environment.path)
    started = time.monotonic()
    say(f"making the environment in {environment.path} (Python {platform.python_version()})")
    try:
        environment.path.mkdir(parents=True)
        environment.marker.write_text("Made by run.py, which may remove and remake this folder.\n", encoding="utf-8")
    except OSError as error:
        raise SetupError(f"{environment.path} cannot be made: {error.strerror}.") from None
    made = subprocess.run([sys.executable, "-m", "venv", str(environment.path)], capture_output=True, text=True)
    if made.returncode:
        hint = " On Debian or Ubuntu: apt install python3-venv." if "ensurepip" in made.stdout + made.stderr else ""
        raise SetupError(f"Python cannot make a virtual environment: {last_line(made.stdout + made.stderr)}{hint}")

    torch = torch_requirement(REQUIREMENTS)
    if torch is not None:
        index = torch_index(environment)
        say(f"installing {torch}" + (f" from {index}" if index else ""))
        pip_install(environment, [torch, *(["--extra-index-url", index] if index else [])])
    say(f"installing {REQUIREMENTS.name}")
    pip_install(environment, ["-r", str(REQUIREMENTS)])
    write_stamp(environment, environment.stamp, REQUIREMENTS)
    say(f"the environment is ready ({time.monotonic() - started:.0f} s)")


def check_ours(environment: Environment) -> None:
    """Refuse to remove a folder that is not a virtual environment, as a mistyped --venv may name."""
    path = environment.path
    known = environment.marker.exists() or (path / "pyvenv.cfg").exists() or path == ROOT / ".venv"
    if not path.is_dir() or not (known or not any(path.iterdir())):
        raise SetupError(f"{path} exists and is not a virtual environment; name another folder with --venv.")


@contextlib.contextmanager
def building(environment: Environment) -> Generator[None]:
    """Hold the lock beside the environment, so that two starts at once do not build it twice."""
    lock = environment.path.with_name(environment.path.name + ".lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("w")
    except OSError as error:
        raise SetupError(f"{lock} cannot be written: {error.strerror}.") from None
    with file:
        if not try_lock(file.fileno()):
            say("another run.py is making the environment; waiting for it")
            while not try_lock(file.fileno()):
                time.sleep(0.5)
        yield  # closing the file frees the lock, as does the end of this process


def try_lock(descriptor: int) -> bool:
    try:
        if sys.platform == "win32":
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


# ------------------------------------------------------------------------------------------------------- torch


def torch_requirement(requirements: Path) -> str | None:
    """The line that pins torch, which is installed first because its index depends on the machine."""
    for line in requirements.read_text(encoding="utf-8").splitlines():
        if line.replace(" ", "").startswith("torch=="):
            return line.strip()
    return None


def torch_index(environment: Environment) -> str | None:
    """The extra package index for torch, or None where pip finds the right build by itself."""
    chosen = os.environ.get("FLUXGUI_TORCH_INDEX")
    if chosen is not None:
        index = None if chosen.strip().lower() in ("", "none") else chosen.strip()
    elif pip_has_own_index(environment):
        return None
    elif sys.platform == "linux" and not has_nvidia():
        index = CPU_INDEX  # PyPI's Linux wheel is the CUDA build: several gigabytes that would not be used
    elif sys.platform == "win32" and has_nvidia():
        index = CUDA_INDEX  # PyPI's Windows wheel is the CPU build
    else:
        index = None
    if index is not None and not is_reachable(index):
        say(f"{index} does not answer; trying without it, which may install another build of torch")
        return None
    return index


def has_nvidia() -> bool:
    """Whether an NVIDIA driver is here. Looks at files only: this is asked at every start."""
    places = ("/proc/driver/nvidia/version", "/usr/lib/wsl/lib/nvidia-smi")
    return any(Path(place).exists() for place in places) or shutil.which("nvidia-smi") is not None


def pip_has_own_index(environment: Environment) -> bool:
    """Whether the user's pip configuration or environment already says where packages come from."""
    return bool(pip_settings(environment) & {"index-url", "extra-index-url", "find-links", "no-index"})


def pip_settings(environment: Environment) -> set[str]:
    """Names of the settings in pip's configuration files and in PIP_* variables."""
    variables = {
        name[4:].lower().replace("_", "-") for name, value in os.environ.items() if value and name[:4] == "PIP_"
    }
    listed = subprocess.run([str(environment.python), "-m", "pip", "config", "list"], capture_output=True, text=True)
    # Lines read like global.index-url='https://...'.
    return variables | {line.partition("=")[0].rpartition(".")[2] for line in listed.stdout.splitlines()}


def is_reachable(index: str) -> bool:
    if not index.startswith(("http://", "https://")):
        return True  # a local folder or file: URL, which costs pip no waiting
    try:
        with urllib.request.urlopen(urllib.request.Request(index, method="HEAD"), timeout=PROBE_SECONDS):
            return True
    except urllib.error.HTTPError:
        return True  # it answered; pip decides what to make of it
    except (OSError, ValueError):
        return False


# --------------------------------------------------------------------------------------------------------- pip

_NO_NETWORK = (
    "name resolution",
    "name or service not known",
    "nodename nor servname",
    "getaddrinfo failed",
    "failed to resolve",
    "newconnectionerror",
    "failed to establish a new connection",
    "connecttimeouterror",
    "readtimeouterror",
    "connection refused",
    "network is unreachable",
    "cannot connect to proxy",
    "proxyerror",
    "max retries exceeded",
    "connection broken",
    "connection reset",
)


def pip_install(environment: Environment, arguments: Sequence[str]) -> None:
    """`pip install`, with everything it says in the set-up log; raises `SetupError` with one line that says what is wrong."""
    command = [str(environment.python), "-m", "pip", "install", "--disable-pip-version-check"]
    if "retries" not in pip_settings(environment):
        command += ["--retries", "2"]  # pip's own five take most of a minute to say that there is no network
    on_terminal = sys.stdout.isatty()
    if not on_terminal:
        command += ["--quiet", "--progress-bar", "off"]
    command += ["--log", str(environment.log), *arguments]
    start = environment.log.stat().st_size if environment.log.exists() else 0
    # On a terminal pip's progress is worth seeing. Its errors are summed up in one line, and the log has all of them.
    result = subprocess.run(command, stderr=subprocess.PIPE, encoding="utf-8", errors="replace")
    if result.returncode:
        with environment.log.open("ab+") as log:
            log.write(result.stderr.encode())
            log.seek(start)
            messages = log.read().decode(errors="replace")
        raise SetupError(explain(messages, environment.log))


def explain(messages: str, log: Path) -> str:
    """One line about a failed pip install."""
    lowered = messages.lower()
    if any(phrase in lowered for phrase in _NO_NETWORK):
        return (
            "The packages cannot be downloaded: the package index does not answer. Connect to the network or point pip "
            f"at a local index (PIP_INDEX_URL, PIP_FIND_LINKS), then start again. Details: {log}"
        )
    if "no space left on device" in lowered:
        return f"The disk is full; the environment needs up to 8 GB. Details: {log}"
    errors = [line.strip() for line in messages.splitlines() if line.startswith("ERROR:")]
    if any("No matching distribution found" in line for line in errors):
        missing = next(line for line in errors if "No matching distribution found" in line)
        name = missing.rpartition(" for ")[2]
        return f"The package index has no {name} for Python {platform.python_version()} here. Details: {log}"
    return f"pip failed: {errors[-1] if errors else last_line(messages)} Details: {log}"


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message."


# ------------------------------------------------------------------------------------------------------- tests


def run_tests(environment: Environment, arguments: Sequence[str]) -> int:
    """Every check and all tests, or only pytest when arguments are given. The exit code is not 0 if any failed."""
    variables = {**os.environ, "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
    python = str(environment.python)
    if arguments:
        return subprocess.run([python, "-m", "pytest", *arguments], cwd=ROOT, env=variables).returncode
    ensure_chromium()
    # As many processes as there are cores: most tests are small and leave a second core idle otherwise.
    num_workers = max(1, min(4, os.cpu_count() or 1))
    variables["OMP_NUM_THREADS"] = "1"
    checks: Mapping[str, list[str]] = {
        "ruff format": [python, "-m", "ruff", "format", "--check", "."],
        "ruff check": [python, "-m", "ruff", "check", "."],
        "import rules": [python, "-c", "from importlinter.cli import lint_imports_command as run; run()"],
        "tests": [
            *(python, "-m", "pytest", f"--numprocesses={num_workers}"),
            *("--dist=loadfile", "--no-loadscope-reorder"),
        ],
    }
    codes: dict[str, int] = {}
    # The types are checked beside the others, in a single process that takes more than a minute; it prints at the end.
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as printed:
        types = subprocess.Popen(
            [python, "-m", "pyright", "--pythonpath", python], cwd=ROOT, env=variables, stdout=printed, stderr=printed
        )
        for name, command in checks.items():
            say(f"--- {name}")
            codes[name] = subprocess.run(command, cwd=ROOT, env=variables).returncode
        say("--- types")
        codes["types"] = types.wait()
        printed.seek(0)
        print(printed.read(), end="", flush=True)
    failed = [name for name, code in codes.items() if code]
    say(f"FAILED: {', '.join(failed)}" if failed else f"all passed: {', '.join(codes)}")
    return 1 if failed else 0


def ensure_chromium() -> None:
    """Install Debian's chromium for the browser tests when that is possible; say so loudly when it is not."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    if os.environ.get("FLUXGUI_CHROMIUM") or any(shutil.which(name) for name in names):
        return
    is_root = sys.platform != "win32" and os.geteuid() == 0
    if is_root and shutil.which("apt-get"):
        say("installing chromium for the browser tests")
        quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["apt-get", "update"], ["apt-get", "install", "-y", "--no-install-recommends", "chromium"]):
            if subprocess.run(command, env=quiet, stdout=subprocess.DEVNULL).returncode:
                break
        else:
            return
    say("NO CHROMIUM: the browser tests cannot run. Install chromium or name its program in FLUXGUI_CHROMIUM.")


# ------------------------------------------------------------------------------------------------------- start


def start(environment: Environment, arguments: Sequence[str]) -> NoReturn:
    """Become the environment's Python with these arguments; signals and the exit code are then the program's own."""
    command = [str(environment.python), *arguments]
    sys.stdout.flush()
    if sys.platform != "win32":
        os.execv(command[0], command)
    # Windows has no exec that keeps the console attached. Ctrl+C reaches the child by itself; this process waits.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(subprocess.run(command).returncode)


def say(text: str) -> None:
    print(f"run.py: {text}", flush=True)


def main(arguments: Sequence[str]) -> int:
    rest = list(arguments)
    folder = os.environ.get("FLUXGUI_VENV") or str(ROOT / ".venv")
    if rest and rest[0] == "--venv":
        if len(rest) < 2:
            print("run.py: --venv needs a folder.", file=sys.stderr)
            return EXIT_USAGE
        folder, rest = rest[1], rest[2:]
    if rest and rest[0] in ("-h", "--help", "help"):
        print(__doc__)
        return 0
    command = rest.pop(0) if rest and rest[0] in ("test", "setup", "demo", "train", "doctor") else ""
    if rest and not command and not rest[0].startswith("-"):
        print(f"run.py: {rest[0]} is not a command; there are demo, train, setup, doctor and test.", file=sys.stderr)
        return EXIT_USAGE

    environment = Environment(Path(folder).expanduser().absolute())
    try:
        prepare(environment, with_tests=command == "test")
    except SetupError as error:
        print(f"run.py: {error}", file=sys.stderr)
        return EXIT_SETUP
    except KeyboardInterrupt:
        print("\nrun.py: stopped; the next start goes on from here.", file=sys.stderr)
        return 130
    if command == "setup":
        return 0
    if command == "test":
        return run_tests(environment, rest)
    if command == "train":
        start(environment, [str(ROOT / "flux_train_network.py"), *rest])
    start(environment, [str(ROOT / "app.py"), *([f"--{command}"] if command else []), *rest])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
