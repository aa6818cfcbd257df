"""Options to a trained LoRA: everything built and every phase, in order. The one place that knows options, model and data.

What a phase needs is freed before the next one loads: text encoders, then autoencoder, then the transformer.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

from trainer.lora.network import LoraNetwork
from trainer.schema.cli import ParsedCommand
from trainer.schema.folders import data_home
from trainer.schema.optimizer_args import parse_optimizer_args
from trainer.schema.options import Options
from trainer.schema.storage import stored_as
from trainer.train.auto_swap import resolve_auto_swap
from trainer.train.base_layers import base_layers
from trainer.train.base_weights import merge_base_weights
from trainer.train.check import CheckedRun, check_run, trains_clip
from trainer.train.dataset_listing import dataset_listing
from trainer.train.device_checks import check_storage, product_seconds, slow_format
from trainer.train.engine import Engine
from trainer.train.file_hashes import HASHES_FILE, FileHashes
from trainer.train.foreign_state import resume_foreign
from trainer.train.gradient_sync import GradientSync
from trainer.train.hub_upload import HubUploader
from trainer.train.latents_phase import prepare_latents
from trainer.train.learning_rate import learning_rate_schedule
from trainer.train.level_losses import LevelLosses
from trainer.train.loop import TrainingLoop
from trainer.train.lost_numbers import after_lost_numbers
from trainer.train.measured_peak import MeasuredPeak
from trainer.train.memory_room import HalfTakenStep, NoRoom, SwapRoom
from trainer.train.micro_batch import NumbersLost
from trainer.train.network_setup import (
    attach_network,
    block_swap,
    compile_model,
    describe_network,
    hold_norms,
    load_model,
    may_swap_more,
    text_encoder_rates,
    unet_rate,
)
from trainer.train.optim import create_optimizer, final_weights, optimizer_description
from trainer.train.plan import estimate_run, largest_batch, plan_text, tell_settings, warn_of_memory
from trainer.train.planned_batches import epoch_micro_batches, flow_objective
from trainer.train.reporting import Reporter, StopRequested
from trainer.train.resume import Start
from trainer.train.saver import LoraSaver, output_dir, save_for_good
from trainer.train.session import DeviceLock
from trainer.train.state_saver import StateSaver, Trainables, advance, resume_state
from trainer.train.step_position import LoopSettings
from trainer.train.text_phase import prepare_text
from trainer.train.text_plan import TextPlan, plan_texts
from trainer.train.trackers import start_trackers
from trainer.train.training_facts import model_files, training_facts
from trainer.train.watchers import make_validator, sample_maker

SEED_BITS = 31


def train(command: ParsedCommand, reporter: Reporter) -> None:
    """The whole job. Raises `UserError` for what the user can fix and `StopRequested` after a requested stop."""
    options = command.options
    engine = Engine.start(options)
    checked = check_run(command, reporter, num_processes=engine.num_processes)
    tell_settings(command, checked, reporter, num_processes=engine.num_processes)
    if options.debug_dataset:
        for text in (plan_text(checked), *dataset_listing(checked, num_processes=engine.num_processes)):
            reporter.note(text)
        reporter.note("nothing is trained: --debug_dataset is given")
        return
    reporter.note(f"training on {engine.name()}, {engine.dtype}".replace("torch.", ""))
    slow = slow_format(engine.device, engine.dtype, product_seconds)
    if slow is not None:
        reporter.warning(slow)
    check_storage(stored_as(checked.options), engine.device)
    checked = resolve_auto_swap(checked, engine, reporter)
    warn_of_memory(checked, engine.total_bytes(), reporter)
    try:
        with _turn_on_device(options, engine, reporter):
            _train_checked(checked, engine, reporter)
    except StopRequested:
        engine.end()
        raise
    # Not after a failure: the others may wait in a collective that never comes, and only the launcher ends those.
    engine.end()


def _turn_on_device(options: Options, engine: Engine, reporter: Reporter) -> AbstractContextManager[object]:
    """Runs of the page take turns on a device; a command line trains at once, as whoever typed it expects."""
    return contextlib.nullcontext() if options.run_dir is None else DeviceLock(str(engine.device), reporter)


def _train_checked(checked: CheckedRun, engine: Engine, reporter: Reporter) -> None:
    options, start = checked.options, checked.start
    session = _session(checked, engine)
    seed = session.seed
    texts = plan_texts(checked, seed, num_processes=engine.num_processes)
    _announce_plan(checked, texts, engine, reporter)
    if engine.is_main:
        reporter.use_trackers(start_trackers(options))
    text = prepare_text(checked, texts, engine, reporter)
    latents, autoencoder = prepare_latents(checked, engine, reporter)

    reporter.phase("model")
    model = load_model(options, checked.flux, engine, reporter.note)
    for line in merge_base_weights({"unet": model}, options):
        reporter.note(line)
    base = base_layers(model) if options.lora_form == "bfl" else None
    clip = text.clip if trains_clip(checked) else None
    network, origin = attach_network(options, checked.spec, model, engine, reporter, seed, clip=clip, t5=text.t5)
    reporter.note(describe_network(network, checked.spec))
    compile_model(options, model, engine, reporter.note)
    if checked.spec.verbose and isinstance(network, LoraNetwork):
        for name, rank in network.ranks().items():
            reporter.note(f"{name}: rank {rank}")
    swap = block_swap(options, model, engine, reporter)
    optimizer_arguments = parse_optimizer_args(options.optimizer_args, options.optimizer_type)
    optimizer = create_optimizer(
        options.optimizer_type,
        network.parameter_groups(unet_rate(options), *text_encoder_rates(options)),
        learning_rate=options.learning_rate,
        arguments=optimizer_arguments,
    )
    upload = HubUploader.from_options(options, note=reporter.note, warn=reporter.warning) if engine.is_main else None
    hashes = FileHashes(model_files(options), data_home() / HASHES_FILE)
    save = LoraSaver(
        network,
        output_dir(options),
        options,
        training_facts(
            checked,
            seed=seed,
            session_id=session.id,
            started_at=session.started_at,
            optimizer=optimizer_description(optimizer, optimizer_arguments),
            num_processes=engine.num_processes,
            weight_dtype=str(engine.dtype).removeprefix("torch."),
        ),
        reporter,
        engine.is_main,
        origin,
        base,
        hashes,
        upload=upload,
        requested=start.requested,
    )
    if options.lora_form != "sd-scripts" and engine.is_main:
        # What the form cannot hold is better said now than after the training.
        save.tensors()
    sample = sample_maker(checked, model, network, autoencoder, text, engine, reporter)
    settings = _loop_settings(checked, seed)
    schedule = learning_rate_schedule(options, optimizer, num_steps=checked.schedule.num_steps)
    scaler = engine.scaler()
    trained = Trainables(
        network, optimizer, schedule, scaler, engine.device, engine.rank, engine.num_processes, engine.gather
    )
    begin(start, trained, reporter)
    states = StateSaver(
        trained,
        options,
        {**checked.identity, "seed": seed, "session_id": session.id, "started_at": session.started_at},
        reporter,
        position_after=settings.position_after,
        requested=save.requested,
        upload=upload.state if upload is not None and options.save_state_to_huggingface else None,
    )
    level_losses = LevelLosses()
    loop = TrainingLoop(
        settings,
        network=network,
        optimizer=optimizer,
        schedule=schedule,
        scaler=scaler,
        sync=GradientSync(engine.reduce_mean, engine.num_processes),
        reporter=reporter,
        rank=engine.rank,
        micro_batches=epoch_micro_batches(
            checked, latents, flow_objective(options, model, network, text.source, engine), level_losses, engine, seed
        ),
        level_losses=level_losses,
        save=save,
        sample=sample,
        validate=make_validator(checked, model, network, latents, text.source, engine, reporter),
        peak_bytes=MeasuredPeak(checked, engine, reporter, swap),
        before_step=partial(
            network.before_step, measures=options.logging_dir is not None or options.log_with is not None
        ),
        after_step=partial(hold_norms, network, options.scale_weight_norms),
        start=start.progress,
        save_state=states,
        state_is_due=states.is_due,
        make_room=SwapRoom(
            swap if may_swap_more(options, network) else None,
            engine,
            reporter,
            estimated_bytes=estimate_run(checked, engine.total_bytes()).peak_bytes,
            recovers=not options.no_oom_recovery,
            batch_size=largest_batch(checked)[1],
        ),
    )
    reporter.phase("training")
    with contextlib.closing(hashes), contextlib.nullcontext() if upload is None else contextlib.closing(upload):
        if engine.is_main and not options.no_metadata:
            hashes.start()
        with swap:
            try:
                position, was_stopped = loop.run()
            except NumbersLost as lost:
                raise after_lost_numbers(lost, network, options, save, engine) from lost
            except HalfTakenStep:
                # Such weights would take the place of the last whole step's.
                raise
            except NoRoom:
                if loop.progress.step > 0 and engine.is_main:
                    with final_weights(optimizer):
                        save_for_good(save, settings.position_after(loop.progress.step), "step")
                raise
        if was_stopped:
            if position.step > 0:
                with final_weights(optimizer):
                    save_for_good(save, position, "step")
                # It was not asked for: when the run is resumed it is as old as any other.
                save.requested.discard(position.step)
                states.save_stopped(loop.progress)
            raise StopRequested
        with final_weights(optimizer):
            save_for_good(save, position, "final")
        # Behind the LoRA: a disk that is full by now costs the state. (The reference has them the other way round.)
        states.save_final(loop.progress)


@dataclass(frozen=True)
class Session:
    """What tells this run from others in its files; a resumed run is still the same one."""

    id: int
    seed: int
    started_at: float


def _session(checked: CheckedRun, engine: Engine) -> Session:
    own = checked.start.own
    seed = checked.options.seed
    if seed is None:
        seed = engine.share(secrets.randbits(SEED_BITS)) if own is None else checked.start.seed
    if own is None:
        return Session(secrets.randbits(32), seed or 0, time.time())
    return Session(int(own.content["session_id"]), seed or 0, float(own.content["started_at"]))


def begin(start: Start, trained: Trainables, reporter: Reporter) -> None:
    """Puts everything that trains where the run begins."""
    step = start.progress.step
    if start.own is not None:
        resume_state(start.own, trained, step=step)
    elif start.foreign is not None:
        resume_foreign(start.foreign, trained, reporter, step=step)
    elif step:
        advance(trained.schedule, step)


def _announce_plan(checked: CheckedRun, texts: TextPlan | None, engine: Engine, reporter: Reporter) -> None:
    schedule, index = checked.schedule, checked.index
    reporter.plan(
        num_images=index.num_images,
        num_validation_images=len(index.validation),
        num_batches_per_epoch=schedule.micro_steps_per_epoch,
        num_epochs=schedule.num_epochs,
        num_steps=schedule.num_steps,
        buckets=[
            {"width": width, "height": height, "count": count}
            for dataset in index.datasets
            for (width, height), count in dataset.bucket_counts.items()
        ],
        first_step=checked.start.progress.step,
        device=engine.name(),
        num_texts=None if texts is None else len(texts.texts),
        text_bytes=None if texts is None else texts.num_bytes,
    )
    reporter.note(plan_text(checked, texts, engine.total_bytes()))


def _loop_settings(checked: CheckedRun, seed: int) -> LoopSettings:
    options, schedule = checked.options, checked.schedule
    return LoopSettings(
        num_steps=schedule.num_steps,
        num_epochs=schedule.num_epochs,
        micro_steps_per_epoch=schedule.micro_steps_per_epoch,
        num_micro_steps=options.gradient_accumulation_steps,
        max_grad_norm=options.max_grad_norm,
        seed=seed,
        save_every_n_steps=options.save_every_n_steps,
        save_every_n_epochs=options.save_every_n_epochs,
        sample_every_n_steps=options.sample_every_n_steps,
        sample_every_n_epochs=options.sample_every_n_epochs,
        sample_at_first=options.sample_at_first,
        validate_every_n_steps=options.validate_every_n_steps,
        validate_every_n_epochs=options.validate_every_n_epochs,
    )
