"""Options to a trained LoRA: everything built and every phase, in order. The one place that knows options, model and data.

What a phase needs is freed before the next one loads: text encoders, then autoencoder, then the transformer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from trainer.data.batches import BatchPlan, epoch_batches, share_of_rank
from trainer.data.validation import validation_batches
from trainer.lora.form_reader import Origin
from trainer.lora.forms import to_published
from trainer.lora.lora_file import read_lora_file
from trainer.lora.lycoris import AnyNetwork, LycorisNetwork
from trainer.lora.network import LoraNetwork
from trainer.lora.targets import settings_without_layers
from trainer.model.autoencoder import AutoEncoder
from trainer.model.storage_cache import StorageCache
from trainer.model.transformer import Transformer, load_transformer
from trainer.offload.block_swap import BlockSwap, swapped_prefixes
from trainer.offload.mover import make_mover
from trainer.schema.base import UserError
from trainer.schema.chroma_header import TransformerParams
from trainer.schema.cli import ParsedCommand
from trainer.schema.folders import data_home
from trainer.schema.lora_spec import LoraSpec
from trainer.schema.optimizer_args import parse_optimizer_args
from trainer.schema.options import Options
from trainer.schema.storage import stored_as
from trainer.schema.swap_counts import chosen_swap
from trainer.train.auto_swap import resolve_auto_swap
from trainer.train.base_weights import base_weights_change, base_weights_identity, merge_base_weights
from trainer.train.check import CheckedRun, check_run, trains_clip
from trainer.train.checkpoint import CheckpointKind, checkpoint_name
from trainer.train.conditioning import TextSource
from trainer.train.dataset_listing import dataset_listing
from trainer.train.device_checks import check_storage, product_seconds, slow_format
from trainer.train.engine import Engine
from trainer.train.file_hashes import HASHES_FILE, FileHashes
from trainer.train.foreign_state import resume_foreign
from trainer.train.hub_upload import HubUploader
from trainer.train.latents_phase import LatentSource, LoadedBatch, load_ae, loaded_batches, prepare_latents
from trainer.train.learning_rate import learning_rate_schedule
from trainer.train.level_losses import LevelLosses
from trainer.train.loop import GradientSync, LoopSettings, MicroBatch, NumbersLost, StepPosition, TrainingLoop
from trainer.train.lora_form import base_layers
from trainer.train.lost_numbers import explain_lost_numbers
from trainer.train.measured_peak import MeasuredPeak
from trainer.train.memory_room import NoRoom, SwapRoom
from trainer.train.objective import FlowBatch, FlowObjective, FlowSettings
from trainer.train.optim import create_optimizer, final_weights, optimizer_description
from trainer.train.plan import estimate_run, largest_batch, plan_text, tell_settings, warn_of_memory
from trainer.train.prompt_file import PromptFile
from trainer.train.reporting import Reporter, StopRequested
from trainer.train.rescue import save_or_rescue
from trainer.train.resume import Start
from trainer.train.sample_maker import SampleMaker
from trainer.train.saver import LoraSaver
from trainer.train.session import DeviceLock
from trainer.train.state_saver import StateSaver, Trainables, advance, resume_state
from trainer.train.text_phase import PreparedText, prepare_text
from trainer.train.text_plan import TextPlan, caption_course, plan_texts
from trainer.train.trackers import start_trackers
from trainer.train.training_facts import model_files, training_facts
from trainer.train.validator import Validator

SEED_BITS = 31
SAMPLE_FOLDER = "sample"
REPLAY_FOLDER = "replay"


def train(command: ParsedCommand, reporter: Reporter) -> None:
    """The whole job. Raises `UserError` for what the user can fix and `StopRequested` after a requested stop."""
    options = command.options
    if command.problems:
        # Everything else that is wrong is reported with them; this always raises.
        check_run(command, reporter)
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
    with _turn_on_device(options, engine, reporter):
        _train_checked(checked, engine, reporter)


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
        _output_dir(options),
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
    sample = _sample_maker(checked, model, network, autoencoder, text, engine, reporter)
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
        micro_batches=_micro_batches(
            checked, latents, flow_objective(options, model, network, text.source, engine), level_losses, engine, seed
        ),
        level_losses=level_losses,
        save=save,
        sample=sample,
        validate=_validator(checked, model, network, latents, text.source, engine, reporter),
        peak_bytes=MeasuredPeak(checked, engine, reporter, swap),
        before_step=network.before_step,
        after_step=partial(hold_norms, network, options.scale_weight_norms),
        start=start.progress,
        save_state=states,
        state_is_due=states.is_due,
        make_room=SwapRoom(
            # LyCORIS keeps the weights for backward, so that they must not move.
            None if isinstance(network, LycorisNetwork) else swap,
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
                raise _after_lost_numbers(lost, network, options, save, engine) from lost
            except NoRoom:
                if loop.progress.step > 0 and engine.is_main:
                    with final_weights(optimizer):
                        _save_for_good(save, settings.position_after(loop.progress.step), "step")
                raise
        if was_stopped:
            if position.step > 0:
                with final_weights(optimizer):
                    _save_for_good(save, position, "step")
                # It was not asked for: when the run is resumed it is as old as any other.
                save.requested.discard(position.step)
                states.save_stopped(loop.progress)
            raise StopRequested
        with final_weights(optimizer):
            _save_for_good(save, position, "final")
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


def _save_for_good(save: LoraSaver, position: StepPosition, kind: CheckpointKind) -> None:
    """The last save of a run: what the output folder refuses is kept in the data folder, or the temporary one."""
    moment = time.strftime("%Y%m%d-%H%M%S")
    elsewhere = (data_home(), Path(tempfile.gettempdir()) / "fluxgui")
    save_or_rescue(
        lambda folder: dataclasses.replace(save, folder=folder)(position, kind),
        save.folder,
        [place / "rescued" / moment for place in elsewhere],
    )


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


def load_model(options: Options, flux: TransformerParams, engine: Engine, tell: Callable[[str], None]) -> Transformer:
    """The transformer on the device, except what will be swapped, which never stays there. `tell` gets notes."""
    if options.pretrained_model_name_or_path is None:
        raise AssertionError("the checks demand the model")
    storage = stored_as(options)
    on_host = swapped_prefixes(flux, chosen_swap(options.blocks_to_swap))
    cache = options.base_storage_cache
    model = load_transformer(
        options.pretrained_model_name_or_path,
        options.model_type,
        engine.dtype,
        engine.device,
        device_of=lambda name: "cpu" if name.startswith(on_host) else engine.device,
        storage=None if storage == "compute" else storage,
        change_of=None if storage == "compute" else base_weights_change(options, "unet"),
        cache=None if cache is None else StorageCache(cache, base_weights_identity(options, ["unet"]), tell),
    )
    model.enable_gradient_checkpointing(options.gradient_checkpointing)
    return model


def attach_network(
    options: Options,
    spec: LoraSpec,
    model: Transformer,
    engine: Engine,
    reporter: Reporter,
    seed: int,
    *,
    clip: nn.Module | None = None,
    t5: nn.Module | None = None,
) -> tuple[AnyNetwork, Origin | None]:
    """The network around the transformer's layers, and those of the text encoders that are given, on the device; and how
    the file was written that it starts from."""
    network: AnyNetwork
    for line in settings_without_layers(model, spec, clip, t5):
        reporter.warning(line)
    if spec.kind == "lycoris":
        if engine.dtype is torch.float16:
            reporter.warning("lycoris.kohya does not keep fp16's range; if a loss is no number, use bf16")
        network = LycorisNetwork.attach(model, clip, spec, seed)
        if network.lacks_ups:
            reporter.warning("the LoRA+ ratios have no effect: this algorithm has no ups to learn faster")
    else:
        flux = None if options.network_train_text_encoder_only else model
        network = LoraNetwork.attach(flux, clip, spec, torch.Generator().manual_seed(seed), t5)
    network.to(engine.device)
    origin = None
    if options.network_weights is not None:
        origin = _load_weights(network, options.network_weights, reporter)
    return network, origin


def describe_network(network: AnyNetwork, spec: LoraSpec) -> str:
    """One line about what is trained."""
    if spec.kind == "oft":
        return f"OFT on {network.num_modules} layers, {spec.rank} blocks each, constraint {spec.alpha:g}"
    if spec.kind == "lycoris":
        return f"LyCORIS ({spec.lycoris.get('algo', 'lora')}) on {network.num_modules} layers"
    kinds = [
        name
        for name, is_on in (
            ("DoRA", spec.dora),
            ("rsLoRA", spec.rslora),
            ("PiSSA", spec.pissa),
            ("split qkv", spec.split_qkv),
            ("GGPO", spec.ggpo_sigma is not None),
        )
        if is_on
    ]
    more = f", {', '.join(kinds)}" if kinds else ""
    if spec.file_ranks is not None:
        return f"LoRA on {network.num_modules} layers, ranks and alphas of the file{more}"
    return f"LoRA on {network.num_modules} layers, rank {spec.rank}, alpha {spec.alpha}{more}"


def hold_norms(network: AnyNetwork, limit: float | None) -> Mapping[str, float]:
    """`scale_weight_norms` after a step, and what is logged of it under the reference's names."""
    if limit is None:
        return {}
    report = network.hold_norms(limit)
    return {
        "max_norm/keys_scaled": report.num_scaled,
        "norm/avg_key_norm": report.mean,
        "max_norm/max_key_norm": report.largest,
    }


def _load_weights(network: AnyNetwork, path: Path, reporter: Reporter) -> Origin | None:
    state, metadata = read_lora_file(path)
    published = to_published(state, metadata, where=str(path))
    origin = published.origin
    report = network.load_published(published.state, where=str(path), metadata=published.metadata)
    reporter.note(f"starting from {path}" if origin is None else f"starting from {path}, a file in {origin.form} form")
    if report.num_corrected:
        reporter.note(
            f"{report.num_corrected} layers of it were trained with split_qkv and saved with an alpha that is too small; "
            "they are used at the strength they were trained with"
        )
    for names, what in (
        (report.missing, "layers are not in the file and start anew"),
        (report.unexpected, "layers of the file are not trained here and are left out"),
    ):
        if names:
            reporter.warning(f"{len(names)} {what}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}")
    return origin


def block_swap(options: Options, model: Transformer, engine: Engine, reporter: Reporter) -> BlockSwap:
    """The swap, not attached yet; of no blocks it does nothing until it is changed."""
    wanted = chosen_swap(options.blocks_to_swap)
    if wanted:
        reporter.note(f"swapping {wanted} blocks between main memory and {engine.device.type}")
    return BlockSwap(
        list(model.double_blocks), list(model.single_blocks), wanted, make_mover(engine.device, reporter.warning)
    )


def unet_rate(options: Options) -> float:
    return options.learning_rate if options.unet_lr is None else options.unet_lr


def text_encoder_rates(options: Options) -> tuple[float, float]:
    """The rates of CLIP-L and T5: one number is for both."""
    rates = options.text_encoder_lr or (options.learning_rate,)
    return rates[0], rates[-1]


def _output_dir(options: Options) -> Path:
    if options.output_dir is None:
        raise AssertionError("the checks demand an output folder")
    return options.output_dir


def _sample_maker(
    checked: CheckedRun,
    model: Transformer,
    network: AnyNetwork,
    autoencoder: AutoEncoder | None,
    text: PreparedText,
    engine: Engine,
    reporter: Reporter,
) -> Callable[[StepPosition, bool], None]:
    options = checked.options
    kept = [autoencoder] if autoencoder is not None else []

    def provide_autoencoder() -> AutoEncoder:
        # Not loaded before when every latent came from the disk.
        if not kept:
            kept.append(load_ae(options, engine, torch.device("cpu")))
        return kept[0]

    path = options.sample_prompts
    prompts = (lambda: checked.prompts) if path is None else PromptFile(path, checked.prompts, reporter.warning)
    maker = SampleMaker(
        prompts,
        model=model,
        network=network,
        autoencoder=provide_autoencoder,
        text=text.source,
        autocast=engine.autocast,
        autocast_in=engine.autocast,
        device=engine.device,
        folder=options.run_dir / "samples" if options.run_dir is not None else _output_dir(options) / SAMPLE_FOLDER,
        output_name=options.output_name,
        reporter=reporter,
        prepare_texts=text.add,
        free_memory=engine.free_cached_memory,
    )

    def sample(position: StepPosition, is_epoch_end: bool) -> None:
        if engine.is_main:
            maker(position, is_epoch_end)

    return sample


def _validator(
    checked: CheckedRun,
    model: Transformer,
    network: AnyNetwork,
    latents: LatentSource,
    text: TextSource,
    engine: Engine,
    reporter: Reporter,
) -> Validator | None:
    """What gives the validation loss; None when no picture is held back."""
    options = checked.options
    if not checked.index.validation:
        return None
    plans = validation_batches(
        checked.index.validation,
        [dataset.spec.batch_size for dataset in checked.index.datasets],
        options.max_validation_steps,
    )
    return Validator(
        plans,
        seed=options.validation_seed or 0,
        latents=latents,
        text=text,
        model=model,
        network=network,
        guidance_scale=options.guidance_scale,
        autocast=engine.autocast,
        compute_dtype=engine.dtype,
        device=engine.device,
        reporter=reporter,
        rank=engine.rank,
        num_processes=engine.num_processes,
        reduce_mean=engine.reduce_mean,
    )


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


@contextlib.contextmanager
def network_off(network: AnyNetwork) -> Generator[None, None, None]:
    """The base model alone, while entered."""
    network.set_multiplier(0.0)
    try:
        yield
    finally:
        network.set_multiplier(1.0)


def flow_objective(
    options: Options, model: Transformer, network: AnyNetwork, text: TextSource, engine: Engine
) -> FlowObjective:
    return FlowObjective(
        model,
        text,
        FlowSettings(
            timestep_sampling=options.timestep_sampling,
            sigmoid_scale=options.sigmoid_scale,
            discrete_flow_shift=options.discrete_flow_shift,
            weighting_scheme=options.weighting_scheme,
            logit_mean=options.logit_mean,
            logit_std=options.logit_std,
            mode_scale=options.mode_scale,
            model_prediction_type=options.model_prediction_type,
            guidance_scale=options.guidance_scale,
            loss_type=options.loss_type,
            huber_schedule=options.huber_schedule,
            huber_c=options.huber_c,
            huber_scale=options.huber_scale,
            ip_noise_gamma=options.ip_noise_gamma,
            ip_noise_gamma_random_strength=options.ip_noise_gamma_random_strength,
            min_timestep=options.min_timestep,
            max_timestep=options.max_timestep,
            rounds_timesteps=options.round_timesteps,
            divides_by_mask=options.masked_loss_normalize,
        ),
        autocast=engine.autocast,
        compute_dtype=engine.dtype,
        device=engine.device,
        without_network=partial(network_off, network),
    )


@dataclass(frozen=True)
class PlannedBatch:
    """One batch of the data: gives its loss, and can be drawn again with the same generator."""

    plan: BatchPlan
    loaded: LoadedBatch
    latents: LatentSource
    objective: FlowObjective
    level_losses: LevelLosses
    device: torch.device

    def __call__(self, generator: torch.Generator) -> Tensor:
        batch = self.draw(generator)
        losses = self.objective.sample_losses(batch)
        if batch.host_timesteps is not None:
            self.level_losses.note(batch.host_timesteps, losses)
        return losses.mean()

    def draw(self, generator: torch.Generator) -> FlowBatch:
        items, mask = self.plan.items, self.loaded.mask
        preserved = torch.tensor([planned.is_preserved for planned in items], device=self.device)
        return self.objective.draw(
            self.latents.finish(self.loaded.pixels, generator),
            [planned.caption for planned in items],
            torch.tensor([planned.loss_weight for planned in items], device=self.device),
            generator,
            mask=None if mask is None else mask.to(self.device),
            preserved=preserved if any(planned.is_preserved for planned in items) else None,
        )


def _micro_batches(
    checked: CheckedRun,
    latents: LatentSource,
    objective: FlowObjective,
    level_losses: LevelLosses,
    engine: Engine,
    seed: int,
) -> Callable[[int, int], Iterator[MicroBatch]]:
    """For an epoch, one callable for each batch of this process behind the skipped ones, which gives the batch's loss."""

    options = checked.options
    course = caption_course(options, checked.schedule, engine.num_processes)
    num_threads = options.max_data_loader_n_workers

    def micro_batches(epoch: int, skipped: int) -> Iterator[MicroBatch]:
        plans = epoch_batches(checked.index, seed, epoch, prior_loss_weight=options.prior_loss_weight, course=course)
        # What comes before the place where the run goes on is not even loaded.
        share = share_of_rank(plans, engine.rank, engine.num_processes)[skipped:]
        with contextlib.closing(loaded_batches(latents, share, num_threads=num_threads)) as batches:
            for plan, loaded in batches:
                yield PlannedBatch(plan, loaded, latents, objective, level_losses, engine.device)

    return micro_batches


def _after_lost_numbers(
    lost: NumbersLost, network: AnyNetwork, options: Options, save: LoraSaver, engine: Engine
) -> UserError:
    """Keeps what can be used: the batch as a replay file, and the LoRA as it was. Gives the error that ends the run."""
    if not isinstance(lost.micro_batch, PlannedBatch):
        raise AssertionError("this recipe trains on planned batches alone")
    planned = lost.micro_batch
    rank = f"-rank{engine.rank}" if engine.num_processes > 1 else ""
    base = options.run_dir if options.run_dir is not None else _output_dir(options)
    saved: Path | None = None
    if lost.position.step > 0 and engine.is_main:
        # A disk that refuses it must not hide why the run ends.
        with contextlib.suppress(UserError):
            save(lost.position, "step")
            saved = _output_dir(options) / checkpoint_name(options.output_name, "step", lost.position.step)
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
