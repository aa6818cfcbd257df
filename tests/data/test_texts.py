from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from tests.data.specs import SUBSET, one_dataset, picture
from trainer.data.batches import epoch_batches
from trainer.data.captions import CaptionCourse
from trainer.data.index import index_dataset
from trainer.data.items import DatasetIndex
from trainer.data.texts import run_texts
from trainer.schema.dataset_keys import SubsetSpec

COURSE = CaptionCourse(num_steps=12, steps_per_epoch=4, num_variants=3)


def index_of(folder: Path, rules: SubsetSpec) -> DatasetIndex:
    for number in range(4):
        caption = f"n{number}, a, b, c, d, e, f\n{{x|y}}, n{number}"
        picture(folder / f"{number}.png", seed=number, caption=caption)
    return index_dataset(one_dataset(replace(rules, image_dir=folder)))


def drawn_texts(index: DatasetIndex, course: CaptionCourse, seed: int) -> set[str]:
    plans = (plan for epoch in (1, 2, 3) for plan in epoch_batches(index, seed, epoch, course=course))
    return {planned.caption for plan in plans for planned in plan.items}


@pytest.mark.parametrize(
    "rules",
    [
        SUBSET,
        replace(SUBSET, shuffle_caption=True, keep_tokens=1, caption_prefix="new"),
        replace(SUBSET, enable_wildcard=True, caption_dropout_rate=0.3),
        replace(SUBSET, caption_tag_dropout_rate=0.4, caption_dropout_every_n_epochs=2),
        replace(SUBSET, shuffle_caption=True, token_warmup_step=7, token_warmup_min=1),
        replace(SUBSET, token_warmup_step=0.99),
    ],
)
def test_a_run_draws_no_text_that_was_not_listed(tmp_path: Path, rules: SubsetSpec) -> None:
    index = index_of(tmp_path, rules)
    for seed in range(8):
        assert drawn_texts(index, COURSE, seed) <= set(run_texts(index, COURSE, seed))


def test_variants_and_the_empty_caption_are_counted(tmp_path: Path) -> None:
    index = index_of(tmp_path, replace(SUBSET, shuffle_caption=True, caption_dropout_rate=0.1))
    texts = run_texts(index, COURSE, seed=1)
    assert len(texts) == 4 * 3 + 1
    assert "" in texts
    assert set(texts.values()) == {tmp_path}
    assert list(run_texts(index, COURSE, seed=2)) == list(texts)


def test_a_warm_up_lists_what_its_steps_draw_and_the_whole_captions(tmp_path: Path) -> None:
    index = index_of(tmp_path, replace(SUBSET, token_warmup_step=4, token_warmup_min=2))
    texts = run_texts(index, COURSE, seed=1)
    # 7 parts in 4 steps from 2 on: 2, 3, 4, 5 of them, one picture each; then all
    lengths = sorted(len(text.split(", ")) for text in texts)
    assert lengths == [2, 3, 4, 5, 7, 7, 7, 7]


def test_steps_count_whole_accumulations_of_all_processes(tmp_path: Path) -> None:
    index = index_of(tmp_path, replace(SUBSET, token_warmup_step=4, token_warmup_min=2))
    course = CaptionCourse(num_steps=6, steps_per_epoch=2, batches_per_step=2)

    def lengths(epoch: int) -> list[int]:
        return [len(plan.items[0].caption.split(", ")) for plan in epoch_batches(index, 1, epoch, course=course)]

    assert lengths(1) == [2, 2, 3, 3]
    assert lengths(2) == [4, 4, 5, 5]
    assert lengths(3) == [7, 7, 7, 7]


def test_words_do_not_decide_how_a_picture_is_cut(tmp_path: Path) -> None:
    plain = index_of(tmp_path, replace(SUBSET, flip_aug=True))
    shuffled = index_of(tmp_path, replace(SUBSET, flip_aug=True, shuffle_caption=True, caption_dropout_rate=0.5))
    flips = [
        [planned.is_flipped for epoch in range(9) for plan in epoch_batches(index, 3, epoch) for planned in plan.items]
        for index in (plain, shuffled)
    ]
    assert flips[0] == flips[1]
    assert 0 < sum(flips[0]) < len(flips[0])


def test_an_epoch_with_every_rule_is_a_function_of_items_seed_and_epoch(tmp_path: Path) -> None:
    rules = replace(
        SUBSET,
        shuffle_caption=True,
        enable_wildcard=True,
        caption_tag_dropout_rate=0.2,
        caption_dropout_rate=0.1,
        token_warmup_step=5,
        flip_aug=True,
    )
    index = index_of(tmp_path, rules)
    random.seed(1)
    first = epoch_batches(index, 3, 2, course=COURSE)
    random.seed(2)
    epoch_batches(index, 3, 1, course=COURSE)
    assert epoch_batches(index, 3, 2, course=COURSE) == first
    assert epoch_batches(index, 4, 2, course=COURSE) != first
    assert epoch_batches(index, 3, 3, course=COURSE) != first
