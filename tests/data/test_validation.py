"""Pictures held back for validation: no overlap with training, the same in every run, captions without chance."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.data.specs import DATASET, SUBSET, one_dataset, picture
from trainer.data.index import index_dataset
from trainer.data.items import DatasetIndex
from trainer.data.validation import validation_batches, validation_caption
from trainer.schema.base import UserError
from trainer.schema.dataset_keys import DatasetConfig, SubsetSpec


def folder(path: Path, count: int, *, first: int = 0, width: int = 64) -> SubsetSpec:
    for number in range(first, first + count):
        picture(path / f"{number:03d}.png", width, 64, seed=number, caption=f"cat {number}, b, c")
    return replace(SUBSET, image_dir=path)


def held(index: DatasetIndex) -> set[str]:
    return {item.digest for item in index.validation}


def trained(index: DatasetIndex) -> set[str]:
    return {item.digest for item in index.items}


def split(share: float, *subsets: SubsetSpec, seed: int | None = None) -> DatasetIndex:
    like = replace(DATASET, validation_split=share, validation_seed=seed)
    return index_dataset(one_dataset(*subsets, like=like))


@pytest.mark.parametrize(("count", "share", "num_held"), [(10, 0.2, 2), (3, 0.5, 2), (10, 0.01, 1), (2, 0.9, 1)])
def test_the_split_is_whole_pictures_and_never_overlaps(
    tmp_path: Path, count: int, share: float, num_held: int
) -> None:
    index = split(share, replace(folder(tmp_path, count), num_repeats=3))
    assert len(index.validation) == num_held
    assert len(index.items) == count - num_held
    assert not held(index) & trained(index)
    assert {item.num_repeats for item in index.validation} == {1}
    assert index.num_batches_per_epoch == 3 * (count - num_held)
    assert index.datasets[0].num_train_images == 3 * (count - num_held)


def test_copies_and_other_datasets_do_not_train_on_what_is_held_back(tmp_path: Path) -> None:
    first = folder(tmp_path / "first", 8)
    for name in ("000.png", "001.png", "002.png", "003.png"):
        (tmp_path / "reg").mkdir(exist_ok=True)
        shutil.copy(tmp_path / "first" / name, tmp_path / "reg" / f"reg-{name}")
        shutil.copy(tmp_path / "first" / name, tmp_path / "first" / f"copy-of-{name}")
    reg = replace(SUBSET, image_dir=tmp_path / "reg", is_reg=True)
    large = replace(DATASET, resolution=(96, 96), subsets=(first,))
    config = DatasetConfig((replace(DATASET, validation_split=0.5, subsets=(first, reg)), large))
    index = index_dataset(config)
    assert len(held(index)) == 4, "a copy is the same picture"
    assert len(index.validation) == 4, "validated on once, and only where the dataset says so"
    assert not held(index) & trained(index)


def test_the_choice_follows_from_content_and_seed_alone(tmp_path: Path) -> None:
    subset = folder(tmp_path / "a", 12)
    first = held(split(0.25, subset))
    (tmp_path / "b").mkdir()
    for number, path in enumerate(sorted((tmp_path / "a").glob("*.png"), reverse=True)):
        shutil.copy(path, tmp_path / "b" / f"{number}.png")
        path.with_suffix(".txt").replace(tmp_path / "b" / f"{number}.txt")
    assert held(split(0.25, replace(SUBSET, image_dir=tmp_path / "b"))) == first
    assert held(split(0.25, replace(SUBSET, image_dir=tmp_path / "b"), seed=5)) != first


def test_a_single_picture_is_not_held_back_and_says_so(tmp_path: Path) -> None:
    index = split(0.5, folder(tmp_path, 1))
    assert not index.validation
    assert any("too few different pictures" in warning for warning in index.warnings)


def test_other_datasets_may_leave_nothing_to_train_on(tmp_path: Path) -> None:
    both = folder(tmp_path / "a", 2)
    config = DatasetConfig(
        (
            replace(DATASET, validation_split=0.5, validation_seed=1, subsets=(both,)),
            replace(DATASET, validation_split=0.5, validation_seed=2, subsets=(both,)),
            replace(DATASET, validation_split=0.5, validation_seed=3, subsets=(both,)),
            replace(DATASET, validation_split=0.5, validation_seed=5, subsets=(both,)),
        )
    )
    with pytest.raises(UserError, match="leaves no picture to train on"):
        index_dataset(config)


def test_captions_of_validation_have_nothing_random(tmp_path: Path) -> None:
    rules = replace(
        folder(tmp_path, 4),
        shuffle_caption=True,
        caption_dropout_rate=0.9,
        caption_tag_dropout_rate=0.9,
        token_warmup_step=100.0,
        caption_prefix="photo of",
    )
    (item,) = split(0.25, rules).validation
    assert validation_caption(item) == f"photo of {item.caption}"


def test_batches_are_of_one_size_in_a_fixed_order_and_take_turns(tmp_path: Path) -> None:
    square, wide = folder(tmp_path / "a", 6), folder(tmp_path / "b", 6, first=6, width=128)
    index = split(0.5, square, replace(wide, flip_aug=True))
    batches = validation_batches(index.validation, [2], limit=3)
    assert [(batch.size, len(batch.items)) for batch in batches] == [((64, 64), 2), ((80, 48), 2), ((64, 64), 1)]
    everything = validation_batches(index.validation, [4])
    assert sorted(p.item.digest for batch in everything for p in batch.items) == sorted(held(index))
    assert not any(planned.is_flipped for batch in everything for planned in batch.items)
