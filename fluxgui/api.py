"""The page's actions for programs, as named endpoints of gradio: create, start, status, stop, list, download.

`docs/api.md` describes them. They do what the buttons do, through the same functions. The page's other handlers are
not among the endpoints: they take what stands in the form, and may change with every version.
"""

from __future__ import annotations

import time
from typing import Any, Final
from urllib.parse import quote

import gradio as gr
from gradio.events import api

from fluxgui.importing import as_job, read_pasted
from fluxgui.runs import RunView, RunWatcher, find_run, resume, send
from trainer.schema.base import UserError
from trainer.schema.folders import runs_dir
from trainer.schema.import_project import ImportedProject
from trainer.schema.run_folder import RunFolder

API_NAMES: Final = ("create", "start", "status", "stop", "list", "download")
START_SECONDS: Final = 20.0
MAX_LISTED: Final = 1000


def add_api(watcher: RunWatcher) -> None:
    """Add the endpoints. Call inside the page's `gr.Blocks`."""

    def create(project: str, dataset: str = "", prompts: str = "", name: str = "") -> dict[str, Any]:
        try:
            read = read_pasted(project, dataset)
            run = _create(read, prompts, name)
        except (OSError, UserError) as error:
            raise _refused(error) from None
        return {"run": run.path.name, "not_understood": [*read.not_understood], "notes": [*read.changed]}

    def start(run: str) -> dict[str, Any]:
        found = _find(run)
        if watcher.look(found).status.state == "completed":
            raise _refused(f"{run} is completed; create another run")
        try:
            resume(found)
        except (OSError, UserError) as error:
            raise _refused(error) from None
        # Until its trainer is heard of, or has ended before it could be.
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and watcher.look(found).status.state in ("stopped", "failed", "crashed"):
            time.sleep(0.2)
        return state_of(watcher.look(found))

    def status(run: str) -> dict[str, Any]:
        return state_of(watcher.look(_find(run)))

    def stop(run: str) -> dict[str, Any]:
        view = watcher.look(_find(run))
        if not view.is_live:
            raise _refused(f"{run} is not running, it is {view.status.state}")
        send(view.run, "stop")
        return state_of(view)

    def list_them() -> list[dict[str, Any]]:
        return [state_of(view) for view in watcher.look_at_all()[:MAX_LISTED]]

    def download(run: str, name: str = "") -> dict[str, Any]:
        view = watcher.look(_find(run))
        files = {checkpoint["name"]: checkpoint for checkpoint in checkpoints_of(view)}
        chosen = files.get(name) if name else next(reversed(files.values()), None)
        if chosen is None:
            there = ", ".join(files) or "none yet"
            raise _refused(f"{run} has no such LoRA; there are: {there}")
        return chosen

    functions = (create, start, status, stop, list_them, download)
    for api_name, function in zip(API_NAMES, functions, strict=True):
        api(function, api_name=api_name, concurrency_limit=4)


def hide_the_rest(page: gr.Blocks) -> None:
    """Make every handler of the page but the endpoints private. The page itself calls them by number."""
    for function in page.fns.values():
        if function.api_name not in API_NAMES:
            function.api_visibility = "private"


def _create(project: ImportedProject, prompts: str, name: str) -> RunFolder:
    job = as_job(project)
    return RunFolder.create(
        runs_dir(),
        name.strip() or job.name,
        config_toml=job.config_toml,
        dataset_toml=job.dataset_toml,
        sample_prompts=prompts.strip() + "\n" if prompts.strip() else job.sample_prompts,
        # It waits for `start`.
        info={"request": None, "by": "api"},
    )


def state_of(view: RunView) -> dict[str, Any]:
    """A run as a program sees it."""
    state = view.state
    return {
        "run": view.run_id,
        "name": view.name,
        "state": view.status.state,
        "detail": view.status.detail,
        "phase": state.phase,
        "step": state.step,
        "num_steps": state.num_steps,
        "epoch": state.epoch,
        "loss": state.loss,
        "step_seconds": state.step_seconds,
        "warnings": [*state.warnings],
        "errors": [f"{error.message} {error.hint}".strip() for error in state.errors],
        "checkpoints": checkpoints_of(view),
    }


def checkpoints_of(view: RunView) -> list[dict[str, Any]]:
    """The LoRAs that are there, oldest first. `url` is relative to the page's address."""
    return [
        {
            "name": path.name,
            "step": checkpoint.step,
            "epoch": checkpoint.epoch,
            "bytes": checkpoint.num_bytes,
            "is_final": checkpoint.is_final,
            "url": f"files/{quote(view.run_id, safe='')}/checkpoints/{quote(path.name, safe='')}",
        }
        for checkpoint in view.state.checkpoints
        if (path := view.run.path / checkpoint.path).is_file()
    ]


def _find(run: str) -> RunFolder:
    found = find_run(run)
    if found is None:
        raise _refused(f"there is no run {run}")
    return found


def _refused(reason: object) -> gr.Error:
    return gr.Error(str(reason), print_exception=False)
