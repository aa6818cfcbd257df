"""Linears whose frozen weight is stored in fewer bits, and made dense for the moment of each product.

O out features, I in features. The forms and their bytes are described in `trainer.schema.storage`:

    fp8    float8_e4m3fn (O, I) times a scale for each row (O), a power of two. Multiplying by it rounds nothing in any
           type that the training computes in, and a weight that was made of plain fp8 numbers comes back exactly. A
           scale from a scaled fp8 file is kept as it is there, whatever it is
    int8   signed bytes (O, I) times a scale for each row (O): the largest size of the row divided by 127
    nf4    pairs of 4-bit numbers in a byte, blocks of 64 in a row-wise walk, each with its largest size: the NormalFloat of
           Dettmers et al., "QLoRA" (2023), arXiv 2305.14314, computed by bitsandbytes
"""

from __future__ import annotations

import importlib
from collections.abc import Collection
from functools import lru_cache
from typing import Any, Final, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.model.frozen_linear import FrozenLinear
from trainer.model.layers import Modulation
from trainer.schema.storage import NF4_BLOCK

PackedStorage = Literal["fp8", "int8", "nf4"]

_FP8_LARGEST: Final = 448.0
_INT8_LARGEST: Final = 127.0
_NUMBERS_AT_ONCE: Final = 1 << 22
"""So many numbers of a weight are stored at once: what is made on the way stays small. A multiple of `NF4_BLOCK`."""
_TYPES: Final = {"fp8": torch.float8_e4m3fn, "int8": torch.int8, "nf4": torch.uint8}


class StoredLinear(FrozenLinear):
    """A `FrozenLinear` that computes with what is left of its weight in `storage`.

    `weight` holds the stored numbers, of the type and shape that the form has, and `weight_scale` their scales, in the form's
    type: float32 (O), or for nf4 bfloat16, one for each block. Both are frozen parameters, so that they move as others do.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool, storage: PackedStorage) -> None:
        with torch.device("meta"):
            super().__init__(in_features, out_features, bias=bias)
        self.storage: PackedStorage = storage
        weight, scale = self.empty("meta")
        self.set_stored(weight, scale)

    def empty(self, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Room for the stored numbers and the scales."""
        count = self.out_features * self.in_features
        if self.storage == "nf4":
            return (
                torch.empty(-(-count // 2), dtype=torch.uint8, device=device),
                torch.empty(-(-count // NF4_BLOCK), dtype=torch.bfloat16, device=device),
            )
        shape = (self.out_features, self.in_features)
        return (
            torch.empty(shape, dtype=_TYPES[self.storage], device=device),
            torch.empty(self.out_features, dtype=torch.float32, device=device),
        )

    def set_stored(self, weight: Tensor, scale: Tensor) -> None:
        """Takes stored numbers and scales as they are."""
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)

    def pack(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Stored numbers and scales of a dense weight (O, I), on its device."""
        packed, scale = self.empty(weight.device)
        if self.storage == "nf4":
            flat = weight.reshape(-1)
            for first in range(0, flat.numel(), _NUMBERS_AT_ONCE):
                _pack_nf4(flat[first : first + _NUMBERS_AT_ONCE], packed[first // 2 :], scale[first // NF4_BLOCK :])
            return packed, scale
        pack_rows = _pack_fp8 if self.storage == "fp8" else _pack_int8
        step = max(1, _NUMBERS_AT_ONCE // self.in_features)
        for first in range(0, self.out_features, step):
            rows = slice(first, first + step)
            pack_rows(weight[rows].float(), packed[rows], scale[rows])
        return packed, scale

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        if self.storage == "nf4":
            return _dense_nf4(self.weight, self.weight_scale, (self.out_features, self.in_features), dtype)
        # The product with the scale is formed in float32 and rounded once.
        return self.weight.to(dtype).mul_(self.weight_scale[:, None])

    def product(self, input: Tensor) -> Tensor:
        device = input.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
        bias = cast("Tensor | None", self.bias)
        return F.linear(input.to(dtype), self.dense_weight(dtype), None if bias is None else bias.to(dtype))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, storage={self.storage}"


def use_storage(
    blocks: nn.Module,
    storage: PackedStorage,
    *,
    with_modulation: bool = False,
    only: Collection[str] | None = None,
) -> dict[str, StoredLinear]:
    """Puts a `StoredLinear` without memory in the place of every Linear below `blocks`, those of the modulation only with
    `with_modulation`; of those, where `only` is given, the ones with these paths.

    Gives the new modules by path. Which Linears these are is also what `trainer.schema.storage.block_shapes` counts.
    """
    stored: dict[str, StoredLinear] = {}
    for path, module in list(blocks.named_modules()):
        if isinstance(module, Modulation) and not with_modulation:
            continue
        for name, child in list(module.named_children()):
            if isinstance(child, FrozenLinear) and (only is None or f"{path}.{name}" in only):
                linear = StoredLinear(
                    child.in_features,
                    child.out_features,
                    bias=cast("Tensor | None", child.bias) is not None,
                    storage=storage,
                )
                setattr(module, name, linear)
                stored[f"{path}.{name}"] = linear
    return stored


# ----------------------------------------------------------------------------------------------------------- fp8, int8


def _pack_fp8(rows: Tensor, packed: Tensor, scale: Tensor) -> None:
    largest = rows.abs().amax(dim=1)
    mantissa, exponent = torch.frexp(largest / _FP8_LARGEST)
    # The smallest power of two that brings the row's largest number into the type's range; 1 for a row of zeros.
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp_(-126, 127)
    scale.copy_(torch.ldexp(torch.ones_like(largest), exponent))
    packed.copy_((rows / scale[:, None]).clamp_(-_FP8_LARGEST, _FP8_LARGEST))


def _pack_int8(rows: Tensor, packed: Tensor, scale: Tensor) -> None:
    largest = rows.abs().amax(dim=1)
    scale.copy_(torch.where(largest == 0, 1.0, largest / _INT8_LARGEST))
    packed.copy_((rows / scale[:, None]).round_().clamp_(-_INT8_LARGEST, _INT8_LARGEST))


# ------------------------------------------------------------------------------------------------------------------ nf4


def _pack_nf4(numbers: Tensor, packed: Tensor, scale: Tensor) -> None:
    half_bytes, state = _bitsandbytes().quantize_4bit(numbers.float(), blocksize=NF4_BLOCK, quant_type="nf4")
    packed[: half_bytes.numel()].copy_(half_bytes.view(-1))
    scale[: state.absmax.numel()].copy_(state.absmax)


def _dense_nf4(packed: Tensor, scale: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    functional = _bitsandbytes()
    # As one row: bitsandbytes 0.50's kernels for AVX-512 read the scales wrongly where a row ends within a block.
    rows_end_with_blocks = shape[1] % NF4_BLOCK == 0
    state = functional.QuantState(
        absmax=scale.float(),
        shape=torch.Size(shape if rows_end_with_blocks else (shape[0] * shape[1],)),
        code=_nf4_code(packed.device),
        blocksize=NF4_BLOCK,
        quant_type="nf4",
        dtype=dtype,
    )
    return cast("Tensor", functional.dequantize_4bit(packed.view(-1, 1), state)).view(shape)


@lru_cache(maxsize=8)
def _nf4_code(device: torch.device) -> Tensor:
    """The sixteen numbers of the form."""
    return cast("Tensor", _bitsandbytes().get_4bit_type("nf4", device=device))


@lru_cache(maxsize=1)
def _bitsandbytes() -> Any:
    """The package's functions. Its import takes seconds, so that only those wait who use it."""
    return importlib.import_module("bitsandbytes.functional")
