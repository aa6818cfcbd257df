"""What a run is told at its start: what of its options was changed or has no effect, and what will be trained."""

from __future__ import annotations

from collections.abc import Iterator, Set

from trainer.data.captions import caption_notes
from trainer.schema.advice import deviations, weak_defaults
from trainer.schema.checkpoint_header import FluxParams, format_bytes
from trainer.schema.cli import ParsedCommand
from trainer.schema.dataset_advice import dataset_advice
from trainer.schema.memory import Estimate, estimate, usable_bytes
from trainer.train.check import CheckedRun
from trainer.train.reporting import Reporter
from trainer.train.text_plan import TextPlan


def tell_settings(command: ParsedCommand, checked: CheckedRun, reporter: Reporter, *, num_processes: int = 1) -> None:
    """In one block what was corrected, what has no effect and where the run differs from the reference trainer; then
    loudly the defaults that train badly."""
    is_schnell = checked.flux.is_schnell
    lines = [
        *command.notes,
        *_prompt_notes(checked),
        *dataset_advice(checked.dataset, checked.options),
        *_caption_lines(checked),
        *_validation_notes(checked, command.explicit),
        *_notes_on_what_is_there(command, checked, num_processes),
        *deviations(command.options, is_schnell=is_schnell, num_processes=num_processes),
    ]
    if lines:
        reporter.note("\n  - ".join(["of these options:", *lines]))
    has_guidance = isinstance(checked.flux, FluxParams) and checked.flux.guidance_embed
    weak = weak_defaults(command.options, command.explicit, has_guidance=has_guidance)
    if weak is not None:
        reporter.warning(weak)


def _prompt_notes(checked: CheckedRun) -> Iterator[str]:
    for number, prompt in enumerate(checked.prompts, 1):
        if prompt.unused_flags:
            yield f"sample prompt {number}: {', '.join(prompt.unused_flags)} have no effect for FLUX"
        if checked.options.model_type == "chroma" and not prompt.uses_negative_prompt:
            yield f"sample prompt {number}: Chroma needs two-pass guidance for good pictures; --l 4 is usual"


def _caption_lines(checked: CheckedRun) -> Iterator[str]:
    for subset in dict.fromkeys(item.subset for item in checked.index.items):
        for note in caption_notes(subset):
            yield f"{subset.place}: {note}"


def _validation_notes(checked: CheckedRun, explicit: Set[str]) -> Iterator[str]:
    if not checked.index.validation:
        for name in ("validate_every_n_steps", "validate_every_n_epochs", "max_validation_steps", "validation_seed"):
            if name in explicit and getattr(checked.options, name) is not None:
                yield f"{name} has no effect: no picture is held back (validation_split)"


def _notes_on_what_is_there(command: ParsedCommand, checked: CheckedRun, num_processes: int) -> Iterator[str]:
    """Settings about a kind of model, picture or process that this run has not."""
    options, items = command.options, checked.index.items
    if (
        "guidance_scale" in command.explicit
        and isinstance(checked.flux, FluxParams)
        and not checked.flux.guidance_embed
    ):
        yield "guidance_scale has no effect: this model, as schnell, takes none"
    if options.prior_loss_weight != 1 and not any(item.is_reg for item in items):
        yield "prior_loss_weight has no effect: there are no regularisation pictures"
    masked = {item.subset for item in items if item.is_transparent}
    for subset in dict.fromkeys(item.subset for item in items if item.subset.alpha_mask):
        if subset not in masked and subset.conditioning_data_dir is None:
            yield f"alpha_mask of {subset.place} has no effect: no picture is transparent"
    # With wildcards one line of several is drawn, and no draw is as long as the whole.
    captions = list(dict.fromkeys(item.caption for item in items if not item.subset.enable_wildcard))
    longest = checked.tokenizers.t5xxl_tokens
    cut = [
        text
        for text, is_cut in zip(captions, checked.tokenizers.t5xxl.is_cut(captions, longest), strict=True)
        if is_cut
    ]
    if cut:
        first = next(item.path.name for item in items if item.caption == cut[0])
        yield f"{len(cut)} captions, such as that of {first}, have more than T5's {longest} tokens and lose their ends"
    if options.ddp_timeout is not None and num_processes == 1:
        yield "ddp_timeout has no effect: there is one process"


def largest_batch(checked: CheckedRun) -> tuple[tuple[int, int], int]:
    """Width and height of the pictures in the largest batch, and their number."""
    spec, (width, height) = max(
        ((dataset.spec, size) for dataset in checked.index.datasets for size in dataset.bucket_counts),
        key=lambda entry: entry[0].batch_size * entry[1][0] * entry[1][1],
    )
    return (width, height), spec.batch_size


def estimate_run(
    checked: CheckedRun, total_bytes: int | None = None, *, factor: float = 1.0, blocks_to_swap: int | None = None
) -> Estimate:
    """The memory that the largest batch needs; `total_bytes` is the card's, `factor` its calibration's."""
    (width, height), batch_size = largest_batch(checked)
    return estimate(
        checked.flux,
        checked.options,
        width=width,
        height=height,
        batch_size=batch_size,
        models=checked.models,
        vram_bytes=total_bytes,
        num_pictures=checked.index.num_images,
        factor=factor,
        blocks_to_swap=blocks_to_swap,
    )


def plan_text(checked: CheckedRun, texts: TextPlan | None = None, total_bytes: int | None = None) -> str:
    """The plan as a block of lines: pictures, repeats, buckets, batches, epochs, steps and memory."""
    index, schedule = checked.index, checked.schedule
    num_draws = sum(item.num_repeats for item in index.items)
    held_back = f"; {len(index.validation)} are held back for validation" if index.validation else ""
    lines = [f"{index.num_images} pictures, {num_draws} with repeats{held_back}"]
    for number, dataset in enumerate(index.datasets, 1):
        place = f"dataset {number}: " if len(index.datasets) > 1 else ""
        regularisation = f", {dataset.num_reg_images} of regularisation" if dataset.num_reg_images else ""
        sizes = ", ".join(f"{width}x{height}: {count}" for (width, height), count in dataset.bucket_counts.items())
        noun = "buckets" if dataset.spec.enable_bucket else "size"
        lines.append(
            f"{place}{dataset.num_train_images} draws in an epoch{regularisation}, batch size {dataset.spec.batch_size}, "
            f"{dataset.num_batches} batches; {noun} {sizes}"
        )
    lines.append(
        f"{schedule.num_epochs} epochs of {schedule.micro_steps_per_epoch} batches, {schedule.steps_per_epoch} steps; "
        f"{schedule.num_steps} steps in total"
    )
    if texts is not None:
        lines.append(str(texts))
    memory = estimate_run(checked, total_bytes)
    lines.append(
        f"about {format_bytes(memory.peak_bytes)} on the device and {format_bytes(memory.host_peak_bytes)} of main memory"
    )
    return "\n  ".join(["the plan:", *lines])


def warn_of_memory(checked: CheckedRun, total_bytes: int | None, reporter: Reporter) -> None:
    """Says before anything loads that the card is probably too small, and what helps."""
    if total_bytes is None:
        return
    result = estimate_run(checked, total_bytes)
    if result.fits is False:
        reporter.warning(
            f"this will probably not fit: about {format_bytes(result.peak_bytes)} are needed, the card leaves "
            f"{format_bytes(usable_bytes(total_bytes))} of its {format_bytes(total_bytes)}. {result.reason}"
        )
