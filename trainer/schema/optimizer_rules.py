"""What optimizer and schedule ask of each other and of the rates: contradictions, corrections, advice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from trainer.schema.base import Problem, UserError
from trainer.schema.optimizer_args import parse_arguments, parse_optimizer_args
from trainer.schema.optimizers import (
    EPS_IN_FP16,
    OPTIMIZER_FLAGS,
    finds_rate,
    is_schedule_free,
    loses_fp16,
    sets_own_rate,
    wanted_optimizer,
)
from trainer.schema.options import Options
from trainer.schema.schedules import SCHEDULES, USERS, WITHOUT_WARMUP

SMALL_FACTOR: Final = 0.1
"""A learning rate up to this is hardly meant as a factor on a rate that the optimizer finds."""


def optimizer_arguments(options: Options) -> dict[str, object]:
    """`optimizer_args` as keyword arguments; raises `UserError` with every problem."""
    return parse_optimizer_args(options.optimizer_args, wanted_optimizer(options))


def schedule_arguments(options: Options) -> dict[str, object]:
    """`lr_scheduler_args` as keyword arguments; raises `UserError` with every problem."""
    if options.lr_scheduler_type:
        return parse_arguments(options.lr_scheduler_args, None, "lr_scheduler_args", options.lr_scheduler_type)
    settings = SCHEDULES[options.lr_scheduler]
    return parse_arguments(options.lr_scheduler_args, settings, "lr_scheduler_args", options.lr_scheduler)


def optimizer_problems(options: Options, explicit: frozenset[str]) -> Iterator[tuple[tuple[str, ...], Problem]]:
    """Each broken rule: the options that it is about, and the problem."""
    try:
        arguments = optimizer_arguments(options)
    except UserError as error:
        arguments = {}
        yield from ((("optimizer_args", "optimizer_type"), problem) for problem in error.problems)
    try:
        schedule = schedule_arguments(options)
    except UserError as error:
        schedule = {"step_rules": "", "min_lr": 0.0}
        yield from ((("lr_scheduler_args", "lr_scheduler"), problem) for problem in error.problems)
    for names, what, hint in _contradictions(options, explicit, arguments, schedule):
        yield names, Problem(what, f"--{names[0]}", hint, names[0])


def _contradictions(
    options: Options, explicit: frozenset[str], arguments: Mapping[str, object], schedule: Mapping[str, object]
) -> Iterator[tuple[tuple[str, ...], str, str]]:
    given = [flag for flag in OPTIMIZER_FLAGS if getattr(options, flag)]
    if len(given) > 1:
        yield (
            ("use_lion_optimizer", "use_8bit_adam"),
            "use_8bit_adam contradicts use_lion_optimizer",
            "Keep one of them.",
        )
    for flag in given:
        if "optimizer_type" in explicit and options.optimizer_type != OPTIMIZER_FLAGS[flag]:
            yield (
                (flag, "optimizer_type"),
                f"{flag} contradicts optimizer_type {options.optimizer_type}",
                f"Leave {flag} out.",
            )
    optimizer, name = wanted_optimizer(options), options.lr_scheduler
    own_rate = sets_own_rate(optimizer, arguments)
    if finds_rate(optimizer) and len(rates := _different_rates(options)) > 1:
        yield (
            ("learning_rate", "unet_lr", "text_encoder_lr", "optimizer_type", "network_args"),
            f"{optimizer} finds one rate for all, but there are several: {', '.join(rates)}",
            "Give learning_rate alone, usually 1, and no LoRA+ ratio.",
        )
    if is_schedule_free(optimizer) and options.scale_weight_norms is not None:
        yield (
            ("scale_weight_norms", "optimizer_type"),
            f"scale_weight_norms changes weights that {optimizer} averages in a form of its own",
            "Leave one of them out.",
        )
    if options.full_fp16 and loses_fp16(optimizer, arguments):
        yield (
            ("optimizer_type", "full_fp16", "optimizer_args"),
            f"with full_fp16 {optimizer} divides by zero in the first steps: its eps is 0 in fp16",
            f"Give --optimizer_args eps={EPS_IN_FP16:g}, use another optimizer such as AdamW without foreach, or leave "
            "full_fp16 out.",
        )
    if is_schedule_free(optimizer) or own_rate:
        return
    if options.lr_scheduler_type:
        if options.lr_warmup_steps:
            yield (
                ("lr_warmup_steps", "lr_scheduler_type"),
                "a schedule given as lr_scheduler_type has no warm-up of its own",
                "Leave lr_warmup_steps out, or use a schedule of lr_scheduler.",
            )
        return
    if name in WITHOUT_WARMUP and options.lr_warmup_steps:
        yield (
            ("lr_warmup_steps", "lr_scheduler"),
            f"lr_scheduler {name} has no warm-up",
            "Use constant_with_warmup, or leave lr_warmup_steps at 0.",
        )
    if name == "adafactor":
        yield (
            ("lr_scheduler", "optimizer_type", "optimizer_args"),
            "lr_scheduler adafactor belongs to optimizer_type Adafactor with relative_step",
            "Use constant, or Adafactor without relative_step=False.",
        )
    if name in ("cosine_with_min_lr", "cosine_warmup_with_min_lr") and (options.lr_scheduler_min_lr_ratio is None) == (
        "min_lr" not in schedule
    ):
        both = options.lr_scheduler_min_lr_ratio is not None
        yield (
            ("lr_scheduler_min_lr_ratio", "lr_scheduler", "lr_scheduler_args"),
            f"lr_scheduler {name} is given its lowest rate twice"
            if both
            else f"lr_scheduler {name} needs its lowest rate",
            "Keep lr_scheduler_min_lr_ratio alone." if both else "Give lr_scheduler_min_lr_ratio, such as 0.1.",
        )
    if name == "piecewise_constant" and "step_rules" not in schedule:
        yield (
            ("lr_scheduler_args", "lr_scheduler"),
            "lr_scheduler piecewise_constant needs its rules",
            'Give lr_scheduler_args step_rules="1:100,0.1:200,0.01": the factor until each step, then the last one.',
        )


def _different_rates(options: Options) -> list[str]:
    """The rates of the groups of parameters where they differ, as far as the options tell; 0 means not trained."""
    rates = [options.learning_rate if options.unet_lr is None else options.unet_lr]
    if not options.network_train_unet_only:
        rates += options.text_encoder_lr or (options.learning_rate,)
    found = [f"{rate:g}" for rate in dict.fromkeys(rates) if rate > 0]
    ratios = [pair for pair in options.network_args or () if pair.startswith(("loraplus_", "network_reg_lrs"))]
    return found + ratios


def optimizer_corrections(options: Options, explicit: frozenset[str]) -> Iterator[tuple[str, dict[str, object]]]:
    """Old names and implied settings: a line for each, and the options that change."""
    for flag, name in OPTIMIZER_FLAGS.items():
        if getattr(options, flag):
            yield f"{flag} is an old name of --optimizer_type={name}", {flag: False, "optimizer_type": name}
    try:
        arguments = optimizer_arguments(options)
    except UserError:
        return  # it is one of the problems
    if not sets_own_rate(wanted_optimizer(options), arguments):
        return
    if arguments.get("relative_step") is False:
        yield "Adafactor's warmup_init turns relative_step on", {}
    yield (
        "Adafactor with relative_step sets its own rate: learning rates, lr_scheduler and warm-up have no effect "
        "(--optimizer_args relative_step=False uses them)",
        {"lr_scheduler": "adafactor", "lr_warmup_steps": 0},
    )


def optimizer_advice(options: Options, explicit: frozenset[str]) -> Iterator[str]:
    """One line for each setting without effect or unusual beside this optimizer and schedule."""
    optimizer = options.optimizer_type
    if finds_rate(optimizer) and options.learning_rate <= SMALL_FACTOR:
        yield (
            f"{optimizer} finds its own rate and takes learning_rate as a factor on it: {options.learning_rate:g} is low, "
            "1 is usual"
        )
    if optimizer == "Adafactor" and options.lr_scheduler != "adafactor":
        if options.max_grad_norm > 0:
            yield "Adafactor clips by itself (clip_threshold); --max_grad_norm=0 is usual with it"
        if options.lr_scheduler != "constant_with_warmup":
            yield "Adafactor with a fixed rate is usually run with --lr_scheduler=constant_with_warmup"
    if options.lr_scheduler == "adafactor":
        return
    if is_schedule_free(optimizer):
        schedule_options = ("lr_scheduler", "lr_scheduler_type", "lr_scheduler_args", *USERS)
        for name in schedule_options:
            if name in explicit and getattr(options, name) not in (0, "", None, "constant"):
                more = "; use --optimizer_args warmup_steps=..." if name == "lr_warmup_steps" else ""
                yield f"{name} has no effect: {optimizer} does without a schedule{more}"
        return
    if options.lr_scheduler_type:
        for name in ("lr_scheduler", *USERS):
            if name in explicit and getattr(options, name) not in (0, "constant"):
                yield f"{name} has no effect: lr_scheduler_type {options.lr_scheduler_type} wins"
        return
    if options.lr_scheduler == "warmup_stable_decay" and not options.lr_decay_steps:
        yield "lr_scheduler warmup_stable_decay never decays: lr_decay_steps is 0"
    for name, users in USERS.items():
        if name in explicit and options.lr_scheduler not in users and getattr(options, name) not in (0, None):
            if name in ("lr_scheduler_num_cycles", "lr_scheduler_power") and getattr(options, name) == 1:
                continue
            yield f"{name} has no effect: lr_scheduler {options.lr_scheduler} does not use it"
