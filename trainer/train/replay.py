"""Replay: trains on one recorded batch, noise and timesteps given, through the same pieces as a run.

Serves debugging and proofs of parity. Of the models only the transformer is needed. The output is a safetensors file:
`losses` (N), before each step; of step 1 `out.model_pred` (after the prediction-type map) and `out.target`
(B, 16, h, w), and `grad.<key>`, averaged but not clipped; `after.<key>`, the LoRA after the last step. Keys are those of
`LoraNetwork.training_state`.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from trainer.lora.lycoris import AnyNetwork
from trainer.model.flux import Flux
from trainer.model.transformer import Transformer
from trainer.schema.base import UserError
from trainer.schema.chroma_header import VISIBLE_PADDING
from trainer.schema.cli import ParsedCommand
from trainer.schema.optimizer_args import parse_optimizer_args
from trainer.train.base_weights import merge_base_weights
from trainer.train.check import check_replay
from trainer.train.checkpoint import write_file
from trainer.train.conditioning import TextInputs, show_padding, text_inputs
from trainer.train.engine import Engine
from trainer.train.gradient_sync import GradientSync
from trainer.train.learning_rate import learning_rate_schedule
from trainer.train.loop import TrainingLoop
from trainer.train.micro_batch import MicroBatch, NumbersLost
from trainer.train.network_setup import (
    attach_network,
    block_swap,
    compile_model,
    hold_norms,
    load_model,
    text_encoder_rates,
    unet_rate,
)
from trainer.train.objective import Comparison, FlowBatch, FlowObjective
from trainer.train.optim import create_optimizer
from trainer.train.planned_batches import flow_objective
from trainer.train.recipe import SEED_BITS
from trainer.train.recording import Recording, read_recording
from trainer.train.replay_options import replay_advice
from trainer.train.reporting import Reporter, StopRequested
from trainer.train.step_position import LoopSettings

_ENCODER_LORAS = ("lora_te1_", "lora_te2_", "lora_te3_")


def replay(command: ParsedCommand, reporter: Reporter, *, source: Path, output: Path, num_steps: int) -> None:
    """Makes exactly `num_steps` optimizer steps on the batch in `source` and writes `output`.

    The learning-rate schedule spans these steps. Raises `UserError` for what the user can fix; when a loss is no number
    the output is written first, with NaN for the steps that were not made.
    """
    options = command.options
    for note in command.notes:
        reporter.note(note)
    recording = read_recording(source)
    for note in replay_advice(command, recording):
        reporter.note(note)
    checked = check_replay(options)
    engine = Engine.start(options)
    reporter.note(f"replaying {num_steps} steps on {engine.name()}, {engine.dtype}".replace("torch.", ""))
    seed = options.seed if options.seed is not None else secrets.randbits(SEED_BITS)
    model = load_model(options, checked.flux, engine, reporter.note)
    _check_sizes(recording, model, source)
    for line in merge_base_weights({"unet": model}, options):
        reporter.note(line)
    network, _ = attach_network(options, checked.spec, model, engine, reporter, seed)
    compile_model(options, model, engine, reporter.note)
    num_left_out = load_initial(network, recording.initial, source)
    if num_left_out:
        reporter.note(
            f"{num_left_out} tensors of the text encoders' LoRA are not trained: the recorded text is encoded already"
        )
    objective = flow_objective(options, model, network, _no_text, engine)
    batch = batch_of(
        recording,
        objective,
        engine.device,
        apply_mask=options.apply_t5_attn_mask,
        visible_padding=VISIBLE_PADDING if options.model_type == "chroma" else 0,
        seed=seed,
    )
    optimizer = create_optimizer(
        options.optimizer_type,
        network.parameter_groups(unet_rate(options), *text_encoder_rates(options)),
        learning_rate=options.learning_rate,
        arguments=parse_optimizer_args(options.optimizer_args, options.optimizer_type),
    )
    witness = _Witness(objective, batch, network)
    loop = TrainingLoop(
        LoopSettings(
            num_steps=num_steps,
            num_epochs=num_steps,
            micro_steps_per_epoch=1,
            num_micro_steps=1,
            max_grad_norm=options.max_grad_norm,
            seed=seed,
            save_every_n_steps=None,
            save_every_n_epochs=None,
            sample_every_n_steps=None,
            sample_every_n_epochs=None,
            sample_at_first=False,
        ),
        network=network,
        optimizer=optimizer,
        schedule=learning_rate_schedule(options, optimizer, num_steps=num_steps),
        scaler=engine.scaler(),
        sync=GradientSync(engine.reduce_mean, engine.num_processes),
        reporter=reporter,
        rank=engine.rank,
        micro_batches=witness.micro_batches,
        save=lambda _position, _kind: None,
        sample=lambda _position, _is_epoch_end: None,
        peak_bytes=engine.peak_bytes,
        inspect_gradients=witness.inspect_gradients,
        before_step=network.before_step,
        after_step=partial(hold_norms, network, options.scale_weight_norms),
    )
    failure: NumbersLost | None = None
    with block_swap(options, model, engine, reporter):
        try:
            _, was_stopped = loop.run()
        except NumbersLost as lost:
            failure, was_stopped = lost, False
    if was_stopped:
        raise StopRequested
    if engine.is_main:
        write_file(output, safetensors.torch.save(witness.outputs(num_steps), metadata={"format": "pt"}))
        reporter.note(f"wrote {output}")
    if failure is not None:
        raise UserError(failure.problems[0].what, str(source), f"The steps until then are in {output}.") from failure


class _Witness:
    """Hands the same batch to every step and writes down what the output file holds."""

    def __init__(self, objective: FlowObjective, batch: FlowBatch, network: AnyNetwork) -> None:
        self._objective = objective
        self._batch = batch
        self._network = network
        self._losses: list[Tensor] = []
        self._first: Comparison | None = None
        self._gradients: dict[str, Tensor] = {}

    def micro_batches(self, _epoch: int, _skipped: int) -> Iterator[MicroBatch]:
        yield self._loss

    def _loss(self, _generator: torch.Generator) -> Tensor:
        comparison = self._objective.compare(self._batch)
        loss = self._objective.error(self._batch, comparison)
        self._losses.append(loss.detach())
        if self._first is None:
            self._first = Comparison(comparison.prediction.detach(), comparison.target, None)
        return loss

    def inspect_gradients(self, step: int) -> None:
        if step == 1:
            self._gradients = {
                key: gradient.detach().clone() for key, gradient in self._network.training_gradients().items()
            }

    def outputs(self, num_steps: int) -> dict[str, Tensor]:
        if self._first is None:
            raise AssertionError("the loop made no step")
        losses = torch.full((num_steps,), torch.nan)
        losses[: len(self._losses)] = torch.stack(self._losses).float().cpu()
        found = {
            "losses": losses,
            "out.model_pred": self._first.prediction,
            "out.target": self._first.target,
            **{f"grad.{key}": gradient for key, gradient in self._gradients.items()},
            **{f"after.{key}": parameter for key, parameter in self._network.training_state().items()},
        }
        return {key: tensor.detach().cpu().clone().contiguous() for key, tensor in found.items()}


def _no_text(captions: Sequence[str]) -> TextInputs:
    raise AssertionError("a replay brings its own text")


def batch_of(
    recording: Recording,
    objective: FlowObjective,
    device: torch.device,
    *,
    apply_mask: bool,
    visible_padding: int = 0,
    seed: int,
) -> FlowBatch:
    """The recorded batch on the device, as the objective takes it; `visible_padding` tokens are not masked."""
    text = text_inputs(
        recording.t5_out.to(device),
        recording.clip_pooled.to(device),
        show_padding(recording.t5_attn_mask.to(device), visible_padding),
        apply_mask=apply_mask,
    )
    batch = objective.mix(
        recording.latents.to(device),
        recording.noise.to(device),
        (recording.timesteps_1000 / 1000).to(device),
        text,
        recording.loss_weights.to(device),
        torch.Generator().manual_seed(seed),
    )
    return replace(
        batch,
        noisy=batch.noisy if recording.noisy is None else recording.noisy.to(device),
        mask=None if recording.mask is None else recording.mask.to(device),
        preserved=None if recording.preserved is None else recording.preserved.to(device),
    )


def load_initial(network: AnyNetwork, initial: Mapping[str, Tensor], source: Path) -> int:
    """Sets the LoRA to the recorded tensors: all of it, or nothing when none are recorded.

    Tensors of a text encoder's LoRA are left out, as the recorded text has been through it; gives how many there are.
    Raises `UserError` when the recording is of another LoRA than the options describe.
    """
    of_encoders = [key for key in initial if key.startswith(_ENCODER_LORAS)]
    initial = {key: tensor for key, tensor in initial.items() if key not in of_encoders}
    if not initial:
        return len(of_encoders)
    state = network.training_state()
    hint = "Give the options that the recording was made with: --network_dim, --network_args and so on."
    tensors = {key: tensor for key, tensor in initial.items() if not key.endswith(".alpha")}
    for names, what in (
        ([key for key in tensors if key not in state], "are recorded and not trained"),
        ([key for key in state if key not in tensors], "are trained and not recorded"),
    ):
        if names:
            raise UserError(f"{len(names)} tensors {what} ({names[0]})", str(source), hint, field="input")
    published = network.published_state_dict(None)
    for key, tensor in initial.items():
        if key.endswith(".alpha"):
            ours = published.get(key)
            if ours is None or float(ours) != float(tensor):
                what = f"{key} is {float(tensor):g} in the recording"
                raise UserError(what, str(source), "Give that --network_alpha.", field="input")
        elif tensor.shape != state[key].shape:
            what = f"{key} is {list(tensor.shape)} in the recording and {list(state[key].shape)} here"
            raise UserError(what, str(source), hint, field="input")
        else:
            state[key].copy_(tensor)
    return len(of_encoders)


def _check_sizes(recording: Recording, model: Transformer, source: Path) -> None:
    pooled = recording.clip_pooled.shape[1]
    vec_in_dim = model.params.vec_in_dim if isinstance(model, Flux) else pooled
    for name, found, wanted in (
        ("in.t5_out", recording.t5_out.shape[2], model.params.context_in_dim),
        ("in.clip_pooled", pooled, vec_in_dim),
    ):
        if found != wanted:
            what = f"{name} is {found} wide, but this model takes {wanted}"
            raise UserError(what, str(source), "The recording belongs to another model.", field="input")
