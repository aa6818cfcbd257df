"""`python -m trainer generate`: pictures from prompts, with LoRAs at one or several strengths."""

from __future__ import annotations

import argparse
import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Final, cast

from trainer.schema.base import Problem, UserError
from trainer.schema.cli import parse_command_line
from trainer.schema.job_folder import JobReporter, run_job

SEED_BITS: Final = 31
_DEFAULT_FLAGS: Final = {
    "width": "w",
    "height": "h",
    "steps": "s",
    "guidance": "g",
    "cfg_scale": "l",
    "negative_prompt": "n",
}


def make_pictures(arguments: Sequence[str]) -> int:
    """Does what the command line asks for; returns the exit code. Raises `UserError`."""
    parser = _parser()
    known, rest = parser.parse_known_args(arguments)
    # Wrong words are better told before torch loads; the page reads them from the job's events.
    return run_job(known.job_dir, lambda reporter: _work(known, rest, reporter))


def _work(known: argparse.Namespace, rest: Sequence[str], reporter: JobReporter) -> None:
    texts = cast("list[str]", known.prompt or [])
    file = cast("Path | None", known.from_file)
    if not texts and file is None:
        raise UserError("there is no prompt", "--prompt", "Give --prompt or --from_file.", exit_code=2)
    loras = [_lora_of(word) for word in cast("list[str]", known.lora or [])]
    checkpoints = cast("list[Path]", known.checkpoints or [])
    grid = cast("list[float]", known.strengths or [1.0])
    output_dir = cast("Path", known.output_dir)

    import torch  # noqa: PLC0415 - seconds to load

    from trainer.train.generate import generate, plan_pictures  # noqa: PLC0415
    from trainer.train.sample_prompts import SamplePrompt, parse_prompt_line, read_sample_prompts  # noqa: PLC0415
    from trainer.train.session import configure_console  # noqa: PLC0415

    problems: list[Problem] = []
    prompts: list[SamplePrompt] = []
    for text in texts:
        prompt = parse_prompt_line(_with_defaults(text, known), where="--prompt", problems=problems)
        prompts += [] if prompt is None else [prompt]
    if file is not None:
        prompts += read_sample_prompts(file)
    if problems:
        raise UserError.many(problems, exit_code=2)
    model_words = list(rest)
    if known.ckpt_path is not None:
        model_words.append(f"--pretrained_model_name_or_path={known.ckpt_path}")
    if not any(word.startswith("--mixed_precision") for word in rest) and torch.cuda.is_available():
        model_words.append("--mixed_precision=bf16")
    command = parse_command_line(model_words)
    configure_console(command.options)
    seeds = cast("list[int]", known.seed or [secrets.randbits(SEED_BITS)])
    pictures = plan_pictures(
        prompts,
        seeds,
        [(index, strength) for index, (_, strength) in enumerate(loras)],
        list(range(len(loras), len(loras) + len(checkpoints))),
        grid,
    )
    made = generate(command, [*(path for path, _ in loras), *checkpoints], pictures, output_dir, reporter)
    print("\n".join(str(path) for path in made))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer generate",
        description="Makes pictures. The trainer's own options name the models (--pretrained_model_name_or_path, --clip_l, "
        "--t5xxl, --ae, tokenizers), --mixed_precision, --blocks_to_swap and --device. Nothing is merged, so that a grid "
        "over strengths and checkpoints loads each model once; strength 0 is the base model.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--prompt", action="append", help="a prompt, with flags as in a sample prompt file; may be repeated")
    add("--from_file", type=Path, help="a file of prompts (.txt, .toml or .json)")
    add(
        "--lora",
        "--lora_weights",
        action="extend",
        nargs="+",
        metavar="FILE[:STRENGTH]",
        help="LoRAs that are used together in every picture",
    )
    add(
        "--checkpoints",
        action="extend",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="LoRAs that are compared: each makes every picture",
    )
    add("--strengths", action="extend", nargs="+", type=float, help="strengths that are compared (default: 1)")
    add(
        "--seed",
        "--seeds",
        action="extend",
        nargs="+",
        type=int,
        help="one or several seeds, for prompts without their own (--d)",
    )
    add("--output_dir", type=Path, required=True, help="folder for the pictures")
    add("--ckpt_path", help="the same as --pretrained_model_name_or_path")
    for name, flag in _DEFAULT_FLAGS.items():
        add(f"--{name}", help=f"for prompts that do not say it themselves (--{flag})")
    add("--job_dir", type=Path, help="folder of a job of the page, for its progress")
    return parser


def _with_defaults(text: str, known: argparse.Namespace) -> str:
    """The prompt with the command's values for what it does not say itself."""
    for name, flag in _DEFAULT_FLAGS.items():
        value = getattr(known, name)
        if value is not None and re.search(rf"(^|\s)--{flag}\s", text) is None:
            text = f"{text} --{flag} {value}"
    return text


def _lora_of(word: str) -> tuple[Path, float]:
    """File and strength of `FILE`, `FILE:0.8` or, as sd-scripts writes it, `FILE;0.8`."""
    match = re.fullmatch(r"(.+)[:;](-?\d+(?:\.\d*)?|-?\.\d+)", word)
    return (Path(word), 1.0) if match is None else (Path(match[1]), float(match[2]))
