"""Option groups: the pictures and captions, and what is computed from them once and kept.

The options of `DatasetOptions` are what a dataset file falls back on; `parse_resolution` reads the one that holds a size.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Final, Literal

from pydantic import BeforeValidator, Field

from trainer.schema.base import Opt
from trainer.schema.options_model import OptionGroup

CHANGES_PIXELS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "color_aug": "changes colours",
        "random_crop": "cuts pictures anew",
        "face_crop_aug_range": "cuts pictures anew",
    }
)
"""Options, and keys of a dataset file, with which a picture is not the same in every step."""

SIZE_STEP = 16
"""Pixels: the AE reduces a side by 8, and FLUX takes 2 x 2 latents as one token."""


def parse_resolution(value: object) -> tuple[int, int]:
    """(width, height) in pixels from `512`, `"512"`, `"512,768"` or `[512, 768]`.

    Raises `ValueError`, with a text that goes after the value ("must be ..."), also for sides that are no multiple of
    16: FLUX has no place for a rest.
    """
    if isinstance(value, (list, tuple)):
        parts = [str(part).strip() for part in value]  # pyright: ignore[reportUnknownVariableType]
    else:
        parts = [part.strip() for part in str(value).split(",")]
    if len(parts) not in (1, 2) or not all(re.fullmatch(r"[0-9]{1,6}", part) for part in parts):
        raise ValueError("must be a size such as 512, or width,height such as 768,512")
    width, height = int(parts[0]), int(parts[-1])
    if width < SIZE_STEP or height < SIZE_STEP:
        raise ValueError(f"must be at least {SIZE_STEP} pixels")
    if width % SIZE_STEP or height % SIZE_STEP:
        raise ValueError(f"must be a multiple of {SIZE_STEP}; {nearest_resolution(width, height)} is near")
    return width, height


def nearest_resolution(width: int, height: int) -> str:
    """The allowed size closest to this one, as the option is written."""
    sides = [max(SIZE_STEP, (side + SIZE_STEP // 2) // SIZE_STEP * SIZE_STEP) for side in (width, height)]
    return str(sides[0]) if width == height else f"{sides[0]},{sides[1]}"


def plain_resolution(value: object) -> object:
    """A resolution in the one way that it is kept, `512` or `512,768`. Raises `ValueError` as `parse_resolution` does."""
    if value is None:
        return None
    width, height = parse_resolution(value)
    return str(width) if width == height else f"{width},{height}"


def parse_face_crop_range(value: object) -> tuple[float, float]:
    """(least, most) from `"2,4"` or `[2, 4]`: how many times a face's longer side the crop's shorter one is.

    Raises `ValueError`, with a text that goes after the value ("must be ...").
    """
    text = ",".join(str(part) for part in value) if isinstance(value, (list, tuple)) else str(value)
    parts = text.split(",")
    try:
        least, most = (float(part) for part in parts)
    except ValueError:
        raise ValueError("must be two numbers such as 2,4") from None
    if not 0 < least <= most < math.inf:
        raise ValueError("must be two numbers above 0, the smaller one first")
    return least, most


def plain_face_crop_range(value: object) -> object:
    """A range in the one way that it is kept, `2,4`. Raises `ValueError` as `parse_face_crop_range` does."""
    return None if value is None else ",".join(f"{number:g}" for number in parse_face_crop_range(value))


class DatasetOptions(OptionGroup):
    """Pictures and captions; a dataset file's own values win over these."""

    dataset_config: Annotated[Path | None, Opt("Dataset file, .toml or .json.", "Dataset file", "basic")] = None
    train_data_dir: Annotated[
        Path | None, Opt("Folder with folders named like 10_mycat (repeats, words).", "Pictures", "advanced")
    ] = None
    reg_data_dir: Annotated[
        Path | None, Opt("The same for regularisation pictures.", "Regularisation pictures", "expert")
    ] = None
    in_json: Annotated[
        Path | None,
        Opt("Metadata file, .json or .jsonl, with pictures and captions; train_data_dir is their folder.", "Metadata"),
    ] = None
    dataset_repeats: Annotated[
        int,
        Field(ge=1),
        Opt("Repeats of a picture in an epoch where the dataset file says nothing.", "Repeats", "expert"),
    ] = 1
    resolution: Annotated[
        str | None,
        BeforeValidator(plain_resolution),
        Opt("Training size: 512, or width,height; a multiple of 16.", "Resolution", "basic", "pixels"),
    ] = None
    train_batch_size: Annotated[int, Field(ge=1), Opt("Pictures in one step.", "Batch size", "basic")] = 1
    enable_bucket: Annotated[
        bool, Opt("Train on each picture's own shape instead of cropping all to one.", "Aspect buckets", "advanced")
    ] = False
    min_bucket_reso: Annotated[
        int, Field(ge=16), Opt("Shortest side of a bucket.", "Shortest side", "expert", "pixels")
    ] = 256
    max_bucket_reso: Annotated[
        int, Field(ge=16), Opt("Longest side of a bucket.", "Longest side", "expert", "pixels")
    ] = 1024
    bucket_reso_steps: Annotated[
        int, Field(ge=16), Opt("Sides of buckets are multiples of this.", "Bucket steps", "expert", "pixels")
    ] = 64
    bucket_no_upscale: Annotated[bool, Opt("Never enlarge a picture.", "Never enlarge", "advanced")] = False
    resize_interpolation: Annotated[
        Literal["lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area"] | None,
        Opt("How pictures are resized. Empty: area to shrink, lanczos to enlarge.", "Resizing", "expert"),
    ] = None
    caption_extension: Annotated[
        str, Field(min_length=1), Opt("Ending of caption files.", "Caption files", "advanced")
    ] = ".caption"
    caption_extention: Annotated[
        str | None, Opt("Misspelt old name of caption_extension.", "Caption files", "expert")
    ] = None
    caption_separator: Annotated[
        str, Field(min_length=1), Opt("What separates a caption's parts.", "Caption separator", "expert")
    ] = ","
    caption_prefix: Annotated[str | None, Opt("Put before every caption.", "Before captions", "advanced")] = None
    caption_suffix: Annotated[str | None, Opt("Put after every caption.", "After captions", "advanced")] = None
    shuffle_caption: Annotated[bool, Opt("Shuffle the parts of captions in every step.", "Shuffle captions")] = False
    keep_tokens: Annotated[int, Field(ge=0), Opt("First parts that stay in place.", "Keep parts", "advanced")] = 0
    keep_tokens_separator: Annotated[
        str,
        Opt(
            "Stands in a caption once or twice: what is before the first one and after the second one stays in place.",
            "Separator of kept parts",
            "expert",
        ),
    ] = ""
    secondary_separator: Annotated[
        str | None,
        Field(min_length=1),
        Opt(
            "Becomes caption_separator in the end: parts that it joins stay together until then.",
            "Second separator",
            "expert",
        ),
    ] = None
    enable_wildcard: Annotated[
        bool,
        Opt(
            "Draw one line of each caption, and one option of each {a|b} in it; {{ and }} stand for braces.",
            "Wildcards",
            "advanced",
        ),
    ] = False
    caption_tag_dropout_rate: Annotated[
        float, Field(ge=0, le=1), Opt("How often each part of a caption is left out, 0 to 1.", "Part dropout")
    ] = 0.0
    token_warmup_min: Annotated[
        int, Field(ge=0), Opt("Parts of a caption at the start of a token warm-up.", "Parts at first", "expert")
    ] = 1
    token_warmup_step: Annotated[
        float,
        Field(ge=0),
        Opt(
            "Steps until captions have all their parts, or a part of the run below 1. 0: from the start.",
            "Token warm-up",
            "expert",
            "steps",
        ),
    ] = 0.0
    caption_dropout_every_n_epochs: Annotated[
        int,
        Field(ge=0),
        Opt("Every Nth epoch leaves all captions empty. 0: none.", "Epochs without captions", "expert"),
    ] = 0
    caption_dropout_rate: Annotated[
        float, Field(ge=0, le=1), Opt("How often a caption is left empty, 0 to 1.", "Caption dropout", "advanced")
    ] = 0.0
    color_aug: Annotated[
        bool, Opt("Change hue or brightness a little, in one draw of three.", "Vary colours", "expert")
    ] = False
    flip_aug: Annotated[bool, Opt("Mirror pictures at random.", "Mirror", "advanced")] = False
    random_crop: Annotated[bool, Opt("Crop at random instead of in the middle.", "Random crop", "advanced")] = False
    face_crop_aug_range: Annotated[
        str | None,
        BeforeValidator(plain_face_crop_range),
        Opt(
            "Cut around faces: how many times the face the crop is, as 2,4. Without buckets only.",
            "Face crop",
            "expert",
        ),
    ] = None
    alpha_mask: Annotated[
        bool, Opt("Transparent parts of pictures count less in the loss.", "Transparency as mask", "advanced")
    ] = False
    max_data_loader_n_workers: Annotated[
        int,
        Field(ge=0, le=256),
        Opt(
            "Threads that read and decode pictures, or read what is cached of them, ahead of their step. 0: none, each "
            "step reads its own. The batches are the same.",
            "Reading threads",
            "expert",
        ),
    ] = 8
    debug_dataset: Annotated[
        bool,
        Opt(
            "Print every batch of the first epoch, with pictures, captions and crops as they would be drawn, and stop.",
            "Print the batches only",
            "expert",
        ),
    ] = False


class CacheOptions(OptionGroup):
    """What is computed once instead of in every step."""

    cache_latents: Annotated[
        bool, Opt("Encode pictures once and free the autoencoder.", "Keep encoded pictures", "advanced")
    ] = False
    cache_latents_to_disk: Annotated[
        bool, Opt("Keep encoded pictures on disk for the next run too.", "Encoded pictures on disk", "advanced")
    ] = False
    skip_cache_check: Annotated[
        bool,
        Opt(
            "Do not read cached files at the start to see whether they are whole; each is checked when it is used.",
            "Trust cached files",
            "expert",
        ),
    ] = False
    vae_batch_size: Annotated[int, Field(ge=1), Opt("Pictures encoded at once.", "Encoding batch", "expert")] = 1
    cache_text_encoder_outputs: Annotated[
        bool, Opt("Encode captions once and free the text encoders.", "Keep encoded captions", "advanced")
    ] = False
    caption_variants: Annotated[
        int,
        Field(ge=1),
        Opt(
            "Texts encoded for each caption that is shuffled, loses parts or has wildcards, beside the empty one.",
            "Encoded variants",
            "expert",
        ),
    ] = 8
    cache_text_encoder_outputs_to_disk: Annotated[
        bool, Opt("Keep encoded captions on disk for the next run too.", "Encoded captions on disk", "advanced")
    ] = False
    write_reference_caches: Annotated[
        bool,
        Opt(
            "What is kept on disk is also written as cache files of sd-scripts beside the pictures; of a caption with "
            "several variants the plain one. Files of sd-scripts itself are never changed.",
            "Caches for sd-scripts",
            "expert",
        ),
    ] = False
    text_encoder_batch_size: Annotated[
        int | None, Field(ge=1), Opt("Captions encoded at once. Empty: the batch size.", "Caption batch", "expert")
    ] = None
