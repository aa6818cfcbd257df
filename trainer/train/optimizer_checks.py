"""Optimizer and schedule, made once for nothing: what they refuse is known before a model loads."""

from __future__ import annotations

from typing import Final

from trainer.schema.optimizer_rules import optimizer_arguments
from trainer.schema.optimizers import OPTIMIZERS
from trainer.schema.optional_packages import is_installed, not_installed
from trainer.schema.options import Options
from trainer.train.findings import Findings
from trainer.train.reporting import Reporter

_PLAIN_SCHEDULES: Final = ("constant", "constant_with_warmup", "cosine", "linear", "cosine_with_restarts")
"""Schedules without settings that could be refused."""


def check_optimization(
    options: Options, findings: Findings, *, num_steps: int, reporter: Reporter | None = None
) -> None:
    findings.attempt(lambda: _check_optimizer(options))
    if _has_open_schedule(options):
        from trainer.train.learning_rate import check_schedule  # noqa: PLC0415 - torch takes seconds to load

        findings.attempt(lambda: check_schedule(options, num_steps=num_steps))
    if reporter is not None and options.optimizer_type.startswith("Paged"):
        import torch  # noqa: PLC0415 - seconds to import

        if not torch.cuda.is_available():
            reporter.note(f"{options.optimizer_type} works without paging: there is no NVIDIA GPU")


def _check_optimizer(options: Options) -> None:
    """Raises `UserError` when `create_optimizer` would, before there is anything to train.

    The optimizers of bitsandbytes, whose import takes seconds, are only looked for. AdamW is not made either: torch
    imports its compiler with the first optimizer, for seconds, and AdamW's settings have been checked one by one.
    """
    name, arguments = options.optimizer_type, optimizer_arguments(options)
    kind = OPTIMIZERS.get(name)
    if name == "AdamW":
        return
    if kind is not None and not is_installed(kind.module):
        raise not_installed(f"optimizer_type {name}", kind.module, "optimizer_type")
    if kind is not None and kind.module == "bitsandbytes.optim":
        return
    from trainer.train.optim import check_optimizer  # noqa: PLC0415 - torch takes seconds to load

    check_optimizer(name, arguments)


def _has_open_schedule(options: Options) -> bool:
    """Whether making the schedule could fail. Besides, torch imports its compiler with the first optimizer, for seconds."""
    return bool(options.lr_scheduler not in _PLAIN_SCHEDULES or options.lr_scheduler_type or options.lr_scheduler_args)
