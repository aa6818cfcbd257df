from __future__ import annotations

import random
from dataclasses import replace

import pytest

from tests.data.specs import SUBSET
from trainer.data.captions import caption_variants, draw_caption, tag_frequency


def test_an_untouched_caption_keeps_its_separators() -> None:
    assert draw_caption("a cat,on  a mat ;red", SUBSET, random.Random(0)) == "a cat,on  a mat ;red"


def test_prefix_and_suffix_are_joined_with_one_space() -> None:
    rules = replace(SUBSET, caption_prefix="photo of", caption_suffix="in rain")
    assert draw_caption("a cat", rules, random.Random(0)) == "photo of a cat in rain"


def test_shuffling_keeps_the_first_parts_and_loses_none() -> None:
    rules = replace(SUBSET, shuffle_caption=True, keep_tokens=2)
    rng = random.Random(1)
    drawn = {draw_caption("one, two,three , four,five", rules, rng) for _ in range(200)}
    assert len(drawn) == 6
    for caption in drawn:
        parts = caption.split(", ")
        assert parts[:2] == ["one", "two"]
        assert sorted(parts[2:]) == ["five", "four", "three"]


def test_another_separator_is_replaced_by_commas_when_shuffled() -> None:
    rules = replace(SUBSET, shuffle_caption=True, keep_tokens=9, caption_separator=";")
    assert draw_caption("a, b; c ;d", rules, random.Random(0)) == "a, b, c, d"


def test_a_prefix_moves_with_the_first_part() -> None:
    rules = replace(SUBSET, shuffle_caption=True, caption_prefix="photo of")
    rng = random.Random(2)
    assert {draw_caption("a, b", rules, rng) for _ in range(50)} == {"photo of a, b", "b, photo of a"}


def test_dropout_drops_prefix_and_suffix_too_and_as_often_as_asked() -> None:
    rules = replace(SUBSET, caption_dropout_rate=0.25, caption_prefix="photo of")
    rng = random.Random(3)
    drawn = [draw_caption("a cat", rules, rng) for _ in range(4000)]
    assert set(drawn) == {"", "photo of a cat"}
    assert drawn.count("") / len(drawn) == pytest.approx(0.25, abs=0.02)


def test_no_random_number_is_drawn_when_nothing_is_random() -> None:
    rng = random.Random(4)
    before = rng.getstate()
    draw_caption("a cat", SUBSET, rng)
    assert rng.getstate() == before


@pytest.mark.parametrize(
    ("rate", "prefix", "expected"),
    [(0.0, None, ("a cat",)), (0.5, "one", ("one a cat", "")), (1.0, None, ("",))],
)
def test_variants_are_all_that_can_be_drawn(rate: float, prefix: str | None, expected: tuple[str, ...]) -> None:
    rules = replace(SUBSET, caption_dropout_rate=rate, caption_prefix=prefix)
    assert caption_variants("a cat", rules) == expected
    rng = random.Random(5)
    assert {draw_caption("a cat", rules, rng) for _ in range(100)} == set(expected)


def test_shuffled_captions_have_no_list_of_variants() -> None:
    assert caption_variants("a, b", replace(SUBSET, shuffle_caption=True)) is None


def test_tags_are_counted_in_lower_case() -> None:
    assert tag_frequency(["Cat, mat,", "cat , hat", ""]) == {"cat": 2, "mat": 1, "hat": 1}
