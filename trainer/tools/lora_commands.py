"""The command lines of the LoRA tools: merge, merge-loras, extract, resize, inspect.

Flags of kohya-ss/sd-scripts' tools (networks/flux_merge_lora.py, flux_extract_lora.py, resize_lora.py) are understood
where they mean something here.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Final, cast

from trainer.schema.job_folder import JobReporter, run_job

_PRECISIONS: Final = ("float", "fp16", "bf16", "fp8")
_WITHOUT_EFFECT: Final[Mapping[str, str]] = MappingProxyType(
    {
        "loading_device": "tensors are read one at a time, into main memory",
        "working_device": "it is computed on the CPU",
        "device": "it is computed on the CPU",
        "load_precision": "numbers are read as the file has them",
        "precision": "it is computed in 32 bit",
        "new_conv_rank": "FLUX.1 has no convolutions",
        "mem_eff_load_save": "little memory is used in any case",
        "mem_eff_safe_open": "little memory is used in any case",
        "no_metadata": "the file always says what it was made from",
        "concat": "LoRAs become one by concatenation unless a rank is given",
        "shuffle": "the order of a LoRA's ranks means nothing",
        "verbose": "what was done is said in any case",
    }
)
"""Flags of sd-scripts' tools that are accepted, and the reason why they change nothing."""
_IGNORED: Final = ("loading_device", "working_device", "load_precision", "precision")


def run_lora_command(name: str, arguments: Sequence[str]) -> int:
    """Runs one of the tools; returns the exit code. Raises `UserError` when it is no job of the page."""
    parser = argparse.ArgumentParser(prog=f"python -m trainer {name}", allow_abbrev=False)
    _ARGUMENTS[name](parser)
    parser.add_argument("--job_dir", type=Path, help="folder of a job of the page, for its progress")
    known = parser.parse_args(arguments)

    def do(reporter: JobReporter) -> None:
        for flag, reason in _WITHOUT_EFFECT.items():
            if getattr(known, flag, None):
                reporter.warning(f"--{flag} has no effect: {reason}")
        from trainer.tools.lora_work import WORK  # noqa: PLC0415 - torch takes seconds to load

        text = WORK[name](known, reporter)
        print(text)
        target = getattr(known, "save_to", None)
        reporter.result(target, text=text)

    return run_job(cast("Path | None", known.job_dir), do)


def _add_output(parser: argparse.ArgumentParser, *, precisions: Sequence[str]) -> None:
    parser.add_argument("--save_to", "--output", dest="save_to", type=Path, required=True, help="the file to write")
    parser.add_argument("--save_precision", choices=precisions, help="number format of the file (default: as it was)")
    parser.add_argument("--overwrite", action="store_true", help="replace the output when it is there")
    for name in _IGNORED:
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    for name in ("mem_eff_load_save", "mem_eff_safe_open", "no_metadata", "concat", "shuffle", "verbose"):
        parser.add_argument(f"--{name}", action="store_true", help=argparse.SUPPRESS)


# ---------------------------------------------------------------------------------------------------------------- merge


def _merge_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Merges LoRAs into a FLUX.1 model (--flux_model), layer by layer, so that little memory is needed. Without a "
        "model the LoRAs become one LoRA. Layers for the text encoders are not in the model's file and are left out."
    )
    parser.add_argument("--flux_model", type=Path, help="the FLUX.1 model")
    _merge_loras_arguments(parser)


def _merge_loras_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", type=Path, required=True, help="the LoRAs")
    parser.add_argument("--ratios", nargs="+", type=float, help="one strength for each LoRA (default: 1)")
    parser.add_argument(
        "--rank", "--new_rank", dest="rank", type=_positive, help="LoRAs to one: approximate at this rank"
    )
    _add_output(parser, precisions=_PRECISIONS)


# --------------------------------------------------------------------------------------------------------------- resize


def _resize_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Reduces a LoRA's rank: to a fixed one, or layer by layer to what a rule keeps."
    parser.add_argument("--model", "--input", dest="model", type=Path, required=True, help="the LoRA")
    parser.add_argument("--new_rank", type=_positive, help="the rank, or with --dynamic_method the largest one")
    parser.add_argument("--new_conv_rank", help=argparse.SUPPRESS)
    parser.add_argument("--device", help=argparse.SUPPRESS)
    parser.add_argument(
        "--dynamic_method",
        choices=["sv_ratio", "sv_cumulative", "sv_fro"],
        help="keep singular values above the largest / PARAM, or those that make up PARAM of their sum, or of the norm",
    )
    parser.add_argument("--dynamic_param", type=float, help="PARAM: above 1 for sv_ratio, 0 to 1 for the others")
    _add_output(parser, precisions=["float", "fp16", "bf16"])


# -------------------------------------------------------------------------------------------------------------- extract


def _extract_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Makes a LoRA of the difference of two FLUX.1 models."
    parser.add_argument("--model_org", type=Path, required=True, help="the original model")
    parser.add_argument("--model_tuned", type=Path, required=True, help="the changed model")
    parser.add_argument("--dim", "--rank", dest="dim", type=_positive, default=16, help="the rank (default: 16)")
    parser.add_argument(
        "--clamp_quantile", type=float, default=1.0, help="below 1, cut off the factors' outliers (default: 1, none)"
    )
    parser.add_argument("--device", help=argparse.SUPPRESS)
    _add_output(parser, precisions=["float", "fp16", "bf16"])


# -------------------------------------------------------------------------------------------------------------- inspect


def _inspect_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Says what a LoRA file holds: form, ranks, alphas, norms, base model, metadata."
    parser.add_argument("file", type=Path, help="the LoRA")
    parser.add_argument("--json", action="store_true", help="as JSON, with all metadata")


def _positive(word: str) -> int:
    value = int(word)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{word} is not 1 or more")
    return value


_ARGUMENTS: Final[Mapping[str, Callable[[argparse.ArgumentParser], None]]] = MappingProxyType(
    {
        "merge": _merge_arguments,
        "merge-loras": _merge_loras_arguments,
        "extract": _extract_arguments,
        "resize": _resize_arguments,
        "inspect": _inspect_arguments,
    }
)
