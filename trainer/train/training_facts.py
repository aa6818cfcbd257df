"""What the LoRA files of a run tell about it, gathered from its options, data and model files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from trainer.data.items import DatasetSummary, SubsetSummary
from trainer.schema.chroma_header import TransformerParams
from trainer.schema.options import Options
from trainer.schema.storage import stored_as
from trainer.schema.swap_counts import chosen_swap
from trainer.train.check import CheckedRun
from trainer.train.metadata import used_settings
from trainer.train.metadata_facts import DatasetFacts, ModelSpecFacts, SubsetFacts, TrainingFacts
from trainer.train.model_hashes import model_file_facts

TRAINER_VERSION: Final = "0.1.0"


def model_files(options: Options) -> dict[str, Path]:
    """The run's model files by the names that the metadata has for them; FLUX's comes first."""
    files = {
        "flux": options.pretrained_model_name_or_path,
        "ae": options.ae,
        "clip_l": options.clip_l,
        "t5xxl": options.t5xxl,
    }
    return {name: path for name, path in files.items() if path is not None}


def with_hashes(facts: TrainingFacts, hashes: Mapping[str, str]) -> TrainingFacts:
    """The facts with those SHA-256 that are known by now, by the names of `model_files`."""
    others = {name: replace(model, sha256=hashes.get(name)) for name, model in facts.other_models.items()}
    return replace(facts, base_model_sha256=hashes.get("flux"), other_models=others)


def _own_settings(options: Options, flux: TransformerParams, weight_dtype: str) -> dict[str, object]:
    """Settings that decide about the result and that the reference does not record."""
    return {
        "base_storage": stored_as(options, flux),
        "blocks_to_swap": chosen_swap(options.blocks_to_swap),
        "weight_dtype": weight_dtype,
        "full_bf16": options.full_bf16,
        "save_precision": options.save_precision or "float",
        "lora_form": options.lora_form,
        "t5xxl_max_token_length": options.t5xxl_max_token_length,
        "clip_l_activation": options.clip_l_activation,
        "network_train_unet_only": options.network_train_unet_only,
    }


def training_facts(
    checked: CheckedRun,
    *,
    seed: int,
    session_id: int,
    started_at: float,
    optimizer: str,
    num_processes: int,
    weight_dtype: str,
) -> TrainingFacts:
    """What the files of this run say about it. `weight_dtype` is the number format of the frozen models."""
    options, spec, schedule = checked.options, checked.spec, checked.schedule
    models = {name: model_file_facts(path) for name, path in model_files(options).items()}
    flux = models.pop("flux")
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
        network_module=options.network_module or "networks.lora_flux",
        is_schnell=checked.flux.is_schnell,
        model_type=options.model_type,
        base_model_name=flux.name,
        base_model_legacy_hash=flux.legacy_hash,
        settings={
            **used_settings(options),
            "ss_fp8_base": stored_as(options) == "fp8",
            "ss_num_validation_images": len(checked.index.validation),
        },
        other_models=models,
        own=_own_settings(options, checked.flux, weight_dtype),
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
        place=spec.place if spec.metadata_file is None else spec.metadata_file,
        is_listed=spec.metadata_file is not None,
        color_aug=spec.color_aug,
        captions=tuple(item.caption for item in checked.index.items if item.subset is spec),
        num_repeats=spec.num_repeats,
        flip_aug=spec.flip_aug,
        random_crop=spec.random_crop,
        shuffle_caption=spec.shuffle_caption,
        keep_tokens=spec.keep_tokens,
        keep_tokens_separator=spec.keep_tokens_separator,
        caption_separator=spec.caption_separator,
        secondary_separator=spec.secondary_separator,
        enable_wildcard=spec.enable_wildcard,
        caption_prefix=spec.caption_prefix,
        caption_suffix=spec.caption_suffix,
        resize_interpolation=spec.resize_interpolation,
        class_tokens=spec.class_tokens,
        is_reg=spec.is_reg,
    )
