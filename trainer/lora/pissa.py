"""PiSSA: a LoRA that begins at the principal part of the weight, after Meng et al., "PiSSA: Principal Singular Values
and Singular Vectors Adaptation of Large Language Models" (2024), arXiv 2404.02948.

With W = U S V, down = sqrt(S_r) V_r and up = U_r sqrt(S_r) begin as the r largest singular values and vectors, and what
is left of W stays frozen. Here W itself is left alone: what is added is up down minus the product that they began with,
which is the same and starts at exactly nothing. That difference is a LoRA of rank 2 r, and as such it is saved: the file
is valid for the unmodified base in every loader.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

_EXACT_SIZE: Final = 512
"""Up to this size all singular values are computed; above, the largest are approximated, as the paper does."""
_MORE_COLUMNS: Final = 8


def principal_factors(
    weight: Tensor,
    parts: Sequence[slice],
    rank: int,
    scale: float,
    generator: torch.Generator,
    *,
    num_iterations: int,
) -> tuple[Tensor, Tensor]:
    """down (P * R, I) and up (O, R) in float32 such that scale * up @ down is the principal part of each part of `weight`."""
    downs: list[Tensor] = []
    ups: list[Tensor] = []
    for part in parts:
        u, s, v = _largest_singular(weight[part].detach().float(), rank, generator, num_iterations)
        root = (s / scale).sqrt()
        downs.append(_padded(root[:, None] * v, rank, dim=0))
        ups.append(_padded(u * root, rank, dim=1))
    return torch.cat(downs), torch.cat(ups)


def _padded(factor: Tensor, rank: int, dim: int) -> Tensor:
    """With zeros up to `rank`, which may exceed what a small weight has."""
    missing = rank - factor.shape[dim]
    if missing <= 0:
        return factor
    shape = (missing, factor.shape[1]) if dim == 0 else (factor.shape[0], missing)
    return torch.cat((factor, factor.new_zeros(shape)), dim=dim)


def _largest_singular(
    weight: Tensor, rank: int, generator: torch.Generator, num_iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """U (O, R), S (R), V (R, I). Large weights by the randomised range finder with power iterations of Halko et al.
    (2011), arXiv 0909.4061."""
    if min(weight.shape) <= max(_EXACT_SIZE, rank + _MORE_COLUMNS):
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        return u[:, :rank], s[:rank], v[:rank]
    start = torch.randn(weight.shape[1], rank + _MORE_COLUMNS, generator=generator).to(weight.device)
    basis = torch.linalg.qr(weight @ start).Q
    for _ in range(num_iterations):
        basis = torch.linalg.qr(weight @ torch.linalg.qr(weight.t() @ basis).Q).Q
    u, s, v = torch.linalg.svd(basis.t() @ weight, full_matrices=False)
    return basis @ u[:, :rank], s[:rank], v[:rank]
