"""What looks at the network between steps: samples and the validation loss."""

from __future__ import annotations

from collections.abc import Callable

import torch

from trainer.data.validation import validation_batches
from trainer.lora.lycoris import AnyNetwork
from trainer.model.autoencoder import AutoEncoder
from trainer.model.transformer import Transformer
from trainer.train.check import CheckedRun
from trainer.train.conditioning import TextSource
from trainer.train.engine import Engine
from trainer.train.latents_phase import LatentSource, load_ae
from trainer.train.prompt_file import PromptFile
from trainer.train.reporting import Reporter
from trainer.train.sample_maker import SampleMaker
from trainer.train.saver import output_dir
from trainer.train.step_position import StepPosition
from trainer.train.text_phase import PreparedText
from trainer.train.validator import Validator

SAMPLE_FOLDER = "sample"


def sample_maker(
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
        folder=options.run_dir / "samples" if options.run_dir is not None else output_dir(options) / SAMPLE_FOLDER,
        output_name=options.output_name,
        reporter=reporter,
        prepare_texts=text.add,
        free_memory=engine.free_cached_memory,
    )

    def sample(position: StepPosition, is_epoch_end: bool) -> None:
        if engine.is_main:
            maker(position, is_epoch_end)

    return sample


def make_validator(
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
