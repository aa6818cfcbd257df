"""A run folder as a worker leaves it, with curves, samples and LoRAs, written without training."""

from __future__ import annotations

import json
import math
from pathlib import Path

from PIL import Image

from trainer.schema.run_folder import RunFolder

LEVELS = 4


def make_ended_run(
    runs: Path, name: str, *, num_steps: int = 80, learning_rate: float = 1e-4, outcome: str | None = "completed"
) -> RunFolder:
    """Completed after `num_steps` (a multiple of 4), with samples and a LoRA at every quarter; `outcome` None: no end."""
    run = RunFolder.create(
        runs,
        name,
        config_toml=f'output_name = "{name}"\nlearning_rate = {learning_rate}\nnetwork_dim = 8\n',
        dataset_toml='[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nimage_dir = "/pictures"\nnum_repeats = 2\n',
        sample_prompts="a cat\na dog\n",
        info={"name": name},
    )
    lines: list[str] = []

    def write(kind: str, **fields: object) -> None:
        head = {"schema": 1, "seq": len(lines) + 1, "attempt": 1, "time": 1000.0 + len(lines), "kind": kind}
        lines.append(json.dumps({**fields, **head}))

    write("run_started", pid=2**22 + 1, device="")  # no system gives this number
    write("plan", num_images=4, num_epochs=1, num_steps=num_steps, first_step=0, device="cpu")
    write("phase", name="training")
    for step in range(1, num_steps + 1):
        level = step % LEVELS
        loss = 0.2 + 0.1 * level + 0.3 * math.exp(-step / 50)
        levels = [loss if number == level else None for number in range(LEVELS)]
        write(
            "step",
            step=step,
            epoch=1,
            loss=loss,
            lr=learning_rate,
            grad_norm=0.5,
            step_seconds=0.5,
            level_losses=levels,
        )
        if step % (num_steps // 4) == 0:
            for index, prompt in enumerate(("a cat", "a dog")):
                path = run.samples_dir / f"{name}_{step}_{index}.png"
                Image.new("RGB", (64, 64), (50 + 50 * index, 255 * step // num_steps, 90)).save(path)
                write("sample", step=step, epoch=1, path=f"samples/{path.name}", prompt=prompt, index=index, seed=1)
    path = run.checkpoints_dir / f"{name}.safetensors"
    path.write_bytes(bytes(200_000))
    write("checkpoint", step=num_steps, epoch=1, path=f"checkpoints/{path.name}", bytes=200_000, is_final=True)
    (run.state_dir / "step-000080").mkdir(parents=True)
    (run.state_dir / "step-000080" / "large.bin").write_bytes(bytes(1000))
    if outcome is not None:
        write("run_finished", outcome=outcome, steps=num_steps)
    run.events_jsonl.write_text("\n".join(lines) + "\n", encoding="utf-8")
    log = ["2026-01-01 10:00:00 WARNING 2 captions are empty"]
    log += [f"2026-01-01 10:00:01 INFO    step {step}  loss 0.3" for step in range(num_steps)]
    run.worker_log.write_text("\n".join(log) + "\n", encoding="utf-8")
    return run
