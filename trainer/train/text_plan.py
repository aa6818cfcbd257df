"""What a run will encode of captions and prompts before it trains, and how much room that takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from trainer.data.captions import CaptionCourse
from trainer.data.texts import run_texts
from trainer.data.validation import validation_caption
from trainer.schema.chroma_header import VISIBLE_PADDING
from trainer.schema.model_kinds import format_bytes
from trainer.schema.options import Options
from trainer.train.check import CheckedRun
from trainer.train.prompt_file import texts_of
from trainer.train.schedule import Schedule


@dataclass(frozen=True)
class TextPlan:
    """`texts` are all that are encoded, each with the folder of a picture that it belongs to, or None for prompts.

    `num_captions` counts the different captions that pictures have, `num_bytes` is what all encodings take.
    """

    texts: Mapping[str, Path | None]
    num_captions: int
    num_bytes: int

    def __str__(self) -> str:
        return (
            f"{len(self.texts)} texts of {self.num_captions} captions and the prompts are encoded beforehand, "
            f"{format_bytes(self.num_bytes)}"
        )


def caption_course(options: Options, schedule: Schedule, num_processes: int) -> CaptionCourse:
    """When batches are trained on, and how many texts a caption may become in this run."""
    return CaptionCourse(
        num_steps=schedule.num_steps,
        steps_per_epoch=schedule.steps_per_epoch,
        batches_per_step=num_processes * options.gradient_accumulation_steps,
        num_variants=options.caption_variants if options.cache_text_encoder_outputs else None,
    )


def keeps_full_text(options: Options) -> bool:
    """Whether encodings are kept in 32 bit, for a 32-bit run, and not in bf16, which the transformer makes of them anyway."""
    return options.mixed_precision == "no"


def writes_reference_text(options: Options) -> bool:
    """Whether sd-scripts' text files are written, which hold the plain captions."""
    is_on_disk = options.write_reference_caches and options.cache_text_encoder_outputs_to_disk
    return is_on_disk and options.model_type != "chroma"


def plan_texts(checked: CheckedRun, seed: int, *, num_processes: int = 1) -> TextPlan | None:
    """The texts of a run whose text is encoded beforehand; None where it is not."""
    options = checked.options
    if not options.cache_text_encoder_outputs:
        return None
    course = caption_course(options, checked.schedule, num_processes)
    texts: dict[str, Path | None] = dict(run_texts(checked.index, course, seed))
    plain = checked.index.items if writes_reference_text(options) else ()
    for item in (*plain, *checked.index.validation):
        texts.setdefault(validation_caption(item), item.path.parent)
    for prompt in texts_of(checked.prompts):
        texts.setdefault(prompt, None)
    return TextPlan(
        texts,
        num_captions=len({item.caption for item in checked.index.items}),
        num_bytes=_num_bytes(checked, list(texts)),
    )


def _num_bytes(checked: CheckedRun, texts: list[str]) -> int:
    """What is kept of each text: the tokens that the transformer sees, which without the text mask are all of them."""
    options, models = checked.options, checked.models
    max_length = checked.tokenizers.t5xxl_tokens
    num_tokens = max_length * len(texts)
    if options.apply_t5_attn_mask:
        padding = VISIBLE_PADDING if options.model_type == "chroma" else 0
        lengths = checked.tokenizers.t5xxl.lengths(texts, max_length)
        num_tokens = sum(min(length + padding, max_length) for length in lengths)
    vec_width = 0 if models.clip is None else models.clip.hidden_size
    return (num_tokens * models.t5.d_model + len(texts) * vec_width) * (4 if keeps_full_text(options) else 2)
