"""What a picture's caption becomes when it is drawn for a step: pure functions of the caption, its rules and an RNG.

The order is that of kohya-ss/sd-scripts (`library/train_util.py`): prefix and suffix, dropout, lines and wildcards, then
the parts (kept, warmed up, shuffled, dropped), then the secondary separator.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from trainer.schema.dataset_keys import SubsetSpec

JOINER = ", "
"""Parts are joined by this whatever separated them, as in the reference trainer."""

_WILDCARD = re.compile(r"\{([^}]+)\}")
_PRIVATE_USE = 0xE000


@dataclass(frozen=True)
class Moment:
    """When a caption is drawn. `epoch` counts from 1; `step` counts the optimizer steps done before, of `num_steps`."""

    epoch: int
    step: int
    num_steps: int


@dataclass(frozen=True)
class CaptionCourse:
    """Where a run's batches lie in time, and how many texts a caption may become.

    `batches_per_step` counts those of all processes; an epoch begins with a step of its own. With `num_variants` every
    caption has that many texts, the same in every run, which can be encoded beforehand; None means any number.
    """

    num_steps: int
    steps_per_epoch: int
    batches_per_step: int = 1
    num_variants: int | None = None

    def moment(self, epoch: int, place: int) -> Moment:
        """When the batch at `place` of an epoch's batches is trained on."""
        return Moment(epoch, (epoch - 1) * self.steps_per_epoch + place // self.batches_per_step, self.num_steps)


def draw_caption(
    caption: str,
    rules: SubsetSpec,
    rng: random.Random,
    moment: Moment | None = None,
    *,
    num_variants: int | None = None,
) -> str:
    """The text for one step, one of `num_variants` where that is given.

    A dropped caption is empty, without prefix and suffix. Without a `moment` no epoch drops its captions and no token
    warm-up takes parts away.
    """
    if _is_dropped(rules, rng, moment):
        return ""
    if num_variants is None:
        return _compose(caption, rules, rng, moment)
    return caption_variant(caption, rules, rng.randrange(num_variants), moment)


def caption_variant(caption: str, rules: SubsetSpec, number: int, moment: Moment | None = None) -> str:
    """Text `number` of those that a caption may become: the same in every run, whatever its seed.

    Chances are as in `draw_caption`, so that a likely text may come several times; but the lines of a caption take
    turns, and none of them is missing where there are as many variants as lines.
    """
    return _compose(caption, rules, random.Random(f"variant {number} {caption}"), moment, turn=number)


def caption_texts(caption: str, rules: SubsetSpec, num_variants: int) -> tuple[str, ...]:
    """Every text that `draw_caption` can give with `num_variants` after a token warm-up, each once; the empty one last."""
    texts: list[str] = []
    if rules.caption_dropout_rate < 1 and rules.caption_dropout_every_n_epochs != 1:
        count = num_variants if has_variants(rules) else 1
        texts = [caption_variant(caption, rules, number) for number in range(count)]
    if rules.caption_dropout_rate > 0 or rules.caption_dropout_every_n_epochs > 0:
        texts.append("")
    return tuple(dict.fromkeys(texts))


def has_variants(rules: SubsetSpec) -> bool:
    """Whether a caption under these rules may become several texts besides the empty one."""
    return rules.shuffle_caption or rules.enable_wildcard or rules.caption_tag_dropout_rate > 0


def warmup_steps(rules: SubsetSpec, num_steps: int) -> float:
    """The steps of the token warm-up, of which a number below 1 is a part of the run's."""
    steps = rules.token_warmup_step
    return math.floor(steps * num_steps) if steps < 1 else steps


def caption_notes(rules: SubsetSpec) -> Iterator[str]:
    """One line for each rule that has no effect beside the others, or one that may surprise."""
    if not _rearranges(rules):
        why = "it counts when captions are shuffled, warmed up or lose parts"
        if rules.keep_tokens > 0:
            yield f"keep_tokens {rules.keep_tokens} has no effect: {why}"
        if rules.keep_tokens_separator:
            yield f"keep_tokens_separator {rules.keep_tokens_separator} stays in captions: {why}"
        if rules.caption_separator != "," and not rules.secondary_separator:
            yield f"caption_separator {rules.caption_separator} has no effect: {why}"
    if rules.token_warmup_min != 1 and rules.token_warmup_step == 0:
        yield f"token_warmup_min {rules.token_warmup_min} has no effect: token_warmup_step is 0"
    if rules.enable_wildcard and (rules.caption_prefix or rules.caption_suffix):
        yield "caption_prefix belongs to the first line of a caption and caption_suffix to the last, also with wildcards"


def tag_frequency(captions: Iterable[str]) -> dict[str, int]:
    """How often each comma-separated part occurs, lower case, in the order of first appearance."""
    tags = (tag.strip().lower() for caption in captions for tag in caption.split(","))
    return dict(Counter(tag for tag in tags if tag))


def _rearranges(rules: SubsetSpec) -> bool:
    return rules.shuffle_caption or rules.token_warmup_step > 0 or rules.caption_tag_dropout_rate > 0


def _is_dropped(rules: SubsetSpec, rng: random.Random, moment: Moment | None) -> bool:
    every = rules.caption_dropout_every_n_epochs
    if every > 0 and moment is not None and moment.epoch % every == 0:
        return True
    return rules.caption_dropout_rate > 0 and rng.random() < rules.caption_dropout_rate


def _compose(
    caption: str, rules: SubsetSpec, rng: random.Random, moment: Moment | None, *, turn: int | None = None
) -> str:
    """A caption that is not dropped, after all the other rules."""
    text = _with_ends(caption, rules)
    text = _fill_wildcards(_pick_line(text, rng, turn), rng) if rules.enable_wildcard else text.split("\n", 1)[0]
    if _rearranges(rules):
        text = _rearrange(text, rules, rng, moment)
    if rules.secondary_separator:
        text = text.replace(rules.secondary_separator, rules.caption_separator)
    return text


def _with_ends(caption: str, rules: SubsetSpec) -> str:
    if rules.caption_prefix:
        caption = f"{rules.caption_prefix} {caption}"
    if rules.caption_suffix:
        caption = f"{caption} {rules.caption_suffix}"
    return caption


def _pick_line(text: str, rng: random.Random, turn: int | None) -> str:
    lines = text.split("\n")
    if len(lines) == 1:
        return text
    if turn is None:
        return rng.choice(lines)
    random.Random(f"lines {text}").shuffle(lines)
    return lines[turn % len(lines)]


def _fill_wildcards(text: str, rng: random.Random) -> str:
    """`{a|b}` becomes one of its options, `{{` and `}}` become braces. Options hold no options of their own."""
    if "{" not in text and "}" not in text:
        return text
    unused = (chr(code) for code in itertools.count(_PRIVATE_USE) if chr(code) not in text)
    opening, closing = next(unused), next(unused)
    text = text.replace("{{", opening).replace("}}", closing)
    text = _WILDCARD.sub(lambda match: rng.choice(match[1].split("|")), text)
    return text.replace(opening, "{").replace(closing, "}")


def _rearrange(text: str, rules: SubsetSpec, rng: random.Random, moment: Moment | None) -> str:
    """The parts of a text with those that may change shuffled, fewer of them early in a token warm-up."""
    kept, flexible, suffix = _parts(text, rules)
    if moment is not None:
        flexible = flexible[: _num_warmed_up(len(flexible), rules, moment)]
    if rules.shuffle_caption:
        rng.shuffle(flexible)
    rate = rules.caption_tag_dropout_rate
    if rate > 0:
        flexible = [part for part in flexible if rng.random() >= rate]
    return JOINER.join(kept + flexible + suffix)


def _parts(text: str, rules: SubsetSpec) -> tuple[list[str], list[str], list[str]]:
    """The parts that stay in front, those that may change, and those that stay behind."""
    between = rules.keep_tokens_separator
    if between and between in text:
        sections = [
            [part.strip() for part in section.split(rules.caption_separator) if part.strip()]
            for section in text.split(between, 2)
        ]
        return sections[0], sections[1], sections[2] if len(sections) > 2 else []
    parts = [part.strip() for part in text.strip().split(rules.caption_separator)]
    return parts[: rules.keep_tokens], parts[rules.keep_tokens :], []


def _num_warmed_up(count: int, rules: SubsetSpec, moment: Moment) -> int:
    """How many of `count` parts take part yet: from `token_warmup_min` evenly up to all."""
    steps = warmup_steps(rules, moment.num_steps)
    if moment.step >= steps:
        return count
    return max(0, math.floor(moment.step * (count - rules.token_warmup_min) / steps) + rules.token_warmup_min)
