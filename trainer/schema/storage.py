"""How the frozen transformer's weights are stored, and the bytes that this takes. Pure arithmetic, no torch.

What is stored in fewer bits are the weights of the blocks' Linears, but for the modulation layers, whose product is one
vector a sample: rounding them changes every token alike. Norms, biases, modulation and what stands outside the blocks are
kept in the compute type. A file that has these weights in fp8 keeps its own numbers and scales unless something else is
asked for, and of the modulation layers, too, where the file has them so: they are exactly what they would be in the compute
type, in half the memory. R rows (out features), I columns (in features) of a Linear:

    compute   R * I numbers of the compute type
    fp8       R * I numbers float8_e4m3fn, and a scale in float32 for each row
    int8      R * I signed bytes, and a scale in float32 for each row
    nf4       R * I half bytes, and the largest size in bfloat16 for each 64 of them in a row-wise walk (4.25 bits each)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal

from trainer.schema.chroma_header import ChromaParams, TransformerParams

if TYPE_CHECKING:
    from trainer.schema.options import Options

Storage = Literal["compute", "fp8", "nf4", "int8"]

NF4_BLOCK: Final = 64
"""Numbers that share one largest size."""
SCALE_BYTES: Final = 4
NF4_SCALE_BYTES: Final = 2

Shape = tuple[int, int]
"""Rows and columns."""


def stored_as(options: Options, flux: TransformerParams | None = None) -> Storage:
    """How the blocks' weights are stored, by the options and, where they leave it open, by the file of `flux`.

    LyCORIS computes with dense weights, and weights into which others are merged are no fp8 numbers any more.
    """
    if options.base_storage is not None:
        return options.base_storage
    if options.fp8_base or options.fp8_base_unet:
        return "fp8"
    return "fp8" if flux is not None and flux.fp8_linears and keeps_file(options) else "compute"


def keeps_file(options: Options) -> bool:
    """Whether weights that the file has in fp8 stay so without being asked for. An Apple GPU cannot compute with them."""
    is_asked = options.base_storage is not None or options.fp8_base or options.fp8_base_unet
    is_dense = options.network_module == "lycoris.kohya" or bool(options.base_weights) or options.device == "mps"
    return not is_asked and not is_dense


def linear_bytes(shape: Shape, storage: Storage, value_bytes: int) -> int:
    """Bytes of a Linear's weight with its scales. `value_bytes` is the size of a number of the compute type."""
    rows, columns = shape
    count = rows * columns
    if storage == "compute":
        return count * value_bytes
    if storage == "nf4":
        return -(-count // 2) + NF4_SCALE_BYTES * -(-count // NF4_BLOCK)
    return count + SCALE_BYTES * rows


def stored_shapes(flux: TransformerParams) -> tuple[tuple[Shape, ...], tuple[Shape, ...]]:
    """The Linears of a double and of a single block that the storage is about."""
    c, m = flux.hidden_size, round(flux.hidden_size * flux.mlp_ratio)
    stream = ((3 * c, c), (c, c), (m, c), (c, m))
    return (*stream, *stream), ((3 * c + m, c), (c, c + m))


def kept_shapes(flux: TransformerParams) -> tuple[tuple[Shape, ...], tuple[Shape, ...]]:
    """The other Linears of a double and of a single block: the modulation, which Chroma's blocks do not have."""
    if isinstance(flux, ChromaParams):
        return (), ()
    c = flux.hidden_size
    return ((6 * c, c), (6 * c, c)), ((3 * c, c),)


def block_shapes(
    flux: TransformerParams, storage: Storage, *, with_modulation: bool = True
) -> tuple[tuple[tuple[Shape, ...], tuple[Shape, ...]], ...]:
    """For a double and a single block the Linears that are stored, and the others."""
    pairs = tuple(zip(stored_shapes(flux), kept_shapes(flux), strict=True))
    if not with_modulation:
        return tuple((stored, ()) for stored, _ in pairs)
    if storage == "fp8" and flux.fp8_modulation:
        return tuple(((*stored, *kept), ()) for stored, kept in pairs)
    return pairs


def block_bytes(
    flux: TransformerParams, storage: Storage, value_bytes: int, *, with_modulation: bool = True
) -> tuple[int, int]:
    """Bytes of all Linear weights, with scales, of a double and of a single block: what one swap moves."""
    double, single = (
        sum(linear_bytes(shape, storage, value_bytes) for shape in stored)
        + sum(linear_bytes(shape, "compute", value_bytes) for shape in kept)
        for stored, kept in block_shapes(flux, storage, with_modulation=with_modulation)
    )
    return double, single


def modulation_bytes(flux: TransformerParams, value_bytes: int) -> tuple[int, int]:
    """Bytes of all blocks' modulation weights, and of the largest."""
    double, single = ([rows * columns * value_bytes for rows, columns in shapes] for shapes in kept_shapes(flux))
    return flux.depth * sum(double) + flux.depth_single_blocks * sum(single), max((*double, *single), default=0)


def saved_bytes(flux: TransformerParams, storage: Storage, value_bytes: int, *, with_modulation: bool = True) -> int:
    """How many bytes the storage saves on the whole transformer against the compute type."""
    plain, stored = (
        block_bytes(flux, kind, value_bytes, with_modulation=with_modulation) for kind in ("compute", storage)
    )
    return flux.depth * (plain[0] - stored[0]) + flux.depth_single_blocks * (plain[1] - stored[1])


def scratch_bytes(flux: TransformerParams, storage: Storage, value_bytes: int) -> int:
    """The largest weight in the compute type, which is made for the moment of its product; 0 without storage."""
    if storage == "compute":
        return 0
    stored = [shape for shapes, _ in block_shapes(flux, storage) for shape in shapes]
    return max(rows * columns for rows, columns in stored) * value_bytes
