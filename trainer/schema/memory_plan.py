"""What fits a card and a machine: the one function behind `estimate`, `--blocks_to_swap=auto`, the page and the presets.

    plan = plan_for(options, vram_bytes=12 * GIB, ram_bytes=32 * GIB)
    plan.fits, plan.choice.blocks_to_swap, plan.alternatives, plan.impossible

Sizes come from the model file's header; without a file those of the published model are assumed, and the plan says so.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, get_args

from trainer.schema.base import UserError
from trainer.schema.calibration import Measurement
from trainer.schema.checkpoint_header import autoencoder_params, clip_params, t5_params
from trainer.schema.chroma_header import ChromaParams, TransformerParams, read_transformer
from trainer.schema.dataset_file import read_dataset_config
from trainer.schema.memory import (
    ASSUMED_PICTURES,
    Estimate,
    estimate,
    pick_blocks_to_swap,
    usable_bytes,
)
from trainer.schema.memory_phases import (
    GIB,
    KINDS,
    Kind,
    Part,
    Phase,
    caches_latents,
    caches_text,
    gib_text,
    may_map_modulation,
    num_checkpointed,
)
from trainer.schema.option_rules import compiles
from trainer.schema.options import Options
from trainer.schema.options_data import CHANGES_PIXELS, parse_resolution
from trainer.schema.parameter_counts import PUBLISHED_CHROMA, PUBLISHED_DEV, OtherModels, usual_models
from trainer.schema.step_time import PRACTICAL_SHARE, Rates, rates_for, step_time
from trainer.schema.storage import Storage, stored_as
from trainer.schema.swap_counts import max_blocks_to_swap
from trainer.schema.weight_files import read_weights

DEFAULT_SIDE: Final = 1024
HOST_RESERVE_BYTES: Final = 2 * GIB
"""Host memory that is left to the system and other programs."""
_FASTER: Final = 0.99
"""A lever beside a setting that fits already must bring so much to be worth naming."""
_LOWER_SIDES: Final = (1024, 768, 512, 256)


@dataclass(frozen=True)
class Segment:
    """One piece of a stacked memory bar."""

    kind: Kind
    bytes: int


@dataclass(frozen=True)
class Choice:
    """One way to train. `changes` are the options that differ from the given ones, `blocks_to_swap` always among them.

    `step_seconds` is a prediction from assumed rates; `step_time_ratio` compares it with the given options without swap.
    """

    changes: Mapping[str, object]
    estimate: Estimate
    step_seconds: float
    step_time_ratio: float

    @property
    def blocks_to_swap(self) -> int:
        return self.estimate.blocks_to_swap

    @property
    def peak_phase(self) -> Phase:
        return max(self.estimate.phases, key=lambda phase: phase.peak_bytes)

    @property
    def device_bar(self) -> tuple[Segment, ...]:
        """The device's memory at its fullest moment, in the order of `KINDS`, without what is empty."""
        return _bar(self.peak_phase.parts)

    @property
    def host_bar(self) -> tuple[Segment, ...]:
        """The host's memory at its fullest moment."""
        return _bar(self.estimate.host_parts)


@dataclass(frozen=True)
class Plan:
    """`choice` is the given options with the fewest swapped blocks that fit; where none fit (`fits` False), with the most.

    `alternatives` are other settings that fit, fastest first: first of all those that change no result, and only when none
    of these fits, others. `impossible` says what does not fit, and why. `vram_bytes` and `ram_bytes` are None where they
    set no limit.
    """

    fits: bool
    choice: Choice
    alternatives: tuple[Choice, ...]
    impossible: tuple[str, ...]
    assumptions: tuple[str, ...]
    vram_bytes: int | None
    ram_bytes: int | None
    width: int
    height: int
    batch_size: int
    rates: Rates

    @property
    def usable_vram_bytes(self) -> int | None:
        return None if self.vram_bytes is None else usable_bytes(self.vram_bytes)

    @property
    def usable_ram_bytes(self) -> int | None:
        return None if self.ram_bytes is None else usable_host_bytes(self.ram_bytes)


def usable_host_bytes(ram_bytes: int) -> int:
    """What of a machine's memory a run may take."""
    return max(ram_bytes - HOST_RESERVE_BYTES, 0)


def plan_for(
    options: Options,
    vram_bytes: int | None = None,
    ram_bytes: int | None = None,
    *,
    flux: TransformerParams | None = None,
    models: OtherModels | None = None,
    size: tuple[int, int] | None = None,
    batch_size: int | None = None,
    num_pictures: int | None = None,
    calibration: Measurement | None = None,
) -> Plan:
    """The plan for a card of `vram_bytes` in a machine of `ram_bytes`; None sets no limit.

    What is not given is read: `flux` and `models` from the headers of the files that the options name, `size` (width, height)
    and `batch_size` from the dataset file or the options. Raises `UserError` for files that cannot be read and for options
    that contradict the model. With `calibration` the estimates follow what was measured on that device.
    """
    assumptions: list[str] = []
    if flux is None:
        flux = _transformer(options, assumptions)
    if models is None:
        models = other_models(flux, options)
    size, batch_size = _sizes(options, size, batch_size, assumptions)
    if num_pictures is None:
        assumptions.append(f"{ASSUMED_PICTURES} pictures are cached in host memory")
    planner = _Planner(
        flux,
        models,
        vram_bytes,
        ram_bytes,
        size,
        batch_size,
        ASSUMED_PICTURES if num_pictures is None else num_pictures,
        rates_for(vram_bytes),
        options,
        1.0 if calibration is None else calibration.factor,
    )
    if calibration is not None:
        assumptions.append(
            f"activations as measured on {calibration.device}: {calibration.factor:.2f} times the formula"
        )
    rates = planner.rates
    assumptions.append(
        f"step times: {rates.name}, {PRACTICAL_SHARE:.0%} of {rates.flops / 1e12:.0f} TFLOP/s and "
        f"{rates.transfer_bytes / 1e9:.0f} GB/s from the host, not measured"
    )
    choice = planner.best({})
    fits = planner.fits(choice.estimate)
    others = planner.others()
    impossible = [] if fits else [planner.why_not(choice.estimate)]
    if not fits and not others:
        others = planner.smaller()
        if not others:
            impossible.append("No setting that was tried fits: not even 256 pixels with every block swapped.")
    width, height = size
    return Plan(
        fits,
        choice,
        tuple(
            sorted(others, key=lambda other: (other.step_seconds, len(other.changes), other.estimate.host_peak_bytes))
        ),
        tuple(impossible),
        tuple(assumptions),
        vram_bytes,
        ram_bytes,
        width,
        height,
        batch_size,
        rates,
    )


def other_models(flux: TransformerParams, options: Options) -> OtherModels:
    """The sizes of the chosen encoders, and the usual ones for those not chosen yet or not readable."""
    models = usual_models(flux)
    with contextlib.suppress(UserError):
        if options.t5xxl is not None:
            models = replace(models, t5=t5_params(read_weights(options.t5xxl, "t5xxl")))
    with contextlib.suppress(UserError):
        if options.clip_l is not None and models.clip is not None:
            models = replace(models, clip=clip_params(read_weights(options.clip_l, "clip_l")))
    with contextlib.suppress(UserError):
        if options.ae is not None:
            models = replace(models, autoencoder=autoencoder_params(read_weights(options.ae, "autoencoder")))
    return models


def _transformer(options: Options, assumptions: list[str]) -> TransformerParams:
    if options.pretrained_model_name_or_path is not None:
        return read_transformer(options.pretrained_model_name_or_path, options.model_type)
    is_chroma = options.model_type == "chroma"
    assumptions.append(f"no model file is given: the shapes of {'Chroma1' if is_chroma else 'FLUX.1-dev'}")
    return PUBLISHED_CHROMA if is_chroma else PUBLISHED_DEV


def _sizes(
    options: Options, size: tuple[int, int] | None, batch_size: int | None, assumptions: list[str]
) -> tuple[tuple[int, int], int]:
    """The largest batch: its pictures' width and height, and how many they are."""
    if size is not None and batch_size is not None:
        return size, batch_size
    if options.dataset_config is not None and options.dataset_config.is_file():
        specs = read_dataset_config(options.dataset_config, options).datasets
        if specs:
            spec = max(specs, key=lambda one: one.batch_size * one.resolution[0] * one.resolution[1])
            return size or spec.resolution, batch_size or spec.batch_size
    if size is None and options.resolution is None:
        assumptions.append(f"no resolution is given: {DEFAULT_SIDE} pixels")
    return size or parse_resolution(options.resolution or DEFAULT_SIDE), batch_size or options.train_batch_size


def _bar(parts: tuple[Part, ...]) -> tuple[Segment, ...]:
    sums: dict[Kind, int] = {kind: sum(part.bytes for part in parts if part.kind == kind) for kind in KINDS}
    return tuple(Segment(kind, num_bytes) for kind, num_bytes in sums.items() if num_bytes)


@dataclass(frozen=True)
class _Planner:
    """Tries settings against one card and machine."""

    flux: TransformerParams
    models: OtherModels
    vram_bytes: int | None
    ram_bytes: int | None
    size: tuple[int, int]
    batch_size: int
    num_pictures: int
    rates: Rates
    options: Options
    factor: float
    _seen: dict[str, Choice] = field(default_factory=dict[str, Choice])

    def fits(self, result: Estimate) -> bool:
        if (
            self.vram_bytes is not None
            and self.options.device != "cpu"
            and result.peak_bytes > usable_bytes(self.vram_bytes)
        ):
            return False
        return self.ram_bytes is None or result.host_peak_bytes <= usable_host_bytes(self.ram_bytes)

    def best(self, changes: Mapping[str, object]) -> Choice:
        """The given options with `changes`, with the fewest swapped blocks that fit the card. More would cost host memory."""
        key = repr(sorted(changes.items(), key=str))
        if key in self._seen:
            return self._seen[key]
        options, (width, height), batch_size = self._changed(changes)
        # Compiled code keeps weights for backward, unless every block is computed twice.
        keeps_weights = compiles(options) and (
            not options.gradient_checkpointing or options.checkpoint_blocks is not None
        )
        may_swap = options.device != "cpu" and options.network_module != "lycoris.kohya" and not keeps_weights
        if self.vram_bytes is None or not may_swap:
            result = estimate(
                self.flux,
                options,
                width=width,
                height=height,
                batch_size=batch_size,
                models=self.models,
                blocks_to_swap=None if may_swap else 0,
                vram_bytes=None if options.device == "cpu" else self.vram_bytes,
                num_pictures=self.num_pictures,
                factor=self.factor,
            )
        else:
            result = pick_blocks_to_swap(
                self.flux,
                options,
                width=width,
                height=height,
                batch_size=batch_size,
                vram_bytes=self.vram_bytes,
                models=self.models,
                num_pictures=self.num_pictures,
                factor=self.factor,
            )
        seconds = self._seconds(options, (width, height), batch_size, result.blocks_to_swap)
        whole = self._seconds(self.options, self.size, self.batch_size, 0)
        # Of a larger batch fewer steps are needed: what is compared is the time for a picture.
        ratio = seconds * self.batch_size / (whole * batch_size)
        choice = Choice({**changes, "blocks_to_swap": result.blocks_to_swap}, result, seconds, ratio)
        self._seen[key] = choice
        return choice

    def others(self) -> list[Choice]:
        """Settings beside the given one that change no result, or hardly, and fit."""
        found: list[Choice] = []
        for changes in self._harmless():
            choice = self.best(changes)
            fits = self.fits(choice.estimate)
            if changes and fits:
                found.append(choice)
            for more in self._levers(changes, choice):
                other = self.best({**changes, **more})
                if self.fits(other.estimate) and not (fits and other.step_seconds > _FASTER * choice.step_seconds):
                    found.append(other)
        return found

    def _levers(self, changes: Mapping[str, object], choice: Choice) -> Iterator[Mapping[str, object]]:
        """What to try beside `changes`, which lead to `choice`: more off the device, or fewer blocks computed twice."""
        if self.vram_bytes is None:
            return
        options, _, _ = self._changed(changes)
        fits = self.fits(choice.estimate)
        if choice.blocks_to_swap or not fits:
            more: dict[str, object] = {}
            if options.gradient_checkpointing and not options.cpu_offload_checkpointing and options.device != "cpu":
                more["cpu_offload_checkpointing"] = True
                yield more
            if self._may_map_modulation(options):
                yield {"offload_modulation": "file"}
                if more:
                    yield {**more, "offload_modulation": "file"}
        elif num_checkpointed(self.flux, options) and options.checkpoint_blocks is None and not options.torch_compile:
            count = self._fewest_checkpointed(changes)
            if 0 < count < num_checkpointed(self.flux, options):
                yield {"checkpoint_blocks": count}

    def _may_map_modulation(self, options: Options) -> bool:
        return (
            options.offload_modulation is None
            and may_map_modulation(self.flux, options)
            and options.network_module != "lycoris.kohya"
            and not options.base_weights
            and not isinstance(self.flux, ChromaParams)
            and options.device != "cpu"
        )

    def _fewest_checkpointed(self, changes: Mapping[str, object]) -> int:
        """The smallest `checkpoint_blocks` that fits the card without swap. More checkpointing never needs more."""
        options, (width, height), batch_size = self._changed(changes)

        def fits(count: int) -> bool:
            return self.fits(
                estimate(
                    self.flux,
                    options.model_copy(update={"checkpoint_blocks": count}),
                    width=width,
                    height=height,
                    batch_size=batch_size,
                    models=self.models,
                    blocks_to_swap=0,
                    vram_bytes=self.vram_bytes,
                    num_pictures=self.num_pictures,
                    factor=self.factor,
                )
            )

        first, last = 0, num_checkpointed(self.flux, options)
        while first < last:
            middle = (first + last) // 2
            first, last = (first, middle) if fits(middle) else (middle + 1, last)
        return first

    def smaller(self) -> list[Choice]:
        """For each lower resolution the fastest setting that fits; the highest resolution that has one comes alone."""
        least: dict[str, object] = {"optimizer_type": "AdamW8bit"} if self.options.optimizer_type == "AdamW" else {}
        if self.batch_size > 1:
            least["train_batch_size"] = 1
        width, height = self.size
        for side in (max(width, height), *(side for side in _LOWER_SIDES if side < max(width, height))):
            size: dict[str, object] = {} if side == max(width, height) else {"resolution": str(side)}
            fitting = [
                choice
                for changes in self._harmless()
                if self.fits((choice := self.best({**changes, **least, **size})).estimate)
            ]
            if fitting:
                return fitting
        return []

    def why_not(self, result: Estimate) -> str:
        """What is too much, in numbers."""
        if result.reason:
            return result.reason
        assert self.ram_bytes is not None
        largest = max(result.host_parts, key=lambda part: part.bytes)
        return (
            f"With blocks_to_swap {result.blocks_to_swap}, {gib_text(result.host_peak_bytes)} of main memory are needed, "
            f"of which {gib_text(largest.bytes)} are {largest.name}; a machine of {gib_text(self.ram_bytes)} leaves "
            f"{gib_text(usable_host_bytes(self.ram_bytes))}. Close other programs, add memory, or train on a larger card, "
            "which needs fewer swapped blocks."
        )

    def _harmless(self) -> Iterator[Mapping[str, object]]:
        """Combinations of what trades memory for time."""
        options = self.options
        base: dict[str, object] = {}
        if not caches_text(options) and options.network_train_unet_only:
            base["cache_text_encoder_outputs"] = True
        if not caches_latents(options) and not any(getattr(options, name) for name in CHANGES_PIXELS):
            base["cache_latents"] = True
        if options.mixed_precision == "no":
            base["mixed_precision"] = "bf16"
        given = stored_as(options, self.flux)
        may_store = options.network_module != "lycoris.kohya" and options.device != "cpu"
        for common, checkpointing in itertools.product(({}, base) if base else ({},), (False, True)):
            for storage in get_args(Storage) if may_store else (given,):
                changes = dict(common)
                if checkpointing != options.gradient_checkpointing:
                    changes["gradient_checkpointing"] = checkpointing
                if storage != given:
                    changes |= self._stored(storage)
                yield changes

    def _stored(self, storage: Storage) -> dict[str, object]:
        """The changes that store the base model so."""
        options = self.options
        free = options.model_copy(update={"base_storage": None, "fp8_base": False, "fp8_base_unet": False})
        changes: dict[str, object] = {
            "base_storage": None if storage == "compute" == stored_as(free, self.flux) else storage
        }
        if storage == "compute":
            changes |= {name: False for name in ("fp8_base", "fp8_base_unet") if getattr(options, name)}
        return {name: value for name, value in changes.items() if value != getattr(options, name)}

    def _changed(self, changes: Mapping[str, object]) -> tuple[Options, tuple[int, int], int]:
        options = self.options.model_copy(update=dict(changes))
        size = parse_resolution(changes["resolution"]) if "resolution" in changes else self.size
        batch_size = options.train_batch_size if "train_batch_size" in changes else self.batch_size
        return options, size, batch_size

    def _seconds(self, options: Options, size: tuple[int, int], batch_size: int, swap: int) -> float:
        width, height = size
        return step_time(
            self.flux,
            options,
            width=width,
            height=height,
            batch_size=batch_size,
            blocks_to_swap=min(swap, max_blocks_to_swap(self.flux.depth, self.flux.depth_single_blocks)),
            rates=self.rates,
        ).seconds
