"""A process that does to a run folder what a worker does, without training: `python -m tests.fluxgui.worker_process FOLDER`.

It takes the lock, writes a plan and steps, and obeys "stop". The tests of the interface watch, command and kill it.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from trainer.schema.events import EventWriter
from trainer.schema.run_folder import RunFolder
from trainer.schema.run_liveness import Heartbeat, WorkerLock

NUM_STEPS = 1000


def work(run: RunFolder) -> None:
    with WorkerLock(run), Heartbeat(run) as heartbeat:
        events = EventWriter(run.events_jsonl, attempt=1)
        events.write("run_started", pid=os.getpid(), device="cpu")
        events.write("plan", num_images=4, num_epochs=1, num_steps=NUM_STEPS, first_step=0)
        events.write("phase", name="training")
        sys.stdout.write("the first line of the log\n")
        sys.stdout.flush()
        for step in range(1, NUM_STEPS + 1):
            events.write("step", step=step, epoch=1, loss=1 / step, lr=1e-4, step_seconds=0.05)
            heartbeat.update(phase="training", progress=f"step {step}")
            for command in run.take_commands():
                events.write("command", id=command.id, name=command.name, result="accepted")
                run.finish_command(command)
                if command.name in ("pause", "resume"):
                    events.write("paused" if command.name == "pause" else "resumed")
                if command.name == "stop":
                    events.write("run_finished", outcome="stopped", steps=step)
                    return
            time.sleep(0.02)


if __name__ == "__main__":
    work(RunFolder(Path(sys.argv[1])))
