"""The LoRA: an adapter around a frozen Linear, and the network of all adapters of a model.

y = W x + b + multiplier * alpha / rank * up(down(x)), after Hu et al., "LoRA: Low-Rank Adaptation of Large Language
Models" (2021). B batch, L tokens, I in features, O out features, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from trainer.lora.naming import PARTS, Component, foreign_format, published_key, published_name, split_key
from trainer.schema.base import UserError
from trainer.schema.lora_spec import IN_LAYERS, LoraSpec

CLIP_CLASSES = ("CLIPAttention", "CLIPSdpaAttention", "CLIPMLP")
"""Classes of CLIP-L whose Linears are adapted."""


class _LoraContext(FunctionCtx):
    module: LoraLinear
    input_dtype: torch.dtype
    scale: float


class _LoraFunction(torch.autograd.Function):
    """The whole adapted Linear as one step of autograd.

    What is kept for backward is the input, which the layer before keeps anyway, and down(x), which is thin. The base's
    weight is read from the module again, as it may be elsewhere in between.
    """

    @staticmethod
    def forward(ctx: _LoraContext, x: Tensor, down: Tensor, up: Tensor, module: LoraLinear, scale: float) -> Tensor:
        output = F.linear(x, module.base.weight, module.base.bias)
        dtype = output.dtype
        flat = x.reshape(-1, x.shape[-1]).to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            inner = flat @ down.to(dtype).t()
            output = output.view(-1, output.shape[-1]).addmm_(inner, up.to(dtype).t(), alpha=scale)
        ctx.save_for_backward(x, inner, down, up)
        ctx.module, ctx.input_dtype, ctx.scale = module, x.dtype, scale
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: _LoraContext, grad_output: Tensor
    ) -> tuple[Tensor | None, Tensor, Tensor, None, None]:
        x, inner, down, up = cast("tuple[Tensor, Tensor, Tensor, Tensor]", ctx.saved_tensors)  # pyright: ignore[reportAttributeAccessIssue]
        dtype = grad_output.dtype
        with torch.autocast(grad_output.device.type, enabled=False):
            grad = grad_output.reshape(-1, grad_output.shape[-1])
            flat = x.reshape(-1, x.shape[-1]).to(dtype)
            grad_inner = (grad @ up.to(dtype)).mul_(ctx.scale)
            grad_up = (grad.t() @ inner).to(up.dtype).mul_(ctx.scale)
            grad_down = (grad_inner.t() @ flat).to(down.dtype)
            grad_x = None
            if ctx.needs_input_grad[0]:  # pyright: ignore[reportAttributeAccessIssue]
                weight = ctx.module.base.weight.to(dtype)
                grad_x = torch.mm(grad, weight).addmm_(grad_inner, down.to(dtype))
                grad_x = grad_x.view(x.shape).to(ctx.input_dtype)
        return grad_x, grad_down, grad_up, None, None


class LoraLinear(nn.Module):
    """Stands in the place of the Linear that it holds as `base`. `lora_down` (R, I) and `lora_up` (O, R) train.

    `alpha` keeps its number type, which is the type it is saved in.
    """

    def __init__(
        self,
        base: nn.Linear,
        rank: int,
        alpha: float,
        generator: torch.Generator,
        *,
        dropout: float = 0.0,
        rank_dropout: float = 0.0,
        module_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.base = base
        self.rank = rank
        self.alpha = alpha if alpha != 0 else rank
        self.multiplier = 1.0
        self.dropout = dropout
        self.rank_dropout = rank_dropout
        self.module_dropout = module_dropout
        # Kaiming's uniform draw with a = sqrt(5) has the bound 1 / sqrt(I). On the host, so that a seed gives the same
        # weights on every device.
        bound = 1.0 / math.sqrt(base.in_features)
        down = torch.empty(rank, base.in_features).uniform_(-bound, bound, generator=generator)
        device = base.weight.device
        self.lora_down = nn.Parameter(down.to(device))
        self.lora_up = nn.Parameter(torch.zeros(base.out_features, rank, device=device))

    @property
    def scale(self) -> float:
        """What the adapter's output is multiplied with."""
        return self.multiplier * self.alpha / self.rank

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        if self.multiplier == 0 or (self.training and self._drops_module()):
            return self.base(x)
        if self.training and (self.dropout > 0 or self.rank_dropout > 0):
            return self._forward_with_dropout(x)
        return cast("Tensor", _LoraFunction.apply(x, self.lora_down, self.lora_up, self, self.scale))

    def _drops_module(self) -> bool:
        return self.module_dropout > 0 and torch.rand(1).item() < self.module_dropout

    def _forward_with_dropout(self, x: Tensor) -> Tensor:
        """Neuron dropout on down(x), and whole ranks dropped sample by sample, what is left scaled up."""
        output = self.base(x)
        inner = F.linear(x, self.lora_down.to(x.dtype))
        scale = self.scale
        if self.dropout > 0:
            inner = F.dropout(inner, self.dropout)
        if self.rank_dropout > 0:
            kept = torch.rand(inner.shape[0], self.rank, device=inner.device) > self.rank_dropout
            inner = inner * kept.view(inner.shape[0], *[1] * (inner.dim() - 2), self.rank).to(inner.dtype)
            scale = scale / (1.0 - self.rank_dropout)
        return output + (F.linear(inner, self.lora_up.to(inner.dtype)) * scale).to(output.dtype)


@dataclass(frozen=True)
class LoadReport:
    """What a LoRA file had and this network has not (`unexpected`), and the other way round (`missing`), by name."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


class LoraNetwork(nn.Module):
    """All adapters of a transformer, and of CLIP-L where it trains, in the order in which they are saved.

    The adapters are modules of the models, which own the base weights; of this module only their own weights are
    parameters, so moving or freezing it never touches a base.
    """

    def __init__(self, adapters: Mapping[str, LoraLinear]) -> None:
        super().__init__()
        self._adapters = dict(adapters)
        for name, adapter in adapters.items():
            self.register_parameter(f"{name}_down", adapter.lora_down)
            self.register_parameter(f"{name}_up", adapter.lora_up)

    @classmethod
    def attach(
        cls, flux: nn.Module, clip_l: nn.Module | None, spec: LoraSpec, generator: torch.Generator
    ) -> LoraNetwork:
        """Puts an adapter around every Linear that `spec` selects, and gives the network of them.

        Raises `UserError` (exit code 2) when nothing is selected, or blocks are that the model has not.
        """
        adapters: dict[str, LoraLinear] = {}
        for path in _clip_linears(clip_l) if clip_l is not None else ():
            adapters[published_name("te1", path)] = _wrap(cast("nn.Module", clip_l), path, spec.rank, spec, generator)
        for path, rank in list(_flux_linears(flux, spec)):
            adapters[published_name("unet", path)] = _wrap(flux, path, rank, spec, generator)
        if not adapters:
            raise UserError("no layer is left to train", "--network_args", "Select more blocks or ranks.", exit_code=2)
        return cls(adapters)

    @property
    def num_modules(self) -> int:
        return len(self._adapters)

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters' published names, in the order in which they are saved."""
        return tuple(self._adapters)

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

    def parameter_groups(self, unet_lr: float, text_encoder_lr: float) -> list[dict[str, object]]:
        """Groups for an optimizer, text encoder first. A group whose rate is 0 is left out: it is saved untrained."""
        groups: list[dict[str, object]] = []
        for component, name, rate in (("te1", "textencoder", text_encoder_lr), ("unet", "unet", unet_lr)):
            parameters = [
                p for key, a in self._adapters.items() if _belongs(key, component) for p in (a.lora_down, a.lora_up)
            ]
            if parameters and rate > 0:
                groups.append({"params": parameters, "lr": rate, "name": name})
        if not groups:
            raise UserError(
                "every learning rate is 0: nothing would be trained",
                "--learning_rate",
                field="learning_rate",
                exit_code=2,
            )
        return groups

    def training_state(self) -> dict[str, nn.Parameter]:
        """Every tensor that trains, under the name it has in a file of this form where it has one."""
        state: dict[str, nn.Parameter] = {}
        for name, adapter in self._adapters.items():
            state[published_key(name, "lora_down.weight")] = adapter.lora_down
            state[published_key(name, "lora_up.weight")] = adapter.lora_up
        return state

    def published_state_dict(self, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """The tensors of a LoRA file, on the host: alpha, down and up of every adapter.

        `dtype` None keeps float32, and alpha an int64 where it was given as a whole number.
        """
        state: dict[str, Tensor] = {}
        for name, adapter in self._adapters.items():
            tensors = {
                "alpha": torch.tensor(adapter.alpha),
                "lora_down.weight": adapter.lora_down.detach(),
                "lora_up.weight": adapter.lora_up.detach(),
            }
            for part in PARTS:
                tensor = tensors[part].cpu()
                state[published_key(name, part)] = tensor.clone() if dtype is None else tensor.to(dtype, copy=True)
        return state

    def load_file(self, path: Path) -> LoadReport:
        """Takes the weights of a LoRA file; see `load_published`."""
        return self.load_published(load_file(path), where=str(path))

    def load_published(self, state: Mapping[str, Tensor], *, where: str = "the LoRA file") -> LoadReport:
        """Takes weights and alpha from published keys. What only one side has is left as it is and reported.

        Raises `UserError` for a file of another format, of another rank or for another model.
        """
        known: dict[str, dict[str, Tensor]] = {}
        for key, tensor in state.items():
            split = split_key(key)
            if split is not None:
                known.setdefault(split[0], {})[split[1]] = tensor
        if not known:
            kind = foreign_format(state) or "no LoRA of this format"
            raise UserError(
                f"this is {kind}",
                where,
                "Give a LoRA with lora_unet_ keys, as sd-scripts writes them.",
                field="network_weights",
            )
        for name in known.keys() & self._adapters.keys():
            self._load_one(name, known[name], where)
        return LoadReport(
            missing=tuple(name for name in self._adapters if name not in known),
            unexpected=tuple(name for name in known if name not in self._adapters),
        )

    def _load_one(self, name: str, tensors: Mapping[str, Tensor], where: str) -> None:
        adapter = self._adapters[name]
        for part, parameter in (("lora_down.weight", adapter.lora_down), ("lora_up.weight", adapter.lora_up)):
            tensor = tensors.get(part)
            if tensor is None:
                raise UserError(f"{name} has no {part}", where, "The file is incomplete.", field="network_weights")
            if tensor.shape != parameter.shape:
                rank = tensors["lora_down.weight"].shape[0] if "lora_down.weight" in tensors else 0
                if rank != adapter.rank:
                    hint = f"Use --network_dim={rank}."
                    raise UserError(
                        f"the file has rank {rank} for {name}, but rank {adapter.rank} is to be trained",
                        where,
                        hint,
                        field="network_weights",
                    )
                raise UserError(
                    f"{name} is {list(tensor.shape)} in the file and {list(parameter.shape)} in this model",
                    where,
                    "The LoRA belongs to another model.",
                    field="network_weights",
                )
            parameter.data.copy_(tensor)
        alpha = tensors.get("alpha")
        if alpha is not None:
            adapter.alpha = cast("float", alpha.item())


def _belongs(name: str, component: Component | str) -> bool:
    return name.startswith(f"lora_{component}_")


def _linears(root: nn.Module, path: str) -> Iterator[str]:
    """Paths of the Linears below `path` (or of `path` itself) in module order."""
    for name, module in root.get_submodule(path).named_modules(prefix=path):
        if isinstance(module, nn.Linear):
            yield name


def _clip_linears(clip_l: nn.Module) -> Iterator[str]:
    for path, module in list(clip_l.named_modules()):
        if type(module).__name__ in CLIP_CLASSES:
            yield from (name for name, child in _direct_linears(path, module) if isinstance(child, nn.Linear))


def _direct_linears(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        yield f"{path}.{name}", child


def _flux_linears(flux: nn.Module, spec: LoraSpec) -> Iterator[tuple[str, int]]:
    """Path and rank of every Linear that gets an adapter: double blocks, single blocks, then the layers before them."""
    for kind, indices in (("double", spec.double_indices), ("single", spec.single_indices)):
        if spec.train_blocks not in ("all", kind):
            continue
        blocks = cast("nn.ModuleList", flux.get_submodule(f"{kind}_blocks"))
        beyond = sorted(index for index in indices or () if index >= len(blocks))
        if beyond:
            raise UserError(
                f"train_{kind}_block_indices names block {beyond[0]}, but this model has {len(blocks)} {kind} blocks",
                "--network_args",
                f"Blocks are numbered 0 to {len(blocks) - 1}.",
                field="network_args",
                exit_code=2,
            )
        for index in range(len(blocks)):
            if indices is not None and index not in indices:
                continue
            for path in _linears(flux, f"{kind}_blocks.{index}"):
                name = published_name("unet", path)
                special = spec.type_dim(name)
                rank = spec.rank if special is None else special
                if rank > 0:
                    yield path, rank
    for layer, rank in zip(IN_LAYERS, spec.in_dims or (), strict=False):
        if rank > 0 and getattr(flux, layer, None) is not None:
            yield from ((path, rank) for path in _linears(flux, layer))


def _wrap(root: nn.Module, path: str, rank: int, spec: LoraSpec, generator: torch.Generator) -> LoraLinear:
    owner_path, _, name = path.rpartition(".")
    owner = root.get_submodule(owner_path)
    adapter = LoraLinear(
        cast("nn.Linear", getattr(owner, name)),
        rank,
        spec.alpha,
        generator,
        dropout=spec.dropout,
        rank_dropout=spec.rank_dropout,
        module_dropout=spec.module_dropout,
    )
    setattr(owner, name, adapter)
    return adapter
