"""Optimizer and schedule, made once for nothing: what they refuse is known before a model loads."""

from __future__ import annotations

import torch

from trainer.schema.optimizer_rules import optimizer_arguments
from trainer.schema.options import Options
from trainer.train.findings import Findings
from trainer.train.learning_rate import check_schedule
from trainer.train.optim import check_optimizer
from trainer.train.reporting import Reporter


def check_optimization(
    options: Options, findings: Findings, *, num_steps: int, reporter: Reporter | None = None
) -> None:
    findings.attempt(lambda: check_optimizer(options.optimizer_type, optimizer_arguments(options)))
    findings.attempt(lambda: check_schedule(options, num_steps=num_steps))
    if reporter is not None and options.optimizer_type.startswith("Paged") and not torch.cuda.is_available():
        reporter.note(f"{options.optimizer_type} works without paging: there is no NVIDIA GPU")
