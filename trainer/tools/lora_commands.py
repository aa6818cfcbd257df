"""The command lines of the LoRA tools: merge, merge-loras, extract, resize, inspect.

Flags of kohya-ss/sd-scripts' tools (networks/flux_merge_lora.py, flux_extract_lora.py, resize_lora.py) are understood
where they mean something here.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Final, cast

import torch

from trainer.lora.low_rank import Rule
from trainer.lora.runtime import read_layers
from trainer.schema.base import UserError
from trainer.schema.job_folder import JobReporter, run_job
from trainer.tools.lora_files import (
    describe,
    describe_in_words,
    extract,
    merge_loras,
    read_content,
    resize,
    save_content,
)
from trainer.tools.merge_model import merge_into_model

DTYPES: Final[Mapping[str, torch.dtype]] = MappingProxyType(
    {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
)
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

Work = Callable[[argparse.Namespace, JobReporter], str]


def run_lora_command(name: str, arguments: Sequence[str]) -> int:
    """Runs one of the tools; returns the exit code. Raises `UserError` when it is no job of the page."""
    fill, work = _TOOLS[name]
    parser = argparse.ArgumentParser(prog=f"python -m trainer {name}", allow_abbrev=False)
    fill(parser)
    parser.add_argument("--job_dir", type=Path, help="folder of a job of the page, for its progress")
    known = parser.parse_args(arguments)

    def do(reporter: JobReporter) -> None:
        for flag, reason in _WITHOUT_EFFECT.items():
            if getattr(known, flag, None):
                reporter.warning(f"--{flag} has no effect: {reason}")
        text = work(known, reporter)
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


def _checked_target(known: argparse.Namespace, sources: Sequence[Path]) -> Path:
    target = cast("Path", known.save_to)
    where = f"--save_to={target}"
    if target.suffix != ".safetensors":
        raise UserError("the output's name must end with .safetensors", where, exit_code=2)
    if target.exists() and not known.overwrite:
        raise UserError("this file is there already", where, "Add --overwrite to replace it.", exit_code=2)
    if any(target.exists() and source.exists() and target.samefile(source) for source in sources):
        raise UserError("input and output are the same file", where, "Give another name.", exit_code=2)
    return target


def _save_dtype(known: argparse.Namespace) -> torch.dtype | None:
    return None if known.save_precision is None else DTYPES[known.save_precision]


def _ratios(known: argparse.Namespace, models: Sequence[Path]) -> list[float]:
    ratios = cast("list[float]", known.ratios or [1.0] * len(models))
    if len(ratios) != len(models):
        what = f"there are {len(models)} LoRAs and {len(ratios)} ratios"
        raise UserError(what, "--ratios", "Give one ratio for each LoRA.", exit_code=2)
    return ratios


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
    _add_output(parser, precisions=list(DTYPES))


def _merge(known: argparse.Namespace, reporter: JobReporter) -> str:
    if getattr(known, "flux_model", None) is None:
        return _merge_loras(known, reporter)
    models, model = cast("list[Path]", known.models), cast("Path", known.flux_model)
    ratios = _ratios(known, models)
    target = _checked_target(known, [model, *models])
    loras = [(read_layers(path), ratio) for path, ratio in zip(models, ratios, strict=True)]
    for lora, _ in loras:
        if lora.has("te1") or lora.has("te3"):
            reporter.warning(f"{lora.path.name}: its layers for text encoders are left out")
    num_changed = merge_into_model(model, loras, target, dtype=_save_dtype(known), progress=reporter.progress)
    return f"{target}: {num_changed} layers of {model.name} changed by {len(loras)} LoRAs"


def _merge_loras(known: argparse.Namespace, reporter: JobReporter) -> str:
    models = cast("list[Path]", known.models)
    ratios = _ratios(known, models)
    if known.save_precision == "fp8":
        raise UserError("a LoRA cannot be kept in fp8", "--save_precision", "Use bf16 or fp16.", exit_code=2)
    target = _checked_target(known, models)
    contents = [read_content(path) for path in models]
    tensors = merge_loras(contents, ratios, rank=cast("int | None", known.rank), progress=reporter.progress)
    shares = ", ".join(f"{path.name} at {ratio:g}" for path, ratio in zip(models, ratios, strict=True))
    base = {key: contents[0].metadata[key] for key in ("ss_base_model_version",) if key in contents[0].metadata}
    save_content(target, tensors, base, _save_dtype(known), f"merged from {shares}")
    ranks = sorted({adapter.rank for adapter in tensors.adapters.values()})
    return f"{target}: {shares}; rank {', '.join(map(str, ranks))}"


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


def _resize(known: argparse.Namespace, reporter: JobReporter) -> str:
    source = cast("Path", known.model)
    new_rank, rule = cast("int | None", known.new_rank), cast("Rule | None", known.dynamic_method)
    value = cast("float | None", known.dynamic_param)
    if rule is None and new_rank is None:
        raise UserError("the new rank is not given", "--new_rank", "Give it, or --dynamic_method.", exit_code=2)
    if rule is not None and (value is None or (value < 1 if rule == "sv_ratio" else not 0 < value <= 1)):
        wanted = "1 or more" if rule == "sv_ratio" else "above 0 and at most 1"
        raise UserError(f"{rule} takes a value of {wanted}", "--dynamic_param", exit_code=2)
    target = _checked_target(known, [source])
    content = read_content(source)
    resized = resize(content, new_rank=new_rank, rule=rule, value=value or 0.0, progress=reporter.progress)
    dtype = _save_dtype(known) or next(iter(content.tensors.adapters.values())).down.dtype
    save_content(target, resized.tensors, content.metadata, dtype, f"resized from {source.name}")
    ranks, kept = list(resized.ranks.values()), list(resized.kept.values())
    return (
        f"{target}: rank {min(ranks)} to {max(ranks)}, {sum(ranks) / len(ranks):.1f} on average; "
        f"{100 * sum(kept) / len(kept):.2f} % of the norm is kept, {100 * min(kept):.2f} % in the worst layer"
    )


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


def _extract(known: argparse.Namespace, reporter: JobReporter) -> str:
    original, tuned = cast("Path", known.model_org), cast("Path", known.model_tuned)
    target = _checked_target(known, [original, tuned])
    quantile = cast("float", known.clamp_quantile)
    if not 0 < quantile <= 1:
        raise UserError("the quantile must be above 0 and at most 1", "--clamp_quantile", exit_code=2)
    tensors = extract(original, tuned, rank=known.dim, clamp_quantile=quantile, progress=reporter.progress)
    save_content(target, tensors, {}, _save_dtype(known), f"extracted from {tuned.name} over {original.name}")
    return f"{target}: rank {known.dim}, {len(tensors.adapters)} changed layers"


# -------------------------------------------------------------------------------------------------------------- inspect


def _inspect_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Says what a LoRA file holds: form, ranks, alphas, norms, base model, metadata."
    parser.add_argument("file", type=Path, help="the LoRA")
    parser.add_argument("--json", action="store_true", help="as JSON, with all metadata")


def _inspect(known: argparse.Namespace, _reporter: JobReporter) -> str:
    facts = describe(cast("Path", known.file))
    return json.dumps(facts, indent=1, ensure_ascii=False) if known.json else describe_in_words(facts)


def _positive(word: str) -> int:
    value = int(word)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{word} is not 1 or more")
    return value


_TOOLS: Final[Mapping[str, tuple[Callable[[argparse.ArgumentParser], None], Work]]] = MappingProxyType(
    {
        "merge": (_merge_arguments, _merge),
        "merge-loras": (_merge_loras_arguments, _merge_loras),
        "extract": (_extract_arguments, _extract),
        "resize": (_resize_arguments, _resize),
        "inspect": (_inspect_arguments, _inspect),
    }
)
