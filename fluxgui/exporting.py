"""A project for elsewhere: as a command line, an options file, a script, or a notebook cell. No gradio."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from trainer.schema.cli import to_argv
from trainer.schema.option_files import options_to_toml
from trainer.schema.options import Options

SCRIPT: Final = "flux_train_network.py"
FORMATS: Final = ("bash", "windows", "toml", "script", "notebook")

# What cmd takes for itself outside of double quotes.
_NEEDS_QUOTES: Final = re.compile(r"[^\w./:\\=,+-]")
_DATASET: Final = "dataset.toml"
_PROMPTS: Final = "sample_prompts.txt"
_PATHS: Final = "Models and pictures have the paths of the machine that wrote this: change those that differ here."
_END: Final = "END_OF_FILE"


@dataclass(frozen=True)
class Project:
    """What is exported. `dataset_toml` and `prompts` are the content of files that the options need, empty without."""

    options: Options
    dataset_toml: str = ""
    prompts: str = ""


def export_project(project: Project, form: str) -> str:
    """The project in one of `FORMATS`. Secrets are left out. Raises `KeyError` for another format."""
    writers = {
        "bash": lambda: bash_command(project.options),
        "windows": lambda: windows_command(project.options),
        "toml": lambda: options_to_toml(_without_secrets(project.options)),
        "script": lambda: bash_script(project),
        "notebook": lambda: notebook_cell(project),
    }
    return writers[form]()


def bash_command(options: Options) -> str:
    """One option a line, for bash."""
    return " \\\n  ".join([f"python {SCRIPT}", *(_bash_option(words) for words in _options(options))])


def windows_command(options: Options) -> str:
    """The same for a batch file (.bat) of Windows."""
    return " ^\n  ".join([f"python {SCRIPT}", *(" ".join(map(_windows_word, words)) for words in _options(options))])


def bash_script(project: Project) -> str:
    """A script that writes the files which the training needs beside itself, and starts it."""
    options, files = _with_own_files(project)
    lines = [
        "#!/bin/bash",
        "# Start it in the program's folder, in its environment: bash train.sh",
        f"# {_PATHS}",
        "set -e",
    ]
    for name, content in files.items():
        end = _end_mark(content)
        lines += [f"cat > {name} <<'{end}'", content.rstrip("\n"), end]
    return "\n".join([*lines, bash_command(options), ""])


def notebook_cell(project: Project) -> str:
    """A cell for a notebook on a rented machine: installs what is needed, writes the files, trains."""
    options, files = _with_own_files(project)
    words = ["train", *to_argv(_without_secrets(options))]
    lines = [
        "# The program's folder on this machine: upload it, or clone its repository there.",
        'PROGRAM = "FluxGUI"',
        "",
        "import pathlib, subprocess, sys",
        "",
        "folder = pathlib.Path(PROGRAM).resolve()",
        'assert (folder / "run.py").is_file(), f"the program is not in {folder}: change PROGRAM"',
    ]
    lines.append(f"# {_PATHS}")
    for name, content in files.items():
        lines.append(f'(folder / "{name}").write_text({json.dumps(content)}, encoding="utf-8")')
    lines += [
        "# run.py makes the environment first (PyTorch with CUDA where there is an NVIDIA GPU), then trains.",
        "words = [",
        *(f"    {json.dumps(word)}," for word in words),
        "]",
        'with subprocess.Popen([sys.executable, "run.py", *words], cwd=folder, text=True,',
        "                      stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as training:",
        "    for line in training.stdout:",
        '        print(line, end="")',
        'assert training.returncode == 0, f"the training ended with code {training.returncode}"',
        "",
    ]
    return "\n".join(lines)


def _options(options: Options) -> list[list[str]]:
    """Each option with its values as words."""
    found: list[list[str]] = []
    for word in to_argv(_without_secrets(options)):
        if word.startswith("--"):
            found.append([word])
        else:
            found[-1].append(word)
    return found


def _without_secrets(options: Options) -> Options:
    return options.model_copy(update={"huggingface_token": None, "wandb_api_key": None, "run_dir": None})


def _bash_option(words: list[str]) -> str:
    return " ".join(shlex.quote(word) for word in words)


def _windows_word(word: str) -> str:
    word = word.replace("%", "%%")  # in a batch file
    name, equals, value = word.partition("=")
    if equals and name.startswith("--") and not _NEEDS_QUOTES.search(name):
        return f"{name}={_windows_value(value)}"
    return _windows_value(word)


def _windows_value(value: str) -> str:
    return f'"{value}"' if _NEEDS_QUOTES.search(value) else value


def _with_own_files(project: Project) -> tuple[Options, dict[str, str]]:
    """The options, naming files that come with the export, and these files."""
    options, files = project.options, dict[str, str]()
    if project.dataset_toml:
        options = options.model_copy(update={"dataset_config": Path(_DATASET)})
        files[_DATASET] = project.dataset_toml
    if project.prompts:
        options = options.model_copy(update={"sample_prompts": Path(_PROMPTS)})
        files[_PROMPTS] = project.prompts.rstrip("\n") + "\n"
    return options, files


def _end_mark(content: str) -> str:
    """A line that the content does not have."""
    mark = _END
    while mark in content.split("\n"):
        mark += "_"
    return mark
