"""Reads the adapters out of a LoRA file's tensors, whatever form the file has."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, cast

import torch
from torch import Tensor

from trainer.lora.adapter_config import AdapterConfig
from trainer.lora.form_names import QKV_OF_LINEAR1, Form, Place, Role, form_of, norm_of, place_of, split_suffix
from trainer.lora.layer_names import HALVES_SWAPPED
from trainer.lora.lora_tensors import LayerTensors, LoraTensors, fuse, matching_alpha, part_sizes, unfold_alpha
from trainer.lora.naming import foreign_format, published_name
from trainer.lora.split import read_as_trained
from trainer.schema.base import UserError

ALPHA_KEY: Final = "fluxgui_alpha"
"""Metadata: the alpha that was folded into the weights, so that it can be taken out again."""
TRAINED_KEY: Final = "fluxgui_trained_layers"
"""Metadata: the layers that a whole BFL file really adapts; the others are there because loaders demand them."""

_MLP_RATIO: Final = 4
_SWAPPED_NAME: Final = published_name("unet", HALVES_SWAPPED)


@dataclass(frozen=True)
class OwnKeys:
    """The file's name of the module of one adapter, the keys under which it is held, and its rank and alpha there."""

    module: str
    keys: Mapping[Role, str]
    rank: int
    alpha: Tensor | None


@dataclass(frozen=True)
class Origin:
    """How the file was written that adapters came from: lets them be written just so again.

    `modules` are the file's keys by published name and number of the part; `norms` those of the norms by path; `config`
    is what diffusers keeps in the metadata.
    """

    form: Form
    modules: Mapping[tuple[str, int], OwnKeys]
    norms: Mapping[str, str]
    config: AdapterConfig | None = None


def read_lora(
    state: Mapping[str, Tensor], metadata: Mapping[str, str], *, where: str = "the LoRA file"
) -> tuple[LoraTensors, Origin]:
    """The adapters in a file's tensors, and how they were written.

    Raises `UserError` (exit code 3) when the file is no LoRA for FLUX, is incomplete, or holds what is not known here.
    """
    form = form_of(state)
    if form is None:
        kind = foreign_format(state)
        raise UserError(
            "this is no LoRA for FLUX.1 in a form that is known here" + ("" if kind is None else f", but {kind}"),
            where,
            f"Its first tensor is {next(iter(state), 'missing')}. Known are sd-scripts, diffusers, BFL and XLabs.",
            field="network_weights",
        )
    places: dict[Place, dict[Role, str]] = {}
    own_names: dict[Place, str] = {}
    norms: dict[str, str] = {}
    strange: list[str] = []
    for key in state:
        split = split_suffix(key)
        place = None if split is None else place_of(split[0])
        norm = norm_of(key) if place is None else None
        if split is not None and place is not None:
            places.setdefault(place, {})[split[1]] = key
            own_names[place] = split[0]
        elif norm is not None:
            norms[norm] = key
        else:
            strange.append(key)
    if strange:
        raise UserError(
            f"{len(strange)} tensors of this LoRA are not known here: {listed(strange)}",
            where,
            "Only LoRA weights for FLUX, CLIP-L and T5 can be taken over, and nothing is left out silently.",
            field="network_weights",
        )
    config = AdapterConfig.of(metadata) if form == "diffusers" else None
    parts = {
        place: _with_configured_alpha(_adapter(state, keys, where), config, own_names[place])
        for place, keys in places.items()
    }
    modules = {
        (place.name, place.index): OwnKeys(own_names[place], keys, parts[place].rank, parts[place].alpha)
        for place, keys in places.items()
    }
    tensors = LoraTensors(_assembled(parts, where), {path: state[key] for path, key in norms.items()})
    tensors = _with_known_alpha(_at_trained_strength(tensors, form, metadata), metadata)
    return _without_filling(tensors, metadata), Origin(form, modules, norms, config)


def listed(names: Sequence[str]) -> str:
    """The first few names, to stand in a sentence."""
    return f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"


def _adapter(state: Mapping[str, Tensor], keys: Mapping[Role, str], where: str) -> LayerTensors:
    if "down" not in keys or "up" not in keys:
        key = next(iter(keys.values()))
        raise UserError(f"{key} has no counterpart", where, "The file is incomplete.", field="network_weights")
    down, up = state[keys["down"]], state[keys["up"]]
    if down.dim() != 2 or up.dim() != 2 or down.shape[0] != up.shape[1] or down.shape[0] == 0:
        raise UserError(
            f"{keys['down']} {list(down.shape)} and {keys['up']} {list(up.shape)} are no LoRA of a Linear",
            where,
            "The file is damaged or of another kind.",
            field="network_weights",
        )
    alpha = state[keys["alpha"]].reshape(()) if "alpha" in keys else None
    bias = state[keys["bias"]] if "bias" in keys else None
    magnitude = _magnitude(state, keys["magnitude"], down, up, where) if "magnitude" in keys else None
    return LayerTensors(down, up, alpha, bias, magnitude)


def _magnitude(state: Mapping[str, Tensor], key: str, down: Tensor, up: Tensor, where: str) -> Tensor:
    """(1, I) or (O, 1); PEFT's vectors are always of the rows."""
    tensor = state[key] if key.endswith(".dora_scale") else state[key].reshape(-1, 1)
    if tuple(tensor.shape) not in ((1, down.shape[1]), (up.shape[0], 1)):
        raise UserError(
            f"{key} {list(state[key].shape)} is no magnitude of a Linear of {up.shape[0]} x {down.shape[1]}",
            where,
            "The file is damaged or of another kind.",
            field="network_weights",
        )
    return tensor


def _with_configured_alpha(adapter: LayerTensors, config: AdapterConfig | None, module: str) -> LayerTensors:
    alpha = None if config is None or adapter.alpha is not None else config.alpha_of(module, adapter.rank)
    return adapter if alpha is None else replace(adapter, alpha=torch.tensor(alpha))


def _assembled(parts: Mapping[Place, LayerTensors], where: str) -> dict[str, LayerTensors]:
    """Whole adapters, from the parts that a form cuts fused layers into, in the file's order."""
    groups: dict[str, dict[int, tuple[Place, LayerTensors]]] = {}
    for place, adapter in parts.items():
        groups.setdefault(place.name, {})[place.index] = (place, adapter)
    adapters: dict[str, LayerTensors] = {}
    for name, group in groups.items():
        place, first = next(iter(group.values()))
        if any(other.num_parts != place.num_parts for other, _ in group.values()):
            raise UserError(
                f"{name} is there whole and in parts", where, "The file is damaged.", field="network_weights"
            )
        if place.index == QKV_OF_LINEAR1:
            mlp = first.up.new_zeros(_mlp_width(groups, name, first.down.shape[1]), first.rank)
            adapters[name] = replace(first, up=torch.cat((first.up, mlp)))
        elif place.num_parts > 1:
            try:
                adapters[name] = _fused(groups, name)
            except ValueError:
                raise UserError(
                    f"only some parts of {name} have a magnitude (DoRA); what the others have depends on the model",
                    where,
                    "Merge this file into the model instead.",
                    field="network_weights",
                ) from None
        elif name == _SWAPPED_NAME and place.form == "diffusers":
            adapters[name] = with_halves_swapped(first)
        else:
            adapters[name] = first
    return adapters


def _fused(groups: Mapping[str, Mapping[int, tuple[Place, LayerTensors]]], name: str) -> LayerTensors:
    group = groups[name]
    place, first = next(iter(group.values()))
    parts = [group[index][1] if index in group else None for index in range(place.num_parts)]
    in_features = first.down.shape[1]
    if place.num_parts == 4:
        mlp = parts[3].up.shape[0] if parts[3] is not None else _mlp_width(groups, name, in_features)
        sizes = part_sizes(4, in_features, 3 * in_features + mlp)
    else:
        sizes = [first.up.shape[0]] * place.num_parts
    return fuse(parts, sizes)


def _mlp_width(groups: Mapping[str, Mapping[int, tuple[Place, LayerTensors]]], name: str, in_features: int) -> int:
    """Out features of linear1's MLP part: what linear2 takes beside the attention's, or four times the input."""
    sibling = groups.get(name.removesuffix("linear1") + "linear2")
    if sibling is None:
        return _MLP_RATIO * in_features
    return next(iter(sibling.values()))[1].down.shape[1] - in_features


def with_halves_swapped(adapter: LayerTensors) -> LayerTensors:
    """The last modulation's adapter with its output's halves in the other order, as diffusers has them."""
    first, second = adapter.up.chunk(2)
    bias = None if adapter.bias is None else torch.cat(adapter.bias.chunk(2)[::-1])
    magnitude = adapter.magnitude
    if magnitude is not None and adapter.has_row_magnitude:
        magnitude = torch.cat(magnitude.chunk(2)[::-1])
    return replace(adapter, up=torch.cat((second, first)), bias=bias, magnitude=magnitude)


# --------------------------------------------------------------------------------------------------------------- alpha


def _at_trained_strength(tensors: LoraTensors, form: Form, metadata: Mapping[str, str]) -> LoraTensors:
    if form != "sd-scripts":
        return tensors
    layers = {name: split_layer(adapter) for name, adapter in tensors.adapters.items()}
    corrected, _ = read_as_trained(layers, metadata)
    alphas = {name: layer.get("alpha") for name, layer in corrected.items()}
    return replace(tensors, adapters={name: replace(a, alpha=alphas[name]) for name, a in tensors.adapters.items()})


def split_layer(adapter: LayerTensors) -> dict[str, Tensor]:
    """The adapter's parts as a published file calls them."""
    alpha = {} if adapter.alpha is None else {"alpha": adapter.alpha}
    return {**alpha, "lora_down.weight": adapter.down, "lora_up.weight": adapter.up}


def _with_known_alpha(tensors: LoraTensors, metadata: Mapping[str, str]) -> LoraTensors:
    """Takes the alpha that a writer of ours folded into the weights out of them again."""
    known = _read_json(metadata, ALPHA_KEY)
    if not isinstance(known, dict):
        return tensors
    table = cast("dict[str, list[object]]", known)
    usual = table.get("")
    adapters: dict[str, LayerTensors] = {}
    for name, adapter in tensors.adapters.items():
        alpha = _alpha_tensor(table.get(name, usual))
        if alpha is None:
            adapters[name] = adapter
        elif adapter.alpha is None:
            adapters[name] = unfold_alpha(adapter, alpha)
        else:
            # It was kept beside the weights; only its number type may have changed.
            is_same = float(adapter.alpha) == float(alpha)
            adapters[name] = replace(adapter, alpha=alpha if is_same else adapter.alpha)
    return replace(tensors, adapters=adapters)


def _alpha_tensor(entry: object) -> Tensor | None:
    if not isinstance(entry, list) or len(cast("list[object]", entry)) != 2:
        return None
    name, value = cast("list[object]", entry)
    dtype = getattr(torch, str(name), None)
    if not isinstance(dtype, torch.dtype) or not isinstance(value, (int, float)) or value <= 0:
        return None
    return torch.tensor(value, dtype=dtype)


def _without_filling(tensors: LoraTensors, metadata: Mapping[str, str]) -> LoraTensors:
    """Drops the layers and norms that a writer of ours added without any effect."""
    trained = _read_json(metadata, TRAINED_KEY)
    if not isinstance(trained, list):
        return tensors
    kept = set(cast("list[str]", trained))
    return LoraTensors({name: adapter for name, adapter in tensors.adapters.items() if name in kept})


def _read_json(metadata: Mapping[str, str], key: str) -> object:
    try:
        return json.loads(metadata.get(key, "null"))
    except ValueError:
        return None


def published_tensors(tensors: LoraTensors, *, where: str) -> dict[str, Tensor]:
    """The adapters under published keys, for training. Raises `UserError` for what cannot be trained here."""
    biased = [name for name, adapter in tensors.adapters.items() if adapter.bias is not None and adapter.bias.any()]
    if tensors.norms or biased:
        what = [*tensors.norms, *(f"the bias of {name}" for name in biased)]
        raise UserError(
            f"this control LoRA replaces {len(what)} norms and biases, which the sd-scripts form cannot hold: "
            f"{listed(what)}",
            where,
            "It can be converted between the diffusers and BFL forms, but not be trained further.",
            field="network_weights",
        )
    state: dict[str, Tensor] = {}
    for name, adapter in tensors.adapters.items():
        state[f"{name}.alpha"] = matching_alpha(adapter.rank, adapter.down) if adapter.alpha is None else adapter.alpha
        state[f"{name}.lora_down.weight"] = adapter.down
        state[f"{name}.lora_up.weight"] = adapter.up
        if adapter.magnitude is not None:
            state[f"{name}.dora_scale"] = adapter.magnitude
    return state
