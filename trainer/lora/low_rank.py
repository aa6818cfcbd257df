"""Changes of low rank: the best factors of a product or of a whole matrix, and how many of them are worth keeping.

O out features, I in features, R rank. A change is up (O, R) times down (R, I).
"""

from __future__ import annotations

from typing import Final, Literal

import torch
from torch import Tensor

Rule = Literal["sv_ratio", "sv_cumulative", "sv_fro"]

_WHOLE_SIDE: Final = 1024
"""Up to this smaller side a matrix is decomposed exactly; above it, that takes minutes for each layer on a CPU."""
_EXTRA_DIRECTIONS: Final = 32
_NUM_ITERATIONS: Final = 6


def decompose_product(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (O, K), S (K) falling, Vh (K, I) of up @ down, K = the smallest of O, R, I: exact, without the whole matrix.

    Both factors are turned into orthogonal ones times a small square, and only the squares' product is decomposed.
    """
    up_basis, up_square = torch.linalg.qr(up.float())
    down_basis, down_square = torch.linalg.qr(down.float().t())
    u, s, vh = torch.linalg.svd(up_square @ down_square.t(), full_matrices=False)
    return up_basis @ u, s, vh @ down_basis.t()


def decompose_matrix(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U, S falling, Vh of the `rank` strongest directions of `matrix` (O, I).

    Large matrices are decomposed by random projection with power iterations (Halko, Martinsson and Tropp, "Finding
    structure with randomness", 2011), which is as good as exact where the rest is small.
    """
    matrix = matrix.float()
    if min(matrix.shape) <= _WHOLE_SIDE:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        directions = min(rank + _EXTRA_DIRECTIONS, *matrix.shape)
        u, s, v = torch.svd_lowrank(matrix, q=directions, niter=_NUM_ITERATIONS)
        vh = v.t()
    return u[:, :rank], s[:rank], vh[:rank]


def factors(u: Tensor, s: Tensor, vh: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """up (O, rank) and down (rank, I) of the strongest directions, of about the same size both."""
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vh[:rank]


def kept_rank(s: Tensor, rule: Rule, value: float) -> int:
    """How many of the falling singular values `s` to keep, at least 1.

    `sv_ratio` keeps those above the largest / value; `sv_cumulative` as many as make up `value` of their sum; `sv_fro` as
    many as keep `value` of the Frobenius norm. The rules' names are those of sd-scripts' resize_lora.
    """
    if float(s[0]) <= 0:
        return 1
    if rule == "sv_ratio":
        return max(1, int((s > s[0] / value).sum()))
    if rule == "sv_cumulative":
        reached = s.double().cumsum(0) / s.double().sum()
        target = value
    else:
        reached = s.double().square().cumsum(0) / s.double().square().sum()
        target = value**2
    return max(1, min(len(s), int((reached < target - 1e-9).sum()) + 1))
