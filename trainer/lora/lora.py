"""The LoRA layer: an adapter of low rank around a frozen Linear.

y = W x + b + multiplier * alpha / rank * up(down(x)), after Hu et al., "LoRA: Low-Rank Adaptation of Large Language
Models" (2021). B batch, L tokens, I in features, O out features, R rank, P parts.

A fused Linear may have a LoRA for each of its P parts (query, key, value, and mlp): `down` is then (P * R, I), one block
of R rows for each part, and the rows of `up` (O, R) that belong to a part read that part's block only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from trainer.lora.adapter import Adapter, Trained, base_linear, compute_dtype, frozen_weight, wrong_part
from trainer.lora.ggpo import Perturbation
from trainer.lora.half import held, inner_scale, scaled_down
from trainer.lora.pissa import principal_factors
from trainer.lora.split import merge_up, part_slices, unmerge_up


class _LoraContext(FunctionCtx):
    base: nn.Linear
    input_dtype: torch.dtype
    scale: float
    parts: Sequence[slice]


class _LoraFunction(torch.autograd.Function):
    """The whole adapted Linear as one step of autograd.

    What is kept for backward is the input, which the layer before keeps anyway, and down(x), which is thin and in fp16
    scaled down. The base's weight is read from the module again, as it may be elsewhere in between.
    """

    @staticmethod
    def forward(
        ctx: _LoraContext, x: Tensor, down: Tensor, up: Tensor, base: nn.Linear, scale: float, parts: Sequence[slice]
    ) -> Tensor:
        output = base_linear(base, x, base.bias)
        dtype, rank = output.dtype, up.shape[1]
        flat = x.reshape(-1, x.shape[-1]).to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            inner = held(flat @ scaled_down(down, dtype).t())
            rows = output.view(-1, output.shape[-1])
            up_rows = up.to(dtype)
            for index, part in enumerate(parts):
                block = inner[:, index * rank : (index + 1) * rank]
                rows[:, part].addmm_(block, up_rows[part].t(), alpha=scale / inner_scale(dtype))
        ctx.save_for_backward(x, inner, down, up)
        ctx.base, ctx.input_dtype, ctx.scale, ctx.parts = base, x.dtype, scale, parts
        return output

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: _LoraContext, grad_output: Tensor
    ) -> tuple[Tensor | None, Tensor, Tensor, None, None, None]:
        x, inner, down, up = cast("tuple[Tensor, Tensor, Tensor, Tensor]", ctx.saved_tensors)  # pyright: ignore[reportAttributeAccessIssue]
        dtype, rank = grad_output.dtype, up.shape[1]
        up_scale = ctx.scale / inner_scale(dtype)
        with torch.autocast(grad_output.device.type, enabled=False):
            grad = grad_output.reshape(-1, grad_output.shape[-1])
            flat = x.reshape(-1, x.shape[-1]).to(dtype)
            up_rows = up.to(dtype)
            if len(ctx.parts) == 1:
                grad_inner = (grad @ up_rows).mul_(ctx.scale)
                grad_up = (grad.t() @ inner).to(up.dtype).mul_(up_scale)
            else:
                grad_inner, grad_up = torch.empty_like(inner), torch.empty_like(up)
                for index, part in enumerate(ctx.parts):
                    block = slice(index * rank, (index + 1) * rank)
                    grad_inner[:, block] = (grad[:, part] @ up_rows[part]).mul_(ctx.scale)
                    grad_up[part] = (grad[:, part].t() @ inner[:, block]).to(up.dtype).mul_(up_scale)
            grad_down = (grad_inner.t() @ flat).to(down.dtype)
            grad_x = None
            if ctx.needs_input_grad[0]:  # pyright: ignore[reportAttributeAccessIssue]
                grad_x = torch.mm(grad, frozen_weight(ctx.base, dtype)).addmm_(grad_inner, down.to(dtype))
                grad_x = grad_x.view(x.shape).to(ctx.input_dtype)
        return grad_x, grad_down, grad_up, None, None, None


class LoraLinear(Adapter):
    """Stands in the place of the Linear that it holds as `base`. `lora_down` (P * R, I) and `lora_up` (O, R) train.

    `alpha` keeps its number type, which is the type it is saved in. `splits` are the sizes of the base's parts that get
    a LoRA each; one part by default. With `pissa_niter` it begins at the base's principal part; see `pissa`.
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
        splits: tuple[int, ...] = (),
        pissa_niter: int | None = None,
    ) -> None:
        super().__init__(base)
        self.rank = rank
        self._alpha = alpha if alpha != 0 else rank
        self.dropout = dropout
        self.rank_dropout = rank_dropout
        self.module_dropout = module_dropout
        self.parts = part_slices(splits or (base.out_features,))
        self.perturbation: Perturbation | None = None
        # Kaiming's uniform draw with a = sqrt(5) has the bound 1 / sqrt(I). On the host, so that a seed gives the same
        # weights on every device.
        bound = 1.0 / math.sqrt(base.in_features)
        down = torch.empty(rank * len(self.parts), base.in_features).uniform_(-bound, bound, generator=generator)
        up = torch.zeros(base.out_features, rank)
        self.begins_at_principal = pissa_niter is not None
        if pissa_niter is not None and not base.weight.is_meta:
            down, up = principal_factors(
                frozen_weight(base, torch.float32),
                self.parts,
                rank,
                self._alpha / rank,
                generator,
                num_iterations=pissa_niter,
            )
        device = base.weight.device
        self.lora_down = nn.Parameter(down.to(device))
        self.lora_up = nn.Parameter(up.to(device))
        if self.begins_at_principal:
            # Frozen parameters: they go where the trained ones go, and a state to resume from needs them too.
            self.first_down = nn.Parameter(self.lora_down.detach().clone(), requires_grad=False)
            self.first_up = nn.Parameter(self.lora_up.detach().clone(), requires_grad=False)

    @property
    def alpha(self) -> float:
        return self._alpha

    @alpha.setter
    def alpha(self, alpha: float) -> None:
        self._alpha = alpha

    @property
    def scale(self) -> float:
        """What the adapter's output is multiplied with."""
        return self.multiplier * self.alpha / self.rank

    def trained(self) -> tuple[Trained, ...]:
        return Trained("down", "down", self.lora_down), Trained("up", "up", self.lora_up)

    def factors(self) -> tuple[Tensor, Tensor]:
        """down (P * R', I) and up (O, R') of what is added to the base; R' = R, or 2 R for a principal beginning."""
        if not self.begins_at_principal:
            return self.lora_down, self.lora_up
        # up @ down - first_up @ first_down, in a form that loses no digits while the two are close.
        first_down, first_up = self.first_down, self.first_up
        blocks = (len(self.parts), self.rank, -1)
        change = (self.lora_down - first_down).view(blocks)
        down = torch.cat((change, first_down.view(blocks)), dim=1).flatten(0, 1)
        return down, torch.cat((self.lora_up, self.lora_up - first_up), dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        if self.multiplier == 0 or (self.training and self._drops_module()):
            return self.base(x)
        return self._adapted(x, self.scale)

    def _adapted(self, x: Tensor, scale: float) -> Tensor:
        if self.training and (self.dropout > 0 or self.rank_dropout > 0):
            output = self._forward_with_dropout(x, scale)
        else:
            down, up = self.factors()
            output = cast("Tensor", _LoraFunction.apply(x, down, up, self.base, scale, self.parts))
        if self.training and self.perturbation is not None:
            output = held(output) + held(self.perturbation(x, output.dtype))
        return output

    def _drops_module(self) -> bool:
        return self.module_dropout > 0 and torch.rand(1).item() < self.module_dropout

    def _forward_with_dropout(self, x: Tensor, scale: float) -> Tensor:
        """Neuron dropout on down(x), and whole ranks dropped sample by sample, what is left scaled up."""
        output = held(self.base(x))
        down, up = self.factors()
        dtype = compute_dtype(x)
        inner = F.linear(x, scaled_down(down, dtype))
        scale = scale / inner_scale(dtype)
        if self.dropout > 0:
            inner = F.dropout(inner, self.dropout)
        if self.rank_dropout > 0:
            width = inner.shape[-1]
            kept = torch.rand(inner.shape[0], width, device=inner.device) > self.rank_dropout
            inner = inner * kept.view(inner.shape[0], *[1] * (inner.dim() - 2), width).to(inner.dtype)
            scale = scale / (1.0 - self.rank_dropout)
        inner = held(inner)
        rank, up = up.shape[1], up.to(inner.dtype)
        added = [
            F.linear(inner[..., index * rank : (index + 1) * rank], up[part]) for index, part in enumerate(self.parts)
        ]
        return output + held((torch.cat(added, dim=-1) * scale).to(output.dtype))

    # ---- files -------------------------------------------------------------------------------------------------------

    def published(self) -> dict[str, Tensor]:
        """Alpha, down and up. Parts become one block-diagonal up, whose rank is higher: alpha rises with it, so that
        every loader, which divides alpha by that rank, comes to the trained strength."""
        with torch.no_grad():
            down, up = self.factors()
            return {
                "alpha": torch.tensor(self.alpha * (down.shape[0] // self.rank)),
                "lora_down.weight": down.detach(),
                "lora_up.weight": merge_up(up.detach(), self.parts),
            }

    def load(self, tensors: Mapping[str, Tensor], name: str, where: str) -> None:
        for part in ("lora_down.weight", "lora_up.weight"):
            if part not in tensors:
                raise wrong_part(f"{name} has no {part}", where, "The file is incomplete.")
        down, up = tensors["lora_down.weight"], tensors["lora_up.weight"]
        self._check_shapes(down, up, name, where)
        rows = unmerge_up(up, self.parts)
        if rows is None:
            raise wrong_part(
                f"{name} was not trained in separate parts", where, "Leave split_qkv out of the network settings."
            )
        down, rows = down.float(), rows.float()
        with torch.no_grad():
            if self.begins_at_principal:
                blocks = down.view(len(self.parts), 2, self.rank, -1)
                first_down, first_up = blocks[:, 1], rows[:, : self.rank] - rows[:, self.rank :]
                self.first_down.copy_(first_down.flatten(0, 1))
                self.first_up.copy_(first_up)
                down, rows = (blocks[:, 0] + first_down).flatten(0, 1), rows[:, : self.rank]
            self.lora_down.data.copy_(down)
            self.lora_up.data.copy_(rows)
        if "alpha" in tensors:
            self.alpha = _divided(
                cast("float", tensors["alpha"].item()), tensors["lora_down.weight"].shape[0] // self.rank
            )

    def _check_shapes(self, down: Tensor, up: Tensor, name: str, where: str) -> None:
        factor = len(self.parts) * (2 if self.begins_at_principal else 1)
        rank = down.shape[0]
        if rank != factor * self.rank:
            hint = f"Use --network_dim={rank // factor}." if rank % factor == 0 else None
            wanted = f"rank {self.rank}" if factor == 1 else f"rank {self.rank}, saved as {factor * self.rank},"
            raise wrong_part(f"the file has rank {rank} for {name}, but {wanted} is to be trained", where, hint)
        for tensor, shape in (
            (down, (rank, self.base.in_features)),
            (up, (self.base.out_features, rank)),
        ):
            if tuple(tensor.shape) != shape:
                raise wrong_part(
                    f"{name} is {list(tensor.shape)} in the file and {list(shape)} in this model",
                    where,
                    "The LoRA belongs to another model.",
                )


def _divided(alpha: float, count: int) -> float:
    """alpha / count, a whole number where that is exact."""
    return alpha // count if isinstance(alpha, int) and alpha % count == 0 else alpha / count
