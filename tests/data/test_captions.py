from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest

from tests.data.specs import SUBSET
from trainer.data.captions import Moment, caption_notes, caption_texts, draw_caption, tag_frequency
from trainer.schema.dataset_keys import SubsetSpec


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


def test_an_epoch_may_drop_every_caption() -> None:
    rules = replace(SUBSET, caption_dropout_every_n_epochs=3)
    rng = random.Random(0)
    drawn = [draw_caption("a", rules, rng, Moment(epoch, step=0, num_steps=9)) for epoch in range(1, 8)]
    assert drawn == ["a", "a", "", "a", "a", "", "a"]
    assert draw_caption("a", rules, rng) == "a"


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a {red|green|blue} cat", {"a red cat", "a green cat", "a blue cat"}),
        ("{a|b} {c|d}", {"a c", "a d", "b c", "b d"}),
        ("{only}", {"only"}),
        ("{{a|b}}", {"{a|b}"}),
        ("{a|{{b}}}", {"a", "{b}"}),
        ("{a|}x", {"ax", "x"}),
        ("{} and }", {"{} and }"}),
        ("one\ntwo {a|b}", {"one", "two a", "two b"}),
    ],
)
def test_wildcards_draw_one_line_and_one_option_each(caption: str, expected: set[str]) -> None:
    rules = replace(SUBSET, enable_wildcard=True)
    rng = random.Random(7)
    assert {draw_caption(caption, rules, rng) for _ in range(200)} == expected


def test_options_hold_no_options_of_their_own() -> None:
    rules = replace(SUBSET, enable_wildcard=True)
    rng = random.Random(8)
    assert {draw_caption("{a{b|c}d}", rules, rng) for _ in range(100)} == {"a{bd}", "cd}"}


def test_every_option_is_as_likely() -> None:
    rules = replace(SUBSET, enable_wildcard=True)
    rng = random.Random(9)
    counts = Counter(draw_caption("{a|b|b|c}", rules, rng) for _ in range(4000))
    assert counts["b"] / 4000 == pytest.approx(0.5, abs=0.03)
    assert counts["a"] / 4000 == pytest.approx(0.25, abs=0.03)


def test_without_wildcards_the_first_line_counts_and_braces_stay() -> None:
    assert draw_caption("a {b|c}\nd", SUBSET, random.Random(0)) == "a {b|c}"


def test_prefix_and_suffix_go_before_the_first_line_and_after_the_last() -> None:
    rules = replace(SUBSET, enable_wildcard=True, caption_prefix="p", caption_suffix="s")
    rng = random.Random(10)
    assert {draw_caption("a\nb\nc", rules, rng) for _ in range(100)} == {"p a", "b", "c s"}
    assert any("first line" in note for note in caption_notes(rules))


@pytest.mark.parametrize(
    ("caption", "front", "flexible", "back"),
    [
        ("a, b ||| c, d, e", ["a", "b"], {"c", "d", "e"}, []),
        ("a ||| b, c ||| d,, e", ["a"], {"b", "c"}, ["d", "e"]),
        ("||| a, b |||", [], {"a", "b"}, []),
        ("a, b, c", ["a"], {"b", "c"}, []),
    ],
)
def test_a_separator_says_which_parts_stay(caption: str, front: list[str], flexible: set[str], back: list[str]) -> None:
    rules = replace(SUBSET, shuffle_caption=True, keep_tokens=1, keep_tokens_separator="|||")
    rng = random.Random(11)
    for _ in range(30):
        parts = draw_caption(caption, rules, rng).split(", ")
        assert parts[: len(front)] == front
        assert parts[len(parts) - len(back) :] == back
        assert set(parts[len(front) : len(parts) - len(back)]) == flexible


def test_the_separator_of_kept_parts_stays_where_nothing_moves_and_a_line_says_so() -> None:
    rules = replace(SUBSET, keep_tokens_separator="|||", keep_tokens=2, token_warmup_min=3)
    assert draw_caption("a ||| b", rules, random.Random(0)) == "a ||| b"
    assert [note.split()[0] for note in caption_notes(rules)] == [
        "keep_tokens",
        "keep_tokens_separator",
        "token_warmup_min",
    ]
    assert list(caption_notes(replace(rules, token_warmup_step=5))) == []


def test_dropped_parts_are_as_many_as_asked_and_never_the_kept_ones() -> None:
    rules = replace(SUBSET, caption_tag_dropout_rate=0.3, keep_tokens=1)
    rng = random.Random(12)
    drawn = [draw_caption("k, a, b, c, d", rules, rng).split(", ") for _ in range(2000)]
    assert all(parts[0] == "k" for parts in drawn)
    assert all(sorted(parts[1:]) == parts[1:] for parts in drawn)
    assert sum(len(parts) - 1 for parts in drawn) / (4 * 2000) == pytest.approx(0.7, abs=0.02)
    assert draw_caption("a, b", replace(rules, caption_tag_dropout_rate=1.0, keep_tokens=0), rng) == ""


@pytest.mark.parametrize(
    ("steps", "minimum", "expected"),
    [
        # 6 flexible parts over 10 steps: floor(step * 5 / 10) + 1
        (10, 1, {0: 1, 1: 1, 2: 2, 5: 3, 9: 5, 10: 6, 99: 6}),
        # a tenth of 200 steps: floor(step * 4 / 20) + 2
        (0.1, 2, {0: 2, 4: 2, 5: 3, 19: 5, 20: 6}),
        (10, 9, {0: 6, 5: 6, 9: 6}),
        (4, 0, {0: 0, 1: 1, 2: 3, 4: 6}),
        # a part of the run that is less than one step
        (0.001, 1, {0: 6}),
    ],
)
def test_a_warm_up_lets_parts_in_one_by_one(steps: float, minimum: int, expected: dict[int, int]) -> None:
    rules = replace(SUBSET, token_warmup_step=steps, token_warmup_min=minimum, keep_tokens=1)
    for step, count in expected.items():
        text = draw_caption("k,a,b,c,d,e,f", rules, random.Random(0), Moment(1, step, num_steps=200))
        assert text.split(", ") == ["k", *"abcdef"[:count]]


def test_the_second_separator_becomes_the_first_at_the_end() -> None:
    rules = replace(SUBSET, secondary_separator=";", caption_separator="|", shuffle_caption=True)
    rng = random.Random(13)
    drawn = {draw_caption("a;b| c", rules, rng) for _ in range(50)}
    assert drawn == {"a|b, c", "c, a|b"}
    assert draw_caption("a;b", replace(rules, shuffle_caption=False), rng) == "a|b"


def test_all_rules_in_their_order() -> None:
    rules = replace(
        SUBSET,
        caption_prefix="new",
        caption_suffix="end",
        enable_wildcard=True,
        shuffle_caption=True,
        keep_tokens_separator="||",
        secondary_separator=";",
        token_warmup_step=4,
        token_warmup_min=1,
    )
    rng = random.Random(14)
    # 3 flexible parts, the first 2 of them at step 2 of 4; then the second separator of what was left
    drawn = {draw_caption("{cat|dog} || a;b, c, d || {{x}}", rules, rng, Moment(1, 2, 10)) for _ in range(100)}
    assert drawn == {
        f"new {animal}, {flexible}, {{x}} end" for animal in ("cat", "dog") for flexible in ("a,b, c", "c, a,b")
    }


RANDOM = replace(SUBSET, shuffle_caption=True, enable_wildcard=True, caption_tag_dropout_rate=0.2)


def test_variants_are_the_same_in_every_run_and_all_that_is_drawn() -> None:
    caption = "{red|green} cat, a, b, c, d, e"
    texts = caption_texts(caption, RANDOM, 8)
    assert texts == caption_texts(caption, RANDOM, 8)
    assert texts[:3] == caption_texts(caption, RANDOM, 3)
    assert 6 <= len(texts) <= 8
    drawn = {draw_caption(caption, RANDOM, random.Random(seed), num_variants=8) for seed in range(400)}
    assert drawn == set(texts)


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (SUBSET, ("a, b",)),
        (replace(SUBSET, caption_dropout_rate=0.5, caption_prefix="one"), ("one a, b", "")),
        (replace(SUBSET, caption_dropout_rate=1.0, shuffle_caption=True), ("",)),
        (replace(SUBSET, caption_dropout_every_n_epochs=2), ("a, b", "")),
        (replace(SUBSET, caption_dropout_every_n_epochs=1), ("",)),
        (replace(SUBSET, caption_tag_dropout_rate=1.0), ("",)),
    ],
)
def test_texts_are_as_few_as_the_rules_need(rules: SubsetSpec, expected: tuple[str, ...]) -> None:
    assert caption_texts("a, b", rules, 50) == expected


def test_no_line_is_missing_among_as_many_variants() -> None:
    rules = replace(SUBSET, enable_wildcard=True)
    for caption in ("a\nb\nc", "q\nr\ns", "x\ny\nz"):
        assert set(caption_texts(caption, rules, 3)) == set(caption.split("\n"))


def test_tags_are_counted_in_lower_case() -> None:
    assert tag_frequency(["Cat, mat,", "cat , hat", ""]) == {"cat": 2, "mat": 1, "hat": 1}
