"""Sample pictures: the prompt file, the noise schedule, and Euler's way from noise to a picture.

Formats and flags of prompt files are those of kohya-ss/sd-scripts (`library/train_util.py`); the schedule is that of
black-forest-labs/flux (`sampling.py`).

B batch, h w latent size (1/8 of the picture's).
"""

from __future__ import annotations

import io
import itertools
import json
import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol, cast

import numpy as np
import tomlkit
import torch
import torch.nn.functional as F
from PIL import Image
from tomlkit.exceptions import TOMLKitError
from torch import Tensor

from trainer.schema.base import Problem, UserError, nearest
from trainer.train.checkpoint import write_file
from trainer.train.conditioning import TextInputs
from trainer.train.flow import mu_for_tokens, shift_sigmas

LATENT_CHANNELS, PIXELS_PER_LATENT = 16, 8
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


# ------------------------------------------------------------------------------------------------------ prompt files

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


# ------------------------------------------------------------------------------------------------------ the sampler


class VelocityModel(Protocol):
    """The model's velocity for latents (B, 16, h, w) at timesteps (B,) in [0, 1]; the same shape as the latents."""

    def __call__(self, noisy: Tensor, timesteps: Tensor, text: TextInputs, guidance_scale: float, /) -> Tensor: ...


def sample_schedule(num_steps: int, num_tokens: int, *, is_shifted: bool) -> Tensor:
    """Timesteps from 1 to 0, (num_steps + 1,) float32, for a picture of `num_tokens` image tokens.

    dev is made with the shift to high noise that grows with the picture; schnell without. (The reference shifts both.)
    """
    levels = torch.linspace(1, 0, num_steps + 1)
    return shift_sigmas(levels, math.exp(mu_for_tokens(num_tokens))) if is_shifted else levels


def initial_noise(prompt: SamplePrompt, seed: int) -> Tensor:
    """Latent noise (1, 16, h, w), float32 on the host: the same picture from the same seed on every device."""
    shape = (1, LATENT_CHANNELS, prompt.height // PIXELS_PER_LATENT, prompt.width // PIXELS_PER_LATENT)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def draw_sample(
    prompt: SamplePrompt,
    *,
    seed: int,
    predict: VelocityModel,
    decode: Callable[[Tensor], Tensor],
    text: TextInputs,
    negative_text: TextInputs | None,
    is_schnell: bool,
    device: torch.device,
    progress: Callable[[int, int], None],
    check_commands: Callable[[], None],
) -> Image.Image:
    """The picture of `prompt`.

    `text` and `negative_text` are encodings of batch 1; the second is needed when the prompt uses its negative prompt.
    `predict` and `decode` (latents (1, 16, h, w) to images (1, 3, H, W) about [-1, 1]) bring their own autocast; the
    model is in evaluation mode. After each step `progress(done, total)` and `check_commands()` are called, and either
    may raise to leave. Global random state is not touched.
    """
    num_tokens = (prompt.height // SIZE_STEP) * (prompt.width // SIZE_STEP)
    schedule = sample_schedule(prompt.num_steps, num_tokens, is_shifted=not is_schnell).tolist()
    latents = initial_noise(prompt, seed).to(device)
    guidance_scale = USUAL_GUIDANCE if prompt.guidance_scale is None else prompt.guidance_scale
    joint = text
    if prompt.uses_negative_prompt:
        if negative_text is None:
            raise ValueError("the prompt uses its negative prompt; its encoding is needed")
        joint = _stack(text, negative_text)
    with torch.no_grad():
        for step, (timestep, next_timestep) in enumerate(itertools.pairwise(schedule), 1):
            batch = latents.expand(joint.txt.shape[0], -1, -1, -1)
            timesteps = torch.full((batch.shape[0],), timestep, device=device)
            velocity = predict(batch, timesteps, joint, guidance_scale).float()
            if prompt.uses_negative_prompt:
                wanted, unwanted = velocity.chunk(2)
                velocity = unwanted + prompt.cfg_scale * (wanted - unwanted)
            latents = latents + (next_timestep - timestep) * velocity
            progress(step, prompt.num_steps)
            check_commands()
        return to_picture(decode(latents)[0])


def _stack(first: TextInputs, second: TextInputs) -> TextInputs:
    """Both as one batch. With the text mask each has its own length; the shorter one is padded, and the padding hidden."""
    longest = max(first.txt.shape[1], second.txt.shape[1])
    txt = torch.cat([F.pad(text.txt, (0, 0, 0, longest - text.txt.shape[1])) for text in (first, second)])
    mask = torch.cat([F.pad(_mask_of(text), (0, longest - text.txt.shape[1])) for text in (first, second)])
    return TextInputs(txt, torch.cat((first.vec, second.vec)), None if bool(mask.all()) else mask)


def _mask_of(text: TextInputs) -> Tensor:
    return torch.ones(text.txt.shape[:2], dtype=torch.int64, device=text.txt.device) if text.mask is None else text.mask


def to_picture(image: Tensor) -> Image.Image:
    """An RGB picture from an image (3, H, W) about [-1, 1]; values beyond are clipped.

    Raises `UserError` when the image holds NaN or infinity: the models' number format cannot hold what they compute.
    """
    image = image.detach().float()
    if not torch.isfinite(image).all():
        raise UserError(
            "a sample picture came out as NaN",
            hint="The LoRA has left the range of numbers (look at the loss, lower the rate), or a model file is damaged.",
        )
    # Truncated, not rounded, as the reference does it.
    values = ((image.clamp(-1, 1) + 1) * 127.5).to(torch.uint8)
    return Image.fromarray(np.ascontiguousarray(values.permute(1, 2, 0).cpu().numpy()))


def sample_file_name(
    output_name: str | None, *, step: int, epoch: int | None, index: int, moment: float, seed: int | None
) -> str:
    """The picture's name: X_e000001_02_20260114203112_42.png after an epoch, X_000500_... after a step.

    `epoch` None means a sample after a step. `moment` is in seconds since 1970; parts that are None are left out.
    """
    parts = (
        output_name,
        f"{step:06d}" if epoch is None else f"e{epoch:06d}",
        f"{index:02d}",
        time.strftime("%Y%m%d%H%M%S", time.localtime(moment)),
        None if seed is None else str(seed),
    )
    return "_".join(part for part in parts if part) + ".png"


def save_picture(path: Path, picture: Image.Image) -> None:
    """Writes a PNG that is whole or absent. Raises `UserError` when the disk does not take it."""
    encoded = io.BytesIO()
    picture.save(encoded, format="PNG")
    write_file(path, encoded.getvalue())
