"""What a dataset's settings ask for without effect, or with another than one may think: one line for each."""

from __future__ import annotations

from collections.abc import Iterator

from trainer.schema.base import shown
from trainer.schema.dataset_keys import DATASET_KEYS, DatasetConfig, DatasetSpec
from trainer.schema.options import Options

_OF_BUCKETS = ("bucket_no_upscale", "min_bucket_reso", "max_bucket_reso", "bucket_reso_steps")
_LIMITS = ("min_bucket_reso", "max_bucket_reso")


def dataset_advice(config: DatasetConfig, options: Options) -> Iterator[str]:
    """Lines about options that the dataset file overrides, the datasets, in their order, and masks that no subset has."""
    for name in config.overridden:
        yield f"{name} {shown(getattr(options, name))} has no effect: the dataset file says otherwise everywhere"
    for number, dataset in enumerate(config.datasets, start=1):
        yield from _of_dataset(dataset, f"dataset {number}")
        for subset in dataset.subsets:
            if subset.cache_info:
                yield f"cache_info of {subset.place} has no effect: captions and sizes are read at every start"
            unknown = subset.custom_attributes.unknown
            if unknown:
                yield f"custom_attributes of {subset.place} have no effect: {', '.join(unknown)}"
            if subset.face_crop_aug_range is not None and dataset.enable_bucket:
                yield f"face_crop_aug_range of {subset.place} has no effect beside enable_bucket"
            if subset.alpha_mask and subset.conditioning_data_dir is not None:
                yield f"alpha_mask of {subset.place} has no effect: its masks are in {subset.conditioning_data_dir}"
    has_masks = any(subset.has_masks for dataset in config.datasets for subset in dataset.subsets)
    if options.masked_loss and not has_masks:
        yield "masked_loss has no effect: no subset has a conditioning_data_dir or alpha_mask"
    if options.masked_loss_normalize and not has_masks:
        yield "masked_loss_normalize has no effect: no subset has a conditioning_data_dir or alpha_mask"


def _of_dataset(dataset: DatasetSpec, place: str) -> Iterator[str]:
    if dataset.network_multiplier != 1:
        yield f"network_multiplier of {place} has no effect, in sd-scripts neither"
    if not dataset.enable_bucket:
        unused = [name for name in _OF_BUCKETS if getattr(dataset, name) != _default(name)]
        if unused:
            yield f"{', '.join(unused)} of {place} have no effect without enable_bucket"
    elif dataset.bucket_no_upscale:
        unused = [name for name in _LIMITS if getattr(dataset, name) != _default(name)]
        if unused:
            yield f"{', '.join(unused)} of {place} have no effect beside bucket_no_upscale"


def _default(name: str) -> object:
    return Options.model_fields[DATASET_KEYS[name].option or name].get_default()
