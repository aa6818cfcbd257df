"""The latents phase: pictures to latents, beforehand when they are to be cached, else at every step.

B batch, H W picture size, h w latent size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from trainer.data.ahead import map_ahead
from trainer.data.batches import BatchPlan
from trainer.data.cache import Encode, TensorCache, latent_key, latent_requests
from trainer.data.images import read_pixels
from trainer.data.reference_files import LATENTS_ENDING, latent_files
from trainer.model.autoencoder import AutoEncoder
from trainer.model.weights import load_autoencoder
from trainer.schema.base import UserError
from trainer.schema.folders import data_home
from trainer.schema.options import Options
from trainer.schema.weight_files import read_weights
from trainer.train.check import CheckedRun
from trainer.train.engine import Engine
from trainer.train.file_hashes import HASHES_FILE, files_identity
from trainer.train.masks_phase import MaskSource, prepare_masks
from trainer.train.memory_room import encode_in_room
from trainer.train.reference_caches import ReferenceCaches
from trainer.train.reporting import Reporter


@dataclass(frozen=True)
class LoadedBatch:
    """What a batch's latents are made of, and its masks (B, 1, h, w), None for none; on the host."""

    pixels: Tensor
    mask: Tensor | None


class LatentSource(Protocol):
    """Gives each batch's latents. `load` runs ahead in threads; `finish` makes (B, 16, h, w) float32 on the device."""

    @property
    def masks(self) -> MaskSource: ...

    def load(self, plan: BatchPlan) -> Tensor: ...

    def finish(self, loaded: Tensor, generator: torch.Generator) -> Tensor: ...


def loaded_batches(
    source: LatentSource, plans: Sequence[BatchPlan], *, num_threads: int
) -> Generator[tuple[BatchPlan, LoadedBatch], None, None]:
    """The plans with what their latents are made of, read ahead of use by `num_threads`; closing it ends the reading.

    Threads, not processes: decoding, resizing and reading release the interpreter, a batch needs no copy to another
    process, and what is cached in memory is there only once. Everything random has been decided in the plans.
    """

    def load(plan: BatchPlan) -> LoadedBatch:
        return LoadedBatch(source.load(plan), source.masks.load(plan))

    if num_threads == 0:
        yield from ((plan, load(plan)) for plan in plans)
        return
    ahead = max(2, num_threads)
    with contextlib.closing(map_ahead(load, plans, num_threads=num_threads, num_ahead=ahead)) as loaded:
        yield from zip(plans, loaded, strict=True)


class CachedLatents:
    """Latents that were encoded beforehand."""

    def __init__(self, cache: TensorCache, identity: str, device: torch.device, masks: MaskSource) -> None:
        self.masks = masks
        self._cache = cache
        self._identity = identity
        self._device = device

    def load(self, plan: BatchPlan) -> Tensor:
        keys = [latent_key(planned.picture, encoder=self._identity) for planned in plan.items]
        return torch.stack([self._cache[key]["latents"] for key in keys])

    def finish(self, loaded: Tensor, generator: torch.Generator) -> Tensor:
        return loaded.to(self._device)


class LiveLatents:
    """Encodes at every step, with a fresh draw of the posterior, as the reference trainer does without a cache."""

    def __init__(self, autoencoder: AutoEncoder, engine: Engine, *, batch_size: int, masks: MaskSource) -> None:
        self.masks = masks
        self._autoencoder = autoencoder
        self._dtype = autoencoder_dtype(autoencoder)
        self._engine = engine
        self._batch_size = batch_size

    def load(self, plan: BatchPlan) -> Tensor:
        return torch.stack([read_pixels(planned.picture) for planned in plan.items])

    def finish(self, loaded: Tensor, generator: torch.Generator) -> Tensor:
        with torch.no_grad(), self._engine.autocast(self._dtype):
            pieces = [
                self._autoencoder.encode(images.to(self._engine.device), generator)
                for images in loaded.split(self._batch_size)
            ]
        return finite_latents(torch.cat(pieces).float())


def finite_latents(latents: Tensor) -> Tensor:
    """`latents`, after making sure that the autoencoder's number format could hold them."""
    if not torch.isfinite(latents).all():
        raise UserError(
            "the autoencoder gave values that are no numbers",
            "--ae",
            "The file is damaged, or of another kind: download it again. Else try --no_half_vae.",
            field="ae",
        )
    return latents


def load_ae(options: Options, engine: Engine, device: torch.device) -> AutoEncoder:
    if options.ae is None:
        raise AssertionError("the checks demand the autoencoder")
    return load_autoencoder(options.ae, engine.autoencoder_dtype(no_half=options.no_half_vae), device)


def autoencoder_dtype(autoencoder: AutoEncoder) -> torch.dtype:
    """The format that the autoencoder was loaded in."""
    return next(autoencoder.parameters()).dtype


def prepare_latents(checked: CheckedRun, engine: Engine, reporter: Reporter) -> tuple[LatentSource, AutoEncoder | None]:
    """Where latents come from, and the autoencoder if it is loaded and still of use: for live encoding, or samples.

    Next to cached latents it waits in main memory.
    """
    options = checked.options
    reporter.phase("latents")
    masks = prepare_masks(checked, reporter)
    if not options.cache_latents:
        autoencoder = load_ae(options, engine, engine.device)
        return LiveLatents(autoencoder, engine, batch_size=options.vae_batch_size, masks=masks), autoencoder

    if options.ae is None:
        raise AssertionError("the checks demand the autoencoder")
    files = read_weights(options.ae, "autoencoder").files
    file_hashes = files_identity(files, data_home() / HASHES_FILE, reporter.check_stop)
    identity = f"{file_hashes}|{engine.autoencoder_dtype(no_half=options.no_half_vae)}"
    cache = TensorCache(
        "latents", on_disk=options.cache_latents_to_disk, warn=reporter.warning, skip_check=options.skip_cache_check
    )
    reference = _reference_caches(checked, identity, cache, reporter) if options.cache_latents_to_disk else None
    requests = latent_requests(checked.index, encoder=identity)
    autoencoder: AutoEncoder | None = None

    def load_encoder() -> Encode[Tensor]:
        return _encoder(load_ae(options, engine, torch.device("cpu")), engine, torch.device("cpu"))

    missing = cache.missing(requests)
    if missing and reference is not None:
        missing = reference.read(missing)
    if missing:
        autoencoder = load_ae(options, engine, engine.device)
        cache.fill(
            missing,
            encode_in_room(
                _encoder(autoencoder, engine, engine.device),
                None if engine.device.type == "cpu" else load_encoder,
                "pictures",
                engine,
                reporter,
            ),
            batch_size=options.vae_batch_size,
            progress=reporter.progress,
            check_commands=reporter.check_stop,
            share=(engine.rank, engine.num_processes),
        )
        autoencoder = autoencoder.to("cpu") if checked.prompts else None
        engine.free_cached_memory()
    else:
        reporter.note("all pictures are cached: the autoencoder is not needed for them")

    # On the CPU: the device is full of the transformer by the time that one is found to be lost.
    cache.recover_with(requests, load_encoder)
    if reference is not None and options.write_reference_caches and engine.rank == 0:
        reference.write(options)
    return CachedLatents(cache, identity, engine.device, masks), autoencoder


def _reference_caches(checked: CheckedRun, identity: str, cache: TensorCache, reporter: Reporter) -> ReferenceCaches:
    files, num_without = latent_files(checked.index, encoder=identity)
    found = ReferenceCaches(
        files,
        num_without,
        cache,
        reporter,
        ending=LATENTS_ENDING,
        made_from="which picture and which autoencoder",
    )
    found.note_foreign(checked)
    return found


def _encoder(autoencoder: AutoEncoder, engine: Engine, device: torch.device) -> Encode[Tensor]:
    """What fills the cache, with an autoencoder on `device`."""

    def encode(keys: list[str], pictures: list[Tensor]) -> list[dict[str, Tensor]]:
        images = torch.stack(pictures).to(device)
        with torch.no_grad(), engine.autocast(autoencoder_dtype(autoencoder), device):
            moments = autoencoder.encode_moments(images)
        # The posterior's draw is a function of the picture, so that a cache in memory and one on disk are the same.
        shape = tuple(moments.chunk(2, dim=1)[0].shape[1:])
        noise = torch.stack([_noise(key, shape) for key in keys])
        latents = finite_latents(autoencoder.latents_from_moments(moments, noise.to(moments)).float())
        return [{"latents": row} for row in latents]

    return encode


def _noise(key: str, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(int(key[:15], 16)))
