"""Which Linears get an adapter, under which published name, and which kind."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from torch import nn

from trainer.lora.adapter import Adapter
from trainer.lora.dora import DoraLinear
from trainer.lora.ggpo import Perturbation
from trainer.lora.lora import LoraLinear
from trainer.lora.naming import Component, published_name
from trainer.lora.oft import OftLinear
from trainer.schema.base import UserError
from trainer.schema.lora_spec import IN_LAYERS, LoraSpec
from trainer.schema.network_args import TYPE_DIMS, fused_parts

CLIP_CLASSES = ("CLIPAttention", "CLIPSdpaAttention", "CLIPMLP")
"""Classes of CLIP-L whose Linears are adapted."""

T5_CLASSES = ("T5Attention", "T5DenseGatedActDense")
"""Classes of T5-XXL whose Linears are adapted."""


@dataclass(frozen=True)
class Target:
    """A Linear that gets an adapter: `path` inside the model, published `name`, and rank."""

    path: str
    name: str
    rank: int


def text_encoder_targets(model: nn.Module, component: Component, spec: LoraSpec) -> list[Target]:
    """The attention and MLP Linears of CLIP-L (`te1`) or T5 (`te3`)."""
    if spec.kind != "lora":
        return []
    targets: list[Target] = []
    for path, module in model.named_modules():
        if type(module).__name__ in (CLIP_CLASSES if component == "te1" else T5_CLASSES):
            for child_name, child in module.named_children():
                if isinstance(child, nn.Linear):
                    name = published_name(component, f"{path}.{child_name}")
                    targets.append(Target(f"{path}.{child_name}", name, spec.rank_of(name)))
    return [target for target in targets if target.rank > 0]


def flux_targets(flux: nn.Module, spec: LoraSpec) -> list[Target]:
    """Double blocks, single blocks, then the layers before them. Raises `UserError` for blocks that do not exist."""
    targets: list[Target] = []
    for kind, indices in (("double", spec.double_indices), ("single", spec.single_indices)):
        blocks = cast("nn.ModuleList", flux.get_submodule(f"{kind}_blocks"))
        _check_indices(kind, indices, len(blocks))
        if spec.train_blocks in ("all", kind) or spec.file_ranks is not None:
            for path in _linears(flux, f"{kind}_blocks"):
                if spec.kind == "oft" and not spec.enable_all_linear and "_attn." not in path:
                    continue
                name = published_name("unet", path, "oft" if spec.kind == "oft" else "lora")
                targets.append(Target(path, name, spec.rank_of(name)))
    in_ranks = spec.in_dims if spec.file_ranks is None else (0,) * len(IN_LAYERS)
    for layer, rank in zip(IN_LAYERS, in_ranks or (), strict=False):
        if getattr(flux, layer, None) is not None:
            for path in _linears(flux, layer):
                name = published_name("unet", path)
                targets.append(Target(path, name, spec.rank_of(name, rank)))
    return [target for target in targets if target.rank > 0]


def settings_without_layers(
    flux: nn.Module, spec: LoraSpec, clip_l: nn.Module | None = None, t5xxl: nn.Module | None = None
) -> list[str]:
    """One line for each setting that is about layers which these models have not: schnell has no guidance_in, Chroma no
    modulation. They are given for dev by habit, so that they are told and not refused."""
    if spec.kind != "lora" or spec.file_ranks is not None:
        return []
    absent = [
        layer
        for layer, rank in zip(IN_LAYERS, spec.in_dims or (), strict=False)
        if rank > 0 and getattr(flux, layer, None) is None
    ]
    lines = [f"in_dims has no effect on {', '.join(absent)}: this model has no such layer"] if absent else []
    names = [published_name("unet", path) for path in _linears(flux, "")]
    for key, rank in spec.type_dims.items():
        if rank > 0 and not any(all(word in name for word in TYPE_DIMS[key]) for name in names):
            lines.append(f"{key} has no effect: this model has no such layers")
    candidates = _candidates(flux, clip_l, t5xxl, spec)
    for key, pairs in (("network_reg_dims", spec.reg_dims), ("network_reg_lrs", spec.reg_lrs)):
        idle = [pattern for pattern, _ in pairs if not any(re.search(pattern, name) for name in candidates)]
        if idle:
            lines.append(f"{key} has no effect with {', '.join(idle)}: no layer that is trained here has such a name")
    return lines


def _candidates(flux: nn.Module, clip_l: nn.Module | None, t5xxl: nn.Module | None, spec: LoraSpec) -> list[str]:
    """Published names of the layers that `spec` would train if each had the default rank."""
    all_blocks = replace(spec, reg_dims=(), type_dims={}, double_indices=None, single_indices=None)
    targets = flux_targets(flux, all_blocks)
    encoders: tuple[tuple[nn.Module | None, Component], ...] = ((clip_l, "te1"), (t5xxl, "te3"))
    for encoder, component in encoders:
        if encoder is not None:
            targets += text_encoder_targets(encoder, component, all_blocks)
    return [target.name for target in targets]


def wrap(root: nn.Module, target: Target, spec: LoraSpec, generator: torch.Generator) -> Adapter:
    """Puts the adapter in the Linear's place."""
    owner_path, _, attribute = target.path.rpartition(".")
    owner = root.get_submodule(owner_path)
    base = cast("nn.Linear", getattr(owner, attribute))
    if spec.kind == "oft":
        adapter: Adapter = OftLinear(base, target.rank, spec.alpha, _parts(base, target.name))
    else:
        adapter = _make_lora(base, target, spec, generator)
    setattr(owner, attribute, adapter)
    return adapter


def _make_lora(base: nn.Linear, target: Target, spec: LoraSpec, generator: torch.Generator) -> LoraLinear:
    make = partial(DoraLinear, axis=spec.dora_axis) if spec.dora else LoraLinear
    adapter = make(
        base,
        target.rank,
        spec.alpha_of(target.name, target.rank),
        generator,
        dropout=spec.dropout,
        rank_dropout=spec.rank_dropout,
        module_dropout=spec.module_dropout,
        splits=_parts(base, target.name) if spec.split_qkv else (),
        pissa_niter=spec.pissa_niter if spec.pissa else None,
    )
    if spec.ggpo_sigma is not None and spec.ggpo_beta is not None:
        adapter.perturbation = Perturbation(base, spec.ggpo_sigma, spec.ggpo_beta)
    return adapter


def _parts(base: nn.Linear, name: str) -> tuple[int, ...]:
    return fused_parts(name, base.in_features, base.out_features)


def _linears(root: nn.Module, path: str) -> Iterator[str]:
    """Paths of the Linears below `path` (or of `path` itself) in module order."""
    for name, module in list(root.get_submodule(path).named_modules(prefix=path)):
        if isinstance(module, nn.Linear):
            yield name


def _check_indices(kind: str, indices: frozenset[int] | None, num_blocks: int) -> None:
    beyond = sorted(index for index in indices or () if index >= num_blocks)
    if beyond:
        raise UserError(
            f"train_{kind}_block_indices names block {beyond[0]}, but this model has {num_blocks} {kind} blocks",
            "--network_args",
            f"Blocks are numbered 0 to {num_blocks - 1}.",
            field="network_args",
            exit_code=2,
        )
