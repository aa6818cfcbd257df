"""What is on the device in each phase of a run, part by part; see `memory`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Literal, get_args

from trainer.schema.activation_counts import (
    dora_values_per_token,
    dora_work_per_token,
    forward_per_token,
    fp16_values_per_token,
    last_saved_bytes,
    saved_values_per_token,
    small_saved_bytes,
    t5_values_per_token,
    work_per_token,
)
from trainer.schema.chroma_header import ChromaParams, TransformerParams
from trainer.schema.optimizers import moments_of, wanted_optimizer
from trainer.schema.parameter_counts import (
    OtherModels,
    autoencoder_count,
    clip_count,
    flux_counts,
    t5_count,
    t5_layer_linear,
)
from trainer.schema.storage import Storage, block_bytes, modulation_bytes, saved_bytes, scratch_bytes, stored_as
from trainer.schema.swap_counts import slab_bytes, split_swap
from trainer.schema.trained_counts import Trained, optimizer_state_bytes

if TYPE_CHECKING:
    from trainer.schema.options import Options

PhaseName = Literal["text encoders", "latents", "training", "sampling"]
Kind = Literal["weights", "lora", "optimizer", "gradients", "activations", "workspace"]
"""What a part is for: frozen weights, the network's own, its optimizer's state and its gradients, what is computed, and
what the computation needs beside it."""
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)

GIB: Final = 2**30
NUM_SLOTS: Final = 2
"""Blocks whose Linear weights are on the device at once while swapping."""
NUM_MODULATION_PLACES: Final = 3
"""Modulation weights on the device at once, where they are kept off it."""
CUDA_CONTEXT_BYTES: Final = round(0.6 * GIB)
"""CUDA context, kernels and cuBLAS workspace of one process. Unmeasured; 0.3 to 0.6 GiB is usual."""
ALLOCATOR_SHARE: Final = 0.05
"""What rounding and fragmentation add to tensors that come and go. Unmeasured."""
STREAMED_BATCH: Final = 4
"""Captions that are encoded at once while T5's layers come to the device in turn, unless a number is given: every batch
brings all of them."""
STRIP_VALUES: Final = 1 << 24
"""The autoencoder computes larger tensors than this in strips of rows, each of about so many values."""
_STRIP_BYTES: Final = 24
"""What comes and goes for each value of a strip: it in float32 twice, as a convolution's input and output, and its copies."""

_CLIP_TOKENS: Final = 77


def gib_text(num_bytes: int) -> str:
    """In GiB, in which cards are sold, or for a little in MiB: `11.1 GiB`, `250 MiB`."""
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB / 4 else f"{num_bytes / 2**20:.0f} MiB"


@dataclass(frozen=True)
class Part:
    """One entry of a sum."""

    name: str
    bytes: int
    kind: Kind = "workspace"


@dataclass(frozen=True)
class Phase:
    """One stretch of a run with what is on the device at its fullest moment."""

    name: PhaseName
    parts: tuple[Part, ...]
    peak_bytes: int

    def split(self) -> dict[Kind, int]:
        """The peak by kind, in the order of `KINDS`; every kind is there."""
        return {kind: sum(part.bytes for part in self.parts if part.kind == kind) for kind in KINDS}


def power_of_two(num_bytes: int) -> int:
    """What torch's page-locked memory takes for so many bytes."""
    return 1 << max(num_bytes - 1, 0).bit_length()


def make_phase(name: PhaseName, parts: list[Part]) -> Phase:
    """The phase with these parts, whose peak is their sum."""
    return Phase(name, tuple(parts), sum(part.bytes for part in parts))


def caches_text(options: Options) -> bool:
    """Whether captions are encoded before the training."""
    return options.cache_text_encoder_outputs or options.cache_text_encoder_outputs_to_disk


def caches_latents(options: Options) -> bool:
    """Whether pictures are encoded before the training."""
    return options.cache_latents or options.cache_latents_to_disk


def text_length(flux: TransformerParams, options: Options) -> int:
    """T5 tokens of each caption, padding included."""
    return options.t5xxl_max_token_length or (256 if flux.is_schnell else 512)


def text_batch_size(options: Options, *, is_streamed: bool = False) -> int:
    """Captions that are encoded at once beforehand."""
    return options.text_encoder_batch_size or max(options.train_batch_size, STREAMED_BATCH if is_streamed else 1)


def modulates_outside(flux: TransformerParams, options: Options) -> bool:
    """Whether the modulation weights are kept off the device; Chroma's blocks have none."""
    return options.offload_modulation is not None and not isinstance(flux, ChromaParams)


def may_map_modulation(flux: TransformerParams, options: Options) -> bool:
    """Whether the modulation weights can be used as they lie in the file: the published one is bf16, and others fp8."""
    return options.mixed_precision == "bf16" and not flux.fp8_modulation


def num_checkpointed(flux: TransformerParams, options: Options) -> int:
    """How many blocks compute their activations twice."""
    if not options.gradient_checkpointing:
        return 0
    num_blocks = flux.depth + flux.depth_single_blocks
    return num_blocks if options.checkpoint_blocks is None else min(options.checkpoint_blocks, num_blocks)


class Sums:
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
        trained: Trained,
        factor: float = 1.0,
    ) -> None:
        """`factor` is what this device was measured to need of what comes and goes in training, as part of the estimate."""
        self.flux, self.options, self.models, self.trained = flux, options, models, trained
        self.factor = factor
        self.pixels, self.batch = width * height, batch_size
        self.num_double, self.num_single = split_swap(blocks_to_swap)
        self.counts = flux_counts(flux)
        self.storage: Storage = stored_as(options, flux)
        self.modulates_outside = modulates_outside(flux, options)
        self.value_bytes = 4 if options.mixed_precision == "no" else 2
        # In fp16 the streams between the blocks are kept in fp32, and the autoencoder stays out of half precision.
        self.stream_bytes = 2 if options.mixed_precision == "bf16" else 4
        self.autoencoder_bytes = 4 if options.no_half_vae or options.mixed_precision != "bf16" else 2
        self.text_bytes = self.value_bytes
        self.num_text = text_length(flux, options)
        self.num_image = (width // 16) * (height // 16)
        self.caches_text = caches_text(options)
        self.caches_latents = caches_latents(options)
        self.trains_clip = models.clip is not None and not options.network_train_unet_only
        self.trains_t5 = trained.spec.train_t5xxl and not options.network_train_unet_only
        self.is_cpu = options.device == "cpu"
        self.makes_samples = options.sample_prompts is not None and bool(
            options.sample_every_n_steps or options.sample_every_n_epochs or options.sample_at_first
        )

    # ---- phases ----

    def text_phase(self, *, is_streamed: bool = False) -> Phase:
        """With `is_streamed` T5's layers lie in main memory and come to the device in turn: see `t5_slabs`."""
        batch = text_batch_size(self.options, is_streamed=is_streamed) if self.caches_text else self.batch
        work = _part("text encoder activations", self._t5_work(batch))
        if not self.caches_text:
            return self._phase("text encoders", self._resident(with_gradients=True), work)
        t5 = [self._t5_weights()]
        if is_streamed:
            layer = t5_layer_linear(self.models.t5) * self.text_bytes
            stays = t5[0].bytes - self.t5_slabs.bytes
            t5 = [Part("T5-XXL weights", stays, "weights"), Part("slots for layers", NUM_SLOTS * layer, "weights")]
        return self._phase("text encoders", [*t5, *self._clip_weights()], work)

    @property
    def t5_slabs(self) -> Part:
        """What of T5 lies in main memory while its layers come to the device in turn."""
        t5 = self.models.t5
        return Part("T5-XXL layers", t5.num_layers * t5_layer_linear(t5) * self.text_bytes, "weights")

    def latents_phase(self) -> Phase:
        batch = self.options.vae_batch_size if self.caches_latents else self.batch
        work = _part("autoencoder activations", self._encode_work(batch))
        if not self.caches_latents:
            return self._phase("latents", self._resident(with_gradients=True), work)
        return self._phase("latents", [self.autoencoder_weights()], work)

    def training_phase(self) -> Phase:
        flux, tokens = self.flux, self.batch * (self.num_image + self.num_text)
        c = flux.hidden_size
        per_token = tokens * c * self.value_bytes
        stream = self.stream_bytes / self.value_bytes
        saved_double, saved_single = saved_values_per_token(flux)
        one_block = work_per_token(flux)
        spec = self.trained.spec
        if spec.dora:
            more_double, more_single = dora_values_per_token(flux, spec.dora_axis)
            saved_double, saved_single = saved_double + more_double, saved_single + more_single
            one_block += max(more_double, more_single)
            one_block += 4 / self.value_bytes * dora_work_per_token(flux, spec.dora_axis)
        # Of what a double block keeps, its sum and the MLP's output are of the streams' type, of a single one the output;
        # and the gradients of two such tensors are there at once.
        saved_double, saved_single = saved_double + 2 * (stream - 1), saved_single + stream - 1
        one_block += 4 * (stream - 1)
        if self.options.mixed_precision == "fp16":
            more_double, more_single = fp16_values_per_token(flux)
            saved_double, saved_single = saved_double + more_double, saved_single + more_single
            one_block += max(more_double, more_single)
        num_blocks, num_twice = flux.depth + flux.depth_single_blocks, num_checkpointed(flux, self.options)
        passing = self.trained.passing
        # Beside every block's input the last layer keeps what the last block gives.
        last = stream * per_token + last_saved_bytes(flux, self.batch * self.num_image, self.batch, self.stream_bytes)
        # In fp16 its normed input is there in fp32 as well.
        last += 2 * (self.stream_bytes - self.value_bytes) * self.batch * self.num_image * c
        small_double, small_single = small_saved_bytes(flux, tokens, self.batch, self.stream_bytes)
        inputs = num_twice * stream * per_token
        if self.offloads_inputs:
            # Those on their way: two to main memory, and two that take turns in backward.
            inputs = min(inputs, 4 * stream * per_token)
        if self.modulates_outside:
            inputs += self._modulation_vectors(num_twice)
        if num_twice == num_blocks:
            saved = _part("saved block inputs", inputs + last)
        else:
            # The first blocks are checkpointed, and the last are gone when backward comes to these.
            num_double = max(flux.depth - num_twice, 0)
            num_single = min(num_blocks - num_twice, flux.depth_single_blocks)
            values = num_double * (stream + saved_double) + num_single * (stream + saved_single)
            thin = self.trained.inner_bytes(
                self.batch,
                self.num_image,
                self.num_text,
                self.value_bytes,
                double_share=num_double / max(flux.depth, 1),
                single_share=num_single / max(flux.depth_single_blocks, 1),
            )
            small = num_double * small_double + num_single * small_single + thin
            saved = _part("saved activations", inputs + values * per_token + small + last)
            one_block -= min(saved_double, saved_single)
            passing = self.trained.passing_all
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
            _part("one block's activations and gradients", one_block * per_token),
            Part("attention workspace", attention),
            *self._scratch(),
            *self._modulation_places(),
            Part("latents, noise, text and loss", latents + text + rotation, "activations"),
            *([Part("CLIP-L activations", self._clip_work(), "activations")] if self.trains_clip else []),
            *([Part("T5-XXL activations", self._t5_training_work(), "activations")] if self.trains_t5 else []),
            *([Part("factors of the principal part", 4 * passing)] if passing else []),
        )

    def sampling_phase(self) -> Phase:
        tokens = self.num_image + self.num_text
        forward = forward_per_token(self.flux) * tokens * self.flux.hidden_size * self.value_bytes
        work = max(forward, self._decode_work())
        resident = self._resident(with_gradients=False)
        if self.caches_latents:  # waits in host memory between samples
            resident.append(self.autoencoder_weights())
        return self._phase(
            "sampling",
            resident,
            _part("activations of sampling and decoding", work),
            *self._scratch(),
            *self._modulation_places(),
        )

    def _phase(self, name: PhaseName, weights: list[Part], *work: Part) -> Phase:
        if name == "training" and not self.is_cpu:
            work = tuple(replace(part, bytes=round(self.factor * part.bytes)) for part in work)
        passing = sum(part.bytes for part in work)
        parts = [*weights, *work, _part("allocator rounding", ALLOCATOR_SHARE * passing, "workspace")]
        if not self.is_cpu:
            parts.append(self.context)
        return make_phase(name, parts)

    # ---- what stays ----

    def _resident(self, *, with_gradients: bool) -> list[Part]:
        """What is on the device all through training."""
        flux = self.flux
        parts = [
            Part(
                "Chroma weights" if isinstance(flux, ChromaParams) else "FLUX.1 weights",
                self.counts.total * self.value_bytes
                - saved_bytes(flux, self.storage, self.value_bytes, with_modulation=not self.modulates_outside)
                - self.swapped_bytes
                - (modulation_bytes(flux, self.value_bytes)[0] if self.modulates_outside else 0),
                "weights",
            ),
            Part("slots for swapped blocks", self._slot_bytes(), "weights"),
            *self._lora_parts(with_gradients=with_gradients),
        ]
        if not self.caches_text:
            parts.append(self._t5_weights())
        if not self.caches_text or self.trains_clip:
            parts += self._clip_weights()
        if not self.caches_latents:
            parts.append(self.autoencoder_weights())
        return [part for part in parts if part.bytes]

    @property
    def context(self) -> Part:
        return Part("CUDA context", 0 if self.is_cpu else CUDA_CONTEXT_BYTES)

    @property
    def swapped_bytes(self) -> int:
        """Linear weights, with their scales, that live in host memory."""
        double, single = block_bytes(
            self.flux, self.storage, self.value_bytes, with_modulation=not self.modulates_outside
        )
        return self.num_double * double + self.num_single * single

    @property
    def slab_bytes(self) -> int:
        """What these weights take in host memory, each at its place in its block's slab."""
        double, single = self._slabs()
        return self.num_double * double + self.num_single * single

    def _slabs(self) -> tuple[int, int]:
        return slab_bytes(self.flux, self.storage, self.value_bytes, with_modulation=not self.modulates_outside)

    def host_modulation(self) -> list[Part]:
        """What of the modulation weights is in main memory; the page-locked part through which they pass."""
        if not self.modulates_outside:
            return []
        every, largest = modulation_bytes(self.flux, self.value_bytes)
        is_mapped = self.options.offload_modulation == "file" and may_map_modulation(self.flux, self.options)
        passing = 0 if self.is_cpu else 2 * power_of_two(largest)
        return [Part("modulation weights", (0 if is_mapped else every) + passing, "weights")]

    def host_inputs(self) -> list[Part]:
        """The inputs of checkpointed blocks that wait in main memory; page-locked memory comes in powers of two."""
        if not self.offloads_inputs:
            return []
        num_twice, one = (
            num_checkpointed(self.flux, self.options),
            self.batch * self.flux.hidden_size * self.stream_bytes,
        )
        num_double = min(num_twice, self.flux.depth)
        double = power_of_two(one * self.num_image) + power_of_two(one * self.num_text)
        single = power_of_two(one * (self.num_image + self.num_text))
        return [Part("saved block inputs", num_double * double + (num_twice - num_double) * single, "activations")]

    @property
    def offloads_inputs(self) -> bool:
        return self.options.cpu_offload_checkpointing and self.options.gradient_checkpointing and not self.is_cpu

    def _modulation_vectors(self, num_twice: int) -> int:
        """What is kept of modulations that are computed outside of checkpointed blocks: vectors and the LoRAs' insides."""
        num_double = min(num_twice, self.flux.depth)
        vectors = 14 * num_double + 4 * (num_twice - num_double)
        is_all = num_twice == self.flux.depth + self.flux.depth_single_blocks
        insides = self.trained.inner[3] if is_all else 0
        return self.batch * (vectors * self.flux.hidden_size + insides) * self.value_bytes

    def _modulation_places(self) -> list[Part]:
        """Where modulation weights that are off the device are during their product."""
        if not self.modulates_outside:
            return []
        count = 1 if self.is_cpu else NUM_MODULATION_PLACES
        return [Part("places for modulation weights", count * modulation_bytes(self.flux, self.value_bytes)[1])]

    def cached_bytes(self, num_pictures: int) -> int:
        """Latents and texts of that many pictures that are kept in host memory; those on the disk are read as needed."""
        options, total = self.options, 0
        if self.caches_latents and not options.cache_latents_to_disk:
            total += 4 * self.num_image * self.flux.in_channels
        if self.caches_text and not options.cache_text_encoder_outputs_to_disk:
            total += self.value_bytes * self.num_text * self.flux.context_in_dim
        return num_pictures * total

    def _slot_bytes(self) -> int:
        """Blocks take turns in the slots, and each slot is as large as the largest block that ever uses it."""
        double, single = self._slabs()
        swapped = [double] * self.num_double + [single] * self.num_single
        return sum(max(swapped[slot::NUM_SLOTS], default=0) for slot in range(NUM_SLOTS))

    def _lora_parts(self, *, with_gradients: bool) -> list[Part]:
        options, sizes, total = self.options, self.trained.sizes, self.trained.total
        num_moments, is_8bit = moments_of(wanted_optimizer(options))
        # fp32 master weights (16 bit in a full run); a plain LoRA casts those of one layer for the moment, others have copies under autocast.
        spec = self.trained.spec
        is_plain = spec.kind == "lora" and not spec.dora and not spec.pissa
        own_bytes = 2 if options.full_bf16 or options.full_fp16 else 4
        weight_bytes = own_bytes if self.value_bytes == own_bytes or is_plain else own_bytes + self.value_bytes
        return [
            Part("LoRA weights", total * weight_bytes + 4 * self.trained.frozen, "lora"),
            Part("LoRA gradients", own_bytes * total if with_gradients else 0, "gradients"),
            Part(
                "optimizer state",
                sum(
                    optimizer_state_bytes(size, is_8bit=is_8bit, num_moments=num_moments, value_bytes=own_bytes)
                    for size in sizes
                ),
                "optimizer",
            ),
        ]

    def _scratch(self) -> list[Part]:
        """Where a weight that is stored in fewer bits is made dense for its product."""
        scratch = scratch_bytes(self.flux, self.storage, self.value_bytes)
        return [Part("scratch for stored weights", scratch)] if scratch else []

    def _t5_weights(self) -> Part:
        return Part("T5-XXL weights", t5_count(self.models.t5) * self.value_bytes, "weights")

    def _clip_weights(self) -> list[Part]:
        clip = self.models.clip
        return [] if clip is None else [Part("CLIP-L weights", clip_count(clip) * self.value_bytes, "weights")]

    def autoencoder_weights(self) -> Part:
        return Part(
            "autoencoder weights", autoencoder_count(self.models.autoencoder) * self.autoencoder_bytes, "weights"
        )

    # ---- what comes and goes ----

    def _t5_work(self, batch: int) -> int:
        """Attention scores in both types and the position bias, or the gated MLP, whichever is larger."""
        t5, length, size = self.models.t5, self.num_text, self.value_bytes
        scores = batch * t5.num_heads * length * length * (2 * size + 4) + t5.num_heads * length * length * size
        scores += 4 * batch * length * t5.num_heads * t5.d_kv * size
        mlp = 3 * batch * length * t5.d_ff * size
        return max(scores, mlp) + 3 * batch * length * t5.d_model * size

    def _t5_training_work(self) -> int:
        """What a T5 that trains keeps for backward: every layer's input, and with checkpointing one layer's inside."""
        t5, tokens = self.models.t5, self.batch * self.num_text
        inside = t5_values_per_token(t5, self.num_text)
        num_inside = 1 if self.options.gradient_checkpointing else t5.num_layers
        # The gradients inside one layer are as many again.
        return tokens * (t5.num_layers * t5.d_model + (num_inside + 1) * inside) * self.value_bytes

    def _clip_work(self) -> int:
        """What a CLIP-L that trains keeps for backward: about 14 tensors of C and 3 of M a layer and token, and scores."""
        clip, tokens = self.models.clip, self.batch * _CLIP_TOKENS
        if clip is None:
            return 0
        values = tokens * (14 * clip.hidden_size + 3 * clip.intermediate_size)
        scores = 2 * clip.num_attention_heads * tokens * _CLIP_TOKENS
        return clip.num_hidden_layers * (values + scores) * self.value_bytes

    def _encode_work(self, batch: int) -> int:
        """In strips: input, inside and output of a block of the first level. Smaller pictures at once: five tensors of this
        size and a convolution's copies of its input and output."""
        unit = batch * self.pixels * self.models.autoencoder.ch * self.autoencoder_bytes
        return min(7 * unit, 3 * unit + _STRIP_BYTES * STRIP_VALUES)

    def _decode_work(self) -> int:
        """As above in the last level, where the first block's input still has the second level's width."""
        autoencoder = self.models.autoencoder
        first, second = (autoencoder.ch * factor for factor in (*autoencoder.ch_mult, autoencoder.ch_mult[-1])[:2])
        unit = self.pixels * self.autoencoder_bytes
        whole = (max(3 * second, second + 4 * first) + 2 * second) * unit
        return min(whole, max(second + 2 * first, 3 * first) * unit + _STRIP_BYTES * STRIP_VALUES)


def _part(name: str, num_bytes: float, kind: Kind = "activations") -> Part:
    return Part(name, round(num_bytes), kind)
