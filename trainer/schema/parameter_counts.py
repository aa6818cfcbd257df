"""The exact numbers of parameters of every model, from its sizes. C hidden size, M hidden size of the MLP."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Final

from trainer.schema.checkpoint_header import AutoencoderParams, ClipParams, FluxParams, T5Params
from trainer.schema.chroma_header import ChromaParams, TransformerParams
from trainer.schema.network_args import IN_LAYERS

_TIME_DIM: Final = 256


@dataclass(frozen=True)
class OtherModels:
    """Sizes of the models beside the transformer; Chroma has no CLIP-L."""

    t5: T5Params
    clip: ClipParams | None
    autoencoder: AutoencoderParams


PUBLISHED_T5: Final = T5Params(4096, 10240, 64, 64, 24, 32128, 32)
PUBLISHED_CLIP: Final = ClipParams(768, 3072, 12, 12, 49408, 77)
PUBLISHED_DEV: Final = FluxParams(64, 64, 768, 4096, 3072, 4.0, 24, 19, 38, (16, 56, 56), 10_000, True, True)
PUBLISHED_CHROMA: Final = ChromaParams(64, 64, 4096, 3072, 4.0, 24, 19, 38, (16, 56, 56), 10_000, True, 64, 5120, 5)
PUBLISHED_AUTOENCODER: Final = AutoencoderParams(256, 3, 128, 3, (1, 2, 4, 4), 2, 16)


def usual_models(flux: TransformerParams) -> OtherModels:
    """The published encoders, or for a transformer of other text widths their like, scaled to its widths."""
    t5, clip = PUBLISHED_T5, PUBLISHED_CLIP
    if flux.context_in_dim != t5.d_model:
        width = flux.context_in_dim
        t5 = dataclasses.replace(t5, d_model=width, d_ff=5 * width // 2, num_heads=max(width // 64, 1))
    if isinstance(flux, ChromaParams):
        return OtherModels(t5, None, PUBLISHED_AUTOENCODER)
    if flux.vec_in_dim != clip.hidden_size:
        width = flux.vec_in_dim
        clip = dataclasses.replace(
            clip, hidden_size=width, intermediate_size=4 * width, num_attention_heads=max(width // 64, 1)
        )
    return OtherModels(t5, clip, PUBLISHED_AUTOENCODER)


@dataclass(frozen=True)
class FluxCounts:
    """Parameters of a transformer. `*_linear` are the Linear weights of one block, which can be swapped."""

    double_linear: int
    double_other: int
    single_linear: int
    single_other: int
    outside: int
    depth: int
    depth_single_blocks: int

    @property
    def total(self) -> int:
        return (
            self.outside
            + self.depth * (self.double_linear + self.double_other)
            + self.depth_single_blocks * (self.single_linear + self.single_other)
        )


def flux_counts(flux: TransformerParams) -> FluxCounts:
    """The exact numbers of parameters; 11,901,408,320 in total for FLUX.1 dev, 8,899,983,424 for Chroma1."""
    c, m = flux.hidden_size, mlp_size(flux)
    # Chroma's blocks have no modulation of their own.
    mod = 0 if isinstance(flux, ChromaParams) else c
    head_dim = c // flux.num_heads
    qkv_bias = 3 * c if flux.qkv_bias else 0
    return FluxCounts(
        double_linear=2 * (6 * c * mod + _double_linear_weights(c, m)),
        double_other=2 * (6 * mod + qkv_bias + c + m + c + 2 * head_dim),
        single_linear=3 * c * mod + c * (3 * c + m) + (c + m) * c,
        single_other=3 * mod + (3 * c + m) + c + 2 * head_dim,
        outside=(
            sum(rows * columns + rows for name in in_layers(flux) for columns, rows in in_shapes(flux, name))
            + (c * flux.out_channels + flux.out_channels)
            + (_approximator_count(flux) if isinstance(flux, ChromaParams) else 2 * c * c + 2 * c)
        ),
        depth=flux.depth,
        depth_single_blocks=flux.depth_single_blocks,
    )


def _double_linear_weights(c: int, m: int) -> int:
    """qkv, projection and MLP of one of the two streams."""
    return 3 * c * c + c * c + 2 * c * m


def _approximator_count(chroma: ChromaParams) -> int:
    a = chroma.approximator_hidden_size
    layer = 2 * (a * a + a) + a
    ends = chroma.approximator_in_dim * a + a + a * chroma.hidden_size + chroma.hidden_size
    return ends + chroma.approximator_depth * layer


def mlp_size(flux: TransformerParams) -> int:
    """M of the blocks."""
    return round(flux.hidden_size * flux.mlp_ratio)


def in_layers(flux: TransformerParams) -> tuple[str, ...]:
    """The layers in front of the blocks that this transformer has."""
    if isinstance(flux, ChromaParams):
        return "img_in", "txt_in"
    return tuple(name for name in IN_LAYERS if name != "guidance_in" or flux.guidance_embed)


def in_shapes(flux: TransformerParams, name: str) -> tuple[tuple[int, int], ...]:
    """(in, out) of the Linears of one layer in front of the blocks."""
    c = flux.hidden_size
    if name == "img_in":
        return ((flux.in_channels, c),)
    if name == "txt_in":
        return ((flux.context_in_dim, c),)
    if name == "vector_in" and isinstance(flux, FluxParams):
        return ((flux.vec_in_dim, c), (c, c))
    return ((_TIME_DIM, c), (c, c))


def t5_count(t5: T5Params) -> int:
    """Parameters of a T5 v1.1 encoder; 4,762,310,656 for T5-XXL."""
    inner = t5.num_heads * t5.d_kv
    layer = 4 * t5.d_model * inner + 3 * t5.d_model * t5.d_ff + 2 * t5.d_model
    return t5.vocab_size * t5.d_model + t5.num_layers * layer + t5.num_buckets * t5.num_heads + t5.d_model


def t5_layer_linear(t5: T5Params) -> int:
    """Linear weights of one layer, which can come to the device in turn."""
    return 4 * t5.d_model * t5.num_heads * t5.d_kv + 3 * t5.d_model * t5.d_ff


def clip_count(clip: ClipParams) -> int:
    """Parameters of a CLIP text encoder; 123,060,480 for CLIP-L."""
    c, m = clip.hidden_size, clip.intermediate_size
    layer = 4 * (c * c + c) + (c * m + m) + (m * c + c) + 4 * c
    return (clip.vocab_size + clip.max_position_embeddings) * c + clip.num_hidden_layers * layer + 2 * c


def autoencoder_count(autoencoder: AutoencoderParams) -> int:
    """Parameters of a FLUX.1 autoencoder; 83,819,683 for the published one."""
    ch, z = autoencoder.ch, autoencoder.z_channels
    widths = [ch * factor for factor in autoencoder.ch_mult]
    top, num_blocks = widths[-1], autoencoder.num_res_blocks

    def conv(inner: int, outer: int, size: int = 3) -> int:
        return size * size * inner * outer + outer

    def block(inner: int, outer: int) -> int:
        shortcut = conv(inner, outer, 1) if inner != outer else 0
        return 2 * inner + conv(inner, outer) + 2 * outer + conv(outer, outer) + shortcut

    def level(inner: int, outer: int, count: int) -> int:
        return block(inner, outer) + (count - 1) * block(outer, outer)

    middle = 2 * block(top, top) + 2 * top + 4 * conv(top, top, 1)
    encoder = conv(autoencoder.in_channels, ch) + middle + 2 * top + conv(top, 2 * z)
    decoder = conv(z, top) + middle + 2 * widths[0] + conv(widths[0], autoencoder.out_ch)
    for index, width in enumerate(widths):
        encoder += level(ch if index == 0 else widths[index - 1], width, num_blocks)
        decoder += level(widths[min(index + 1, len(widths) - 1)], width, num_blocks + 1)
        encoder += conv(width, width) if index < len(widths) - 1 else 0
        decoder += conv(width, width) if index > 0 else 0
    return encoder + decoder
