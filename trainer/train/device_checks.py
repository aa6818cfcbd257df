"""The device and the installed packages that a run's options ask for."""

from __future__ import annotations

import importlib.util

import torch

from trainer.schema.base import Problem
from trainer.schema.options import Options
from trainer.train.findings import EXIT_OPTIONS, Findings


def check_device(options: Options, findings: Findings) -> None:
    where = f"--device={options.device}"
    if options.device == "cuda" and not torch.cuda.is_available():
        findings.add(
            Problem(
                "no NVIDIA GPU can be used", where, "Check the driver and torch's CUDA build, or use auto.", "device"
            ),
            EXIT_OPTIONS,
        )
    if options.device == "mps" and not torch.backends.mps.is_available():
        findings.add(Problem("no Apple GPU can be used", where, "Use auto or cpu.", "device"), EXIT_OPTIONS)
    if options.optimizer_type == "AdamW8bit" and importlib.util.find_spec("bitsandbytes") is None:
        findings.add(
            Problem(
                "AdamW8bit needs the package bitsandbytes, which is not installed",
                "--optimizer_type",
                "Run python run.py setup, or use AdamW.",
                "optimizer_type",
            ),
            EXIT_OPTIONS,
        )
