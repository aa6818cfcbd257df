"""The trainer as a program: `python -m trainer --flags...`, or one of the commands below.

Nothing heavy is imported before the options have been understood.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from trainer.schema.base import UserError
from trainer.schema.cli import (
    ParsedCommand,
    check_files,
    parse_command_line,
    read_command_line,
    read_values,
    write_config,
)
from trainer.schema.file_checks import needed_models
from trainer.schema.folders import demo_dir
from trainer.schema.job_folder import JobReporter, run_job
from trainer.schema.option_files import read_config_file
from trainer.schema.options import Options
from trainer.schema.run_folder import RunFolder

if TYPE_CHECKING:
    from trainer.train.reporting import Reporter

EXIT_DONE, EXIT_OPTIONS, EXIT_FIXABLE, EXIT_INTERRUPTED = 0, 2, 3, 130

HELP: Final = """\
python -m trainer --option=value ...     train a LoRA; --help lists the options
python -m trainer demo --output_dir D    train the bundled demo; the LoRA and the samples are written to D
python -m trainer check --option=...     check options, files and pictures as before training, and stop there
python -m trainer options [--json]       list all options; --json for programs, --markdown for docs/options.md
python -m trainer estimate --option=...  print what memory the training needs; --vram_gb and --ram_gb plan for a machine
python -m trainer replay --input=F --output=O --steps=N --option=...
                                         train on one recorded batch; a run records it when its loss is no number
python -m trainer convert-lora --input X --output Y --form F
                                         write a LoRA in another form: sd-scripts, diffusers, bfl or xlabs
python -m trainer generate --prompt P --output_dir D --option=...
                                         make pictures, with LoRAs at one or several strengths
python -m trainer merge | merge-loras | extract | resize | inspect
                                         work on LoRA files; each has --help, and docs/tools.md explains them
python -m trainer caption --image_dir D --model M
                                         write captions with a vision-language model: missing ones, all, or added
python -m trainer cache FOLDER ...        list what is cached beside pictures; --prune removes what is not used any more
python -m trainer make-demo [--dir D]    write the demo's models and pictures
python -m trainer get-models [--flux dev] [--t5 fp16] [--dir D]
                                         download the four model files from the Hugging Face hub; goes on where it was
python -m trainer notify                 try what the settings do at the end of a run
python -m trainer run FOLDER             train what a run folder holds (the page starts this)
"""


def main(argv: Sequence[str]) -> int:
    """Runs one command; returns the exit code: 0 done, 2 wrong options, 3 something to fix, 1 a bug."""
    arguments = list(argv)
    if arguments and arguments[0] in COMMANDS:
        command, arguments = COMMANDS[arguments[0]], arguments[1:]
    elif not arguments:
        print(HELP)
        return EXIT_OPTIONS
    elif not arguments[0].startswith("-"):
        print(f"{arguments[0]} is no command.\n\n{HELP}", file=sys.stderr)
        return EXIT_OPTIONS
    else:
        command = train_from_flags
    try:
        return command(arguments)
    except UserError as error:
        print(f"error: {error}" if len(error.problems) == 1 else f"errors:\n{error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def train_from_flags(arguments: Sequence[str]) -> int:
    parsed = read_command_line(arguments)
    if parsed.options.output_config:
        print(write_config(parsed.without_problems().options))
        return EXIT_DONE
    if parsed.problems and not names_files(parsed.options):
        # Nothing more could be found: answered in a fraction of a second, before torch loads.
        parsed.without_problems()
    from trainer.train.session import configure_console, is_main_process, run_guarded  # noqa: PLC0415

    configure_console(parsed.options)
    from trainer.train.reporting import Reporter  # noqa: PLC0415

    reporter = Reporter(is_main=is_main_process())
    reporter.install_signal_handlers()

    def work() -> None:
        report_mistakes(parsed, reporter)
        from trainer.train.recipe import train  # noqa: PLC0415 - torch takes seconds to load

        train(parsed, reporter)

    return run_guarded(work, reporter)


def report_mistakes(parsed: ParsedCommand, reporter: Reporter) -> None:
    """Raises `UserError` for wrong options and missing files, with all else that is wrong, before torch loads."""
    if parsed.problems or check_files(parsed.options):
        from trainer.train.check import check_run  # noqa: PLC0415 - Pillow and numpy

        check_run(parsed, reporter)


def names_files(options: Options) -> bool:
    """Whether the options name anything that can be looked at."""
    names = ("dataset_config", "train_data_dir", "sample_prompts", *(name for name, _, _ in needed_models(options)))
    return any(getattr(options, name) is not None for name in names)


def train_run_folder(arguments: Sequence[str]) -> int:
    from trainer.train.session import run_in_folder  # noqa: PLC0415

    parser = argparse.ArgumentParser(prog="python -m trainer run")
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args(arguments).folder

    def work(run: RunFolder, reporter: Reporter) -> None:
        parsed = options_of_run(run)
        report_mistakes(parsed, reporter)
        from trainer.train.recipe import train  # noqa: PLC0415 - torch takes seconds to load

        train(parsed, reporter)

    return run_in_folder(folder, work)


def options_of_run(run: RunFolder) -> ParsedCommand:
    """The options in a run folder; dataset, prompts and output are the folder's own where the file names none."""
    values = read_config_file(run.config_toml)
    values.setdefault("output_dir", str(run.checkpoints_dir))
    if run.dataset_toml.is_file() and not {"train_data_dir", "dataset_config"} & set(values):
        values["dataset_config"] = str(run.dataset_toml)
    if run.sample_prompts_txt.is_file() and run.sample_prompts_txt.read_text(encoding="utf-8").strip():
        values.setdefault("sample_prompts", str(run.sample_prompts_txt))
    values["run_dir"] = str(run.path)
    return read_values(values, where=run.config_toml.name)


def train_demo(arguments: Sequence[str]) -> int:
    from trainer.tools.demo import demo_arguments  # noqa: PLC0415 - numpy and Pillow
    from trainer.tools.tiny_models import make_demo_bundle  # noqa: PLC0415

    parser = argparse.ArgumentParser(
        prog="python -m trainer demo",
        description="Trains a LoRA on the bundled small models and pictures. Further options of the trainer may follow.",
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the LoRA and the samples")
    known, rest = parser.parse_known_args(arguments)
    output_dir: Path = known.output_dir
    bundle = make_demo_bundle(demo_dir())
    return train_from_flags([*demo_arguments(bundle), f"--output_dir={output_dir}", *rest])


def make_demo(arguments: Sequence[str]) -> int:
    from trainer.tools.tiny_models import make_demo_bundle  # noqa: PLC0415

    parser = argparse.ArgumentParser(prog="python -m trainer make-demo")
    parser.add_argument("--dir", type=Path, default=None, help="folder to make (default: in the data folder)")
    folder: Path | None = parser.parse_args(arguments).dir
    print(make_demo_bundle(folder or demo_dir()).folder)
    return EXIT_DONE


def convert_lora_file(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--job_dir", type=Path)
    known, rest = parser.parse_known_args(arguments)

    def work(reporter: JobReporter) -> None:
        from trainer.tools.convert_lora import convert_lora  # noqa: PLC0415 - torch takes seconds to load

        text = convert_lora(rest)
        print(text)
        reporter.result(text=text)

    return run_job(known.job_dir, work)


def make_pictures(arguments: Sequence[str]) -> int:
    from trainer.tools.generate import make_pictures as make  # noqa: PLC0415

    return make(arguments)


def lora_tool(name: str) -> Callable[[Sequence[str]], int]:
    """The command `name` of `trainer.tools.lora_commands`."""

    def work(arguments: Sequence[str]) -> int:
        from trainer.tools.lora_commands import run_lora_command  # noqa: PLC0415 - only these commands need it

        return run_lora_command(name, arguments)

    return work


def cache(arguments: Sequence[str]) -> int:
    from trainer.tools.cache_command import clean_caches  # noqa: PLC0415 - torch takes seconds to load

    print("\n".join(clean_caches(arguments)))
    return EXIT_DONE


def check(arguments: Sequence[str]) -> int:
    parsed = read_command_line(arguments)
    if parsed.problems and not names_files(parsed.options):
        parsed.without_problems()
    from trainer.train.check import check_run  # noqa: PLC0415 - Pillow and numpy
    from trainer.train.layer_notes import layer_notes  # noqa: PLC0415
    from trainer.train.plan import plan_text, tell_settings  # noqa: PLC0415
    from trainer.train.reporting import Reporter  # noqa: PLC0415
    from trainer.train.session import configure_console  # noqa: PLC0415
    from trainer.train.text_plan import plan_texts  # noqa: PLC0415

    configure_console(parsed.options)
    reporter = Reporter()
    checked = check_run(parsed, reporter)
    tell_settings(parsed, checked, reporter)
    for line in layer_notes(checked):
        reporter.warning(line)
    texts = plan_texts(checked, parsed.options.seed or 0)
    print("\n".join([plan_text(checked, texts), "No problems found."]))
    return EXIT_DONE


def replay_recording(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m trainer replay",
        description="Trains on one recorded batch and writes losses, gradients and weights. Options of the trainer may "
        "follow; those in the recording count where they are not given.",
        allow_abbrev=False,
    )
    parser.add_argument("--input", type=Path, required=True, help="the recorded batch, a .safetensors file")
    parser.add_argument("--output", type=Path, required=True, help="the .safetensors file to write")
    parser.add_argument("--steps", type=int, required=True, help="optimizer steps to make")
    known, rest = parser.parse_known_args(arguments)
    source: Path = known.input
    output: Path = known.output
    num_steps: int = known.steps
    if num_steps < 1:
        raise UserError(f"steps is {num_steps}; it must be 1 or more", "--steps", exit_code=2)
    from trainer.train.session import configure_console, is_main_process, run_guarded  # noqa: PLC0415

    configure_console(None)
    from trainer.train.recording import read_options_of  # noqa: PLC0415 - torch takes seconds to load

    parsed = parse_command_line([*read_options_of(source), *rest])
    configure_console(parsed.options)
    from trainer.train.reporting import Reporter  # noqa: PLC0415

    reporter = Reporter(is_main=is_main_process())
    reporter.install_signal_handlers()

    def work() -> None:
        from trainer.train.replay import replay  # noqa: PLC0415

        replay(parsed, reporter, source=source, output=output, num_steps=num_steps)

    return run_guarded(work, reporter)


def list_options(arguments: Sequence[str]) -> int:
    from trainer.schema.cli_help import help_text  # noqa: PLC0415 - only this command needs them
    from trainer.schema.option_reference import reference_page, reference_rows  # noqa: PLC0415

    parser = argparse.ArgumentParser(prog="python -m trainer options", allow_abbrev=False)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one object for each option")
    form.add_argument("--markdown", action="store_true", help="the page docs/options.md")
    known = parser.parse_args(arguments)
    if known.json:
        print(json.dumps(reference_rows(), indent=1))
    else:
        print(reference_page() if known.markdown else help_text(), end="")
    return EXIT_DONE


def estimate_memory(arguments: Sequence[str]) -> int:
    from trainer.tools.estimate_command import estimate_text  # noqa: PLC0415 - only this command needs it

    print(estimate_text(arguments))
    return EXIT_DONE


def get_models(arguments: Sequence[str]) -> int:
    from trainer.tools.get_models import main as download  # noqa: PLC0415 - the hub's library

    return download(arguments)


def caption(arguments: Sequence[str]) -> int:
    from trainer.tools.caption import main as write_captions  # noqa: PLC0415 - Pillow and numpy

    return write_captions(arguments)


def notify(arguments: Sequence[str]) -> int:
    from trainer.train.notify import tell_of_crash, try_out  # noqa: PLC0415

    parser = argparse.ArgumentParser(prog="python -m trainer notify", allow_abbrev=False)
    parser.add_argument("--run", type=Path, help="tell that this run's trainer is gone, instead of a trial")
    run = parser.parse_args(arguments).run
    problems = try_out() if run is None else tell_of_crash(RunFolder(run))
    for problem in problems:
        print(problem, file=sys.stderr)
    return EXIT_FIXABLE if problems else EXIT_DONE


COMMANDS: Final[Mapping[str, Callable[[Sequence[str]], int]]] = MappingProxyType(
    {
        "run": train_run_folder,
        "demo": train_demo,
        "make-demo": make_demo,
        "convert-lora": convert_lora_file,
        "generate": make_pictures,
        **{name: lora_tool(name) for name in ("merge", "merge-loras", "extract", "resize", "inspect")},
        "check": check,
        "cache": cache,
        "replay": replay_recording,
        "estimate": estimate_memory,
        "options": list_options,
        "get-models": get_models,
        "notify": notify,
        "caption": caption,
    }
)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
