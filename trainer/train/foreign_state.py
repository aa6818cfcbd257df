"""State folders of kohya-ss/sd-scripts, which are accelerate's: what can be taken from them without running code.

They hold `model.safetensors` (older ones `pytorch_model.bin`) with the LoRA under its published names, `optimizer.bin`,
`scheduler.bin`, `random_states_<rank>.pkl`, and `train_state.json`. Pickled files are only read by torch's reader that
takes nothing but tensors and plain values; the generators' files hold more than that and are left alone.
"""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import torch
from torch import Tensor

from trainer.lora.forms import to_published
from trainer.lora.lora_file import read_lora_file
from trainer.schema.base import UserError
from trainer.train.reporting import Reporter
from trainer.train.state_saver import Trainables, advance

_LORA_FILES: Final = ("model.safetensors", "pytorch_model.bin")
_OPTIMIZER_FILE: Final = "optimizer.bin"
_POSITION_FILE: Final = "train_state.json"

_GATHERED: Final[Mapping[str, frozenset[str]]] = {
    "AdamW": frozenset({"step", "exp_avg", "exp_avg_sq"}),
    "AdamW8bit": frozenset(
        {"step", "state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2", "max1", "max2", "new_max1", "new_max2"}
    ),
}
"""What each optimizer gathers for a weight; the file does not say which optimizer it is of."""
_SHAPED: Final = frozenset({"exp_avg", "exp_avg_sq", "state1", "state2"})
"""Those of them that have the weight's shape."""


@dataclass(frozen=True)
class ForeignState:
    """A folder of the reference trainer; `step` optimizer steps were done, 0 where it does not say."""

    path: Path
    lora: Path
    step: int
    says_step: bool


def read_foreign_state(path: Path) -> ForeignState:
    """Looks into the folder. Raises `UserError` when it holds no LoRA that can be read."""
    lora = next((path / name for name in _LORA_FILES if (path / name).is_file()), None)
    if lora is None:
        raise UserError(
            "this is no state of a run: neither state.json nor model.safetensors is in it",
            str(path),
            "Give a folder that --save_state wrote.",
            field="resume",
        )
    to_published(*_read_lora(lora), where=str(lora))
    step: object = None
    try:
        step = json.loads((path / _POSITION_FILE).read_bytes())["current_step"]
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"the position cannot be read: {error}", str(path / _POSITION_FILE), field="resume") from error
    known = step if isinstance(step, int) and step >= 0 else None
    return ForeignState(path, lora, known or 0, says_step=known is not None)


def _read_lora(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if path.suffix == ".safetensors":
        return read_lora_file(path)
    return _read_pickled(path), {}


def _read_pickled(path: Path) -> Any:
    """The file's tensors and plain values; no code of it is run."""
    try:
        with warnings.catch_warnings():
            # An unusual protocol is no news: what cannot be read is reported below.
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{path.name} cannot be read: {str(error).splitlines()[0]}", str(path), field="resume"
        ) from error


def resume_foreign(state: ForeignState, trained: Trainables, reporter: Reporter, *, step: int) -> None:
    """Takes the LoRA, the position's learning rates and, where it fits, the optimizer; says in a line what was taken.

    `step` is where the run goes on, which the options may have moved.
    """
    content, metadata = _read_lora(state.lora)
    published = to_published(content, metadata, where=str(state.lora))
    report = trained.network.load_published(published.state, where=str(state.lora), metadata=published.metadata)
    if report.missing or report.unexpected:
        name = (*report.missing, *report.unexpected)[0]
        raise UserError(
            f"the state is of another network: {name} is only on one side",
            str(state.path),
            "Give the network's settings as they were, or start from its LoRA with --network_weights.",
            field="resume",
        )
    taken = ["the LoRA", f"the position (step {state.step})" if state.says_step else "no position: it has none"]
    reason = _take_optimizer(state.path / _OPTIMIZER_FILE, trained.optimizer)
    if reason is None:
        taken.append("the optimizer")
    advance(trained.schedule, step)
    left = ["the random generators, whose files can hold code"]
    if reason is not None:
        left.insert(0, f"the optimizer ({reason}), which begins anew")
    reporter.note(f"a state of sd-scripts: taken are {', '.join(taken)}; not taken are {' and '.join(left)}")


def _take_optimizer(path: Path, optimizer: torch.optim.Optimizer) -> str | None:
    """Loads the optimizer's tensors where each has its weight's shape. Gives the reason when they are not taken."""
    if not path.is_file():
        return "there is none"
    try:
        loaded = _read_pickled(path)
        saved = cast("Mapping[str, Any]", loaded["state"])
        numbers = [number for group in loaded["param_groups"] for number in group["params"]]
    except UserError as error:
        return error.problems[0].what
    except (KeyError, TypeError):
        return "it is no optimizer's state"
    known = _GATHERED.get(type(optimizer).__name__)
    if known is None:
        return f"{type(optimizer).__name__}'s is not known well enough"
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if [len(group["params"]) for group in loaded["param_groups"]] != [len(g["params"]) for g in optimizer.param_groups]:
        return "its groups are others"
    moments: list[Mapping[str, Any]] = [saved.get(number, {}) for number in numbers]
    for parameter, entry in zip(parameters, moments, strict=True):
        if not entry.keys() <= known:
            return "it is another optimizer's"
        if any(entry[name].shape != parameter.shape for name in _SHAPED & entry.keys()):
            return "its tensors have other shapes"
    # The settings stay those of the options; only what the optimizer has gathered is taken.
    own = optimizer.state_dict()
    try:
        optimizer.load_state_dict({"state": dict(enumerate(moments)), "param_groups": own["param_groups"]})
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        optimizer.load_state_dict(own)
        return f"it does not fit: {error}"
    return None
