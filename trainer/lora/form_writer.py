"""Writes adapters in the form that a program reads."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from trainer.lora.adapter_config import CONFIG_KEY
from trainer.lora.form_limits import refuse_inexpressible
from trainer.lora.form_names import (
    QKV_OF_LINEAR1,
    Form,
    Role,
    bfl_name,
    diffusers_names,
    module_keys,
    norm_key,
    xlabs_name,
)
from trainer.lora.form_reader import (
    ALPHA_KEY,
    TRAINED_KEY,
    Origin,
    OwnKeys,
    listed,
    published_tensors,
    with_halves_swapped,
)
from trainer.lora.layer_names import HALVES_SWAPPED, layer_of
from trainer.lora.lora_tensors import LayerTensors, LoraTensors, cut, fold_alpha, folds_exactly, part_sizes
from trainer.lora.naming import published_name
from trainer.schema.base import UserError

_SWAPPED_NAME: Final = published_name("unet", HALVES_SWAPPED)

_FILLING_RANK: Final = 2
"""diffusers cuts the last modulation's lora_A in two halves, which a single row has not."""


@dataclass(frozen=True)
class BaseLayers:
    """The FLUX model that a whole BFL file is for: its Linears' (out, in) and its query and key norms, by path."""

    linears: Mapping[str, tuple[int, int]]
    norms: Mapping[str, Tensor]


def write_lora(
    tensors: LoraTensors,
    form: Form,
    *,
    origin: Origin | None = None,
    base: BaseLayers | None = None,
    where: str = "the LoRA",
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file in `form`, and metadata that lets them be read without loss.

    `origin` is followed where it is of the same form. With `base` a BFL file is made whole: ComfyUI and diffusers take
    that form only with every layer and norm of the model. Raises `UserError` that names what the form cannot hold.
    """
    if origin is not None and origin.form != form:
        origin = None
    refuse_inexpressible(tensors, form, where, is_as_it_was=origin is not None)
    if form == "sd-scripts":
        return _published(tensors, origin, where), {}
    written, filled = tensors, {}
    if form == "bfl" and base is not None:
        written, filled = _made_whole(tensors, base, where)
    if origin is not None and origin.config is not None:
        if _is_configured(tensors, origin):
            filled = {CONFIG_KEY: origin.config.text}
        else:
            origin = replace(origin, config=None)
    keeps_alpha = {part: form == "diffusers" and _keeps_alpha(tensors, part, origin) for part in ("unet", "te1", "te3")}
    if form == "bfl" and origin is not None:
        keeps_alpha["unet"] = _had_alpha(origin, "unet")
    state: dict[str, Tensor] = {}
    for name, adapter in written.adapters.items():
        is_beside = keeps_alpha[_model_part(name)]
        whole = adapter if is_beside else fold_alpha(adapter)
        for number, module, part in _parts(name, whole, form, origin):
            known = origin.modules.get((name, number)) if origin is not None else None
            keys: dict[Role, str] = {**module_keys(form, module), **(known.keys if known is not None else {})}
            state |= _tensors_of(part, keys)
            if is_beside and CONFIG_KEY not in filled:
                state[keys["alpha"]] = _alpha_beside(part, None if known is None else known.alpha)
    for path, tensor in written.norms.items():
        known = origin.norms.get(path) if origin is not None else None
        state[known or norm_key(form, path)] = tensor
    return _apart(state), {**_alpha_metadata(tensors), **filled}


def _apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, each with memory of its own: safetensors writes no others."""
    seen: set[int] = set()
    apart: dict[str, Tensor] = {}
    for key, tensor in state.items():
        place = tensor.untyped_storage().data_ptr()
        apart[key] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return apart


def _model_part(name: str) -> str:
    layer = layer_of(name)
    return "unet" if layer is None else layer[0]


# --------------------------------------------------------------------------------------------------------------- parts


def _parts(
    name: str, adapter: LayerTensors, form: Form, origin: Origin | None
) -> Iterable[tuple[int, str, LayerTensors]]:
    """Number, the form's own module name, and adapter of every part that `form` cuts this adapter into."""
    if form == "bfl":
        yield 0, bfl_name(name) or "", adapter
    elif form == "xlabs":
        module = xlabs_name(name) or ""
        if name.endswith("_linear1"):
            attention = adapter.up[: 3 * adapter.down.shape[1]].contiguous()
            yield QKV_OF_LINEAR1, module, replace(adapter, up=attention)
        else:
            yield 0, module, adapter
    else:
        modules = diffusers_names(name) or ()
        if len(modules) == 1:
            yield 0, modules[0], with_halves_swapped(adapter) if name == _SWAPPED_NAME else adapter
            return
        sizes = part_sizes(len(modules), adapter.down.shape[1], adapter.up.shape[0])
        for number, (module, part) in enumerate(
            zip(modules, cut(adapter, sizes, _known_ranks(origin, name, len(modules))), strict=True)
        ):
            if part is not None:
                known = None if origin is None else origin.modules.get((name, number))
                yield number, module, part if known is None else _as_it_stood(part, known)


def _as_it_stood(part: LayerTensors, known: OwnKeys) -> LayerTensors:
    """With the scale that it had in its file, where fusing gave it that of the first part."""
    if part.alpha is None or known.alpha is None or part.rank != known.rank:
        return part
    scale = float(known.alpha) / known.rank
    if scale == 0 or math.isclose(scale, part.scale, rel_tol=1e-6):
        return part
    return replace(part, up=part.up * (part.scale / scale), alpha=known.alpha)


def _known_ranks(origin: Origin | None, name: str, num_parts: int) -> list[int | None] | None:
    if origin is None:
        return None
    own = [origin.modules.get((name, number)) for number in range(num_parts)]
    return None if not any(own) else [None if keys is None else keys.rank for keys in own]


def _tensors_of(adapter: LayerTensors, keys: Mapping[Role, str]) -> dict[str, Tensor]:
    tensors = {keys["down"]: adapter.down, keys["up"]: adapter.up}
    if adapter.bias is not None:
        tensors[keys["bias"]] = adapter.bias
    if adapter.magnitude is not None:
        tensors[keys["magnitude"]] = adapter.magnitude.reshape(-1)
    return tensors


def _alpha_beside(adapter: LayerTensors, known: Tensor | None) -> Tensor:
    alpha = torch.tensor(float(adapter.rank)) if adapter.alpha is None else adapter.alpha
    if known is not None and math.isclose(float(alpha), float(known), rel_tol=1e-6):
        # A part's alpha was computed from that of the whole, and may be off by a rounding.
        return known
    # diffusers takes no whole number for an alpha.
    return alpha if alpha.is_floating_point() else alpha.float()


def _published(tensors: LoraTensors, origin: Origin | None, where: str) -> dict[str, Tensor]:
    state = published_tensors(tensors, where=where)
    if origin is None:
        return state
    renamed: dict[str, Tensor] = {}
    for name in tensors.adapters:
        usual = module_keys("sd-scripts", name)
        known = origin.modules.get((name, 0))
        for role, key in (known.keys if known is not None else usual).items():
            if usual[role] in state:
                renamed[key] = state[usual[role]]
    return renamed


# --------------------------------------------------------------------------------------------------------------- alpha


def _keeps_alpha(tensors: LoraTensors, part: str, origin: Origin | None) -> bool:
    """Whether the adapters of one model keep alpha beside their weights; all of them, or none.

    diffusers takes the one most frequent alpha for adapters without their own, so a mixture would be applied wrongly.
    """
    adapters = [adapter for name, adapter in tensors.adapters.items() if _model_part(name) == part]
    if origin is not None and (origin.config is not None or _had_alpha(origin, part)):
        return True
    if all(folds_exactly(adapter) for adapter in adapters):
        return False
    # diffusers mixes up the alphas of a text encoder's layers when they differ: rounding is the smaller harm then.
    return part != "te1" or len({None if a.alpha is None else float(a.alpha) for a in adapters}) == 1


def _is_configured(tensors: LoraTensors, origin: Origin) -> bool:
    """Whether every adapter still has the alpha that the metadata of the file it came from give it."""
    for name, adapter in tensors.adapters.items():
        for number, _, part in _parts(name, adapter, origin.form, origin):
            own = origin.modules.get((name, number))
            if own is None or origin.config is None or "alpha" in own.keys:
                return False
            alpha = origin.config.alpha_of(own.module, part.rank)
            known = part.rank if alpha is None else alpha
            if not math.isclose(known, part.rank * part.scale, rel_tol=1e-6):
                return False
    return True


def _had_alpha(origin: Origin, part: str) -> bool:
    return any("alpha" in own.keys for (name, _), own in origin.modules.items() if _model_part(name) == part)


def _alpha_metadata(tensors: LoraTensors) -> dict[str, str]:
    """Number type and value of every adapter's alpha, the most frequent one under the empty name."""
    entries = {name: _alpha_entry(adapter) for name, adapter in tensors.adapters.items()}
    if not any(entries.values()):
        return {}
    usual = Counter(json.dumps(entry) for entry in entries.values()).most_common(1)[0][0]
    others = {name: entry for name, entry in entries.items() if json.dumps(entry) != usual}
    return {ALPHA_KEY: json.dumps({"": json.loads(usual), **others})}


def _alpha_entry(adapter: LayerTensors) -> list[object] | None:
    if adapter.alpha is None:
        return None
    return [str(adapter.alpha.dtype).removeprefix("torch."), adapter.alpha.item()]


# ----------------------------------------------------------------------------------------------------------- whole BFL


def _made_whole(tensors: LoraTensors, base: BaseLayers, where: str) -> tuple[LoraTensors, dict[str, str]]:
    """Every Linear of the model with an adapter, those beside the LoRA's without effect, and the model's own norms."""
    if tensors.norms:
        # A control LoRA is whole by itself.
        return tensors, {}
    strange = [
        name
        for name, adapter in tensors.adapters.items()
        if base.linears.get(bfl_name(name) or "") != (adapter.up.shape[0], adapter.down.shape[1])
    ]
    if strange:
        raise UserError(
            f"the model has no layers of these sizes: {listed(strange)}", where, "The LoRA belongs to another model."
        )
    like = next(iter(tensors.adapters.values())).down
    adapters: dict[str, LayerTensors] = {}
    for path, (out_features, in_features) in base.linears.items():
        name = published_name("unet", path)
        nothing = LayerTensors(like.new_zeros(_FILLING_RANK, in_features), like.new_zeros(out_features, _FILLING_RANK))
        adapters[name] = tensors.adapters.get(name, nothing)
    norms = {path: tensor.detach().cpu() for path, tensor in base.norms.items()}
    trained = json.dumps(list(tensors.adapters))
    return LoraTensors({**tensors.adapters, **adapters}, norms), {TRAINED_KEY: trained}
