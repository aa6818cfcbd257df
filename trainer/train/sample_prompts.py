"""Prompts of sample pictures from files and command lines.

Formats and flags are those of kohya-ss/sd-scripts (`library/train_util.py`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

import tomlkit
from tomlkit.exceptions import TOMLKitError

from trainer.schema.base import Problem, UserError, nearest

SIZE_STEP, SMALLEST_SIZE = 16, 64


LARGEST_STEPS = 1000


USUAL_GUIDANCE = 3.5


_SEED_LIMIT: Final = 2**63


@dataclass(frozen=True)
class SamplePrompt:
    """One picture to make. `seed` None means a new one every time; `cfg_scale` 1 leaves the negative prompt unused.

    `guidance_scale` None means what is usual for the model. `width` and `height` are multiples of 16. `unused_flags` names what was given and has no effect.
    """

    prompt: str
    negative_prompt: str = ""
    width: int = 512
    height: int = 512
    seed: int | None = None
    num_steps: int = 20
    guidance_scale: float | None = None
    cfg_scale: float = 1.0
    unused_flags: tuple[str, ...] = ()

    @property
    def uses_negative_prompt(self) -> bool:
        return self.cfg_scale != 1.0


_FLAGS: Final[Mapping[str, str]] = {
    "w": "width",
    "h": "height",
    "d": "seed",
    "s": "sample_steps",
    "g": "guidance_scale",
    "l": "scale",
    "n": "negative_prompt",
    "ss": "sample_sampler",
    "cn": "controlnet_image",
    "ctr": "cfg_trunc_ratio",
    "rcfg": "renorm_cfg",
    "fs": "flow_shift",
}


_UNUSED: Final = ("sample_sampler", "controlnet_image", "cfg_trunc_ratio", "renorm_cfg", "flow_shift")


_KEYS: Final = ("prompt", *_FLAGS.values())


# A flag is two dashes and a letter after a space; a dash of the prose is neither.
_FLAG: Final = re.compile(r"(?:^|\s+)--(?=[A-Za-z])(\S+)")


# What a file can hold for one prompt: the key, or the flag as written, and the value with it.
_Entry = dict[str, object]


def read_sample_prompts(path: Path) -> list[SamplePrompt]:
    """The prompts of a .txt, .toml or .json file.

    Raises `UserError` (exit code 3) with every problem and its line or place. Sizes are rounded down to multiples of 16
    and up to 64, as in the reference; unlike there, unknown flags and values that are no numbers are problems.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _file_error("the prompt file is not UTF-8 text", path, "Save it as UTF-8.") from error
    except OSError as error:
        raise _file_error(
            f"the prompt file cannot be read: {error.strerror or error}", path, "Check --sample_prompts."
        ) from error
    readers = {".txt": _read_lines, ".toml": _read_toml, ".json": _read_json}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise _file_error("a prompt file ends in .txt, .toml or .json", path, "Rename it, or choose another.")
    problems: list[Problem] = []
    prompts = reader(text, path, problems)
    if problems:
        raise UserError.many(problems, exit_code=3)
    if not prompts:
        raise _file_error("the prompt file holds no prompt", path, "Write one prompt on each line.")
    return prompts


def parse_prompt_line(line: str, *, where: str, problems: list[Problem]) -> SamplePrompt | None:
    """A prompt with flags such as `--w 512`; None, with the reasons added to `problems`, when something is wrong."""
    words = _FLAG.split(line)
    entry: _Entry = {"prompt": words[0].strip()}
    is_good = True
    for flag, value in zip(words[1::2], words[2::2], strict=True):
        key = _FLAGS.get(flag.lower())
        if key is None:
            known = ", ".join(f"--{name}" for name in _FLAGS)
            is_good = False
            problems.append(
                _problem(
                    f"the prompt has an unknown flag --{flag}", where, f"Known are {known}; write them as --w 512."
                )
            )
        elif key in entry:
            is_good = False
            problems.append(_problem(f"the prompt has --{flag.lower()} twice", where))
        else:
            entry[key] = value.strip()
    prompt = _prompt_from(entry, where, problems)
    return prompt if is_good else None


def _read_lines(text: str, path: Path, problems: list[Problem]) -> list[SamplePrompt]:
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if not line.startswith("#")]
    found = [
        parse_prompt_line(line.strip(), where=f"{path}, line {number}", problems=problems)
        for number, line in lines
        if line.strip()
    ]
    return [prompt for prompt in found if prompt is not None]


def _read_toml(text: str, path: Path, problems: list[Problem]) -> list[SamplePrompt]:
    try:
        parsed: object = tomlkit.parse(text).unwrap()
    except TOMLKitError as error:
        raise _file_error(f"the prompt file is not TOML: {error}", path) from error
    table = cast("_Entry", parsed).get("prompt")
    if not isinstance(table, dict):
        raise _file_error("the prompt file has no [prompt] table", path, "Put prompts into [[prompt.subset]] tables.")
    shared = dict(cast("_Entry", table))
    subsets = shared.pop("subset", [{}])
    if not isinstance(subsets, list):
        raise _file_error("prompt.subset is not a list of tables", path, "Write [[prompt.subset]] in double brackets.")
    return _read_entries(cast("list[object]", subsets), "prompt.subset", path, problems, shared)


def _read_json(text: str, path: Path, problems: list[Problem]) -> list[SamplePrompt]:
    try:
        parsed: object = json.loads(text)
    except ValueError as error:
        raise _file_error(f"the prompt file is not JSON: {error}", path) from error
    if not isinstance(parsed, list):
        raise _file_error("the prompt file does not hold a list", path, 'Write ["a prompt", "another --w 512"].')
    return _read_entries(cast("list[object]", parsed), "entry", path, problems, {})


def _read_entries(
    entries: list[object], noun: str, path: Path, problems: list[Problem], shared: _Entry
) -> list[SamplePrompt]:
    found: list[SamplePrompt | None] = []
    for number, entry in enumerate(entries, 1):
        where = f"{path}, {noun} {number}"
        if isinstance(entry, str) and not shared:
            found.append(parse_prompt_line(entry.strip(), where=where, problems=problems))
        elif isinstance(entry, dict):
            found.append(_prompt_from({**shared, **cast("_Entry", entry)}, where, problems))
        else:
            problems.append(_problem("the entry is neither a text nor a table of values", where))
    return [prompt for prompt in found if prompt is not None]


class _Values:
    """The values of one entry, with what is wrong about them added to `problems`."""

    def __init__(self, entry: _Entry, where: str, problems: list[Problem]) -> None:
        self._entry = entry
        self._where = where
        self._problems = problems
        self.is_good = True

    def complain(self, what: str, hint: str | None = None) -> None:
        self.is_good = False
        self._problems.append(_problem(what, self._where, hint))

    def text(self, key: str) -> str:
        value = self._entry.get(key)
        if value is not None and not isinstance(value, str):
            self.complain(f"{key} is {value}; it must be a text")
            return ""
        return value or ""

    def whole(self, key: str, default: int | None, *, least: int, most: int) -> int | None:
        value = self._entry.get(key)
        if value is None:
            return default
        text = str(value)
        if isinstance(value, bool) or not re.fullmatch(r"-?[0-9]{1,19}", text) or not least <= int(text) <= most:
            self.complain(f"{_flag_of(key)} is {text or 'empty'}; it must be a whole number from {least} to {most}")
            return default
        return int(text)

    def number(self, key: str, default: float) -> float:
        value = self._entry.get(key)
        if value is None:
            return default
        try:
            parsed = math.nan if isinstance(value, bool) else float(str(value))
        except ValueError:
            parsed = math.nan
        if not math.isfinite(parsed):
            self.complain(f"{_flag_of(key)} is {str(value) or 'empty'}; it must be a number")
            return default
        return parsed


def _prompt_from(entry: _Entry, where: str, problems: list[Problem]) -> SamplePrompt | None:
    values = _Values(entry, where, problems)
    for key in entry:
        if key not in _KEYS:
            near = nearest(key, _KEYS)
            values.complain(f"the prompt has an unknown key {key}", f"Did you mean {near}?" if near else None)
    prompt = values.text("prompt")
    if not prompt and values.is_good:
        values.complain("the prompt has no text")
    made = SamplePrompt(
        prompt=prompt,
        negative_prompt=values.text("negative_prompt"),
        width=_rounded_size(values.whole("width", 512, least=1, most=16384)),
        height=_rounded_size(values.whole("height", 512, least=1, most=16384)),
        seed=values.whole("seed", None, least=0, most=_SEED_LIMIT - 1),
        num_steps=values.whole("sample_steps", 20, least=1, most=LARGEST_STEPS) or 20,
        guidance_scale=values.number("guidance_scale", USUAL_GUIDANCE) if "guidance_scale" in entry else None,
        cfg_scale=values.number("scale", 1.0),
        unused_flags=tuple(_flag_of(key) for key in _UNUSED if key in entry),
    )
    return made if values.is_good else None


def _rounded_size(size: int | None) -> int:
    return max(SMALLEST_SIZE, (size or SMALLEST_SIZE) // SIZE_STEP * SIZE_STEP)


def _flag_of(key: str) -> str:
    flag = next((flag for flag, name in _FLAGS.items() if name == key), None)
    return key if flag is None else f"--{flag} ({key})"


def _problem(what: str, where: str, hint: str | None = None) -> Problem:
    return Problem(what, where, hint, "sample_prompts")


def _file_error(what: str, path: Path, hint: str | None = None) -> UserError:
    return UserError(what, str(path), hint, field="sample_prompts")
