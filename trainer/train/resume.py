"""Where a run begins: at its start, or where the state that `--resume` names, or the run's own folder, left off.

Settings that differ from the state's are treated by one rule. Where the saved numbers have no place, or would mean
something else (another network, optimizer or kind of model), resuming is refused. What else decides about the training
is taken as it is now and named in a warning. What only concerns files, memory, samples and logs may differ freely.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from trainer.data.items import DatasetIndex
from trainer.schema.base import Problem, UserError
from trainer.schema.options import GROUPS, Options
from trainer.schema.run_folder import RunFolder
from trainer.train.findings import EXIT_OPTIONS
from trainer.train.progress import DUTIES, Progress
from trainer.train.reporting import Reporter
from trainer.train.schedule import Schedule
from trainer.train.state_head import StateHead, is_own_state, newest_run_state, read_head

if TYPE_CHECKING:
    from trainer.train.foreign_state import ForeignState

COURSE_GROUPS: Final = ("model", "network", "dataset", "course", "optimizer", "flow", "memory")
"""Groups of options that decide about the training; those of the others may differ freely."""

REFUSED: Final = (
    "model_type",
    "network_module",
    "network_dim",
    "network_alpha",
    "network_args",
    "network_train_unet_only",
    "network_train_text_encoder_only",
    "optimizer_type",
    "full_bf16",
    "full_fp16",
)

FREE: Final = frozenset(
    {
        # Memory and time, not numbers.
        "device",
        "base_storage_cache",
        "blocks_to_swap",
        "split_mode",
        "gradient_checkpointing",
        "checkpoint_blocks",
        "cpu_offload_checkpointing",
        "offload_modulation",
        "torch_compile",
        "dynamo_backend",
        # Files, which may have moved: what is in them is compared.
        "pretrained_model_name_or_path",
        "clip_l",
        "t5xxl",
        "ae",
        "clip_l_tokenizer",
        "t5xxl_tokenizer",
        "tokenizer_cache_dir",
        "dataset_config",
        "train_data_dir",
        "reg_data_dir",
        # The state has later weights, of a network with the same ranks.
        "network_weights",
        "dim_from_weights",
        # Where to begin is not how to train.
        "initial_epoch",
        "initial_step",
    }
)
_LENGTH: Final = ("max_train_steps", "max_train_epochs")
_RATES: Final = ("learning_rate", "unet_lr", "text_encoder_lr")
_STEADY: Final = ("constant", "constant_with_warmup")
_DEFAULT_RANK: Final = 4


@dataclass(frozen=True)
class Start:
    """Where a run begins. Without a state: at `progress.step` of 0, or where the options say."""

    progress: Progress = field(default_factory=Progress)
    own: StateHead | None = None
    foreign: ForeignState | None = None

    @property
    def seed(self) -> int | None:
        """The seed that the state's run had."""
        return None if self.own is None else int(self.own.content["seed"])

    @property
    def requested(self) -> set[int]:
        return set() if self.own is None else {int(step) for step in self.own.content["requested"]}


def find_state(options: Options, reporter: Reporter) -> StateHead | ForeignState | None:
    """The state to begin from: the newest good one of the run folder, else that of `--resume`.

    Raises `UserError` for one that cannot be used, with all reasons.
    """
    if options.run_dir is not None:
        head = newest_run_state(RunFolder(options.run_dir).state_dir, reporter.warning)
        if head is not None:
            return _fitting(head, options)
    if options.resume is None:
        return None
    folder = options.resume
    if options.resume_from_huggingface:
        from trainer.train.hub_state import fetch_state  # noqa: PLC0415 - the hub's library

        folder = fetch_state(folder, token=options.huggingface_token, announce=reporter.note)
    if not folder.is_dir():
        raise UserError(
            "the state to resume from does not exist",
            str(folder),
            "Give a folder whose name ends in -state, as --save_state writes them.",
            field="resume",
        )
    if is_own_state(folder):
        return _fitting(read_head(folder), options)
    from trainer.train.foreign_state import read_foreign_state  # noqa: PLC0415 - torch takes seconds to load

    return read_foreign_state(folder)


def _fitting(head: StateHead, options: Options) -> StateHead:
    # States of earlier versions, which knew no other, have a LoRA in 32 bit.
    saved = {"full_bf16": False, "full_fp16": False, **head.content["options"]}
    now = describe_options(options)
    problems = [
        Problem(
            f"{name} is {_shown(now[name])}, but the state was made with {_shown(saved[name])}",
            str(head.path),
            "Give that value, or start a new run from the LoRA with --network_weights.",
            name,
        )
        for name in REFUSED
        if name in saved and _normal(name, saved[name]) != _normal(name, now[name])
    ]
    if [_is_off(saved, name) for name in _RATES] != [_is_off(now, name) for name in _RATES]:
        problems.append(
            Problem(
                "a learning rate is 0 that was not, or the other way round: other layers would train than in the state",
                str(head.path),
                "Give the rates as they were, or start a new run from the LoRA with --network_weights.",
                "learning_rate",
            )
        )
    if problems:
        raise UserError.many(problems, exit_code=EXIT_OPTIONS)
    return head


def plan_start(
    options: Options,
    state: StateHead | ForeignState | None,
    schedule: Schedule,
    identity: Mapping[str, Any],
    reporter: Reporter,
) -> Start:
    """Where the run begins, with a line for each thing that is not as it was.

    Of several the first that is given counts: `initial_step`, `initial_epoch`, the state. The learning rate's schedule
    and the data go along, so that the run is at that step in every respect. (In the reference the counters begin at 0
    again, names of files repeat, and the data begins at the epoch's first batch.) Raises `UserError` when no step would
    be left.
    """
    start = Start()
    if isinstance(state, StateHead):
        from trainer.train.state_saver import progress_of  # noqa: PLC0415 - torch takes seconds to load

        start = Start(progress_of(state), own=state)
        for line in differences(state.content, identity, options):
            reporter.warning(line)
    elif state is not None:
        start = Start(Progress(step=state.step), foreign=state)
    step = _asked_step(options, schedule)
    if step is not None and step != start.progress.step:
        if state is not None:
            reporter.warning(
                f"training goes on at step {step}, as asked for, though the state is that of step {start.progress.step}"
            )
        start = replace(start, progress=replace(start.progress, step=step, num_duties_done=len(DUTIES)))
    _check_length(start, options, schedule, has_own_folder=options.run_dir is not None)
    if state is not None:
        epoch = max(1, math.ceil(start.progress.step / schedule.steps_per_epoch))
        reporter.note(f"resuming from {state.path}: {start.progress.step} steps are done, in epoch {epoch}")
    elif start.progress.step:
        reporter.note(f"training begins behind step {start.progress.step}; schedule, data and file names go along")
    return start


def _asked_step(options: Options, schedule: Schedule) -> int | None:
    if options.initial_step is not None:
        return options.initial_step
    if options.initial_epoch is not None:
        return max(0, options.initial_epoch - 1) * schedule.steps_per_epoch
    return None


def _check_length(start: Start, options: Options, schedule: Schedule, *, has_own_folder: bool) -> None:
    step, name = start.progress.step, "max_train_steps" if options.max_train_epochs is None else "max_train_epochs"
    # A run that ended between its last step and its last file has that file to write.
    if step < schedule.num_steps or (has_own_folder and step == schedule.num_steps):
        return
    raise UserError(
        f"no step is left to train: {step} are done and the run has {schedule.num_steps}",
        f"--{name}",
        f"Raise {name}.",
        field=name,
        exit_code=EXIT_OPTIONS,
    )


# ---------------------------------------------------------------------------------------------------------- identity


def run_identity(options: Options, index: DatasetIndex, *, num_processes: int) -> dict[str, object]:
    """What a state says about its run, to be compared when it is resumed. Seed and session are added by the recipe."""
    described = describe_options(options)
    return {
        "options": described,
        "options_sha256": _digest(described),
        "models": {
            name: {"name": path.name, "bytes": path.stat().st_size}
            for name, path in (
                ("pretrained_model_name_or_path", options.pretrained_model_name_or_path),
                ("clip_l", options.clip_l),
                ("t5xxl", options.t5xxl),
                ("ae", options.ae),
            )
            if path is not None and path.is_file()
        },
        "data_sha256": _data_digest(index),
        "num_batches_per_epoch": index.num_batches_per_epoch,
        "num_processes": num_processes,
    }


def describe_options(options: Options) -> dict[str, Any]:
    """The options that decide about the training, as JSON."""
    names = {name for group in COURSE_GROUPS for name in GROUPS[group].model_fields}
    return options.model_dump(mode="json", include=names)


def differences(saved: Mapping[str, Any], now: Mapping[str, Any], options: Options) -> Iterator[str]:
    """A line for each difference that changes the course of the training but does not rule it out."""
    if saved["options_sha256"] != now["options_sha256"]:
        was, are = saved["options"], now["options"]
        changed = [
            f"{name} was {_shown(was[name])} and is {_shown(are[name])}"
            for name in are
            if name in was and was[name] != are[name] and _counts(name, options)
        ]
        if changed:
            yield f"settings differ from those of the state, so training goes on with others: {'; '.join(changed)}"
    for name, file in now["models"].items():
        before = saved["models"].get(name)
        if before is not None and before["bytes"] != file["bytes"]:
            yield f"{name} is another file than the state's: {before['name']} was used, and {file['name']} is now"
    if saved["data_sha256"] != now["data_sha256"]:
        yield "pictures, captions or their settings differ from the state's; the epoch goes on with those of now"
    if saved["num_processes"] != now["num_processes"]:
        yield (
            f"the state is of {saved['num_processes']} processes and this run has {now['num_processes']}: steps are "
            "counted on, and batches are divided otherwise"
        )


def _counts(name: str, options: Options) -> bool:
    if name in _LENGTH:
        # A longer run changes only those schedules that look at the end.
        is_steady = options.lr_scheduler in _STEADY and not options.lr_scheduler_type
        return not is_steady or 0 < options.lr_warmup_steps < 1
    return name not in FREE and name not in REFUSED


def _normal(name: str, value: Any) -> object:
    if name == "network_dim":
        return value or _DEFAULT_RANK
    if name == "network_args":
        return sorted("".join(str(pair).split()) for pair in value or ())
    return value


def _is_off(options: Mapping[str, Any], name: str) -> bool:
    value = options.get(name)
    if value is None:
        value = options.get("learning_rate")
    return not any(value) if isinstance(value, Sequence) else value == 0


def _shown(value: object) -> str:
    return "not given" if value is None else json.dumps(value, ensure_ascii=False)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _data_digest(index: DatasetIndex) -> str:
    """Of everything that decides about an epoch's batches; where the pictures lie does not."""
    items = [
        [item.digest, item.caption, item.bucket, item.num_repeats, item.is_reg, item.dataset] for item in index.items
    ]
    settings = [
        [
            [summary.spec.batch_size, summary.spec.resolution],
            *(
                {name: str(value) for name, value in vars(subset.spec).items() if not isinstance(value, Path)}
                for subset in summary.subsets
            ),
        ]
        for summary in index.datasets
    ]
    return _digest([items, settings])
