"""What a run shows on the console: a bar for each phase that counts, and lines that do not run into it."""

from __future__ import annotations

import logging
import sys

import pytest

from trainer.train.reporting import Reporter
from trainer.train.session import ConsoleHandler


def test_the_console_counts_through_a_phase_before_training(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter()
    reporter.phase("latents")
    for done in range(1, 4):
        reporter.progress(done, 3)
    reporter.phase("model")
    assert "latents: 100%" in capsys.readouterr().err
    reporter.progress(1, 2)
    assert "model:  50%" in capsys.readouterr().err
    reporter.close()


def test_during_training_only_the_steps_have_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter()
    reporter.start_training(4, 0)
    reporter.phase("sampling")
    reporter.progress(2, 2)
    reporter.close()
    shown = capsys.readouterr().err
    assert "steps:" in shown
    assert "sampling:" not in shown


def test_a_line_begins_at_the_margin_while_a_bar_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter()
    logger = logging.Logger("lines")
    logger.addHandler(ConsoleHandler(sys.stderr))
    reporter.start_training(4, 0)
    reporter.step(step=1, scalars={"loss/average": 0.5})
    logger.warning("a line of its own")
    reporter.close()
    before, _, after = capsys.readouterr().err.partition("a line of its own")
    assert before[-1] in "\r\n"
    assert after.startswith("\n")
