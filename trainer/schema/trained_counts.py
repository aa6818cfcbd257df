"""The number of values of everything that trains: LoRA and OFT on the transformer, CLIP-L and T5."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from trainer.schema.base import UserError
from trainer.schema.checkpoint_header import ClipParams, FluxParams, T5Params
from trainer.schema.chroma_header import TransformerParams
from trainer.schema.lora_spec import LoraSpec
from trainer.schema.network_args import IN_LAYERS, fused_parts
from trainer.schema.network_rules import spec_of
from trainer.schema.parameter_counts import OtherModels, in_layers, in_shapes, mlp_size
from trainer.schema.safetensors_header import read_header

if TYPE_CHECKING:
    from trainer.schema.options import Options

_MIN_8BIT_VALUES: Final = 4096
"""bitsandbytes keeps the state of smaller tensors in 32 bit."""
_STEP_BYTES: Final = 4
"""torch's optimizers with a state count the steps of each tensor."""
_8BIT_BLOCK: Final = 256
"""Values that share one fp32 scale in bitsandbytes' block-wise state."""
_CLIP_STARTS: Final = ("lora_te1_", "lora_te_", "text_encoder.", "text_encoders.clip_l.")
_T5_STARTS: Final = ("lora_te3_", "text_encoder_2.", "text_encoders.t5xxl.")


@dataclass(frozen=True)
class LayerLora:
    """The LoRA of one Linear: its published name, in and out features, rank, and number of parts with one each."""

    name: str
    num_in: int
    num_out: int
    rank: int
    num_parts: int = 1

    @property
    def sizes(self) -> tuple[int, int]:
        """Values of down and up."""
        return self.num_parts * self.rank * self.num_in, self.rank * self.num_out


@dataclass(frozen=True)
class Trained:
    """`sizes` are the numbers of values of the trained tensors. `frozen` values stay in fp32 beside them, and as many as
    `passing` are put together in fp32 in every block's forward: a LoRA that begins at the principal part."""

    spec: LoraSpec
    sizes: tuple[int, ...]
    frozen: int = 0
    passing: int = 0
    passing_all: int = 0
    inner: tuple[int, int, int, int] = (0, 0, 0, 0)
    """Values that all downs together give for a token of the image's stream, of the text's, of both in the single blocks,
    and for a sample."""

    def inner_bytes(
        self,
        batch: int,
        num_image: int,
        num_text: int,
        value_bytes: int,
        *,
        double_share: float = 1.0,
        single_share: float = 1.0,
    ) -> int:
        """What autograd keeps of the LoRAs' thin insides in the double and single blocks that are not checkpointed."""
        image, text, joint, sample = self.inner
        double, single = image * num_image + text * num_text, joint * (num_image + num_text)
        return round(batch * (double_share * double + single_share * single + sample) * value_bytes)

    @property
    def total(self) -> int:
        return sum(self.sizes)


def trained_by(flux: TransformerParams, options: Options, models: OtherModels) -> Trained:
    """What trains with `options`. With `dim_from_weights` it is what the file holds; one that cannot be read, which is
    told elsewhere, counts like the options. Raises `UserError` for wrong network options."""
    spec = spec_of(options)
    clip = None if options.network_train_unet_only else models.clip
    t5 = models.t5 if spec.train_t5xxl and not options.network_train_unet_only else None
    if options.dim_from_weights and options.network_weights is not None:
        with contextlib.suppress(UserError):
            sizes = tuple(_sizes_in(options.network_weights, with_text=not options.network_train_unet_only))
            return Trained(spec, sizes)
    sizes = tuple(trained_sizes(flux, spec, clip, t5))
    if spec.kind != "lora":
        return Trained(spec, sizes)
    layers = list(lora_layers(flux, spec, clip, t5))
    frozen = passing = passing_all = 0
    if spec.dora:
        frozen += sum(_magnitude(layer, spec) for layer in layers)
    if spec.pissa:
        frozen += sum(sum(layer.sizes) for layer in layers)
        blocks: dict[str, int] = {}
        for layer in layers:
            block = "_".join(layer.name.split("_")[:5])
            blocks[block] = blocks.get(block, 0) + 2 * sum(layer.sizes)
        passing, passing_all = max(blocks.values(), default=0), sum(blocks.values())
    return Trained(spec, sizes, frozen, passing, passing_all, _inner_values(layers))


def _inner_values(layers: Iterable[LayerLora]) -> tuple[int, int, int, int]:
    values = [0, 0, 0, 0]
    for layer in layers:
        if "_mod" in layer.name:
            place = 3
        elif "_single_blocks_" in layer.name:
            place = 2
        elif "_double_blocks_" in layer.name:
            place = 1 if "_txt_" in layer.name else 0
        else:
            continue
        values[place] += layer.rank * layer.num_parts
    return values[0], values[1], values[2], values[3]


def _magnitude(layer: LayerLora, spec: LoraSpec) -> int:
    return layer.num_in if spec.dora_axis == "in" else layer.num_out


def _sizes_in(path: Path, *, with_text: bool) -> Iterator[int]:
    """The values of each matrix in a LoRA file. In the diffusers form fused layers share a matrix that counts for each
    of their parts: a little too much."""
    text = (*_CLIP_STARTS, *_T5_STARTS)
    for name, info in read_header(path).tensors.items():
        if len(info.shape) == 2 and (with_text or not name.startswith(text)):
            yield math.prod(info.shape)


def trained_sizes(
    flux: TransformerParams, spec: LoraSpec, clip: ClipParams | None, t5: T5Params | None = None
) -> Iterator[int]:
    """The number of values in each trained tensor, two for each Linear that gets a LoRA; None leaves an encoder out."""
    if spec.kind == "oft":
        for name, num_in, num_out in _block_linears(flux, spec):
            if spec.rank_of(name) and (spec.enable_all_linear or "_attn_" in name):
                yield from (size * size // spec.rank for size in fused_parts(name, num_in, num_out))
        return
    for layer in lora_layers(flux, spec, clip, t5):
        yield from layer.sizes
        if spec.dora:
            yield _magnitude(layer, spec)


def lora_layers(
    flux: TransformerParams, spec: LoraSpec, clip: ClipParams | None, t5: T5Params | None = None
) -> Iterator[LayerLora]:
    """Every LoRA. CLIP-L and T5 get none where None."""
    for name, num_in, num_out in _block_linears(flux, spec):
        num_parts = len(fused_parts(name, num_in, num_out)) if spec.split_qkv else 1
        yield from _with_rank(name, num_in, num_out, spec.rank_of(name), num_parts)
    for layer, rank in zip(IN_LAYERS, spec.in_dims or (), strict=False):
        if layer in in_layers(flux):
            shapes = in_shapes(flux, layer)
            ends = ("",) if len(shapes) == 1 else ("_in_layer", "_out_layer")
            for end, (num_in, num_out) in zip(ends, shapes, strict=True):
                name = f"lora_unet_{layer}{end}"
                yield from _with_rank(name, num_in, num_out, spec.rank_of(name, rank))
    for name, num_in, num_out in (*_clip_linears(clip), *_t5_linears(t5)):
        yield from _with_rank(name, num_in, num_out, spec.rank_of(name))


def _with_rank(name: str, num_in: int, num_out: int, rank: int, num_parts: int = 1) -> Iterable[LayerLora]:
    return (LayerLora(name, num_in, num_out, rank, num_parts),) if rank else ()


def _clip_linears(clip: ClipParams | None) -> Iterator[tuple[str, int, int]]:
    c, m = (0, 0) if clip is None else (clip.hidden_size, clip.intermediate_size)
    for index in range(0 if clip is None else clip.num_hidden_layers):
        prefix = f"lora_te1_text_model_encoder_layers_{index}_"
        for part in ("k_proj", "v_proj", "q_proj", "out_proj"):
            yield f"{prefix}self_attn_{part}", c, c
        yield f"{prefix}mlp_fc1", c, m
        yield f"{prefix}mlp_fc2", m, c


def _t5_linears(t5: T5Params | None) -> Iterator[tuple[str, int, int]]:
    for index in range(0 if t5 is None else t5.num_layers):
        assert t5 is not None
        prefix, d, inner = f"lora_te3_encoder_block_{index}_layer_", t5.d_model, t5.num_heads * t5.d_kv
        for part in "qkv":
            yield f"{prefix}0_SelfAttention_{part}", d, inner
        yield f"{prefix}0_SelfAttention_o", inner, d
        for part in ("wi_0", "wi_1"):
            yield f"{prefix}1_DenseReluDense_{part}", d, t5.d_ff
        yield f"{prefix}1_DenseReluDense_wo", t5.d_ff, d


def _block_linears(flux: TransformerParams, spec: LoraSpec) -> Iterator[tuple[str, int, int]]:
    """Name, inputs and outputs of the block Linears among which the spec selects."""
    c, m = flux.hidden_size, mlp_size(flux)
    has_modulation = isinstance(flux, FluxParams)
    if spec.train_blocks != "single":
        for index in range(flux.depth):
            prefix = f"lora_unet_double_blocks_{index}_"
            for stream in ("img", "txt"):
                if has_modulation:
                    yield f"{prefix}{stream}_mod_lin", c, 6 * c
                yield f"{prefix}{stream}_attn_qkv", c, 3 * c
                yield f"{prefix}{stream}_attn_proj", c, c
                yield f"{prefix}{stream}_mlp_0", c, m
                yield f"{prefix}{stream}_mlp_2", m, c
    if spec.train_blocks != "double":
        for index in range(flux.depth_single_blocks):
            prefix = f"lora_unet_single_blocks_{index}_"
            if has_modulation:
                yield f"{prefix}modulation_lin", c, 3 * c
            yield f"{prefix}linear1", c, 3 * c + m
            yield f"{prefix}linear2", c + m, c


def optimizer_state_bytes(num_values: int, *, is_8bit: bool, num_moments: float = 2, value_bytes: int = 4) -> int:
    """Bytes of an optimizer's moments (two for AdamW) for one matrix of numbers that take `value_bytes` each; 8-bit state
    has one fp32 scale for 256 values, and is in fp32 for small matrices."""
    if is_8bit and num_values >= _MIN_8BIT_VALUES:
        return round(num_moments * (num_values + 4 * math.ceil(num_values / _8BIT_BLOCK)))
    return round((4 if is_8bit else value_bytes) * num_moments * num_values) + (_STEP_BYTES if num_moments else 0)
