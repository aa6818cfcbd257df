"""The network: all adapters of a model, their learning rates, and their files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from trainer.lora.adapter import Adapter, Trained, wrong_part
from trainer.lora.ggpo import row_slopes
from trainer.lora.lora import LoraLinear
from trainer.lora.lora_file import read_lora_file
from trainer.lora.max_norm import NormReport, hold_norms
from trainer.lora.naming import Component, foreign_format, layers_of, published_key
from trainer.lora.oft import OftLinear
from trainer.lora.rate_groups import rate_groups, require_any
from trainer.lora.split import MERGED, SPLIT_ALPHA_KEY, read_as_trained
from trainer.lora.targets import flux_targets, text_encoder_targets, wrap
from trainer.schema.base import UserError
from trainer.schema.lora_spec import LoraSpec


@dataclass(frozen=True)
class LoadReport:
    """What a LoRA file had and this network has not (`unexpected`), and the other way round (`missing`), by name.

    `num_corrected` layers had an alpha that was not the one they were trained with; see `split`.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    num_corrected: int = 0


class LoraNetwork(nn.Module):
    """All adapters of a transformer, and of CLIP-L and T5 where they train, in the order in which they are saved.

    The adapters are modules of the models, which own the base weights; of this module only their own weights are
    parameters, so moving or freezing it never touches a base.
    """

    def __init__(self, adapters: Mapping[str, Adapter], spec: LoraSpec | None = None) -> None:
        super().__init__()
        self._adapters = dict(adapters)
        self._spec = spec or LoraSpec()
        for name, adapter in adapters.items():
            for own_name, parameter in adapter.named_parameters(recurse=False):
                self.register_parameter(f"{name}_{own_name.removeprefix('lora_')}", parameter)

    @classmethod
    def attach(
        cls,
        flux: nn.Module | None,
        clip_l: nn.Module | None,
        spec: LoraSpec,
        generator: torch.Generator,
        t5xxl: nn.Module | None = None,
    ) -> LoraNetwork:
        """Puts an adapter around every Linear that `spec` selects, and gives the network of them.

        Raises `UserError` (exit code 2) when nothing is selected, or blocks are that the model has not.
        """
        adapters: dict[str, Adapter] = {}
        encoders: tuple[tuple[nn.Module | None, Component], ...] = ((clip_l, "te1"), (t5xxl, "te3"))
        for encoder, component in encoders:
            if encoder is not None:
                for target in text_encoder_targets(encoder, component, spec):
                    adapters[target.name] = wrap(encoder, target, spec, generator)
        if flux is not None:
            for target in flux_targets(flux, spec):
                adapters[target.name] = wrap(flux, target, spec, generator)
        if not adapters:
            raise UserError("no layer is left to train", "--network_args", "Select more blocks or ranks.", exit_code=2)
        return cls(adapters, spec)

    @property
    def num_modules(self) -> int:
        return len(self._adapters)

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters' published names, in the order in which they are saved."""
        return tuple(self._adapters)

    @property
    def file_metadata(self) -> dict[str, str]:
        """What a file of this network says about its tensors beside the training's details."""
        return {SPLIT_ALPHA_KEY: MERGED} if self._spec.split_qkv else {}

    def ranks(self) -> dict[str, int]:
        """Published name -> rank (LoRA) or number of blocks (OFT)."""
        return {name: trained_rank(adapter) for name, adapter in self._adapters.items()}

    def train(self, mode: bool = True) -> LoraNetwork:
        """Training mode switches the dropouts on."""
        super().train(mode)
        for adapter in self._adapters.values():
            adapter.training = mode
        return self

    def set_multiplier(self, multiplier: float) -> None:
        """Strength of the whole LoRA; 0 gives exactly the base."""
        for adapter in self._adapters.values():
            adapter.multiplier = multiplier

    def train_in(self, dtype: torch.dtype) -> None:
        """Keeps everything that trains in `dtype`, gradients and optimizer state with it. It is float32 otherwise."""
        for adapter in self._adapters.values():
            for entry in adapter.trained():
                entry.parameter.data = entry.parameter.data.to(dtype)
            if isinstance(adapter, LoraLinear) and adapter.begins_at_principal:
                # Rounded alike, so that it still begins as the base.
                for first, trained in ((adapter.first_down, adapter.lora_down), (adapter.first_up, adapter.lora_up)):
                    first.data.copy_(first.data.to(trained.dtype))

    # ---- training ----------------------------------------------------------------------------------------------------

    def parameter_groups(
        self, unet_lr: float, text_encoder_lr: float, t5xxl_lr: float | None = None
    ) -> list[dict[str, object]]:
        """Groups for an optimizer: CLIP-L, T5, FLUX. A group whose rate is 0 is left out: it is saved untrained.

        Layers that `network_reg_lrs` matches come first, with its rate. With LoRA+ (Hayou et al., "LoRA+: Efficient Low
        Rank Adaptation of Large Models", 2024, arXiv 2402.12354) the ups get a group of their own, at ratio times the
        rate. `t5xxl_lr` None means the rate of CLIP-L.
        """
        spec, groups = self._spec, list[dict[str, object]]()
        for component, label, rate, ratio in (
            ("te1", "textencoder", text_encoder_lr, spec.loraplus_text_encoder_ratio),
            (
                "te3",
                "textencoder 2",
                text_encoder_lr if t5xxl_lr is None else t5xxl_lr,
                spec.loraplus_text_encoder_ratio,
            ),
            ("unet", "unet", unet_lr, spec.loraplus_unet_ratio),
        ):
            by_rate: dict[int | None, list[Trained]] = {}
            for name, adapter in self._adapters.items():
                if name.split("_")[1] == component:
                    special = spec.rate_of(name)
                    by_rate.setdefault(None if special is None else special[0], []).extend(adapter.trained())
            for index in sorted(by_rate, key=lambda index: (index is None, index)):
                base_rate = rate if index is None else spec.reg_lrs[index][1]
                suffix = "" if index is None else f" reg_lr_{index}"
                groups += _rate_groups(by_rate[index], base_rate, f"{label}{suffix}", ratio)
        return require_any(groups)

    def before_step(self, *, measures: bool = False) -> dict[str, float]:
        """Between backward and an optimizer step: GGPO takes the norms of weights and gradients.

        With `measures` they are given under the reference's names as means over rows and layers, those of gradients
        without GGPO too: of `scale * (up @ (gradient of down) + (gradient of up) @ down)`.
        """
        means: dict[str, list[Tensor]] = {}
        with torch.no_grad():
            for adapter in self._adapters.values():
                if not isinstance(adapter, LoraLinear):
                    continue
                down, up, parts = adapter.lora_down, adapter.lora_up, adapter.parts
                if down.grad is None or up.grad is None or not (measures or adapter.perturbation is not None):
                    continue
                gradients = down.grad.float(), up.grad.float()
                if adapter.perturbation is not None:
                    norm, combined = adapter.perturbation.update(down, up, parts, gradients, adapter.scale)
                    means.setdefault("norm/avg_key_norm", []).append(norm)
                    means.setdefault("norm/avg_combined_norm", []).append(combined)
                if measures:
                    slope = adapter.scale * row_slopes(down, up, parts, gradients).mean()
                    means.setdefault("norm/avg_grad_norm", []).append(slope)
            if not measures or not means:
                return {}
            # One transfer for all.
            values = torch.stack([torch.stack(found).mean() for found in means.values()]).tolist()
        return dict(zip(means, values, strict=True))

    def hold_norms(self, limit: float) -> NormReport:
        """`scale_weight_norms`: no layer's LoRA is larger than `limit` afterwards."""
        return hold_norms([a for a in self._adapters.values() if isinstance(a, LoraLinear)], limit)

    def training_state(self) -> dict[str, Tensor]:
        """The values of everything that trains, by key: views, so that writing into one sets it."""
        return {key: parameter.data[rows] for key, (parameter, rows) in self.training_tensors().items()}

    def training_gradients(self) -> dict[str, Tensor]:
        """The gradients of everything that trains, by key; zeros where there is none."""
        return {
            key: torch.zeros_like(parameter[rows]) if parameter.grad is None else parameter.grad[rows]
            for key, (parameter, rows) in self.training_tensors().items()
        }

    def training_tensors(self) -> dict[str, tuple[nn.Parameter, slice]]:
        """Everything that trains by key, as a trained parameter and the rows of it.

        Keys are those of a file, except that the parts of a split layer have a number each:
        `<name>.lora_down.<part>.weight`.
        """
        found: dict[str, tuple[nn.Parameter, slice]] = {}
        for name, adapter in self._adapters.items():
            for entry in adapter.trained():
                for suffix, rows in _rows_of(adapter, entry):
                    found[published_key(name, suffix)] = (entry.parameter, rows)
        return found

    def state_to_resume(self) -> dict[str, dict[str, object]]:
        """Everything that a later attempt needs to go on exactly: more than a file has, and not rounded. Views."""
        return {
            "parameters": {name: parameter.data for name, parameter in self.named_parameters()},
            "alphas": {name: adapter.alpha for name, adapter in self._adapters.items()},
            "deviations": {
                name: adapter.perturbation.deviation
                for name, adapter in self._adapters.items()
                if isinstance(adapter, LoraLinear) and adapter.perturbation is not None
            },
        }

    def resume_from(self, state: Mapping[str, Mapping[str, object]]) -> None:
        """Takes what `state_to_resume` gave. Raises `ValueError` when it is of another network; nothing is taken then."""
        parameters = dict(self.named_parameters())
        take_tensors({name: parameter.data for name, parameter in parameters.items()}, state["parameters"])
        for name, adapter in self._adapters.items():
            if isinstance(adapter, (LoraLinear, OftLinear)):
                adapter.alpha = cast("float", state["alphas"][name])
            if isinstance(adapter, LoraLinear) and adapter.perturbation is not None:
                deviation = cast("Tensor | None", state["deviations"].get(name))
                adapter.perturbation.deviation = None if deviation is None else deviation.to(adapter.lora_up.device)

    # ---- files -------------------------------------------------------------------------------------------------------

    def published_state_dict(self, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """The tensors of a file, on the host: alpha, down and up of every LoRA, and what other kinds have.

        `dtype` None keeps what trains as it is, and alpha an int64 where it was given as a whole number. An alpha that
        `dtype` cannot hold exactly is float32.
        """
        state: dict[str, Tensor] = {}
        for name, adapter in self._adapters.items():
            for part, tensor in adapter.published().items():
                host = tensor.detach().cpu()
                saved = host.clone() if dtype is None else host.to(dtype, copy=True)
                # A rounded alpha would change the strength of the whole LoRA.
                is_rounded = part == "alpha" and float(saved) != float(host)
                state[published_key(name, part)] = host.float() if is_rounded else saved
        return state

    def load_file(self, path: Path) -> LoadReport:
        """Takes the weights of a LoRA file; see `load_published`."""
        state, metadata = read_lora_file(path)
        return self.load_published(state, where=str(path), metadata=metadata)

    def load_published(
        self, state: Mapping[str, Tensor], *, where: str = "the LoRA file", metadata: Mapping[str, str] | None = None
    ) -> LoadReport:
        """Takes weights and alpha from published keys. What only one side has is left as it is and reported.

        Raises `UserError` for a file of another format, of another rank or for another model.
        """
        known: Mapping[str, Mapping[str, Tensor]] = layers_of(state)
        if not known:
            kind = foreign_format(state) or "no LoRA of this format"
            raise wrong_part(f"this is {kind}", where, "Give a LoRA with lora_unet_ keys, as sd-scripts writes them.")
        known, num_corrected = read_as_trained(known, metadata)
        for name in (name for name in self._adapters if name in known):
            if "dora_scale" in known[name] and not self._spec.dora:
                raise wrong_part(
                    "this LoRA has trained magnitudes (DoRA)", where, 'Add "dora=True" to the network settings.'
                )
            self._adapters[name].load(known[name], name, where)
        return LoadReport(
            missing=tuple(name for name in self._adapters if name not in known),
            unexpected=tuple(name for name in known if name not in self._adapters),
            num_corrected=num_corrected,
        )


def take_tensors(own: Mapping[str, Tensor], given: Mapping[str, object]) -> None:
    """Copies `given` into the tensors of `own`. Raises `ValueError` before the first copy when names or shapes differ."""
    if own.keys() != given.keys():
        name = sorted(own.keys() ^ given.keys())[0]
        raise ValueError(f"{name} is only in {'the state' if name in given else 'this network'}")
    for name, tensor in own.items():
        shape = tuple(cast("Tensor", given[name]).shape)
        if shape != tuple(tensor.shape):
            raise ValueError(f"{name} is {list(shape)} in the state and {list(tensor.shape)} here")
    for name, tensor in own.items():
        tensor.copy_(cast("Tensor", given[name]))


def _rate_groups(trained: Sequence[Trained], rate: float, name: str, ratio: float | None) -> list[dict[str, object]]:
    """One group at `rate`, or with a ratio one without and one with the ups."""
    if ratio is None:
        return rate_groups([entry.parameter for entry in trained], rate, name)
    normal = [entry.parameter for entry in trained if entry.role != "up"]
    plus = [entry.parameter for entry in trained if entry.role == "up"]
    return rate_groups(normal, rate, name, plus=plus, ratio=ratio)


def _rows_of(adapter: Adapter, entry: Trained) -> list[tuple[str, slice]]:
    """(key without the name, rows) of each part of one trained parameter."""
    if entry.role == "blocks":
        return [(f"oft_{entry.name.replace('_', '.')}", slice(None))]
    if entry.role == "magnitude" or not isinstance(adapter, LoraLinear):
        return [("dora_scale", slice(None))]
    key = f"lora_{entry.role}"
    if len(adapter.parts) == 1:
        return [(f"{key}.weight", slice(None))]
    rank = adapter.rank
    return [
        (f"{key}.{index}.weight", part if entry.role == "up" else slice(index * rank, (index + 1) * rank))
        for index, part in enumerate(adapter.parts)
    ]


def trained_rank(adapter: Adapter) -> int:
    """Rank of a LoRA, number of blocks of an OFT."""
    if isinstance(adapter, LoraLinear):
        return adapter.rank
    return adapter.trained()[0].parameter.shape[0]
