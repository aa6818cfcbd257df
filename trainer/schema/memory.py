"""How much memory a run will need, and the smallest `blocks_to_swap` that fits a card. Pure arithmetic on sizes.

The peak is the highest of four phases, each a sum of parts. Parameter counts are exact. Activations follow from what the
blocks of `trainer.model` keep for backward, counted in tensors of the hidden size C per token. The rest, the CUDA context,
convolution workspace and the allocator's rounding, are constants of a model: **none of the CUDA figures has been measured
on a GPU**. They are meant to be a little too high rather than too low.

Block swap: `blocks_to_swap` = n stands for n // 2 double and 2 * (n - n // 2) single blocks (the rule of sd-scripts'
`blocks_to_swap`). The Linear weights of swapped blocks live in host memory and pass through a ring of two slots on the
device; biases, norms and the LoRA stay on the device. The ring costs as much as the two blocks it holds, so a count of 1
or 2 saves nothing.

B batch, N image tokens, L text tokens, C hidden size, M hidden size of the MLP, m = M / C.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from trainer.schema.base import UserError
from trainer.schema.checkpoint_header import AutoencoderParams, ClipParams, FluxParams, T5Params
from trainer.schema.chroma_header import ChromaParams, TransformerParams
from trainer.schema.lora_spec import IN_LAYERS, LoraSpec, spec_from_network_args
from trainer.schema.network_args import fused_parts
from trainer.schema.optimizers import moments_of, wanted_optimizer

if TYPE_CHECKING:
    from trainer.schema.options import Options

PhaseName = Literal["text encoders", "latents", "training", "sampling"]

GIB: Final = 2**30
NUM_SLOTS: Final = 2
"""Blocks whose Linear weights are on the device at once while swapping."""

CUDA_CONTEXT_BYTES: Final = round(0.6 * GIB)
"""CUDA context, kernels and cuBLAS workspace of one process. Unmeasured; 0.3 to 0.6 GiB is usual."""
ALLOCATOR_SHARE: Final = 0.05
"""What rounding and fragmentation add to tensors that come and go. Unmeasured."""
RESERVE_SHARE: Final = 0.04
"""Share of a card's memory that is left to the desktop and other programs."""
HOST_PROCESS_BYTES: Final = 2 * GIB
"""Python, torch and its libraries in host memory."""

_TIME_DIM: Final = 256
_LATENT_CHANNELS: Final = 16
_CLIP_TOKENS: Final = 77
_MIN_8BIT_VALUES: Final = 4096
"""bitsandbytes keeps the state of smaller tensors in 32 bit."""
_8BIT_BLOCK: Final = 256
"""Values that share one fp32 scale in bitsandbytes' block-wise state."""


@dataclass(frozen=True)
class Part:
    """One entry of a sum."""

    name: str
    bytes: int


@dataclass(frozen=True)
class Phase:
    """One stretch of a run with what is on the device at its fullest moment."""

    name: PhaseName
    parts: tuple[Part, ...]
    peak_bytes: int


@dataclass(frozen=True)
class Estimate:
    """Memory for one setting of `blocks_to_swap`. `peak_bytes` is the most on the device at any moment.

    `fits` compares with `usable_bytes` of the card, None when no card was named; `reason` says why it does not fit and what helps. `text_on_host` is True when
    captions have to be encoded by the CPU because the text encoders alone are too large for the card.
    """

    peak_bytes: int
    host_peak_bytes: int
    phases: tuple[Phase, ...]
    blocks_to_swap: int
    fits: bool | None = None
    reason: str = ""
    text_on_host: bool = False


@dataclass(frozen=True)
class OtherModels:
    """Sizes of the models beside the transformer; Chroma has no CLIP-L."""

    t5: T5Params
    clip: ClipParams | None
    autoencoder: AutoencoderParams


PUBLISHED_T5: Final = T5Params(4096, 10240, 64, 64, 24, 32128, 32)
PUBLISHED_CLIP: Final = ClipParams(768, 3072, 12, 12, 49408, 77)
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


# ------------------------------------------------------------------------------------------------------- block swap


def split_swap(blocks_to_swap: int) -> tuple[int, int]:
    """How many double and single blocks `blocks_to_swap` stands for: 18 -> (9, 18)."""
    num_double = blocks_to_swap // 2
    return num_double, 2 * (blocks_to_swap - num_double)


def max_blocks_to_swap(depth: int, depth_single_blocks: int) -> int:
    """The largest count that a model of this depth has the blocks for: (19, 38) -> 38.

    The reference trainer stops at 35, as it keeps two blocks of each kind resident; the ring needs none.
    """
    count = 0
    while split_swap(count + 1)[0] <= depth and split_swap(count + 1)[1] <= depth_single_blocks:
        count += 1
    return count


# ----------------------------------------------------------------------------------------------------------- counts


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
    c, m = flux.hidden_size, _mlp_size(flux)
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
            sum(rows * columns + rows for name in _in_layers(flux) for columns, rows in _in_shapes(flux, name))
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


def _mlp_size(flux: TransformerParams) -> int:
    return round(flux.hidden_size * flux.mlp_ratio)


def _in_layers(flux: TransformerParams) -> tuple[str, ...]:
    if isinstance(flux, ChromaParams):
        return "img_in", "txt_in"
    return tuple(name for name in IN_LAYERS if name != "guidance_in" or flux.guidance_embed)


def _in_shapes(flux: TransformerParams, name: str) -> tuple[tuple[int, int], ...]:
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


# ------------------------------------------------------------------------------------------------------------- LoRA


def lora_tensor_sizes(flux: TransformerParams, spec: LoraSpec, clip: ClipParams | None) -> Iterator[int]:
    """The number of values in each LoRA matrix, two for each Linear that gets one; `clip` None leaves CLIP-L out."""
    for name, num_in, num_out in _target_linears(flux, spec):
        rank = spec.rank_of(name)
        if rank and spec.kind == "oft":
            if spec.enable_all_linear or "_attn_" in name:
                yield from (size * size // rank for size in fused_parts(name, num_in, num_out))
        elif rank:
            num_parts = len(fused_parts(name, num_in, num_out)) if spec.split_qkv else 1
            yield from (num_parts * rank * num_in, rank * num_out)
    if spec.in_dims is not None:
        for name, rank in zip(IN_LAYERS, spec.in_dims, strict=True):
            if rank and name in _in_layers(flux):
                for num_in, num_out in _in_shapes(flux, name):
                    yield from (rank * num_in, rank * num_out)
    if clip is not None and spec.kind == "lora":
        c, m = clip.hidden_size, clip.intermediate_size
        for num_in, num_out in ([(c, c)] * 4 + [(c, m), (m, c)]) * clip.num_hidden_layers:
            yield from (spec.rank * num_in, spec.rank * num_out)


def _target_linears(flux: TransformerParams, spec: LoraSpec) -> Iterator[tuple[str, int, int]]:
    """Name, inputs and outputs of the block Linears among which the spec selects."""
    c, m = flux.hidden_size, _mlp_size(flux)
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


def optimizer_state_bytes(num_values: int, *, is_8bit: bool, num_moments: float = 2) -> int:
    """Bytes of an optimizer's moments (two for AdamW) for one matrix; 8-bit state has one fp32 scale for 256 values."""
    if is_8bit and num_values >= _MIN_8BIT_VALUES:
        return round(num_moments * (num_values + 4 * math.ceil(num_values / _8BIT_BLOCK)))
    return round(4 * num_moments * num_values)


# ------------------------------------------------------------------------------------------------------ activations


def saved_values_per_token(flux: TransformerParams) -> tuple[float, float]:
    """What autograd keeps of a double and of a single block beside its input, in tensors of C values per token.

    Double, each stream: two normed inputs, qkv (3), query, key and value (3), attention, projection, sum, MLP output, and
    the MLP's inside before and after GELU (2 m). Single: the normed input, linear1 (3 + m), query and key (2), attention,
    linear2's input (1 + m) and output. All Linears are taken to have a LoRA, which keeps their inputs.
    """
    m = _mlp_size(flux) / flux.hidden_size
    return 12 + 2 * m, 9 + 2 * m


def _work_per_token(flux: TransformerParams) -> float:
    """What one block has at most during backward, its saved tensors included, in tensors of C values per token.

    Double: the gradients around GELU join the saved tensors. Single: those of linear2's output and input, the latter twice,
    once from the weight and once from the LoRA.
    """
    m = _mlp_size(flux) / flux.hidden_size
    double, single = saved_values_per_token(flux)
    return max(double + 2 + 2 * m, single + 2 + 2 * (1 + m))


def _forward_per_token(flux: TransformerParams) -> float:
    """What a forward pass without gradients has at most, in tensors of C values per token."""
    m = _mlp_size(flux) / flux.hidden_size
    return max(10 + 2 * m, 8 + 3 * m)


# --------------------------------------------------------------------------------------------------------- estimate


def estimate(
    flux: TransformerParams,
    options: Options,
    *,
    width: int,
    height: int,
    batch_size: int,
    models: OtherModels | None = None,
    blocks_to_swap: int | None = None,
    vram_bytes: int | None = None,
) -> Estimate:
    """The memory that training with `options` needs on pictures of `width` x `height` pixels.

    `models` are the sizes of the encoders, by default the published ones. `blocks_to_swap` replaces that of the options.
    With `vram_bytes`, the card's memory, the estimate also says whether it fits, and cached captions are encoded by the CPU
    where the text encoders are too large for the card.

    Raises `UserError` (exit code 2) for more blocks than the model has and for wrong network options.
    """
    swap = (options.blocks_to_swap or 0) if blocks_to_swap is None else blocks_to_swap
    limit = max_blocks_to_swap(flux.depth, flux.depth_single_blocks)
    if not 0 <= swap <= limit:
        raise UserError(
            f"blocks_to_swap is {swap}; this model allows 0 to {limit}",
            "--blocks_to_swap",
            field="blocks_to_swap",
            exit_code=2,
        )
    sums = _Sums(flux, options, models or usual_models(flux), width, height, batch_size, swap)
    phases = [sums.text_phase(), sums.latents_phase(), sums.training_phase()]
    if sums.makes_samples:
        phases.append(sums.sampling_phase())
    text_on_host = vram_bytes is not None and sums.caches_text and not _text_fits(phases[0], vram_bytes)
    host_bytes = HOST_PROCESS_BYTES + sums.swapped_bytes
    if sums.is_cpu:
        host_bytes += max(phase.peak_bytes for phase in phases)
    elif text_on_host:
        on_host = sum(part.bytes for part in phases[0].parts if part != sums.context)
        host_bytes = max(host_bytes, HOST_PROCESS_BYTES + on_host)
        phases[0] = _phase("text encoders", [sums.context])
    peak = max(phase.peak_bytes for phase in phases)
    result = Estimate(peak, host_bytes, tuple(phases), swap, text_on_host=text_on_host)
    if vram_bytes is None:
        return result
    fits = result.peak_bytes <= usable_bytes(vram_bytes)
    return dataclasses.replace(result, fits=fits, reason="" if fits else _why_not(result, options, vram_bytes))


def text_encoders_fit(
    flux: TransformerParams, options: Options, *, vram_bytes: int, batch_size: int, models: OtherModels | None = None
) -> bool:
    """Whether captions that are cached can be encoded on a card of `vram_bytes`.

    Where not, the trainer encodes them on the CPU, and `estimate` counts them there.
    """
    sums = _Sums(flux, options, models or usual_models(flux), 0, 0, batch_size, 0)
    return _text_fits(sums.text_phase(), vram_bytes)


def pick_blocks_to_swap(
    flux: TransformerParams,
    options: Options,
    *,
    width: int,
    height: int,
    batch_size: int,
    vram_bytes: int,
    models: OtherModels | None = None,
) -> Estimate:
    """The estimate with the smallest `blocks_to_swap` that fits a card of `vram_bytes`, a small reserve left.

    When none fits, that of the largest count, with `fits` False and the reason.
    """
    largest = max_blocks_to_swap(flux.depth, flux.depth_single_blocks)
    result: Estimate | None = None
    for count in range(largest + 1):
        result = estimate(
            flux,
            options,
            width=width,
            height=height,
            batch_size=batch_size,
            models=models,
            blocks_to_swap=count,
            vram_bytes=vram_bytes,
        )
        if result.fits:
            break
    assert result is not None
    return result


def _phase(name: PhaseName, parts: list[Part]) -> Phase:
    return Phase(name, tuple(parts), sum(part.bytes for part in parts))


def _text_fits(text_phase: Phase, vram_bytes: int) -> bool:
    return text_phase.peak_bytes <= usable_bytes(vram_bytes)


def usable_bytes(vram_bytes: int) -> int:
    """What of a card's memory a run may take. This alone decides what fits, for every caller."""
    return round(vram_bytes * (1 - RESERVE_SHARE))


def _why_not(result: Estimate, options: Options, vram_bytes: int) -> str:
    worst = max(result.phases, key=lambda phase: phase.peak_bytes)
    text = (
        f"With blocks_to_swap {result.blocks_to_swap}, {worst.name} needs {worst.peak_bytes / GIB:.1f} GiB, "
        f"and a card of {vram_bytes / GIB:.1f} GiB leaves {usable_bytes(vram_bytes) / GIB:.1f} GiB."
    )
    remedies: list[str] = []
    if options.mixed_precision == "no":
        remedies.append("set mixed_precision to bf16")
    if not _caches_text(options):
        remedies.append("turn on cache_text_encoder_outputs")
    if not _caches_latents(options):
        remedies.append("turn on cache_latents")
    if worst.name in ("training", "latents") and not options.gradient_checkpointing:
        remedies.append("turn on gradient_checkpointing")
    remedies.append("lower the resolution or the batch size")
    joined = ", ".join(remedies)
    return f"{text} {joined[0].upper()}{joined[1:]}."


def _caches_text(options: Options) -> bool:
    return options.cache_text_encoder_outputs or options.cache_text_encoder_outputs_to_disk


def _caches_latents(options: Options) -> bool:
    return options.cache_latents or options.cache_latents_to_disk


class _Sums:
    """The parts of every phase, for one set of sizes and options."""

    def __init__(
        self,
        flux: TransformerParams,
        options: Options,
        models: OtherModels,
        width: int,
        height: int,
        batch_size: int,
        blocks_to_swap: int,
    ) -> None:
        self.flux, self.options, self.models = flux, options, models
        self.pixels, self.batch = width * height, batch_size
        self.num_double, self.num_single = split_swap(blocks_to_swap)
        self.counts = flux_counts(flux)
        self.value_bytes = 4 if options.mixed_precision == "no" else 2
        self.num_text = options.t5xxl_max_token_length or (256 if flux.is_schnell else 512)
        self.num_image = (width // 16) * (height // 16)
        self.caches_text = _caches_text(options)
        self.caches_latents = _caches_latents(options)
        self.trains_clip = models.clip is not None and not options.network_train_unet_only
        self.is_cpu = options.device == "cpu"
        self.makes_samples = options.sample_prompts is not None and bool(
            options.sample_every_n_steps or options.sample_every_n_epochs or options.sample_at_first
        )

    # ---- phases ----

    def text_phase(self) -> Phase:
        batch = (self.options.text_encoder_batch_size or self.batch) if self.caches_text else self.batch
        work = self._part("text encoder activations", self._t5_work(batch))
        if not self.caches_text:
            return self._phase("text encoders", self._resident(with_gradients=True), work)
        weights = [self._t5_weights(), *self._clip_weights()]
        return self._phase("text encoders", weights, work)

    def latents_phase(self) -> Phase:
        batch = self.options.vae_batch_size if self.caches_latents else self.batch
        work = self._part("autoencoder activations", self._encode_work(batch))
        if not self.caches_latents:
            return self._phase("latents", self._resident(with_gradients=True), work)
        return self._phase("latents", [self._autoencoder_weights()], work)

    def training_phase(self) -> Phase:
        flux, tokens = self.flux, self.batch * (self.num_image + self.num_text)
        c = flux.hidden_size
        per_token = tokens * c * self.value_bytes
        saved_double, saved_single = saved_values_per_token(flux)
        one_block = _work_per_token(flux)
        if self.options.gradient_checkpointing:
            saved = Part("saved block inputs", (flux.depth + flux.depth_single_blocks) * per_token)
        else:
            values = flux.depth * (1 + saved_double) + flux.depth_single_blocks * (1 + saved_single)
            saved = self._part("saved activations", values * per_token)
            one_block -= min(saved_double, saved_single)
        # Flash attention's backward sums the query's gradient in fp32, and keeps two numbers a head and token.
        attention = tokens * (4 * c + 2 * 4 * flux.num_heads)
        # Latents, noise, target, output and gradients in fp32; the text; the rotation table.
        latents = 6 * 4 * self.batch * self.num_image * flux.in_channels
        text = self.batch * self.num_text * flux.context_in_dim * self.value_bytes
        rotation = 8 * tokens * c // flux.num_heads // 2
        return self._phase(
            "training",
            self._resident(with_gradients=True),
            saved,
            self._part("one block's activations and gradients", one_block * per_token),
            Part("attention workspace", attention),
            Part("latents, noise, text and loss", latents + text + rotation),
            *([Part("CLIP-L activations", self._clip_work())] if self.trains_clip else []),
        )

    def sampling_phase(self) -> Phase:
        tokens = self.num_image + self.num_text
        forward = _forward_per_token(self.flux) * tokens * self.flux.hidden_size * self.value_bytes
        work = max(forward, self._decode_work())
        resident = self._resident(with_gradients=False)
        if self.caches_latents:  # waits in host memory between samples
            resident.append(self._autoencoder_weights())
        return self._phase("sampling", resident, self._part("activations of sampling and decoding", work))

    def _phase(self, name: PhaseName, weights: list[Part], *work: Part) -> Phase:
        passing = sum(part.bytes for part in work)
        parts = [*weights, *work, self._part("allocator rounding", ALLOCATOR_SHARE * passing)]
        if not self.is_cpu:
            parts.append(self.context)
        return _phase(name, parts)

    # ---- what stays ----

    def _resident(self, *, with_gradients: bool) -> list[Part]:
        """What is on the device all through training."""
        parts = [
            Part(
                "Chroma weights" if isinstance(self.flux, ChromaParams) else "FLUX.1 weights",
                self.counts.total * self.value_bytes - self.swapped_bytes,
            ),
            Part("slots for swapped blocks", self._slot_bytes()),
            *self._lora_parts(with_gradients=with_gradients),
        ]
        if not self.caches_text:
            parts.append(self._t5_weights())
        if not self.caches_text or self.trains_clip:
            parts += self._clip_weights()
        if not self.caches_latents:
            parts.append(self._autoencoder_weights())
        return [part for part in parts if part.bytes]

    @property
    def context(self) -> Part:
        return Part("CUDA context", 0 if self.is_cpu else CUDA_CONTEXT_BYTES)

    @property
    def swapped_bytes(self) -> int:
        """Linear weights that live in host memory."""
        counts = self.counts
        return self.value_bytes * (self.num_double * counts.double_linear + self.num_single * counts.single_linear)

    def _slot_bytes(self) -> int:
        swapped = [self.counts.double_linear] * self.num_double + [self.counts.single_linear] * self.num_single
        return min(NUM_SLOTS, len(swapped)) * max(swapped, default=0) * self.value_bytes

    def _lora_parts(self, *, with_gradients: bool) -> list[Part]:
        options = self.options
        spec = spec_from_network_args(
            options.network_args or (),
            network_dim=options.network_dim,
            network_alpha=options.network_alpha,
            network_dropout=options.network_dropout,
            network_module=options.network_module,
        )
        sizes = list(lora_tensor_sizes(self.flux, spec, self.models.clip if self.trains_clip else None))
        total = sum(sizes)
        num_moments, is_8bit = moments_of(wanted_optimizer(options))
        # fp32 master weights, and under autocast their copies in the type of the products.
        weight_bytes = 4 if self.value_bytes == 4 else 4 + self.value_bytes
        return [
            Part("LoRA weights", total * weight_bytes),
            Part("LoRA gradients", 4 * total if with_gradients else 0),
            Part(
                "optimizer state",
                sum(optimizer_state_bytes(size, is_8bit=is_8bit, num_moments=num_moments) for size in sizes),
            ),
        ]

    def _t5_weights(self) -> Part:
        return Part("T5-XXL weights", t5_count(self.models.t5) * self.value_bytes)

    def _clip_weights(self) -> list[Part]:
        clip = self.models.clip
        return [] if clip is None else [Part("CLIP-L weights", clip_count(clip) * self.value_bytes)]

    def _autoencoder_weights(self) -> Part:
        return Part("autoencoder weights", autoencoder_count(self.models.autoencoder) * self.value_bytes)

    # ---- what comes and goes ----

    def _t5_work(self, batch: int) -> int:
        """Attention scores in both types and the position bias, or the gated MLP, whichever is larger."""
        t5, length, size = self.models.t5, self.num_text, self.value_bytes
        scores = batch * t5.num_heads * length * length * (2 * size + 4) + t5.num_heads * length * length * size
        scores += 4 * batch * length * t5.num_heads * t5.d_kv * size
        mlp = 3 * batch * length * t5.d_ff * size
        return max(scores, mlp) + 3 * batch * length * t5.d_model * size

    def _clip_work(self) -> int:
        """What a CLIP-L that trains keeps for backward: about 14 tensors of C and 3 of M a layer and token, and scores."""
        clip, tokens = self.models.clip, self.batch * _CLIP_TOKENS
        if clip is None:
            return 0
        values = tokens * (14 * clip.hidden_size + 3 * clip.intermediate_size)
        scores = 2 * clip.num_attention_heads * tokens * _CLIP_TOKENS
        return clip.num_hidden_layers * (values + scores) * self.value_bytes

    def _encode_work(self, batch: int) -> int:
        """Five tensors at full size and width in the first level, and a convolution's copies of its input and output."""
        return 7 * batch * self.pixels * self.models.autoencoder.ch * self.value_bytes

    def _decode_work(self) -> int:
        """As above in the last level, where the first block still has the second level's width."""
        autoencoder = self.models.autoencoder
        first, second = (autoencoder.ch * factor for factor in (*autoencoder.ch_mult, autoencoder.ch_mult[-1])[:2])
        return (max(3 * second, second + 4 * first) + 2 * second) * self.pixels * self.value_bytes

    def _part(self, name: str, num_bytes: float) -> Part:
        return Part(name, round(num_bytes))
