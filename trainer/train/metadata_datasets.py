"""The `ss_` keys about the data: one set for runs with a dataset file, another for runs on `train_data_dir`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from trainer.train.metadata_facts import DatasetFacts, SubsetFacts, TrainingFacts


def dataset_file_values(datasets: Sequence[DatasetFacts]) -> dict[str, object]:
    """The keys of a run with a dataset file: everything as JSON, dataset by dataset."""
    described: list[dict[str, object]] = []
    frequency: dict[str, dict[str, int]] = {}
    folders: dict[str, dict[str, int]] = {}
    for dataset in datasets:
        dataset_frequency = tag_frequency(dataset.subsets)
        # A folder that several datasets use is counted once.
        for folder, tags in dataset_frequency.items():
            frequency.setdefault(folder, tags)
        for subset in dataset.subsets:
            folders[_free_name(subset.place.name, folders)] = {
                "n_repeats": subset.num_repeats,
                "img_count": subset.num_images,
            }
        described.append(
            {
                "is_dreambooth": not any(subset.is_listed for subset in dataset.subsets),
                "batch_size_per_device": dataset.batch_size,
                "num_train_images": dataset.count_images(is_reg=False),
                "num_reg_images": dataset.count_images(is_reg=True),
                "resolution": list(dataset.resolution),
                "enable_bucket": dataset.enable_bucket,
                "min_bucket_reso": dataset.min_bucket_reso,
                "max_bucket_reso": dataset.max_bucket_reso,
                "tag_frequency": dataset_frequency,
                "bucket_info": _bucket_info(dataset),
                "resize_interpolation": dataset.resize_interpolation,
                "subsets": [_subset_values(subset) for subset in dataset.subsets],
            }
        )
    return {
        "ss_datasets": json.dumps(described),
        "ss_tag_frequency": json.dumps(frequency),
        "ss_dataset_dirs": json.dumps(folders),
    }


def folder_values(facts: TrainingFacts) -> dict[str, object]:
    """The keys of a run on `train_data_dir`, which makes exactly one dataset."""
    dataset = facts.datasets[0]
    train, reg = ([s for s in dataset.subsets if s.is_reg is is_reg] for is_reg in (False, True))
    return {
        "ss_batch_size_per_device": dataset.batch_size,
        "ss_total_batch_size": dataset.batch_size * facts.num_processes * facts.gradient_accumulation_steps,
        "ss_resolution": dataset.resolution,
        "ss_color_aug": any(subset.color_aug for subset in dataset.subsets),
        "ss_flip_aug": any(subset.flip_aug for subset in dataset.subsets),
        "ss_random_crop": any(subset.random_crop for subset in dataset.subsets),
        "ss_shuffle_caption": any(subset.shuffle_caption for subset in dataset.subsets),
        "ss_enable_bucket": dataset.enable_bucket,
        "ss_bucket_no_upscale": dataset.bucket_no_upscale,
        "ss_min_bucket_reso": dataset.min_bucket_reso,
        "ss_max_bucket_reso": dataset.max_bucket_reso,
        "ss_keep_tokens": max((subset.keep_tokens for subset in dataset.subsets), default=0),
        "ss_dataset_dirs": json.dumps(_folder_counts(train)),
        "ss_reg_dataset_dirs": json.dumps(_folder_counts(reg)),
        "ss_tag_frequency": json.dumps(tag_frequency(dataset.subsets)),
        "ss_bucket_info": json.dumps(_bucket_info(dataset)),
    }


def _folder_counts(subsets: Iterable[SubsetFacts]) -> dict[str, dict[str, int]]:
    return {s.place.name: {"n_repeats": s.num_repeats, "img_count": s.num_images} for s in subsets}


def _subset_values(subset: SubsetFacts) -> dict[str, object]:
    return {
        "img_count": subset.num_images,
        "num_repeats": subset.num_repeats,
        "color_aug": subset.color_aug,
        "flip_aug": subset.flip_aug,
        "random_crop": subset.random_crop,
        "shuffle_caption": subset.shuffle_caption,
        "keep_tokens": subset.keep_tokens,
        "keep_tokens_separator": subset.keep_tokens_separator,
        "secondary_separator": subset.secondary_separator,
        "enable_wildcard": subset.enable_wildcard,
        "caption_prefix": subset.caption_prefix,
        "caption_suffix": subset.caption_suffix,
        "resize_interpolation": subset.resize_interpolation,
        **(
            {"metadata_file": subset.place.name}
            if subset.is_listed
            else {"image_dir": subset.place.name, "class_tokens": subset.class_tokens, "is_reg": subset.is_reg}
        ),
    }


def _bucket_info(dataset: DatasetFacts) -> dict[str, object] | None:
    if not dataset.enable_bucket:
        return None
    buckets = {
        str(index): {"resolution": list(size), "count": count}
        for index, (size, count) in enumerate(dataset.buckets)
        if count
    }
    return {"buckets": buckets, "mean_img_ar_error": dataset.mean_aspect_error}


def _free_name(name: str, taken: Iterable[str]) -> str:
    names, number, free = set(taken), 2, name
    while free in names:
        free = f"{name} ({number})"
        number += 1
    return free


def tag_frequency(subsets: Iterable[SubsetFacts]) -> dict[str, dict[str, int]]:
    """How many captions of each folder hold a tag, in the order of first appearance: folder -> tag -> count.

    Tags are what commas separate, in lower case, whatever the caption separator is: readers of the key expect that.
    """
    frequency: dict[str, dict[str, int]] = {}
    for subset in subsets:
        tags = frequency.setdefault(subset.place.name, {})
        for caption in subset.captions:
            for tag in (part.strip().lower() for part in caption.split(",")):
                if tag:
                    tags[tag] = tags.get(tag, 0) + 1
    return frequency
