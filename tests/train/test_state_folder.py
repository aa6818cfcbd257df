"""State folders: values that come back bit for bit, folders that are whole or not there, optimizers of every kind."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import re
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trainer.schema.base import UserError
from trainer.train.random_state import random_state, set_random_state
from trainer.train.state_folder import read_tensors, remove_states, state_name, write_state
from trainer.train.state_head import read_head
from trainer.train.state_tree import pack, unpack


def through_json(value: object) -> Any:
    tree, tensors = pack(value)
    return unpack(json.loads(json.dumps(tree, allow_nan=False)), tensors)


def test_values_of_every_kind_come_back_as_they_were() -> None:
    value: dict[object, Any] = {
        0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(2, 3), "qmap": torch.arange(4, dtype=torch.uint8)},
        "groups": [{"lr": 0.1 + 0.2, "betas": (0.9, 0.999), "params": [0, 1], "name": None, "fused": True}],
        "odd": [math.inf, -math.inf, 5e-324, 1e308, -0.0, 2**70, torch.bfloat16, "ünï", {"dict": [], "tensor": 1}],
    }
    back = through_json(value)
    assert back["groups"] == value["groups"]
    assert type(back["groups"][0]["betas"]) is tuple
    assert back["odd"] == value["odd"]
    assert math.copysign(1, back["odd"][4]) == -1
    for name, tensor in value[0].items():
        assert back[0][name].dtype == tensor.dtype
        assert torch.equal(back[0][name], tensor)
    assert math.isnan(through_json(math.nan))
    assert through_json(deque([np.float64(0.5), np.int64(2)])) == [0.5, 2]


def test_what_has_no_form_is_refused_by_its_place() -> None:
    with pytest.raises(ValueError, match=r"state\.0\.kept is a set"):
        pack({"state": {0: {"kept": {1}}}})
    with pytest.raises(ValueError, match="the tensor a is missing"):
        unpack({"tensor": "a"}, {})
    for tree in ({"code": "x"}, {}, {"list": [], "dict": []}, [1]):
        with pytest.raises(ValueError, match="no part of a state"):
            unpack(tree, {})


def test_generators_go_on_with_the_same_numbers() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(1))  # noqa: NPY002

    state = through_json(random_state(torch.device("cpu")))
    expected = draw()
    draw()
    set_random_state(state, torch.device("cpu"))
    assert draw() == expected


CONTENT: dict[str, object] = {"position": {"step": 7}, "seed": 3}
TENSORS = {"network": {"a": torch.ones(300)}, "optimizer": {"b": torch.zeros(2)}, "random": {"c": torch.ones(1)}}


def write(path: Path, **changes: object) -> None:
    write_state(path, {**CONTENT, **changes}, TENSORS, {"current_epoch": 1, "current_step": 7})


def test_a_state_is_read_as_it_was_written_and_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "out" / state_name("x", "step", 7)
    write(path)
    write(path, seed=4)
    head = read_head(path)
    assert (head.step, head.content["seed"]) == (7, 4)
    assert torch.equal(read_tensors(path, "network")["a"], torch.ones(300))
    assert [entry.name for entry in path.parent.iterdir()] == ["x-step00000007-state"]


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_disk_that_refuses_leaves_the_old_state_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "x-state"
    write(path)

    def no_space(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if call == "fsync":
            patch.setattr(os, "fsync", no_space)
        else:
            rename = Path.rename
            patch.setattr(Path, "rename", lambda self, to: no_space() if self.suffix == ".tmp" else rename(self, to))
        with pytest.raises(UserError, match=r"the disk is full: x-state needs 0\.0 MB"):
            write(path, seed=4)
    assert read_head(path).content["seed"] == 3
    assert [entry.name for entry in tmp_path.iterdir()] == ["x-state"]


def test_a_file_that_cannot_be_written_is_a_full_disk_and_no_riddle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library that writes tensors has an error of its own for what the system refuses."""
    monkeypatch.setattr(Path, "mkdir", lambda *_args, **_named: None)
    with pytest.raises(UserError, match="x-state cannot be written"):
        write(tmp_path / "nowhere" / "x-state")


def test_what_a_killed_process_left_is_cleared_and_an_old_state_gets_its_name_back(tmp_path: Path) -> None:
    path = tmp_path / "x-state"
    write(path)
    path.rename(tmp_path / ".x-state.0123abcd.old")
    (tmp_path / ".x-state.4567cdef.tmp").mkdir()
    (tmp_path / ".y-state.4567cdef.tmp").mkdir()
    write(path, seed=4)
    assert {entry.name for entry in tmp_path.iterdir()} == {"x-state", ".y-state.4567cdef.tmp"}
    assert read_head(path).content["seed"] == 4


def test_only_states_that_are_old_and_of_this_run_are_removed(tmp_path: Path) -> None:
    names = ["x-step00000002-state", "x-step00000004-state", "x-step00000006-state", "xx-step00000002-state", "x-state"]
    for name in names:
        write(tmp_path / name)
    pattern = re.compile(r"x-step(\d{8,})-state")
    keep = tmp_path / "x-step00000004-state"
    remove_states(tmp_path, pattern, up_to=4, keep=keep, warn=pytest.fail)
    assert {entry.name for entry in tmp_path.iterdir()} == set(names[1:])


def test_a_state_of_another_format_is_not_guessed_at(tmp_path: Path) -> None:
    write(tmp_path / "x-state")
    file = tmp_path / "x-state" / "state.json"
    file.write_text(file.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(UserError, match="this state has format 2; 1 is known here"):
        read_head(tmp_path / "x-state")
