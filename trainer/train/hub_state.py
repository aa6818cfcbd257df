"""Fetching the state that `--resume_from_huggingface` names into the hub's local cache."""

from __future__ import annotations

import glob
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import huggingface_hub
from huggingface_hub import constants as hub_constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from trainer.model.hub import first_line, unreachable_reason
from trainer.schema.base import UserError
from trainer.schema.hub_cache import cache_folder
from trainer.schema.hub_place import HubPlace, parse_hub_place
from trainer.train.hub_upload import without_secret
from trainer.train.state_head import REFERENCE_FILE

_LOG_IN: Final = "A private one needs HF_TOKEN, `hf auth login` or --huggingface_token."
_BY_HAND: Final = "Or download the folder yourself and give it as --resume, without --resume_from_huggingface."
_NUM_SHOWN: Final = 5


class HubReader(Protocol):
    """The part of `huggingface_hub.HfApi` that is used."""

    def list_repo_files(self, repo_id: str, *, revision: str | None, repo_type: str | None) -> list[str]: ...

    def snapshot_download(
        self, repo_id: str, *, repo_type: str | None, revision: str | None, cache_dir: Path, allow_patterns: list[str]
    ) -> Any: ...


def fetch_state(resume: Path, *, token: str | None, announce: Callable[[str], None]) -> Path:
    """The folder on this machine with the files of the state that lies at `resume` on the hub, and no others.

    A branch may have moved on, so the hub is asked each time; files that were fetched before are not fetched again.
    `announce` is told before. Raises `UserError` when there is no such state or it cannot be had.
    """
    try:
        place = parse_hub_place(resume)
    except ValueError as error:
        raise AssertionError("the checks of the options demand a place on the hub") from error
    reason = unreachable_reason()
    if reason is not None:
        raise _error(f"the state cannot be fetched ({reason})", resume, f"Make the hub reachable. {_BY_HAND}")
    hub: HubReader = huggingface_hub.HfApi(token=token)
    where = place.repo_id if place.revision is None else f"{place.repo_id} at {place.revision}"
    try:
        names = hub.list_repo_files(place.repo_id, revision=place.revision, repo_type=place.repo_type)
        files = [name for name in names if name.rpartition("/")[0] == place.folder]
        if not files:
            raise _error(f"{where} has no folder {place.folder} with files", resume, _states_in(names))
        announce(f"fetching the state {place.folder} of {where} ({len(files)} files) into {cache_folder()}")
        snapshot = hub.snapshot_download(
            place.repo_id,
            repo_type=place.repo_type,
            revision=place.revision,
            cache_dir=cache_folder(),
            allow_patterns=[glob.escape(name) for name in files],
        )
    except UserError:
        raise
    except Exception as error:
        what, hint = _explained(error, place)
        raise _error(without_secret(what, token), resume, hint) from error
    return Path(snapshot) / place.folder


def _explained(error: Exception, place: HubPlace) -> tuple[str, str]:
    """What went wrong and what helps."""
    if isinstance(error, GatedRepoError):
        what = f"the hub gives {place.repo_id} only to those who have agreed to its conditions"
        return what, f"Agree at {hub_constants.ENDPOINT}/{place.repo_id}, then set HF_TOKEN or run `hf auth login`."
    if isinstance(error, RepositoryNotFoundError):
        return f"the hub shows no {place.repo_type} repository {place.repo_id}", f"Check owner and name. {_LOG_IN}"
    if isinstance(error, RevisionNotFoundError):
        return f"{place.repo_id} has no revision {place.revision}", "Give a branch, a tag or a commit, or leave it out."
    # Network, hub and their libraries fail in many ways, which have no class in common.
    return f"the state cannot be fetched ({type(error).__name__}: {first_line(error)})", f"Try again. {_BY_HAND}"


def _states_in(names: Sequence[str]) -> str:
    """What could have been meant."""
    folders = sorted(folder for folder, _, name in (name.rpartition("/") for name in names) if name == REFERENCE_FILE)
    if not folders:
        return "There is no state in it. --save_state_to_huggingface uploads them."
    more = ", ..." if len(folders) > _NUM_SHOWN else ""
    return f"States in it: {', '.join(folders[-_NUM_SHOWN:])}{more}."


def _error(what: str, resume: Path, hint: str) -> UserError:
    return UserError(what, resume.as_posix(), hint, field="resume")
