"""Writes the LoRA files of a run: state, metadata, name, retention, event."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from trainer.data.index import DatasetSummary, SubsetSummary
from trainer.lora.lora import LoraNetwork
from trainer.schema.options import Options
from trainer.schema.weight_files import read_weights
from trainer.train.check import CheckedRun
from trainer.train.checkpoint import CheckpointKind, checkpoint_name, remove_superseded, save_dtype, save_lora
from trainer.train.loop import StepPosition
from trainer.train.metadata import (
    DatasetFacts,
    ModelSpecFacts,
    SubsetFacts,
    TrainingFacts,
    legacy_file_hash,
    lora_metadata,
)
from trainer.train.model_hash import ModelHash
from trainer.train.reporting import Reporter

TRAINER_VERSION: Final = "0.1.0"
FINAL_HASH_SECONDS: Final = 60.0
"""How long the last file waits for the base model's hash."""


@dataclass(frozen=True)
class LoraSaver:
    """Saves `network` into `folder`. Only the main process has one that writes."""

    network: LoraNetwork
    folder: Path
    options: Options
    facts: TrainingFacts
    reporter: Reporter
    is_main: bool
    model_hash: ModelHash | None = None

    def __call__(self, position: StepPosition, kind: CheckpointKind) -> None:
        if not self.is_main:
            return
        self.reporter.phase("saving")
        number = position.epoch if kind == "epoch" else position.step
        path = self.folder / checkpoint_name(self.options.output_name, kind, number)
        metadata = lora_metadata(
            self._facts(kind),
            step=position.step,
            epoch=position.epoch,
            finished_at=time.time(),
            no_metadata=self.options.no_metadata,
        )
        # With no precision asked for, alpha stays the whole number that an untouched --network_alpha is.
        state = self.network.published_state_dict(save_dtype(self.options.save_precision))
        save_lora(path, state, metadata)
        self.reporter.checkpoint(path, step=position.step, epoch=position.epoch, is_final=kind == "final")
        self._remove_superseded(kind, number)

    def _facts(self, kind: CheckpointKind) -> TrainingFacts:
        """With the base model's hash as soon as it is known; the last file waits a little for it."""
        if self.model_hash is None:
            return self.facts
        sha256 = self.model_hash.value(FINAL_HASH_SECONDS if kind == "final" else 0.0)
        return replace(self.facts, base_model_sha256=sha256)

    def _remove_superseded(self, kind: CheckpointKind, number: int) -> None:
        options = self.options
        is_epoch = kind == "epoch"
        remove_superseded(
            self.folder,
            options.output_name,
            kind,
            number,
            every=options.save_every_n_epochs if is_epoch else options.save_every_n_steps,
            keep_last=options.save_last_n_epochs if is_epoch else options.save_last_n_steps,
            warn=self.reporter.warning,
        )


def base_model_file(options: Options) -> Path | None:
    """The transformer's file when it is a single one."""
    if options.pretrained_model_name_or_path is None:
        return None
    files = read_weights(options.pretrained_model_name_or_path, options.model_type).files
    return files[0] if len(files) == 1 else None


def training_facts(
    checked: CheckedRun, *, seed: int, session_id: int, started_at: float, optimizer: str, num_processes: int
) -> TrainingFacts:
    """What the files of this run say about it."""
    options, spec, schedule = checked.options, checked.spec, checked.schedule
    flux_path = options.pretrained_model_name_or_path
    if flux_path is None:
        raise AssertionError("the checks demand the model")
    flux_file = base_model_file(options)
    return TrainingFacts(
        session_id=session_id,
        started_at=started_at,
        trainer_version=TRAINER_VERSION,
        output_name=options.output_name,
        learning_rate=options.learning_rate,
        text_encoder_lr=options.text_encoder_lr,
        unet_lr=options.unet_lr,
        num_batches_per_epoch=schedule.micro_steps_per_epoch * num_processes,
        num_epochs=schedule.num_epochs,
        max_train_steps=schedule.num_steps,
        gradient_checkpointing=options.gradient_checkpointing,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        num_processes=num_processes,
        lr_warmup_steps=options.lr_warmup_steps,
        lr_scheduler=options.lr_scheduler,
        optimizer=optimizer,
        max_grad_norm=options.max_grad_norm,
        network_dim=spec.rank,
        network_alpha=spec.alpha,
        network_dropout=options.network_dropout,
        network_args=_pairs(options.network_args),
        mixed_precision=options.mixed_precision,
        cache_latents=options.cache_latents,
        seed=seed,
        training_comment=options.training_comment,
        caption_dropout_rate=options.caption_dropout_rate,
        prior_loss_weight=options.prior_loss_weight,
        ip_noise_gamma=options.ip_noise_gamma,
        ip_noise_gamma_random_strength=options.ip_noise_gamma_random_strength,
        loss_type=options.loss_type,
        huber_schedule=options.huber_schedule,
        huber_scale=options.huber_scale,
        huber_c=options.huber_c,
        resize_interpolation=options.resize_interpolation,
        apply_t5_attn_mask=options.apply_t5_attn_mask,
        weighting_scheme=options.weighting_scheme,
        logit_mean=options.logit_mean,
        logit_std=options.logit_std,
        mode_scale=options.mode_scale,
        guidance_scale=options.guidance_scale,
        timestep_sampling=options.timestep_sampling,
        sigmoid_scale=options.sigmoid_scale,
        model_prediction_type=options.model_prediction_type,
        discrete_flow_shift=options.discrete_flow_shift,
        datasets=tuple(_dataset_facts(summary, checked) for summary in checked.index.datasets),
        uses_dataset_config=options.dataset_config is not None,
        is_schnell=checked.flux.is_schnell,
        model_type=options.model_type,
        # As in the reference: the name of a file, else what was given.
        base_model_name=flux_path.name if flux_path.is_file() else flux_path.as_posix(),
        base_model_legacy_hash=None if flux_file is None else legacy_file_hash(flux_file),
        min_timestep=options.min_timestep,
        max_timestep=options.max_timestep,
        modelspec=ModelSpecFacts(
            title=options.metadata_title,
            author=options.metadata_author,
            description=options.metadata_description,
            license=options.metadata_license,
            tags=options.metadata_tags,
            usage_hint=options.metadata_usage_hint,
            thumbnail=options.metadata_thumbnail,
            merged_from=options.metadata_merged_from,
            trigger_phrase=options.metadata_trigger_phrase,
            preprocessor=options.metadata_preprocessor,
            is_negative_embedding=options.metadata_is_negative_embedding,
        ),
    )


def _pairs(network_args: tuple[str, ...] | None) -> dict[str, str] | None:
    if network_args is None:
        return None
    pairs = (pair.partition("=") for pair in network_args)
    return {key.strip(): value.strip() for key, _, value in pairs}


def _dataset_facts(summary: DatasetSummary, checked: CheckedRun) -> DatasetFacts:
    spec = summary.spec
    return DatasetFacts(
        subsets=tuple(_subset_facts(subset, checked) for subset in summary.subsets),
        resolution=spec.resolution,
        batch_size=spec.batch_size,
        enable_bucket=spec.enable_bucket,
        bucket_no_upscale=spec.bucket_no_upscale,
        min_bucket_reso=spec.min_bucket_reso,
        max_bucket_reso=spec.max_bucket_reso,
        buckets=tuple(summary.bucket_counts.items()),
        mean_aspect_error=summary.mean_aspect_error,
        resize_interpolation=checked.options.resize_interpolation,
    )


def _subset_facts(summary: SubsetSummary, checked: CheckedRun) -> SubsetFacts:
    spec = summary.spec
    return SubsetFacts(
        image_dir=spec.image_dir,
        captions=tuple(item.caption for item in checked.index.items if item.subset is spec),
        num_repeats=spec.num_repeats,
        flip_aug=spec.flip_aug,
        random_crop=spec.random_crop,
        shuffle_caption=spec.shuffle_caption,
        keep_tokens=spec.keep_tokens,
        caption_separator=spec.caption_separator,
        caption_prefix=spec.caption_prefix,
        caption_suffix=spec.caption_suffix,
        resize_interpolation=spec.resize_interpolation,
        class_tokens=spec.class_tokens,
        is_reg=spec.is_reg,
    )
