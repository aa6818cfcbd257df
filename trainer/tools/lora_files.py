"""Work on LoRA files as a whole: several into one, to a smaller rank, out of two models, and what a file holds."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from trainer.lora.form_reader import published_tensors, read_lora
from trainer.lora.layer_names import is_flux_path
from trainer.lora.lora_file import read_lora_file
from trainer.lora.lora_tensors import LayerTensors, LoraTensors
from trainer.lora.low_rank import Rule, decompose_matrix, decompose_product, factors, kept_rank
from trainer.lora.naming import published_name
from trainer.model.weights import read_planned
from trainer.schema.base import UserError
from trainer.schema.key_plans import PlannedTensor, flux_plan
from trainer.schema.model_check import check_kind
from trainer.schema.model_kinds import identify, noun
from trainer.schema.safetensors_header import Header, read_header
from trainer.schema.weight_files import read_weights
from trainer.train.checkpoint import save_lora

Progress = Callable[[int, int, str], None]

_STALE: Final = ("sshs_model_hash", "sshs_legacy_hash", "ss_network_dim", "ss_network_alpha", "ss_network_args")
_NOTHING_BELOW: Final = 1e-6
"""A layer whose largest change is below this part of its largest weight counts as unchanged."""


@dataclass(frozen=True)
class LoraContent:
    path: Path
    tensors: LoraTensors
    metadata: Mapping[str, str]
    form: str


def read_content(path: Path) -> LoraContent:
    """A LoRA of any form that is known. Raises `UserError`."""
    header = read_header(path)
    if identify(header) not in ("lora", "unknown"):
        raise UserError(f"this is {noun(header)}, not a LoRA", str(path), "Give a LoRA.")
    state, metadata = read_lora_file(path)
    tensors, origin = read_lora(state, metadata, where=str(path))
    return LoraContent(path, tensors, metadata, origin.form)


# -------------------------------------------------------------------------------------------------------------- several


def merge_loras(
    contents: Sequence[LoraContent], ratios: Sequence[float], *, rank: int | None, progress: Progress
) -> LoraTensors:
    """One LoRA that does what all do together at their ratios.

    Without `rank` exactly, by writing the factors beside one another, so that the rank is the sum of theirs; with it the
    best approximation of that rank.
    """
    names = list(dict.fromkeys(name for content in contents for name in content.tensors.adapters))
    merged: dict[str, LayerTensors] = {}
    for number, name in enumerate(names):
        progress(number, len(names), name)
        ups, downs = [], []
        for content, ratio in zip(contents, ratios, strict=True):
            adapter = content.tensors.adapters.get(name)
            if adapter is not None:
                _require_plain(name, adapter, content.path)
                ups.append(adapter.up.float() * (ratio * adapter.scale))
                downs.append(adapter.down.float())
        shapes = {(up.shape[0], down.shape[1]) for up, down in zip(ups, downs, strict=True)}
        if len(shapes) > 1:
            raise UserError(f"{name} has different sizes in these files", hint="They belong to different models.")
        up, down = torch.cat(ups, dim=1), torch.cat(downs)
        if rank is not None and rank < down.shape[0]:
            u, s, vh = decompose_product(up, down)
            up, down = factors(u, s, vh, rank)
        merged[name] = LayerTensors(down.contiguous(), up.contiguous(), torch.tensor(float(down.shape[0])))
    _require_no_norms(contents)
    return LoraTensors(merged)


def _require_no_norms(contents: Sequence[LoraContent]) -> None:
    for content in contents:
        if content.tensors.norms:
            raise UserError("this control LoRA replaces norms, which cannot be mixed", str(content.path))


def _require_plain(name: str, adapter: LayerTensors, path: Path) -> None:
    if adapter.magnitude is not None or adapter.bias is not None:
        kind = "a magnitude (DoRA)" if adapter.magnitude is not None else "a bias"
        raise UserError(
            f"{name} has {kind}: what it does depends on the model's weights",
            str(path),
            "Merge it into the model instead.",
        )


# --------------------------------------------------------------------------------------------------------------- resize


@dataclass(frozen=True)
class Resized:
    """`kept` is per layer the part of the change's Frobenius norm that is left."""

    tensors: LoraTensors
    ranks: Mapping[str, int]
    kept: Mapping[str, float]


def resize(
    content: LoraContent, *, new_rank: int | None, rule: Rule | None, value: float, progress: Progress
) -> Resized:
    """The same LoRA at a smaller rank: at most `new_rank`, and with `rule` only what it keeps; alpha / rank stays."""
    adapters: dict[str, LayerTensors] = {}
    ranks: dict[str, int] = {}
    kept: dict[str, float] = {}
    _require_no_norms([content])
    for number, (name, adapter) in enumerate(content.tensors.adapters.items()):
        progress(number, len(content.tensors.adapters), name)
        _require_plain(name, adapter, content.path)
        u, s, vh = decompose_product(adapter.up, adapter.down)
        rank = len(s) if rule is None else kept_rank(s, rule, value)
        rank = min(rank, len(s), new_rank or len(s))
        up, down = factors(u, s, vh, rank)
        alpha = torch.tensor(adapter.scale * rank)
        adapters[name] = LayerTensors(down.contiguous(), up.contiguous(), alpha)
        total = float(s.norm())
        ranks[name], kept[name] = rank, float(s[:rank].norm()) / total if total else 1.0
    return Resized(LoraTensors(adapters), ranks, kept)


# -------------------------------------------------------------------------------------------------------------- extract


def extract(original: Path, tuned: Path, *, rank: int, clamp_quantile: float, progress: Progress) -> LoraTensors:
    """The LoRA of `rank` that comes closest to what leads from one FLUX model to the other; unchanged layers are left out.

    Read layer by layer: no more than two weights are in memory. `clamp_quantile` below 1 cuts off outliers of the
    factors, as sd-scripts' flux_extract_lora does at 0.99; 1 leaves them.
    """
    first, second = _flux_linears(original), _flux_linears(tuned)
    if first[1].keys() != second[1].keys():
        raise UserError("these models have different layers", str(tuned), "Give two FLUX.1 models of one kind.")
    adapters: dict[str, LayerTensors] = {}
    for number, (path, planned) in enumerate(first[1].items()):
        progress(number, len(first[1]), path)
        before, after = _weight(first[0], planned), _weight(second[0], second[1][path])
        if before.shape != after.shape:
            raise UserError(f"{path} has different sizes in these models", str(tuned), "Give two models of one kind.")
        change = after - before
        if float(change.abs().max()) <= _NOTHING_BELOW * float(before.abs().max()):
            continue
        u, s, vh = decompose_matrix(change, rank)
        up, down = factors(u, s, vh, rank)
        if clamp_quantile < 1:
            limit = float(torch.quantile(torch.cat((up.flatten(), down.flatten())).abs()[: 1 << 24], clamp_quantile))
            up, down = up.clamp(-limit, limit), down.clamp(-limit, limit)
        alpha = torch.tensor(float(down.shape[0]))
        adapters[published_name("unet", path)] = LayerTensors(down.contiguous(), up.contiguous(), alpha)
    if not adapters:
        raise UserError("these two models are the same", str(tuned), "There is nothing to extract.")
    return LoraTensors(adapters)


def _flux_linears(path: Path) -> tuple[Header, dict[str, PlannedTensor]]:
    header = read_weights(path, "flux")
    problem = check_kind(header, "flux", "model")
    if problem is not None:
        raise UserError(problem.what, problem.where, "Give a FLUX.1 model.")
    linears = {
        planned.target.removesuffix(".weight"): planned
        for planned in flux_plan(header)
        if planned.target.endswith(".weight")
        and len(planned.shape) == 2
        and is_flux_path(planned.target.removesuffix(".weight"))
    }
    return header, linears


def _weight(header: Header, planned: PlannedTensor) -> Tensor:
    return read_planned(header, [planned])[planned.target].float()


# --------------------------------------------------------------------------------------------------------------- saving


def save_content(
    path: Path, tensors: LoraTensors, metadata: Mapping[str, str], dtype: torch.dtype | None, note: str
) -> None:
    """Writes the sd-scripts form, with the metadata that is still true, the new rank and `note` on where it comes from."""
    if dtype is not None:
        converted = {
            name: replace(adapter, down=adapter.down.to(dtype), up=adapter.up.to(dtype))
            for name, adapter in tensors.adapters.items()
        }
        tensors = replace(tensors, adapters=converted)
    ranks = Counter(adapter.rank for adapter in tensors.adapters.values())
    alphas = Counter(adapter.rank * adapter.scale for adapter in tensors.adapters.values())
    kept = {key: value for key, value in metadata.items() if key not in _STALE and not key.startswith("fluxgui_")}
    added = {
        "ss_network_module": "networks.lora_flux",
        "ss_network_dim": str(ranks.most_common(1)[0][0]) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": f"{alphas.most_common(1)[0][0]:g}" if len(alphas) == 1 else "Dynamic",
        "ss_training_comment": f"{kept.get('ss_training_comment', '')} {note}".strip(),
    }
    save_lora(path, published_tensors(tensors, where=str(path)), {**kept, **added})


# -------------------------------------------------------------------------------------------------------------- inspect


def describe(path: Path) -> dict[str, object]:
    """What a LoRA file holds, as JSON: form, layers by model, ranks, alphas, norms of the change, metadata."""
    content = read_content(path)
    adapters = content.tensors.adapters
    norms = {name: float(decompose_product(a.up, a.down)[1].norm()) * a.scale for name, a in adapters.items()}
    parts = Counter(name.split("_")[1] for name in adapters)
    strongest = sorted(norms, key=lambda name: -norms[name])[:10]
    return {
        "file": str(path),
        "form": content.form,
        "bytes": path.stat().st_size,
        "base_model": content.metadata.get("ss_base_model_version") or content.metadata.get("modelspec.architecture"),
        "layers": {name: parts[own] for own, name in (("unet", "flux"), ("te1", "clip_l"), ("te3", "t5xxl"))},
        "ranks": {str(rank): number for rank, number in sorted(Counter(a.rank for a in adapters.values()).items())},
        "alphas": {
            f"{alpha:g}": number
            for alpha, number in sorted(Counter(a.rank * a.scale for a in adapters.values()).items())
        },
        "dtypes": sorted({str(a.down.dtype).removeprefix("torch.") for a in adapters.values()}),
        "dora": sum(a.magnitude is not None for a in adapters.values()),
        "not_finite": [name for name, norm in norms.items() if not norm < float("inf")],
        "mean_norm": sum(norms.values()) / max(1, len(norms)),
        "largest_norms": {name: norms[name] for name in strongest},
        "metadata": dict(content.metadata),
    }


def describe_in_words(facts: Mapping[str, object]) -> str:
    """`describe` for people; the metadata is left to --json."""
    shown = {key: value for key, value in facts.items() if key != "metadata"}
    width = max(map(len, shown)) + 2
    lines = [f"{key:<{width}}{value if isinstance(value, str) else json.dumps(value)}" for key, value in shown.items()]
    metadata = facts["metadata"]
    num_entries = len(metadata) if isinstance(metadata, dict) else 0
    return "\n".join([*lines, f"{'metadata':<{width}}{num_entries} entries, shown with --json"])
