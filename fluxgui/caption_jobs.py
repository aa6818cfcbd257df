"""Automatic captions as jobs: a worker writes them, and what it wrote can be undone. No gradio."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from fluxgui.dataset_history import Written, record_written
from fluxgui.datasets import Dataset
from fluxgui.jobs import JobView, list_jobs, look_at_job, start_job
from fluxgui.language import say
from trainer.schema.base import UserError
from trainer.schema.run_folder import write_atomic
from trainer.schema.settings import with_token

KIND: Final = "caption"
MODES: Final = ("missing", "overwrite", "append")
DEFAULT_MODEL: Final = "florence-community/Florence-2-base"


def start_captions(
    dataset: Dataset, *, model: str, mode: str, prompt: str, only: Sequence[str] | None = None
) -> JobView:
    """Start a worker that captions the dataset, or the pictures in it that `only` names.

    Raises `UserError` when one is at it already, no model is named, or `only` is empty.
    """
    if not model.strip():
        raise UserError(say("dataset.no_captioner"), hint=say("dataset.no_captioner_hint", example=DEFAULT_MODEL))
    if mode not in MODES:
        raise UserError(f"mode is {mode}; it must be one of {', '.join(MODES)}")
    if only is not None and not only:
        raise UserError(say("dataset.caption_nothing_selected"), hint=say("dataset.caption_nothing_selected_hint"))
    running = caption_job(dataset)
    if running is not None and running.is_live:
        raise UserError(say("dataset.captioner_busy"))
    arguments = [
        "caption",
        f"--model={_model(model)}",
        f"--image_dir={dataset.path}",
        f"--mode={mode}",
        f"--prompt={prompt.strip()}",
        "--job_dir={job}",
        *(["--pictures={job}/pictures.txt"] if only is not None else []),
    ]
    job = start_job(
        KIND,
        say("dataset.step_captions"),
        arguments,
        subject={"folder": str(dataset.path), "mode": mode},
        environment=with_token({}),
        files={} if only is None else {"pictures.txt": "".join(f"{name}\n" for name in only)},
    )
    return look_at_job(job)


def _model(text: str) -> str:
    """A folder with its home sign resolved; a hub id as it is."""
    path = Path(text.strip().strip("\"'")).expanduser()
    return str(path) if path.is_dir() else text.strip()


def caption_job(dataset: Dataset) -> JobView | None:
    """The newest captioning of the dataset, ended or not."""
    return next((view for view in list_jobs(KIND) if view.subject.get("folder") == str(dataset.path)), None)


def keep_for_undo(dataset: Dataset, view: JobView) -> int:
    """Once a job has ended, put what it wrote into the dataset's history. Returns how many captions that is, once."""
    noted = view.job.path / "in_history"
    if view.is_live or noted.exists():
        return 0
    written = list(_written(view))
    record_written(dataset, written, say("dataset.step_captions"))
    write_atomic(noted, "")
    return len(written)


def _written(view: JobView) -> Iterator[Written]:
    for result in view.results:
        file, before, after = result.get("file"), result.get("before"), result.get("after")
        if not isinstance(file, str) or not isinstance(after, str) or Path(file).name != file:
            continue
        try:
            old = None if before is None else base64.b64decode(str(before)).decode("utf-8", errors="surrogateescape")
        except binascii.Error:
            continue
        yield Written(file, old, after)
