"""The masks of the loss, made ready beside the latents: once beforehand when those are cached, else for each batch."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.data.batches import BatchPlan
from trainer.data.cache import TensorCache, mask_key, mask_requests
from trainer.data.cache_files import Entry
from trainer.data.masks import LATENT_STRIDE, read_mask
from trainer.data.pictures import Mask
from trainer.train.check import CheckedRun
from trainer.train.reporting import Reporter


class MaskSource:
    """Gives each batch's masks, from the cache or else from the files. Called in threads."""

    def __init__(self, cache: TensorCache | None = None) -> None:
        self._cache = cache

    def load(self, plan: BatchPlan) -> Tensor | None:
        """(B, 1, h, w) float32 on the host, ones for pictures without a mask; None when none of them has one."""
        masks = [planned.mask for planned in plan.items]
        if all(mask is None for mask in masks):
            return None
        width, height = plan.size
        everything = torch.ones(height // LATENT_STRIDE, width // LATENT_STRIDE)
        return torch.stack([everything if mask is None else self._read(mask) for mask in masks])[:, None]

    def _read(self, mask: Mask) -> Tensor:
        return read_mask(mask) if self._cache is None else self._cache[mask_key(mask)]["mask"]


def prepare_masks(checked: CheckedRun, reporter: Reporter) -> MaskSource:
    """Where masks come from."""
    options = checked.options
    if not options.cache_latents:
        return MaskSource()
    cache = TensorCache(
        "masks", on_disk=options.cache_latents_to_disk, warn=reporter.warning, skip_check=options.skip_cache_check
    )
    requests = mask_requests(checked.index)
    cache.fill(requests, _as_entries, check_commands=reporter.check_stop)
    cache.recover_with(requests, lambda: _as_entries)
    return MaskSource(cache)


def _as_entries(_keys: list[str], masks: list[Tensor]) -> list[Entry]:
    return [{"mask": mask} for mask in masks]
