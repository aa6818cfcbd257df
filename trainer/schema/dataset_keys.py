"""The dataset language: what a dataset is made of, and every key with where it may stand and how it is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final, Literal, cast

from trainer.schema.base import with_home
from trainer.schema.options_data import SIZE_STEP, parse_face_crop_range, parse_resolution


@dataclass(frozen=True)
class CustomAttributes:
    """What a subset says of its pictures beyond the keys.

    With `diff_output_preservation` they are not learnt: the network is held to what the model makes of them without
    it. `unknown` are the names of other attributes, which mean nothing here nor in the reference's trainer.
    """

    diff_output_preservation: bool = False
    unknown: tuple[str, ...] = ()


@dataclass(frozen=True)
class SubsetSpec:
    """One folder of pictures, or the pictures that a metadata file lists.

    `image_dir` is None only beside a `metadata_file` that holds whole paths. `conditioning_data_dir` holds a mask for
    each picture. `class_tokens` is the caption of pictures without one; `resize_interpolation` None means area to shrink
    and lanczos to enlarge; `face_crop_aug_range` is how many times longer than the face the crop's short side is.
    `picture_repeats` are file names with what multiplies `num_repeats` for them.
    """

    image_dir: Path | None
    metadata_file: Path | None
    conditioning_data_dir: Path | None
    num_repeats: int
    caption_extension: str
    class_tokens: str | None
    cache_info: bool
    is_reg: bool
    shuffle_caption: bool
    keep_tokens: int
    keep_tokens_separator: str
    caption_separator: str
    secondary_separator: str | None
    enable_wildcard: bool
    caption_prefix: str | None
    caption_suffix: str | None
    caption_dropout_rate: float
    caption_dropout_every_n_epochs: int
    caption_tag_dropout_rate: float
    token_warmup_min: int
    token_warmup_step: float
    color_aug: bool
    flip_aug: bool
    random_crop: bool
    face_crop_aug_range: tuple[float, float] | None
    alpha_mask: bool
    custom_attributes: CustomAttributes
    resize_interpolation: str | None
    picture_repeats: tuple[tuple[str, int], ...] = ()

    @property
    def place(self) -> Path:
        """What messages call the subset: its folder, or its metadata file."""
        place = self.image_dir or self.metadata_file
        if place is None:
            raise AssertionError("a subset has a folder or a metadata file")
        return place

    @property
    def has_masks(self) -> bool:
        """Whether its pictures may come with a mask for the loss."""
        return self.alpha_mask or self.conditioning_data_dir is not None


@dataclass(frozen=True)
class DatasetSpec:
    """Subsets that are trained at one resolution (width, height), in pixels, and one batch size.

    `network_multiplier` is read and has no effect, in the reference neither.
    """

    resolution: tuple[int, int]
    batch_size: int
    enable_bucket: bool
    min_bucket_reso: int
    max_bucket_reso: int
    bucket_reso_steps: int
    bucket_no_upscale: bool
    network_multiplier: float
    subsets: tuple[SubsetSpec, ...]
    validation_split: float = 0.0
    validation_seed: int | None = None


@dataclass(frozen=True)
class DatasetConfig:
    """Everything that training draws pictures from.

    `overridden` are options that have a value, and the dataset file another one wherever they would count.
    """

    datasets: tuple[DatasetSpec, ...]
    overridden: tuple[str, ...] = ()


Level = Literal["general", "dataset", "subset"]
TITLES: Final[Mapping[Level, str]] = MappingProxyType(
    {"general": "[general]", "dataset": "[[datasets]]", "subset": "[[datasets.subsets]]"}
)
_PRESERVATION: Final = "diff_output_preservation"
RESIZE_CHOICES: Final = ("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box")


def _switch(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError('must be text in "quotes"')
    return value


def _filled_text(value: object) -> str:
    text = _text(value)
    if not text:
        raise ValueError("must be at least one character")
    return text


def _text_or_none(value: object) -> str | None:
    return _text(value) or None


def _ending(value: object) -> str:
    text = _filled_text(value)
    return text if text.startswith(".") else f".{text}"


def _whole(lowest: int) -> Callable[[object], int]:
    def read(value: object) -> int:
        if type(value) is not int or value < lowest:
            raise ValueError(f"must be a whole number, {lowest} or more")
        return value

    return read


def _part(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError("must be a number, 0 to 1")
    return float(value)


def _part_below_one(value: object) -> float:
    part = _part(value)
    if part == 1:
        raise ValueError("must be a number, at least 0 and below 1")
    return part


def _steps(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError("must be a number, 0 or more")
    return float(value)


def _side_steps(value: object) -> int:
    if type(value) is not int or value < SIZE_STEP or value % SIZE_STEP:
        raise ValueError(f"must be a multiple of {SIZE_STEP}")
    return value


def _resizing(value: object) -> str:
    if value not in RESIZE_CHOICES:
        raise ValueError(f"must be one of {', '.join(RESIZE_CHOICES)}")
    return cast("str", value)


def _path(value: object) -> Path:
    return Path(with_home(_filled_text(value)))


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError("must be a number")
    return float(value)


def _repeats_by_name(value: object) -> tuple[tuple[str, int], ...]:
    read = _whole(1)
    if not isinstance(value, dict):
        raise ValueError('must be a table, such as {"a.png" = 3}')
    try:
        return tuple((name, read(times)) for name, times in cast("dict[str, object]", value).items())
    except ValueError as error:
        raise ValueError(f"{error}, for each picture") from None


def _attributes(value: object) -> CustomAttributes:
    if not isinstance(value, dict):
        raise ValueError("must be a table, such as {diff_output_preservation = true}")
    given = dict(cast("dict[str, object]", value))
    preserves = given.pop(_PRESERVATION, False)
    if not isinstance(preserves, bool):
        raise ValueError(f"must say true or false for {_PRESERVATION}")
    return CustomAttributes(preserves, tuple(given))


@dataclass(frozen=True)
class Key:
    """A key of a dataset file: the tables that it may stand in, how it is read, and the option below the file.

    `reads_option` says that the option's value is text, to be read as the file's is.
    """

    levels: tuple[Level, ...]
    read: Callable[[object], object]
    option: str | None = None
    default: object = None
    reads_option: bool = False


_UPPER: Final[tuple[Level, ...]] = ("general", "dataset")
_ALL: Final[tuple[Level, ...]] = (*_UPPER, "subset")
DATASET_KEYS: Final[Mapping[str, Key]] = MappingProxyType(
    {
        "resolution": Key(_UPPER, parse_resolution, "resolution", reads_option=True),
        "batch_size": Key(_UPPER, _whole(1), "train_batch_size"),
        "enable_bucket": Key(_UPPER, _switch, "enable_bucket"),
        "min_bucket_reso": Key(_UPPER, _whole(SIZE_STEP), "min_bucket_reso"),
        "max_bucket_reso": Key(_UPPER, _whole(SIZE_STEP), "max_bucket_reso"),
        "bucket_reso_steps": Key(_UPPER, _side_steps, "bucket_reso_steps"),
        "bucket_no_upscale": Key(_UPPER, _switch, "bucket_no_upscale"),
        "validation_split": Key(_UPPER, _part_below_one, "validation_split"),
        "validation_seed": Key(_UPPER, _whole(0), "validation_seed"),
        "network_multiplier": Key(_UPPER, _number, default=1.0),
    }
)
SUBSET_KEYS: Final[Mapping[str, Key]] = MappingProxyType(
    {
        "image_dir": Key(("subset",), _path),
        "metadata_file": Key(("subset",), _path),
        "conditioning_data_dir": Key(("subset",), _path),
        "num_repeats": Key(_ALL, _whole(0), "dataset_repeats"),
        "caption_extension": Key(_ALL, _ending, "caption_extension"),
        "class_tokens": Key(_ALL, _text),
        "cache_info": Key(_ALL, _switch, default=False),
        "is_reg": Key(("subset",), _switch, default=False),
        "shuffle_caption": Key(_ALL, _switch, "shuffle_caption"),
        "keep_tokens": Key(_ALL, _whole(0), "keep_tokens"),
        "keep_tokens_separator": Key(_ALL, _text, "keep_tokens_separator"),
        "caption_separator": Key(_ALL, _filled_text, "caption_separator"),
        "secondary_separator": Key(_ALL, _text_or_none, "secondary_separator"),
        "enable_wildcard": Key(_ALL, _switch, "enable_wildcard"),
        "caption_prefix": Key(_ALL, _text, "caption_prefix"),
        "caption_suffix": Key(_ALL, _text, "caption_suffix"),
        "caption_dropout_rate": Key(_ALL, _part, "caption_dropout_rate"),
        "caption_dropout_every_n_epochs": Key(_ALL, _whole(0), "caption_dropout_every_n_epochs"),
        "caption_tag_dropout_rate": Key(_ALL, _part, "caption_tag_dropout_rate"),
        "token_warmup_min": Key(_ALL, _whole(0), "token_warmup_min"),
        "token_warmup_step": Key(_ALL, _steps, "token_warmup_step"),
        "color_aug": Key(_ALL, _switch, "color_aug"),
        "flip_aug": Key(_ALL, _switch, "flip_aug"),
        "random_crop": Key(_ALL, _switch, "random_crop"),
        "face_crop_aug_range": Key(_ALL, parse_face_crop_range, "face_crop_aug_range", reads_option=True),
        "alpha_mask": Key(("subset",), _switch, "alpha_mask"),
        "custom_attributes": Key(_ALL, _attributes, default=CustomAttributes()),
        "resize_interpolation": Key(_ALL, _resizing, "resize_interpolation"),
        "picture_repeats": Key(("subset",), _repeats_by_name, default=()),
    }
)
KEYS: Final[Mapping[str, Key]] = MappingProxyType({**DATASET_KEYS, **SUBSET_KEYS})

REFUSED_KEYS: Final[Mapping[str, tuple[object, str]]] = MappingProxyType({})
"""Keys of the reference's dataset files that are not carried out: the value that changes nothing, and the reason."""

RENAMED: Final[Mapping[str, str]] = MappingProxyType(
    {
        "train_batch_size": "batch_size",
        "dataset_repeats": "num_repeats",
        "caption_extention": "caption_extension",
        "train_data_dir": "image_dir",
        "in_json": "metadata_file",
    }
)
"""Names that are options, and what they are called in a dataset file."""

NOT_WITH_METADATA: Final = ("caption_extension", "class_tokens", "cache_info", "is_reg")
"""Keys of subsets of folders alone, which no subset with a metadata file may have itself."""
