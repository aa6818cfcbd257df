"""What the Library page starts: test pictures and the LoRA tools, each as a job. No gradio."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from fluxgui.jobs import JobView, list_jobs, start_job
from fluxgui.library import Entry, loras_dir
from fluxgui.pictures import safe_name
from trainer.schema.base import UserError
from trainer.schema.folders import demo_dir, models_dir
from trainer.schema.job_folder import JobFolder
from trainer.schema.option_files import read_config_file
from trainer.schema.settings import read_settings

TRY, TOOL = "try", "lora-tool"
MODELS: Final = ("pretrained_model_name_or_path", "clip_l", "t5xxl", "ae", "clip_l_tokenizer", "t5xxl_tokenizer")
MORE_OPTIONS: Final = (
    "model_type",
    "mixed_precision",
    "blocks_to_swap",
    "device",
    "apply_t5_attn_mask",
    "t5xxl_max_token_length",
    "clip_l_activation",
    "no_half_vae",
    "tokenizer_cache_dir",
)
"""Options of a run that its pictures should be made with, too."""
MAX_PICTURES: Final = 200
MAX_STRENGTH: Final = 2.0
TOOLS: Final = ("inspect", "resize", "convert", "merge-loras", "merge")
FORMS: Final = ("diffusers", "sd-scripts", "bfl", "xlabs")


def options_for(entry: Entry) -> dict[str, str]:
    """The models and settings that a LoRA was trained with, else those that were used last on this machine."""
    values: Mapping[str, object] = dict(read_settings().model_paths)
    if entry.run is not None:
        with contextlib.suppress(UserError):  # a damaged config: the models of before may fit
            values = {**values, **read_config_file(entry.run.config_toml)}
    elif entry.facts.base == "flux1-demo.safetensors" and (demo_dir() / "models").is_dir():
        folder = demo_dir() / "models"
        values = {name: str(folder / f"{name}.safetensors") for name in ("clip_l", "t5xxl", "ae")}
        values |= {name: str(folder / name) for name in ("clip_l_tokenizer", "t5xxl_tokenizer")}
        values |= {"pretrained_model_name_or_path": str(folder / "flux1-demo.safetensors"), "mixed_precision": "no"}
    if "blocks_to_swap" not in values:
        values = {**values, "blocks_to_swap": "auto"}
    return {
        name: str(value).lower() if isinstance(value, bool) else str(value)
        for name, value in values.items()
        if name in (*MODELS, *MORE_OPTIONS) and value not in (None, "", False)
    }


def usual_prompts(entry: Entry) -> str:
    """The run's own sample prompts, else one with the trigger word."""
    if entry.run is not None:
        try:
            lines = entry.run.sample_prompts_txt.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            lines = []
        prompts = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if prompts:
            return "\n".join(prompts)
    return entry.facts.trigger


def start_try(
    entry: Entry,
    checkpoints: Sequence[Path],
    *,
    prompts: str,
    seed: int | None,
    strengths: Sequence[float],
    size: int | None,
    steps: int | None,
    options: Mapping[str, str],
) -> JobFolder:
    """Start making the grid. Raises `UserError` for what cannot be started at all."""
    lines = [line.strip() for line in prompts.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    if not lines:
        raise UserError("there is no prompt", hint="Write what the picture should show, one prompt a line.")
    grid = sorted(set(strengths))
    if not grid:
        raise UserError("no strength is chosen", hint="Choose at least one; 0 shows the base model.")
    if not checkpoints:
        raise UserError("no checkpoint is chosen", hint="Choose at least one.")
    count = len(lines) * len(grid) * len(checkpoints)
    if count > MAX_PICTURES:
        raise UserError(f"these are {count} pictures", hint=f"At most {MAX_PICTURES} are made at once.")
    missing = [name for name in MODELS[:4] if not options.get(name)]
    if options.get("model_type") == "chroma":
        missing = [name for name in missing if name != "clip_l"]
    if missing:
        raise UserError(f"model files are missing: {', '.join(missing)}", hint="Fill them in under Models.")
    lines = [_with_flags(line, size=size, steps=steps) for line in lines]
    words = ["generate", "--job_dir={job}", "--output_dir={job}/output", "--from_file={job}/prompts.txt"]
    words += [f"--checkpoints={path}" for path in checkpoints]
    words += [f"--strengths={strength:g}" for strength in grid]
    words += [] if seed is None else [f"--seed={seed}"]
    words += [f"--{name}" if value == "true" else f"--{name}={value}" for name, value in options.items()]
    subject: dict[str, object] = {
        "entry": entry.entry_id,
        "prompts": lines,
        "strengths": grid,
        "checkpoints": [path.stem for path in checkpoints],
    }
    return start_job(TRY, entry.title, words, subject=subject, files={"prompts.txt": "\n".join(lines) + "\n"})


def _with_flags(line: str, *, size: int | None, steps: int | None) -> str:
    for flag, value in (("w", size), ("h", size), ("s", steps)):
        if value is not None and re.search(rf"(^|\s)--{flag}\s", line) is None:
            line = f"{line} --{flag} {value}"
    return line


def start_tool(
    entry: Entry,
    tool: str,
    *,
    name: str,
    rank: int | None = None,
    form: str = FORMS[0],
    other: Path | None = None,
    ratios: tuple[float, float] = (1.0, 1.0),
    model: str = "",
) -> JobFolder:
    """Start one of `TOOLS` on a LoRA. The result lies in the library's folder, a merged model in that of the models."""
    source = str(entry.path)
    target = None
    if tool != "inspect":
        stem = safe_name(name) if name.strip() else f"{entry.path.stem}-{tool}"
        target = (models_dir() if tool == "merge" else loras_dir()) / f"{stem}.safetensors"
        if target.exists():
            raise UserError("there is a file of this name already", target.name, "Choose another name.")
    match tool:
        case "inspect":
            words = ["inspect", source]
        case "resize":
            if rank is None:
                raise UserError("the new rank is not given", hint="A quarter of the present one is often enough.")
            words = ["resize", f"--model={source}", f"--new_rank={rank}", f"--save_to={target}"]
        case "convert":
            words = ["convert-lora", f"--input={source}", f"--output={target}", f"--form={form}"]
            words += [f"--model={model}"] if form == "bfl" and model else []
        case "merge-loras":
            if other is None:
                raise UserError("the second LoRA is not chosen", hint="Choose it in the list.")
            words = ["merge-loras", f"--save_to={target}", "--models", source, str(other)]
            words += ["--ratios", *(f"{ratio:g}" for ratio in ratios)]
        case "merge":
            if not model:
                raise UserError("the model is not given", hint="Fill in the FLUX model under Models.")
            words = ["merge", f"--flux_model={model}", f"--save_to={target}", "--models", source]
            words += ["--ratios", f"{ratios[0]:g}"]
        case _:
            raise ValueError(tool)
    return start_job(TOOL, f"{tool}: {entry.title}", [*words, "--job_dir={job}"], subject={"entry": entry.entry_id})


def latest_job(kind: str, entry: Entry) -> JobView | None:
    """The newest job of a kind that was started for this LoRA."""
    return next((view for view in list_jobs(kind) if view.subject.get("entry") == entry.entry_id), None)


def made_picture(view: JobView, name: str) -> Path | None:
    """A picture that the job says it has made, by name; never another file."""
    for result in view.results:
        path = Path(str(result.get("path", "")))
        if path.name == name and path.parent == view.job.output_dir and path.is_file():
            return path
    return None
