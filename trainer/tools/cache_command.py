"""`python -m trainer cache`: what the caches hold, and the removal of what is not used any more."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from trainer.data.cache_cleaning import DAY_SECONDS, CachedFile, cached_files, remove_files, unused_files
from trainer.schema.base import UserError
from trainer.schema.model_kinds import format_bytes


def clean_caches(arguments: Sequence[str], *, now: float | None = None) -> list[str]:
    """The lines to print. Raises `UserError` for folders that do not exist and for a removal without a measure."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer cache",
        description="Lists what is cached at or below some folders. Nothing is removed without --prune.",
        allow_abbrev=False,
    )
    parser.add_argument("folders", nargs="+", type=Path, help="folders of pictures")
    parser.add_argument("--list", action="store_true", help="show and remove nothing (the default)")
    parser.add_argument(
        "--prune", action="store_true", help="remove what the following name; it is computed anew if needed"
    )
    parser.add_argument("--unused_days", type=float, help="what was not used for so many days; 0 is everything")
    parser.add_argument("--max_gb", type=float, help="the longest unused, until the rest takes at most so many GB")
    known = parser.parse_args(arguments)
    folders: list[Path] = known.folders
    unused_days: float | None = known.unused_days
    max_gb: float | None = known.max_gb
    for folder in folders:
        if not folder.is_dir():
            raise UserError("this folder does not exist", str(folder), "Give folders of pictures.", exit_code=2)
    if known.list and known.prune:
        raise UserError("--list and --prune exclude each other", hint="Leave one of them out.", exit_code=2)
    if known.prune and unused_days is None and max_gb is None:
        hint = "Give --unused_days=30, --max_gb=10 or both; --unused_days=0 removes everything."
        raise UserError("--prune needs a measure", "--prune", hint, exit_code=2)
    now = time.time() if now is None else now
    files = cached_files(folders)
    max_bytes = None if max_gb is None else round(max_gb * 10**9)
    chosen = unused_files(files, now=now, unused_days=unused_days, max_bytes=max_bytes)
    lines = [_line(folder, [file for file in files if file.path.parent == folder], now) for folder in _folders(files)]
    if known.prune:
        lines.append(f"removed {len(chosen)} files, {format_bytes(remove_files(chosen))}")
    elif unused_days is not None or max_gb is not None:
        lines.append(f"--prune would remove {len(chosen)} files, {_size(chosen)}")
    else:
        lines.append(f"{len(files)} files, {_size(files)} together")
    return lines


def _folders(files: Sequence[CachedFile]) -> list[Path]:
    return list(dict.fromkeys(file.path.parent for file in files))


def _size(files: Sequence[CachedFile]) -> str:
    return format_bytes(sum(file.num_bytes for file in files))


def _line(folder: Path, files: Sequence[CachedFile], now: float) -> str:
    kinds = ", ".join(
        f"{len(of_kind)} {kind} {_size(of_kind)}"
        for kind in ("latents", "masks", "text")
        if (of_kind := [file for file in files if file.kind == kind])
    )
    days = (now - max(file.used_at for file in files)) / DAY_SECONDS
    return f"{folder}: {kinds}; last used {max(0, days):.0f} days ago"
