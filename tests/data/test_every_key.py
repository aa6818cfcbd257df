"""Every key of a dataset file, in every table that it may stand in: it is read, it yields to nearer tables, and it does
something that can be seen."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.data.specs import picture
from trainer.data.batches import epoch_batches
from trainer.data.captions import CaptionCourse
from trainer.data.index import index_dataset
from trainer.data.items import DatasetIndex
from trainer.schema.cli import parse_command_line
from trainer.schema.dataset_advice import dataset_advice
from trainer.schema.dataset_file import read_dataset_config
from trainer.schema.dataset_keys import KEYS, DatasetConfig
from trainer.schema.options import Options

COMMAND = [
    "--resolution=64",
    "--min_bucket_reso=32",
    "--max_bucket_reso=128",
    "--bucket_reso_steps=16",
    "--caption_extension=.txt",
    "--masked_loss",
]
CAPTION = "red, {green|blue}, $one ||| two, three; four, five\nanother line, six"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pictures of different shapes, one of them transparent and one with a face, and all that keys point to."""
    folder = tmp_path_factory.mktemp("data")
    sizes = {"a": (64, 64), "b": (150, 60), "cat_200_60_20_20": (256, 128), "small": (40, 48)}
    for number, (name, size) in enumerate(sizes.items()):
        picture(folder / "images" / f"{name}.png", *size, seed=number)
        (folder / "images" / f"{name}.txt").write_text(CAPTION)
        (folder / "images" / f"{name}.caption").write_text("from the other file")
        picture(folder / "masks" / f"{name}.png", *size, seed=10 + number)
    Image.new("RGBA", (64, 64), (200, 0, 0, 100)).save(folder / "images" / "a.png")
    picture(folder / "others" / "other.png", caption="another folder")
    (folder / "meta.json").write_text(json.dumps({"a.png": {"caption": "listed"}}))
    return folder


CASES: Mapping[str, tuple[object, dict[str, object]]] = {
    "resolution": (96, {}),
    "batch_size": (2, {}),
    "enable_bucket": (True, {}),
    "min_bucket_reso": (64, {"enable_bucket": True}),
    "max_bucket_reso": (64, {"enable_bucket": True}),
    "bucket_reso_steps": (32, {"enable_bucket": True}),
    "bucket_no_upscale": (True, {"enable_bucket": True}),
    "network_multiplier": (0.5, {}),
    "validation_split": (0.5, {}),
    "validation_seed": (3, {"validation_split": 0.5}),
    "image_dir": ("others", {}),
    "metadata_file": ("meta.json", {}),
    "conditioning_data_dir": ("masks", {}),
    "num_repeats": (3, {}),
    "caption_extension": ("caption", {}),
    "class_tokens": ("cat", {"caption_extension": ".none"}),
    "cache_info": (True, {}),
    "is_reg": (True, {}),
    "shuffle_caption": (True, {}),
    "keep_tokens": (2, {"shuffle_caption": True}),
    "keep_tokens_separator": ("|||", {"shuffle_caption": True}),
    "secondary_separator": ("$", {}),
    "enable_wildcard": (True, {}),
    "caption_separator": (";", {"shuffle_caption": True}),
    "caption_prefix": ("before", {}),
    "caption_suffix": ("behind", {}),
    "caption_dropout_rate": (0.5, {}),
    "caption_dropout_every_n_epochs": (2, {}),
    "caption_tag_dropout_rate": (0.5, {}),
    "token_warmup_min": (3, {"token_warmup_step": 8}),
    "token_warmup_step": (8, {}),
    "color_aug": (True, {}),
    "flip_aug": (True, {}),
    "random_crop": (True, {}),
    "face_crop_aug_range": ([3.2, 6.4], {}),
    "alpha_mask": (True, {}),
    "custom_attributes": ({"diff_output_preservation": True}, {}),
    "resize_interpolation": ("nearest", {}),
    "picture_repeats": ({"a.png": 3}, {}),
}
"""Key -> another value than the usual one, and what else must be set for it to matter. Names of files are in `pictures`."""


def options() -> Options:
    return parse_command_line(COMMAND).options


def read(folder: Path, tables: Mapping[str, Mapping[str, object]]) -> DatasetConfig:
    """A dataset of `tables` (general, dataset, subset) beside another subset, which all keys leave alone."""
    subset = {"image_dir": str(folder / "images"), **tables.get("subset", {})}
    second = {"image_dir": str(folder / "second"), "num_repeats": 2}
    picture(folder / "second" / "z.png", caption="z")
    subsets = [subset] if "metadata_file" in subset else [subset, second]
    content = {"general": tables.get("general", {}), "datasets": [{**tables.get("dataset", {}), "subsets": subsets}]}
    path = folder / "dataset.json"
    path.write_text(json.dumps(content))
    return read_dataset_config(path, options())


def placed(folder: Path, key: str, value: object) -> object:
    return str(folder / str(value)) if key in ("image_dir", "metadata_file", "conditioning_data_dir") else value


def own_level(key: str) -> str:
    return "subset" if "subset" in KEYS[key].levels else "dataset"


def fingerprint(config: DatasetConfig) -> tuple[object, ...]:
    """Everything that training and its user get to see of the data."""
    index = index_dataset(config)
    course = CaptionCourse(num_steps=24, steps_per_epoch=6)
    return (
        [seen for epoch in (1, 2, 3) for seen in draws(index, epoch, course)],
        [item.path.name for item in index.validation],
        list(dataset_advice(config, options())),
    )


def draws(index: DatasetIndex, epoch: int, course: CaptionCourse) -> list[tuple[object, ...]]:
    return [
        (
            plan.size,
            len(plan.items),
            planned.item.path.name,
            planned.caption,
            planned.picture.identity,
            planned.colour,
            None if planned.mask is None else planned.mask.identity,
            planned.loss_weight,
            planned.is_preserved,
        )
        for plan in epoch_batches(index, 1, epoch, prior_loss_weight=0.5, course=course)
        for planned in plan.items
    ]


def test_the_cases_cover_every_key() -> None:
    assert list(CASES) == [key for key in CASES if key in KEYS]
    assert set(CASES) == set(KEYS)


@pytest.mark.parametrize("key", CASES)
def test_a_key_changes_what_is_trained_on_or_says_that_it_does_not(pictures: Path, key: str) -> None:
    value, setting = CASES[key]
    tables: dict[str, dict[str, Any]] = {"dataset": {}, "subset": {}}
    for name, entry in setting.items():
        tables[own_level(name)][name] = entry
    before = fingerprint(read(pictures, tables))
    assert fingerprint(read(pictures, tables)) == before
    tables[own_level(key)][key] = placed(pictures, key, value)
    assert fingerprint(read(pictures, tables)) != before


@pytest.mark.parametrize("key", CASES)
def test_a_key_is_read_in_every_table_and_the_nearest_one_wins(pictures: Path, key: str) -> None:
    value, setting = CASES[key]
    base: dict[str, dict[str, Any]] = {"general": {}, "dataset": {}, "subset": {}}
    for name, entry in setting.items():
        base[own_level(name)][name] = entry

    def found(**tables: object) -> object:
        merged = {level: {**base[level], **({key: tables[level]} if level in tables else {})} for level in base}
        (dataset,) = read(pictures, merged).datasets
        return getattr(dataset if own_level(key) == "dataset" else dataset.subsets[0], key)

    usual = found()
    chosen = placed(pictures, key, value)
    levels: list[str] = [*KEYS[key].levels]
    results = {level: found(**{level: chosen}) for level in levels}
    assert usual not in results.values()
    assert len({repr(result) for result in results.values()}) == 1
    changed = next(iter(results.values()))
    neutral = {True: False, False: True}.get(value) if isinstance(value, bool) else None
    if neutral is not None and len(levels) > 1:
        # False counts as a value: it hides what farther tables say.
        assert found(**{levels[0]: chosen, levels[-1]: neutral}) == usual
        assert found(**{levels[0]: neutral, levels[-1]: chosen}) == changed
    # A null, which only JSON has, is an absent value.
    assert found(**{levels[0]: chosen, levels[-1]: chosen if len(levels) == 1 else None}) == changed


@pytest.mark.parametrize("key", [key for key in CASES if KEYS[key].option is not None])
def test_an_option_stands_below_the_file(pictures: Path, key: str) -> None:
    value, setting = CASES[key]
    option = KEYS[key].option
    text = ",".join(str(part) for part in value) if isinstance(value, list) else str(value)
    command = [f"--{option}"] if value is True else [f"--{option}={text}"]
    path = pictures / "dataset.json"
    subset = {"image_dir": str(pictures / "images"), **{k: v for k, v in setting.items() if own_level(k) == "subset"}}
    dataset = {k: v for k, v in setting.items() if own_level(k) == "dataset"}
    path.write_text(json.dumps({"datasets": [{**dataset, "subsets": [subset]}]}))

    def found(words: list[str]) -> object:
        (read_dataset,) = read_dataset_config(path, parse_command_line(words).options).datasets
        return getattr(read_dataset if own_level(key) == "dataset" else read_dataset.subsets[0], key)

    assert found([*COMMAND, *command]) != found(COMMAND)
