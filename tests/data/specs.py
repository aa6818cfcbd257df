"""Dataset descriptions with the reference's defaults, and small picture files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from trainer.schema.dataset_keys import CustomAttributes, DatasetConfig, DatasetSpec, SubsetSpec

SUBSET = SubsetSpec(
    image_dir=Path(),
    metadata_file=None,
    conditioning_data_dir=None,
    num_repeats=1,
    caption_extension=".txt",
    class_tokens=None,
    cache_info=False,
    is_reg=False,
    shuffle_caption=False,
    keep_tokens=0,
    keep_tokens_separator="",
    caption_separator=",",
    secondary_separator=None,
    enable_wildcard=False,
    caption_prefix=None,
    caption_suffix=None,
    caption_dropout_rate=0.0,
    caption_dropout_every_n_epochs=0,
    caption_tag_dropout_rate=0.0,
    token_warmup_min=1,
    token_warmup_step=0.0,
    color_aug=False,
    flip_aug=False,
    random_crop=False,
    face_crop_aug_range=None,
    alpha_mask=False,
    custom_attributes=CustomAttributes(),
    resize_interpolation=None,
)

DATASET = DatasetSpec(
    resolution=(64, 64),
    batch_size=1,
    enable_bucket=True,
    min_bucket_reso=32,
    max_bucket_reso=128,
    bucket_reso_steps=16,
    bucket_no_upscale=False,
    network_multiplier=1.0,
    subsets=(),
)


def one_dataset(*subsets: SubsetSpec, like: DatasetSpec = DATASET) -> DatasetConfig:
    return DatasetConfig((replace(like, subsets=subsets),))


def picture(path: Path, width: int = 64, height: int = 64, *, seed: int = 0, caption: str | None = None) -> Path:
    """A picture of noise, which no resize or crop leaves as it was, with its caption beside it."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path
