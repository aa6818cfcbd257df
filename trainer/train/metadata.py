"""What a LoRA file says about itself: the `ss_` keys of its training, and with `modelspec.` keys, all of its metadata.

Keys and spelling of values are those of kohya-ss/sd-scripts (`train_network.py`, `library/sai_model_spec.py`), which
interfaces and model sites read. Everything is text: Python's `str` of a value, JSON for lists and tables. Settings that
this trainer does not have are written at the value that says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Final

from trainer.train.metadata_datasets import dataset_file_values, folder_values
from trainer.train.metadata_facts import TrainingFacts
from trainer.train.model_spec import model_spec

_OWN_PREFIX: Final = "ss_fluxgui_"

_ABSENT: Final[Mapping[str, object]] = {
    "ss_full_fp16": False,
    "ss_v2": False,
    "ss_clip_skip": None,
    "ss_max_token_length": None,
    "ss_lowram": False,
    "ss_noise_offset": None,
    "ss_multires_noise_iterations": None,
    "ss_multires_noise_discount": 0.3,
    "ss_adaptive_noise_scale": None,
    "ss_zero_terminal_snr": False,
    "ss_sd_scripts_commit_hash": "(unknown)",
    "ss_caption_dropout_every_n_epochs": 0,
    "ss_caption_tag_dropout_rate": 0.0,
    "ss_face_crop_aug_range": None,
    "ss_min_snr_gamma": None,
    "ss_scale_weight_norms": None,
    "ss_debiased_estimation": False,
    "ss_noise_offset_random_strength": False,
    "ss_fp8_base": False,
    "ss_fp8_base_unet": False,
    "ss_num_validation_images": 0,
    "ss_validation_seed": None,
    "ss_validation_split": 0.0,
    "ss_max_validation_steps": None,
    "ss_validate_every_n_epochs": None,
    "ss_validate_every_n_steps": None,
}
"""Settings of the reference that do not exist here, at the reference's value for "not used"."""

_OPTION_NAMES: Final[Mapping[str, str]] = {"ss_debiased_estimation": "debiased_estimation_loss"}
"""Options that are called otherwise than their key."""

_MINIMUM_KEYS: Final = (
    "ss_v2",
    "ss_base_model_version",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_args",
)
"""What `no_metadata` leaves: what a loader may need."""


def used_settings(options: object) -> dict[str, object]:
    """The values of those keys in the reference's list whose options exist in `options`, by key."""
    names = {key: _OPTION_NAMES.get(key, key.removeprefix("ss_")) for key in _ABSENT}
    return {key: getattr(options, name) for key, name in names.items() if hasattr(options, name)}


def lora_metadata(
    facts: TrainingFacts, *, step: int, epoch: int, finished_at: float, no_metadata: bool = False
) -> dict[str, str]:
    """The metadata of the LoRA saved after `step` in `epoch` (1-based) at the time `finished_at`, without its hashes.

    `no_metadata` keeps what a loader needs, and `modelspec`. Deviations from the reference: `ss_epoch` is 1-based in
    step files too, `modelspec.resolution` is that of the dataset, and `implementation_version` names this program.
    """
    values: dict[str, object] = {**_ABSENT, **facts.settings, **_training_values(facts), **_flux_values(facts)}
    values |= _other_model_values(facts) | {f"{_OWN_PREFIX}{name}": value for name, value in facts.own.items()}
    values |= dataset_file_values(facts.datasets) if facts.uses_dataset_config else folder_values(facts)
    values |= {"ss_training_finished_at": finished_at, "ss_steps": step, "ss_epoch": epoch}
    if no_metadata:
        values = {key: values[key] for key in _MINIMUM_KEYS if key in values}
    written = {key: value if isinstance(value, str) else str(value) for key, value in values.items()}
    return {**written, **model_spec(facts, finished_at)}


def _training_values(facts: TrainingFacts) -> dict[str, object]:
    values: dict[str, object] = {
        "ss_session_id": facts.session_id,
        "ss_training_started_at": facts.started_at,
        "ss_output_name": facts.output_name,
        "ss_learning_rate": facts.learning_rate,
        "ss_text_encoder_lr": None if facts.text_encoder_lr is None else list(facts.text_encoder_lr),
        "ss_unet_lr": facts.unet_lr,
        "ss_num_train_images": sum(dataset.count_images(is_reg=False) for dataset in facts.datasets),
        "ss_num_reg_images": sum(dataset.count_images(is_reg=True) for dataset in facts.datasets),
        "ss_num_batches_per_epoch": facts.num_batches_per_epoch,
        "ss_num_epochs": facts.num_epochs,
        "ss_gradient_checkpointing": facts.gradient_checkpointing,
        "ss_gradient_accumulation_steps": facts.gradient_accumulation_steps,
        "ss_max_train_steps": facts.max_train_steps,
        "ss_lr_warmup_steps": facts.lr_warmup_steps,
        "ss_lr_scheduler": facts.lr_scheduler,
        "ss_network_module": facts.network_module,
        "ss_network_dim": facts.network_dim,
        "ss_network_alpha": float(facts.network_alpha),
        "ss_network_dropout": facts.network_dropout,
        "ss_mixed_precision": facts.mixed_precision,
        "ss_base_model_version": "chroma" if facts.model_type == "chroma" else "flux1",
        "ss_cache_latents": facts.cache_latents,
        "ss_seed": facts.seed,
        "ss_training_comment": facts.training_comment,
        "ss_optimizer": facts.optimizer,
        "ss_max_grad_norm": facts.max_grad_norm,
        "ss_caption_dropout_rate": facts.caption_dropout_rate,
        "ss_prior_loss_weight": facts.prior_loss_weight,
        "ss_ip_noise_gamma": facts.ip_noise_gamma,
        "ss_ip_noise_gamma_random_strength": facts.ip_noise_gamma_random_strength,
        "ss_loss_type": facts.loss_type,
        "ss_huber_schedule": facts.huber_schedule,
        "ss_huber_scale": facts.huber_scale,
        "ss_huber_c": facts.huber_c,
        "ss_resize_interpolation": facts.resize_interpolation,
        "ss_sd_model_name": facts.base_model_name,
    }
    if facts.network_args is not None:
        values["ss_network_args"] = json.dumps({"dropout": facts.network_dropout, **facts.network_args})
    if facts.base_model_legacy_hash is not None:
        values["ss_sd_model_hash"] = facts.base_model_legacy_hash
    if facts.base_model_sha256 is not None:
        values["ss_new_sd_model_hash"] = facts.base_model_sha256
    return values


def _other_model_values(facts: TrainingFacts) -> dict[str, object]:
    """Name and hashes of each, under keys of our own; the autoencoder also under those of the reference's VAE."""
    values: dict[str, object] = {}
    for name, model in facts.other_models.items():
        named = {f"{name}_name": model.name, f"{name}_hash": model.legacy_hash, f"new_{name}_hash": model.sha256}
        values |= {f"{_OWN_PREFIX}{key}": value for key, value in named.items() if value is not None}
    ae = facts.other_models.get("ae")
    if ae is not None:
        vae = {"ss_vae_name": ae.name, "ss_vae_hash": ae.legacy_hash, "ss_new_vae_hash": ae.sha256}
        values |= {key: value for key, value in vae.items() if value is not None}
    return values


def _flux_values(facts: TrainingFacts) -> dict[str, object]:
    return {
        "ss_model_type": facts.model_type,
        "ss_apply_t5_attn_mask": facts.apply_t5_attn_mask,
        "ss_weighting_scheme": facts.weighting_scheme,
        "ss_logit_mean": facts.logit_mean,
        "ss_logit_std": facts.logit_std,
        "ss_mode_scale": facts.mode_scale,
        "ss_guidance_scale": facts.guidance_scale,
        "ss_timestep_sampling": facts.timestep_sampling,
        "ss_sigmoid_scale": facts.sigmoid_scale,
        "ss_model_prediction_type": facts.model_prediction_type,
        "ss_discrete_flow_shift": facts.discrete_flow_shift,
    }
