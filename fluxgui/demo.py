"""The demo: small models that come with the program, pictures made on the spot, and a run that trains on them. No gradio."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Final

from fluxgui.form import read_form
from fluxgui.presets import preset_form_values, start_values
from fluxgui.run_start import PROGRAM_FOLDER
from fluxgui.runs import create_and_start
from trainer.schema.base import UserError
from trainer.schema.dataset_file import read_dataset_config
from trainer.schema.folders import demo_dir
from trainer.schema.options import Options
from trainer.schema.run_folder import RunFolder

MAKE_SECONDS: Final = 120
DEMO_PRESET: Final = "demo"


def make_demo() -> None:
    """Make the demo's files unless they are there. In a process of its own, as the maker belongs to the trainer."""
    command = [sys.executable, "-m", "trainer", "make-demo", "--dir", str(demo_dir())]
    try:
        made = subprocess.run(
            command, cwd=PROGRAM_FOLDER, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=MAKE_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise UserError("the demo's files were not made in time", str(demo_dir()), "Try again.") from None
    if made.returncode:
        lines = (made.stderr.strip() or made.stdout.strip() or "no message").splitlines()
        raise UserError(f"the demo's files cannot be made: {lines[-1]}", str(demo_dir()))


def _taught_pictures(folder: Path) -> Path:
    """The folder of what the demo teaches: its dataset file names that one first, and ordinary pictures after it."""
    dataset = read_dataset_config(folder / "dataset.toml", Options())
    subset = dataset.datasets[0].subsets[0]
    if subset.image_dir is None:
        raise UserError("the demo's dataset file names no folder", str(folder / "dataset.toml"), "Make the demo anew.")
    return subset.image_dir


def demo_form_values() -> dict[str, object]:
    """What to fill the form with to train on the demo's files, which must have been made."""
    folder = demo_dir()
    models = folder / "models"
    return {
        **start_values(),
        **preset_form_values(DEMO_PRESET),
        "pretrained_model_name_or_path": str(models / "flux1-demo.safetensors"),
        "ae": str(models / "ae.safetensors"),
        "clip_l": str(models / "clip_l.safetensors"),
        "t5xxl": str(models / "t5xxl.safetensors"),
        "clip_l_tokenizer": str(models / "clip_l_tokenizer"),
        "t5xxl_tokenizer": str(models / "t5xxl_tokenizer"),
        "image_dir": str(_taught_pictures(folder)),
        "sample_prompt_lines": (folder / "sample_prompts.txt").read_text(encoding="utf-8").strip(),
        "output_name": "demo",
    }


def start_demo() -> RunFolder:
    """Make the demo's files if need be, and start a run on them. Raises `UserError`."""
    make_demo()
    reading = read_form(demo_form_values())
    if reading.job is None:
        raise UserError.many(reading.problems, exit_code=3)
    job = reading.job
    return create_and_start(
        job.name,
        config_toml=job.config_toml,
        # The form has one folder; beside it, ordinary pictures keep what the model could draw before.
        dataset_toml=(demo_dir() / "dataset.toml").read_text(encoding="utf-8"),
        sample_prompts=job.sample_prompts,
        info={"is_demo": True},
    )
