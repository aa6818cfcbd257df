"""The trainer's own entry function, called in this process: the same path as a command line, without its start."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import signal
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.tiny import TinyModels
from trainer.__main__ import main


@dataclass(frozen=True)
class Answer:
    """What a user sees: the exit code and all that is written. `problems` are the lines of the error.

    `seconds` are those of the processor, whatever else runs on the machine.
    """

    code: int
    output: str
    seconds: float

    @property
    def problems(self) -> list[str]:
        """Each problem of the final report; none after a success."""
        logged = re.search(r" ERROR +(.*?)(?=\n\d{4}-\d\d-\d\d |\Z)", self.output, re.DOTALL)
        printed = re.search(r"^errors?:\s(.*)\Z", self.output, re.DOTALL | re.MULTILINE)
        found = logged or printed
        return found[1].strip().splitlines() if found else []


@contextlib.contextmanager
def _untouched_process() -> Generator[None, None, None]:
    """Logging and signals as they were: a command sets both, as the process is its own."""
    root, own = logging.getLogger(), logging.getLogger("trainer")
    handlers, levels = root.handlers[:], (root.level, own.level)
    signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for handler in root.handlers:
            if handler not in handlers:
                handler.close()
        root.handlers[:] = handlers
        root.setLevel(levels[0])
        own.setLevel(levels[1])
        for number, handler in signals.items():
            signal.signal(number, handler)


def answer(*words: str) -> Answer:
    """`python -m trainer WORDS`, or `python flux_train_network.py WORDS`: they call one function."""
    output = io.StringIO()
    started = time.process_time()
    with _untouched_process(), contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            code = main(list(words))
        except SystemExit as ending:
            code = int(str(ending.code))
    return Answer(code, output.getvalue(), time.process_time() - started)


def words_of(arguments: Mapping[str, str]) -> list[str]:
    return [f"--{name}={value}" for name, value in arguments.items()]


def arguments_of(words: Sequence[str]) -> dict[str, str]:
    return dict(word.removeprefix("--").split("=", 1) for word in words)


def small_run(models: TinyModels, dataset: Path, output_dir: Path) -> dict[str, str]:
    """The options of one short step in which nothing is wrong, by name."""
    return arguments_of(models.arguments()) | {
        "dataset_config": str(dataset),
        "output_dir": str(output_dir),
        "output_name": "lora",
        "network_module": "networks.lora_flux",
        "max_train_steps": "1",
    }
