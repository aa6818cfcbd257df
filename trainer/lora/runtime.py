"""LoRA files applied while a model computes, without merging: strengths and files change between two pictures at no cost.

y = W x + b + sum over the files of strength * (W' - W) x, where W' is the weight as a loader would adapt it. O out
features, I in features, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.lora.adapter import frozen_weight
from trainer.lora.forms import to_published
from trainer.lora.half import held, inner_scale, scaled_down
from trainer.lora.lora_file import read_lora_file
from trainer.lora.merge import changed_weight
from trainer.lora.naming import Component, layers_of, published_name
from trainer.lora.split import read_as_trained
from trainer.schema.base import UserError


@dataclass(frozen=True)
class LoraLayers:
    """A LoRA file of any form that is known here: published layer name -> part -> tensor, on the host."""

    path: Path
    layers: Mapping[str, Mapping[str, Tensor]]

    def has(self, component: Component) -> bool:
        return any(name.split("_")[1] == component for name in self.layers)


def read_layers(path: Path) -> LoraLayers:
    """Raises `UserError` for what is no LoRA of FLUX in a form that is known."""
    published = to_published(*read_lora_file(path), where=str(path))
    layers, _ = read_as_trained(layers_of(published.state), published.metadata)
    if not layers:
        raise UserError("this is no LoRA of a kind that can be applied", str(path), "Give a LoRA for FLUX.1.")
    return LoraLayers(path, layers)


@dataclass(frozen=True)
class _Addition:
    """One file's part in one layer, on the layer's device. `factors` are down (R, I) and up (O, R) of a plain LoRA."""

    name: str
    where: str
    parts: Mapping[str, Tensor]
    strength: float

    def added(self, y: Tensor, x: Tensor, base: nn.Linear) -> Tensor:
        parts, dtype = self.parts, y.dtype
        with torch.autocast(x.device.type, enabled=False):
            flat = x.reshape(-1, x.shape[-1]).to(dtype)
            rows = y.reshape(-1, y.shape[-1])
            if parts.keys() - {"alpha"} == {"lora_down.weight", "lora_up.weight"}:
                down, up = parts["lora_down.weight"], parts["lora_up.weight"]
                rank = down.shape[0]
                scale = float(parts["alpha"]) / rank if "alpha" in parts else 1.0
                inner = held(flat @ scaled_down(down, dtype).t())
                rows = rows.addmm(inner, up.to(dtype).t(), alpha=self.strength * scale / inner_scale(dtype))
            else:
                weight = frozen_weight(base, torch.float32)
                change = changed_weight(weight, parts, self.name, self.where).sub(weight).mul_(self.strength)
                rows = rows + F.linear(flat, change.to(dtype))
            return held(rows).view(y.shape)


class AddedLinear(nn.Module):
    """Stands in the place of the Linear `base`. Without additions it computes what the base does, to the last bit."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.additions: list[_Addition] = []

    @property
    def weight(self) -> Tensor:
        """The base's weight: T5 looks at the type of its Linears' weights."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        y = self.base(x)
        for addition in self.additions:
            y = addition.added(y, x, self.base)
        return y


class RuntimeLoras:
    """Several LoRA files on one model. None is in use until `use` says so."""

    def __init__(
        self, model: nn.Module, component: Component, files: Sequence[LoraLayers], device: torch.device
    ) -> None:
        self._files = files
        self._device = device
        self._layers: dict[str, AddedLinear] = {}
        wanted = {name for file in files for name in file.layers}
        for path, linear in [(path, m) for path, m in model.named_modules() if isinstance(m, nn.Linear)]:
            names = [published_name(component, path, kind) for kind in ("lora", "oft")]
            if not wanted.intersection(names):
                continue
            parent_path, _, own = path.rpartition(".")
            layer = AddedLinear(linear)
            setattr(model.get_submodule(parent_path), own, layer)
            self._layers |= dict.fromkeys(names, layer)
        self.unknown: dict[Path, tuple[str, ...]] = {}
        """Per file the layers that belong to this component and that the model has not."""
        for file in files:
            own_names = [name for name in file.layers if name.split("_")[1] == component]
            self.unknown[file.path] = tuple(name for name in own_names if name not in self._layers)
            for name in own_names:
                if name in self._layers:
                    _check_fits(file.layers[name], self._layers[name].base, name, str(file.path))

    def use(self, strengths: Mapping[int, float]) -> None:
        """From now on the files with these indices are in use at these strengths; 0 leaves a file out."""
        for layer in self._layers.values():
            layer.additions = []
        for index, strength in strengths.items():
            if strength == 0:
                continue
            file = self._files[index]
            for name, parts in file.layers.items():
                if name in self._layers:
                    moved = {
                        part: tensor.to(self._device) if tensor.dim() else tensor for part, tensor in parts.items()
                    }
                    self._layers[name].additions.append(_Addition(name, str(file.path), moved, strength))


def _check_fits(parts: Mapping[str, Tensor], base: nn.Linear, name: str, where: str) -> None:
    if "lora_down.weight" in parts and "lora_up.weight" in parts:
        given = (parts["lora_up.weight"].shape[0], parts["lora_down.weight"].shape[1])
        if given != (base.out_features, base.in_features):
            wanted = [base.out_features, base.in_features]
            raise UserError(
                f"{name} is for a layer of {list(given)}, not {wanted}",
                where,
                "This LoRA belongs to another model.",
                field="lora",
            )
