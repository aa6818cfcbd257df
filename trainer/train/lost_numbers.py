"""What a run leaves behind, and says, when a loss or a gradient is no number."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from trainer.lora.lycoris import AnyNetwork
from trainer.schema.base import UserError
from trainer.schema.options import Options
from trainer.train.checkpoint import checkpoint_name
from trainer.train.engine import Engine
from trainer.train.micro_batch import NumbersLost
from trainer.train.objective import FlowBatch
from trainer.train.planned_batches import PlannedBatch
from trainer.train.recording import write_recording
from trainer.train.saver import LoraSaver, output_dir

REPLAY_FOLDER = "replay"


def after_lost_numbers(
    lost: NumbersLost, network: AnyNetwork, options: Options, save: LoraSaver, engine: Engine
) -> UserError:
    """Keeps what can be used: the batch as a replay file, and the LoRA as it was. Gives the error that ends the run."""
    if not isinstance(lost.micro_batch, PlannedBatch):
        raise AssertionError("this recipe trains on planned batches alone")
    planned = lost.micro_batch
    rank = f"-rank{engine.rank}" if engine.num_processes > 1 else ""
    base = options.run_dir if options.run_dir is not None else output_dir(options)
    saved: Path | None = None
    if lost.position.step > 0 and engine.is_main:
        # A disk that refuses it must not hide why the run ends.
        with contextlib.suppress(UserError):
            save(lost.position, "step")
            saved = output_dir(options) / checkpoint_name(options.output_name, "step", lost.position.step)
    with torch.no_grad():
        batch = planned.draw(lost.generator)
    return explain_lost_numbers(
        lost,
        batch,
        [str(item.picture.path) for item in planned.plan.items],
        network.training_state(),
        options,
        path=base / REPLAY_FOLDER / f"step{lost.position.step + 1:08d}{rank}.safetensors",
        saved=saved,
    )


def explain_lost_numbers(
    lost: NumbersLost,
    batch: FlowBatch,
    pictures: Sequence[str],
    weights: Mapping[str, Tensor],
    options: Options,
    *,
    path: Path,
    saved: Path | None,
) -> UserError:
    """Writes the replay file `path` and gives the error that ends the run: causes, what was kept, what to do.

    Training never goes on after this: numbers that are lost once are lost again, and skipped steps hide it. `batch`
    is what was computed, `pictures` its files, `weights` the LoRA before the step and `saved` its file, if any.
    """
    end = "Training ends here"
    end += " with the LoRA as it was before this step" + (f", saved as {saved}" if saved is not None else "")
    try:
        write_recording(path, batch, weights, options)
        replay = (
            f"The step is recorded in {path}; run it again with: "
            f"python -m trainer replay --input={path} --output=replayed.safetensors --steps=1"
        )
    except UserError as error:
        replay = f"The step could not be recorded: {error}"
    cause = likely_cause(batch, pictures, weights, options)
    return UserError(lost.problems[0].what, hint=f"{cause} {end}. {replay}")


def likely_cause(batch: FlowBatch, pictures: Sequence[str], weights: Mapping[str, Tensor], options: Options) -> str:
    """One or two sentences: the first thing on the way to the loss that is no number, and what to do about it."""
    bad = [name for name, latents in zip(pictures, batch.latents, strict=True) if not _is_finite(latents)]
    if bad:
        return f"The latents of {', '.join(bad)} are no numbers: check the picture and delete its cache."
    if not (_is_finite(batch.text.txt) and _is_finite(batch.text.vec)):
        return f"The text encoding of {', '.join(pictures)} is no number: check the text encoders' files."
    wrong = [name for name, tensor in weights.items() if not _is_finite(tensor)]
    if wrong:
        return f"The LoRA's own weights are no numbers ({wrong[0]}): start from another --network_weights."
    causes = ["a learning rate that is too high: try a third of it"]
    if options.mixed_precision == "fp16":
        causes.append("numbers beyond fp16's range: use --mixed_precision=bf16 where the card can")
    if options.optimizer_args:
        causes.append("optimizer_args")
    causes.append("a damaged model file")
    return f"Pictures, captions and LoRA are numbers, so the likely causes are {'; '.join(causes)}."


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
