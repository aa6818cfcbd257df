"""A trainer that is gone without a word is told of, once; one that said its end, or was never seen, is not."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from fluxgui.run_crashes import CrashTeller
from trainer.schema.events import EventWriter
from trainer.schema.folders import runs_dir
from trainer.schema.run_folder import RunFolder
from trainer.schema.run_liveness import WorkerLock
from trainer.schema.settings import change_settings


def at_work(name: str) -> tuple[RunFolder, WorkerLock, EventWriter]:
    run = RunFolder.create(runs_dir(), name, config_toml="", dataset_toml="", sample_prompts="", info={"name": name})
    lock = WorkerLock(run)
    lock.acquire()
    run.heartbeat_json.write_text("{}", encoding="utf-8")
    events = EventWriter(run.events_jsonl, 1)
    events.write("run_started")
    events.write("step", step=7)
    return run, lock, events


def test_a_killed_trainer_is_told_of_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLUXGUI_HOME", str(tmp_path / "home"))
    told = tmp_path / "told"
    code = "import os, sys, json; open(sys.argv[1], 'a').write(json.dumps(dict(os.environ)))"
    change_settings(notify_command=(sys.executable, "-c", code, str(told)))
    killed, killed_lock, _ = at_work("killed")
    _, ended_lock, ended_events = at_work("ended")
    teller = CrashTeller()
    assert teller.look() == []
    killed_lock.release()
    ended_events.write("run_finished", outcome="completed", steps=9)
    ended_lock.release()
    assert [run.path for run in teller.look()] == [killed.path]
    assert teller.look() == []
    assert CrashTeller().look() == [], "nobody saw these at work"
    end = time.monotonic() + 60
    while not told.exists() or not told.read_text(encoding="utf-8").endswith("}"):
        assert time.monotonic() < end
        time.sleep(0.05)
    variables = json.loads(told.read_text(encoding="utf-8"))
    assert (variables["FLUXGUI_NAME"], variables["FLUXGUI_OUTCOME"]) == ("killed", "crashed")
    assert variables["FLUXGUI_TEXT"].startswith("FluxGUI: killed crashed after 7 steps: the trainer ended")
