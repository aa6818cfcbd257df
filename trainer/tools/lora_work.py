"""What the LoRA tools do with their parsed command lines: merge, merge-loras, extract, resize, inspect."""

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
from trainer.schema.job_folder import JobReporter
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

_DTYPES: Final[Mapping[str, torch.dtype]] = MappingProxyType(
    {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
)


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


def _extract(known: argparse.Namespace, reporter: JobReporter) -> str:
    original, tuned = cast("Path", known.model_org), cast("Path", known.model_tuned)
    target = _checked_target(known, [original, tuned])
    quantile = cast("float", known.clamp_quantile)
    if not 0 < quantile <= 1:
        raise UserError("the quantile must be above 0 and at most 1", "--clamp_quantile", exit_code=2)
    tensors = extract(original, tuned, rank=known.dim, clamp_quantile=quantile, progress=reporter.progress)
    save_content(target, tensors, {}, _save_dtype(known), f"extracted from {tuned.name} over {original.name}")
    return f"{target}: rank {known.dim}, {len(tensors.adapters)} changed layers"


def _inspect(known: argparse.Namespace, _reporter: JobReporter) -> str:
    facts = describe(cast("Path", known.file))
    return json.dumps(facts, indent=1, ensure_ascii=False) if known.json else describe_in_words(facts)


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
    return None if known.save_precision is None else _DTYPES[known.save_precision]


def _ratios(known: argparse.Namespace, models: Sequence[Path]) -> list[float]:
    ratios = cast("list[float]", known.ratios or [1.0] * len(models))
    if len(ratios) != len(models):
        what = f"there are {len(models)} LoRAs and {len(ratios)} ratios"
        raise UserError(what, "--ratios", "Give one ratio for each LoRA.", exit_code=2)
    return ratios


WORK: Final[Mapping[str, Callable[[argparse.Namespace, JobReporter], str]]] = MappingProxyType(
    {"merge": _merge, "merge-loras": _merge_loras, "extract": _extract, "resize": _resize, "inspect": _inspect}
)
"""By the tool's name: does its work and gives the line to print. Raises `UserError`."""
