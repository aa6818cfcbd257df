"""How much memory a run will need, and the smallest `blocks_to_swap` that fits a card. Pure arithmetic on sizes.

The peak is the highest of four phases, each a sum of parts. Parameter counts are exact. Activations follow from what the
blocks of `trainer.model` keep for backward, counted in tensors of the hidden size C per token. The rest, the CUDA context,
convolution workspace and the allocator's rounding, are constants of a model: **none of the CUDA figures has been measured
on a GPU**. They are meant to be a little too high rather than too low, and `calibration` corrects them on a user's card.
Weights, LoRA, gradients, optimizer state and what autograd keeps agree with counted bytes to less than a per cent.

Block swap: `blocks_to_swap` = n stands for n // 2 double and 2 * (n - n // 2) single blocks (the rule of sd-scripts'
`blocks_to_swap`). The Linear weights of swapped blocks live in host memory and pass through a ring of two slots on the
device; biases, norms and the LoRA stay on the device. The ring costs as much as the two blocks it holds, so a count of 1
saves nothing.

B batch, N image tokens, L text tokens, C hidden size, M hidden size of the MLP, m = M / C.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from trainer.schema.base import UserError
from trainer.schema.chroma_header import TransformerParams
from trainer.schema.memory_phases import GIB, Part, Phase, Sums, caches_latents, caches_text, make_phase
from trainer.schema.parameter_counts import OtherModels, usual_models
from trainer.schema.swap_counts import chosen_swap, max_blocks_to_swap
from trainer.schema.trained_counts import trained_by

if TYPE_CHECKING:
    from trainer.schema.options import Options

RESERVE_SHARE: Final = 0.04
"""Share of a card's memory that is left to the desktop and other programs."""
HOST_PROCESS_BYTES: Final = 2 * GIB
"""Python, torch and its libraries in host memory."""
ASSUMED_PICTURES: Final = 50
"""Pictures whose latents and texts wait in host memory, where nobody has counted them."""


@dataclass(frozen=True)
class Estimate:
    """Memory for one setting of `blocks_to_swap`. `peak_bytes` is the most on the device at any moment.

    `fits` compares with `usable_bytes` of the card, None when no card was named; `reason` says why it does not fit and
    what helps. Where the text encoders alone are too large for the card, `text_streamed` is True when T5's layers come to it
    in turn, and `text_on_host` when even so captions have to be encoded by the CPU.
    """

    peak_bytes: int
    host_peak_bytes: int
    phases: tuple[Phase, ...]
    blocks_to_swap: int
    fits: bool | None = None
    reason: str = ""
    text_on_host: bool = False
    text_streamed: bool = False
    host_parts: tuple[Part, ...] = ()
    """What `host_peak_bytes` is made of."""


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
    num_pictures: int = ASSUMED_PICTURES,
    factor: float = 1.0,
) -> Estimate:
    """The memory that training with `options` needs on pictures of `width` x `height` pixels.

    `models` are the sizes of the encoders, by default the published ones. `blocks_to_swap` replaces that of the options.
    With `vram_bytes`, the card's memory, the estimate also says whether it fits, and cached captions are encoded by the CPU
    where the text encoders are too large for the card. `factor` is that of `calibration`.

    Raises `UserError` (exit code 2) for more blocks than the model has and for wrong network options.
    """
    swap = chosen_swap(options.blocks_to_swap) if blocks_to_swap is None else blocks_to_swap
    limit = max_blocks_to_swap(flux.depth, flux.depth_single_blocks)
    if not 0 <= swap <= limit:
        raise UserError(
            f"blocks_to_swap is {swap}; this model allows 0 to {limit}",
            "--blocks_to_swap",
            field="blocks_to_swap",
            exit_code=2,
        )
    models = models or usual_models(flux)
    return _estimate(
        options,
        Sums(flux, options, models, width, height, batch_size, swap, trained_by(flux, options, models), factor),
        swap,
        vram_bytes,
        num_pictures,
    )


def _estimate(
    options: Options, sums: Sums, swap: int, vram_bytes: int | None, num_pictures: int = ASSUMED_PICTURES
) -> Estimate:
    phases = [sums.text_phase(), sums.latents_phase(), sums.training_phase()]
    if sums.makes_samples:
        phases.append(sums.sampling_phase())
    place = "device" if vram_bytes is None else _text_place(sums, vram_bytes)
    # While texts are encoded nothing is swapped yet, and when blocks are swapped the text encoders are gone.
    host = [Part("swapped blocks", sums.slab_bytes, "weights"), *sums.host_modulation(), *sums.host_inputs()]
    if sums.is_cpu:
        host += max(phases, key=lambda phase: phase.peak_bytes).parts
    elif sums.makes_samples and sums.caches_latents:
        host.append(sums.autoencoder_weights())
    if place != "device":
        on_host = [sums.t5_slabs] if place == "streamed" else [part for part in phases[0].parts if part != sums.context]
        host = max(host, on_host, key=lambda parts: sum(part.bytes for part in parts))
        phases[0] = (
            sums.text_phase(is_streamed=True) if place == "streamed" else make_phase("text encoders", [sums.context])
        )
    host = [
        Part("Python, torch and libraries", HOST_PROCESS_BYTES),
        *(part for part in host if part.bytes),
        Part("cached latents and texts", sums.cached_bytes(num_pictures), "activations"),
    ]
    peak = max(phase.peak_bytes for phase in phases)
    host_bytes = sum(part.bytes for part in host)
    result = Estimate(
        peak,
        host_bytes,
        tuple(phases),
        swap,
        text_on_host=place == "host",
        text_streamed=place == "streamed",
        host_parts=tuple(host),
    )
    if vram_bytes is None:
        return result
    fits = result.peak_bytes <= usable_bytes(vram_bytes)
    return dataclasses.replace(result, fits=fits, reason="" if fits else _why_not(result, options, vram_bytes))


TextPlace = Literal["device", "streamed", "host"]
"""Where captions are encoded that are cached: on the device, there with T5's layers brought in turn, or by the CPU."""


def text_place(
    flux: TransformerParams, options: Options, *, vram_bytes: int, batch_size: int, models: OtherModels | None = None
) -> TextPlace:
    """The first place that a card of `vram_bytes` has the room for. The trainer acts on it, and `estimate` counts it."""
    models = models or usual_models(flux)
    return _text_place(Sums(flux, options, models, 0, 0, batch_size, 0, trained_by(flux, options, models)), vram_bytes)


def pick_blocks_to_swap(
    flux: TransformerParams,
    options: Options,
    *,
    width: int,
    height: int,
    batch_size: int,
    vram_bytes: int,
    models: OtherModels | None = None,
    num_pictures: int = ASSUMED_PICTURES,
    factor: float = 1.0,
) -> Estimate:
    """The estimate with the smallest `blocks_to_swap` that fits a card of `vram_bytes`, a small reserve left.

    When none fits, that of the largest count, with `fits` False and the reason.
    """
    largest = max_blocks_to_swap(flux.depth, flux.depth_single_blocks)
    models = models or usual_models(flux)
    trained = trained_by(flux, options, models)

    def at(count: int) -> Estimate:
        sums = Sums(flux, options, models, width, height, batch_size, count, trained, factor)
        return _estimate(options, sums, count, vram_bytes, num_pictures)

    # Each further swapped block saves memory, so that halving finds the first count that fits.
    first, last = 0, largest
    while first < last:
        middle = (first + last) // 2
        first, last = (first, middle) if at(middle).fits else (middle + 1, last)
    return at(first)


def _text_place(sums: Sums, vram_bytes: int) -> TextPlace:
    if not sums.caches_text or sums.text_phase().peak_bytes <= usable_bytes(vram_bytes):
        return "device"
    return "streamed" if sums.text_phase(is_streamed=True).peak_bytes <= usable_bytes(vram_bytes) else "host"


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
    if not caches_text(options):
        remedies.append("turn on cache_text_encoder_outputs")
    if not caches_latents(options):
        remedies.append("turn on cache_latents")
    if worst.name in ("training", "latents") and not options.gradient_checkpointing:
        remedies.append("turn on gradient_checkpointing")
    if options.gradient_checkpointing and options.checkpoint_blocks is not None:
        remedies.append("leave checkpoint_blocks out")
    remedies.append("lower the resolution or the batch size")
    joined = ", ".join(remedies)
    return f"{text} {joined[0].upper()}{joined[1:]}."
