from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from tests.data.specs import DATASET, SUBSET, picture
from trainer.data.batches import epoch_batches, share_of_rank
from trainer.data.index import index_dataset
from trainer.data.items import DatasetIndex
from trainer.schema.dataset_keys import DatasetConfig


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> DatasetIndex:
    """7 pictures of two shapes drawn 3 times in batches of 2, 2 for regularisation, and the 7 again at another size."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(7):
        size = (64, 64) if number % 2 else (120, 60)
        picture(folder / "train" / f"{number}.png", *size, seed=number, caption=f"n{number}, a, b, c")
    for number in range(2):
        picture(folder / "reg" / f"{number}.png", 90, 64, seed=number, caption="cat")
    train = replace(
        SUBSET, image_dir=folder / "train", num_repeats=3, flip_aug=True, shuffle_caption=True, keep_tokens=1
    )
    reg = replace(SUBSET, image_dir=folder / "reg", is_reg=True)
    small = replace(DATASET, batch_size=2, subsets=(train, reg))
    large = replace(DATASET, resolution=(128, 128), subsets=(replace(train, random_crop=True, num_repeats=1),))
    return index_dataset(DatasetConfig((small, large)))


def test_an_epoch_is_a_function_of_index_seed_and_epoch(index: DatasetIndex) -> None:
    first = epoch_batches(index, 42, 3)
    assert epoch_batches(index, 42, 3) == first
    assert epoch_batches(index, 42, 4) != first
    assert epoch_batches(index, 43, 3) != first


def test_every_item_is_drawn_as_often_as_it_repeats(index: DatasetIndex) -> None:
    plans = epoch_batches(index, 1, 1)
    drawn = Counter(planned.item for plan in plans for planned in plan.items)
    assert drawn == {item: item.num_repeats for item in index.items}
    assert sum(drawn.values()) == 21 + 21 + 7
    assert len(plans) == index.num_batches_per_epoch


def test_a_batch_has_one_size_one_dataset_and_only_the_last_of_a_bucket_is_short(index: DatasetIndex) -> None:
    plans = epoch_batches(index, 1, 1)
    for plan in plans:
        assert {planned.item.bucket for planned in plan.items} == {plan.size}
        assert len({planned.item.dataset for planned in plan.items}) == 1
    lengths = Counter(len(plan.items) for plan in plans if plan.items[0].item.dataset == 0)
    # buckets of 12 and 9 draws of training pictures and 21 of the others
    assert lengths == {2: 6 + 4 + 10, 1: 2}


def test_batches_of_different_sizes_and_datasets_are_mixed(index: DatasetIndex) -> None:
    plans = epoch_batches(index, 1, 1)
    assert [plan.size for plan in plans] != sorted(plan.size for plan in plans)
    firsts = {epoch_batches(index, 1, epoch)[0].items[0].item.path.name for epoch in range(40)}
    assert len(firsts) > 3


def test_the_company_of_a_picture_changes_from_epoch_to_epoch(index: DatasetIndex) -> None:
    pairs = {
        tuple(sorted(each.item.path.name for each in plan.items))
        for epoch in range(40)
        for plan in epoch_batches(index, 1, epoch)
        if plan.size == (64, 64) and len(plan.items) == 2 and plan.items[0].item.dataset == 0
    }
    assert len(pairs) == 6


def test_repeats_of_one_item_are_drawn_independently(index: DatasetIndex) -> None:
    planned = [each for epoch in range(40) for plan in epoch_batches(index, 5, epoch) for each in plan.items]
    first_epoch = [each for plan in epoch_batches(index, 5, 0) for each in plan.items if each.item in index.items[:7]]
    mixed = {each.item.path for each in first_epoch if each.is_flipped} & {
        each.item.path for each in first_epoch if not each.is_flipped
    }
    assert len(mixed) >= 3
    flips = [each.is_flipped for each in planned if each.item.subset.flip_aug]
    assert sum(flips) / len(flips) == pytest.approx(0.5, abs=0.05)
    assert not any(each.is_flipped for each in planned if each.item.is_reg)
    assert len({each.caption for each in planned if each.item is index.items[0]}) == 6
    crops = {each.crop for each in planned if each.item.dataset == 1 and each.item.path.name == "0.png"}
    fit = next(item.fit for item in index.items if item.dataset == 1)
    assert crops == {(left, 0) for left in range(fit.resized[0] - fit.bucket[0] + 1)}
    assert len({each.crop for each in planned if each.item is index.items[0]}) == 1


def test_decisions_do_not_depend_on_how_batches_are_cut(index: DatasetIndex) -> None:
    single = replace(
        index, datasets=tuple(replace(each, spec=replace(each.spec, batch_size=1)) for each in index.datasets)
    )

    def decisions(of: DatasetIndex) -> Counter[tuple[str, bool, tuple[int, int], str]]:
        planned = (each for plan in epoch_batches(of, 9, 2) for each in plan.items)
        return Counter((str(each.item.path), each.is_flipped, each.crop, each.caption) for each in planned)

    assert decisions(single) == decisions(index)


def test_regularisation_pictures_carry_the_prior_weight(index: DatasetIndex) -> None:
    planned = [each for plan in epoch_batches(index, 1, 1, prior_loss_weight=0.25) for each in plan.items]
    assert {each.loss_weight for each in planned if each.item.is_reg} == {0.25}
    assert {each.loss_weight for each in planned if not each.item.is_reg} == {1.0}


def test_a_planned_picture_holds_all_that_decides_its_pixels(index: DatasetIndex) -> None:
    planned = epoch_batches(index, 1, 1)[0].items[0]
    assert planned.picture == planned.item.picture(planned.crop, is_flipped=planned.is_flipped)
    assert planned.picture.bucket == planned.item.bucket


@pytest.mark.parametrize("num_processes", [1, 2, 3, 8, 100])
def test_processes_share_all_batches_in_equal_numbers(index: DatasetIndex, num_processes: int) -> None:
    plans = epoch_batches(index, 1, 1)
    shares = [share_of_rank(plans, rank, num_processes) for rank in range(num_processes)]
    assert {len(share) for share in shares} == {-(-len(plans) // num_processes)}
    together = [plan for turn in zip(*shares, strict=True) for plan in turn]
    assert together[: len(plans)] == plans
