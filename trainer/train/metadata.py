"""What a LoRA file says about itself: the `ss_` keys of its training, `modelspec.` keys, and hashes.

Keys and spelling of values are those of kohya-ss/sd-scripts (`train_network.py`, `library/sai_model_spec.py`), which
interfaces and model sites read. Everything is text: Python's `str` of a value, JSON for lists and tables. Settings that
this trainer does not have are written at the value that says so.
"""

from __future__ import annotations

import base64
import hashlib
import json
import mimetypes
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Final, Literal

from trainer.schema.base import UserError

_OWN_PREFIX: Final = "ss_fluxgui_"

_READ_BYTES: Final = 1 << 24
_IMPLEMENTATIONS: Final[Mapping[str, str]] = {
    "flux": "https://github.com/black-forest-labs/flux",
    "chroma": "https://huggingface.co/lodestones/Chroma",
}
_LEGACY_START, _LEGACY_BYTES = 0x100000, 0x10000

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


@dataclass(frozen=True)
class SubsetFacts:
    """One folder of pictures, or one metadata file that lists them (`is_listed`), named `place`.

    `captions` holds one entry for each picture, before any shuffling or dropout.
    """

    place: Path
    captions: tuple[str, ...]
    num_repeats: int
    flip_aug: bool = False
    random_crop: bool = False
    shuffle_caption: bool = False
    keep_tokens: int = 0
    keep_tokens_separator: str = ""
    caption_separator: str = ","
    secondary_separator: str | None = None
    enable_wildcard: bool = False
    caption_prefix: str | None = None
    caption_suffix: str | None = None
    resize_interpolation: str | None = None
    class_tokens: str | None = None
    is_reg: bool = False
    is_listed: bool = False
    color_aug: bool = False

    @property
    def num_images(self) -> int:
        return len(self.captions)


@dataclass(frozen=True)
class DatasetFacts:
    """One dataset. `buckets` are its sizes (width, height) with the number of pictures, repeats counted."""

    subsets: tuple[SubsetFacts, ...]
    resolution: tuple[int, int]
    batch_size: int
    enable_bucket: bool
    bucket_no_upscale: bool
    min_bucket_reso: int | None
    max_bucket_reso: int | None
    buckets: tuple[tuple[tuple[int, int], int], ...] = ()
    mean_aspect_error: float = 0.0
    resize_interpolation: str | None = None

    def count_images(self, *, is_reg: bool) -> int:
        """Pictures of one kind, repeats counted."""
        return sum(subset.num_images * subset.num_repeats for subset in self.subsets if subset.is_reg is is_reg)


@dataclass(frozen=True)
class ModelSpecFacts:
    """The `modelspec.` keys that the user writes, each None when not given."""

    title: str | None = None
    author: str | None = None
    description: str | None = None
    license: str | None = None
    tags: str | None = None
    usage_hint: str | None = None
    thumbnail: str | None = None
    merged_from: str | None = None
    trigger_phrase: str | None = None
    preprocessor: str | None = None
    is_negative_embedding: str | None = None


@dataclass(frozen=True)
class ModelFileFacts:
    """A model file beside FLUX's: its name, eight-digit hash and, once known, SHA-256."""

    name: str
    legacy_hash: str | None = None
    sha256: str | None = None


_NONE: Final[Mapping[str, object]] = MappingProxyType({})
_NO_MODELS: Final[Mapping[str, ModelFileFacts]] = MappingProxyType({})


@dataclass(frozen=True)
class TrainingFacts:
    """Everything about a run that its LoRA files tell. Names are those of the options where there is one.

    `uses_dataset_config` says whether the data came from a dataset file: the reference writes other keys then.
    `network_args` are the given pairs, None for none. `optimizer` is the text of `optim.optimizer_description`.
    `learning_rate` and the two others are the options, None included. `base_model_sha256` may be left out, since it
    means reading the whole file. `settings` are values for keys of the reference that are otherwise written as not
    used. `other_models` are the encoders and the autoencoder by our names for them, and `own` our own settings: written
    as `ss_fluxgui_...`, since the reference does not record them.
    """

    session_id: int
    started_at: float
    trainer_version: str
    output_name: str | None
    learning_rate: float
    text_encoder_lr: Sequence[float] | None
    unet_lr: float | None
    num_batches_per_epoch: int
    num_epochs: int
    max_train_steps: int
    gradient_checkpointing: bool
    gradient_accumulation_steps: int
    num_processes: int
    lr_warmup_steps: float
    lr_scheduler: str
    optimizer: str
    max_grad_norm: float
    network_dim: int
    network_alpha: float
    network_dropout: float | None
    network_args: Mapping[str, str] | None
    mixed_precision: str
    cache_latents: bool
    seed: int | None
    training_comment: str | None
    caption_dropout_rate: float
    prior_loss_weight: float
    ip_noise_gamma: float | None
    ip_noise_gamma_random_strength: bool
    loss_type: str
    huber_schedule: str
    huber_scale: float
    huber_c: float
    resize_interpolation: str | None
    apply_t5_attn_mask: bool
    weighting_scheme: str
    logit_mean: float
    logit_std: float
    mode_scale: float
    guidance_scale: float
    timestep_sampling: str
    sigmoid_scale: float
    model_prediction_type: str
    discrete_flow_shift: float
    datasets: tuple[DatasetFacts, ...]
    uses_dataset_config: bool
    is_schnell: bool
    base_model_name: str
    base_model_legacy_hash: str | None = None
    base_model_sha256: str | None = None
    min_timestep: int | None = None
    max_timestep: int | None = None
    model_type: Literal["flux", "chroma"] = "flux"
    modelspec: ModelSpecFacts = ModelSpecFacts()
    network_module: str = "networks.lora_flux"
    settings: Mapping[str, object] = field(default_factory=lambda: _NONE)
    other_models: Mapping[str, ModelFileFacts] = field(default_factory=lambda: _NO_MODELS)
    own: Mapping[str, object] = field(default_factory=lambda: _NONE)


def used_settings(options: object) -> dict[str, object]:
    """The values of those keys in the reference's list whose options exist in `options`, by key."""
    names = {key: _OPTION_NAMES.get(key, key.removeprefix("ss_")) for key in _ABSENT}
    return {key: getattr(options, name) for key, name in names.items() if hasattr(options, name)}


def model_file_facts(path: Path) -> ModelFileFacts:
    """Name and quick hash of a model file; the reference's words stand for the hash of a folder or of no file."""
    try:
        return ModelFileFacts(path.name, "IsADirectory" if path.is_dir() else legacy_file_hash(path))
    except OSError:
        return ModelFileFacts(path.name, "NOFILE")


def lora_metadata(
    facts: TrainingFacts, *, step: int, epoch: int, finished_at: float, no_metadata: bool = False
) -> dict[str, str]:
    """The metadata of the LoRA saved after `step` in `epoch` (1-based) at the time `finished_at`, without its hashes.

    `no_metadata` keeps what a loader needs, and `modelspec`. Deviations from the reference: `ss_epoch` is 1-based in
    step files too, `modelspec.resolution` is that of the dataset, and `implementation_version` names this program.
    """
    values: dict[str, object] = {**_ABSENT, **facts.settings, **_training_values(facts), **_flux_values(facts)}
    values |= _other_model_values(facts) | {f"{_OWN_PREFIX}{name}": value for name, value in facts.own.items()}
    values |= _dataset_file_values(facts.datasets) if facts.uses_dataset_config else _folder_values(facts)
    values |= {"ss_training_finished_at": finished_at, "ss_steps": step, "ss_epoch": epoch}
    if no_metadata:
        values = {key: values[key] for key in _MINIMUM_KEYS if key in values}
    written = {key: value if isinstance(value, str) else str(value) for key, value in values.items()}
    return {**written, **_modelspec(facts, finished_at)}


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


def _dataset_file_values(datasets: Sequence[DatasetFacts]) -> dict[str, object]:
    """The keys of a run with a dataset file: everything as JSON, dataset by dataset."""
    described: list[dict[str, object]] = []
    frequency: dict[str, dict[str, int]] = {}
    folders: dict[str, dict[str, int]] = {}
    for dataset in datasets:
        dataset_frequency = tag_frequency(dataset.subsets)
        # A folder that several datasets use is counted once.
        for folder, tags in dataset_frequency.items():
            frequency.setdefault(folder, tags)
        for subset in dataset.subsets:
            folders[_free_name(subset.place.name, folders)] = {
                "n_repeats": subset.num_repeats,
                "img_count": subset.num_images,
            }
        described.append(
            {
                "is_dreambooth": not any(subset.is_listed for subset in dataset.subsets),
                "batch_size_per_device": dataset.batch_size,
                "num_train_images": dataset.count_images(is_reg=False),
                "num_reg_images": dataset.count_images(is_reg=True),
                "resolution": list(dataset.resolution),
                "enable_bucket": dataset.enable_bucket,
                "min_bucket_reso": dataset.min_bucket_reso,
                "max_bucket_reso": dataset.max_bucket_reso,
                "tag_frequency": dataset_frequency,
                "bucket_info": _bucket_info(dataset),
                "resize_interpolation": dataset.resize_interpolation,
                "subsets": [_subset_values(subset) for subset in dataset.subsets],
            }
        )
    return {
        "ss_datasets": json.dumps(described),
        "ss_tag_frequency": json.dumps(frequency),
        "ss_dataset_dirs": json.dumps(folders),
    }


def _folder_values(facts: TrainingFacts) -> dict[str, object]:
    """The keys of a run on `train_data_dir`, which makes exactly one dataset."""
    dataset = facts.datasets[0]
    train, reg = ([s for s in dataset.subsets if s.is_reg is is_reg] for is_reg in (False, True))
    return {
        "ss_batch_size_per_device": dataset.batch_size,
        "ss_total_batch_size": dataset.batch_size * facts.num_processes * facts.gradient_accumulation_steps,
        "ss_resolution": dataset.resolution,
        "ss_color_aug": any(subset.color_aug for subset in dataset.subsets),
        "ss_flip_aug": any(subset.flip_aug for subset in dataset.subsets),
        "ss_random_crop": any(subset.random_crop for subset in dataset.subsets),
        "ss_shuffle_caption": any(subset.shuffle_caption for subset in dataset.subsets),
        "ss_enable_bucket": dataset.enable_bucket,
        "ss_bucket_no_upscale": dataset.bucket_no_upscale,
        "ss_min_bucket_reso": dataset.min_bucket_reso,
        "ss_max_bucket_reso": dataset.max_bucket_reso,
        "ss_keep_tokens": max((subset.keep_tokens for subset in dataset.subsets), default=0),
        "ss_dataset_dirs": json.dumps(_folder_counts(train)),
        "ss_reg_dataset_dirs": json.dumps(_folder_counts(reg)),
        "ss_tag_frequency": json.dumps(tag_frequency(dataset.subsets)),
        "ss_bucket_info": json.dumps(_bucket_info(dataset)),
    }


def _folder_counts(subsets: Iterable[SubsetFacts]) -> dict[str, dict[str, int]]:
    return {s.place.name: {"n_repeats": s.num_repeats, "img_count": s.num_images} for s in subsets}


def _subset_values(subset: SubsetFacts) -> dict[str, object]:
    return {
        "img_count": subset.num_images,
        "num_repeats": subset.num_repeats,
        "color_aug": subset.color_aug,
        "flip_aug": subset.flip_aug,
        "random_crop": subset.random_crop,
        "shuffle_caption": subset.shuffle_caption,
        "keep_tokens": subset.keep_tokens,
        "keep_tokens_separator": subset.keep_tokens_separator,
        "secondary_separator": subset.secondary_separator,
        "enable_wildcard": subset.enable_wildcard,
        "caption_prefix": subset.caption_prefix,
        "caption_suffix": subset.caption_suffix,
        "resize_interpolation": subset.resize_interpolation,
        **(
            {"metadata_file": subset.place.name}
            if subset.is_listed
            else {"image_dir": subset.place.name, "class_tokens": subset.class_tokens, "is_reg": subset.is_reg}
        ),
    }


def _bucket_info(dataset: DatasetFacts) -> dict[str, object] | None:
    if not dataset.enable_bucket:
        return None
    buckets = {
        str(index): {"resolution": list(size), "count": count}
        for index, (size, count) in enumerate(dataset.buckets)
        if count
    }
    return {"buckets": buckets, "mean_img_ar_error": dataset.mean_aspect_error}


def _free_name(name: str, taken: Iterable[str]) -> str:
    names, number, free = set(taken), 2, name
    while free in names:
        free = f"{name} ({number})"
        number += 1
    return free


def tag_frequency(subsets: Iterable[SubsetFacts]) -> dict[str, dict[str, int]]:
    """How many captions of each folder hold a tag, in the order of first appearance: folder -> tag -> count.

    Tags are what commas separate, in lower case, whatever the caption separator is: readers of the key expect that.
    """
    frequency: dict[str, dict[str, int]] = {}
    for subset in subsets:
        tags = frequency.setdefault(subset.place.name, {})
        for caption in subset.captions:
            for tag in (part.strip().lower() for part in caption.split(",")):
                if tag:
                    tags[tag] = tags.get(tag, 0) + 1
    return frequency


def _modelspec(facts: TrainingFacts, finished_at: float) -> dict[str, str]:
    spec = facts.modelspec
    width, height = facts.datasets[0].resolution
    timestep_range = None
    if facts.min_timestep is not None or facts.max_timestep is not None:
        lowest = facts.min_timestep if facts.min_timestep is not None else 0
        highest = facts.max_timestep if facts.max_timestep is not None else 1000
        timestep_range = f"{lowest},{highest}"
    values = {
        "sai_model_spec": "1.0.1",
        "architecture": _architecture(facts),
        "implementation": _IMPLEMENTATIONS[facts.model_type],
        "implementation_version": f"fluxgui/{facts.trainer_version}",
        "title": spec.title or facts.output_name or f"LoRA@{int(facts.started_at)}",
        "resolution": f"{width}x{height}",
        "date": time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(finished_at)),
        "author": spec.author,
        "description": spec.description,
        "license": spec.license,
        "tags": spec.tags,
        "usage_hint": spec.usage_hint,
        "thumbnail": None if spec.thumbnail is None else thumbnail_data_url(spec.thumbnail),
        "merged_from": spec.merged_from,
        "trigger_phrase": spec.trigger_phrase,
        "preprocessor": spec.preprocessor,
        "is_negative_embedding": spec.is_negative_embedding,
        "timestep_range": timestep_range,
    }
    return {f"modelspec.{key}": value for key, value in values.items() if value is not None}


def _architecture(facts: TrainingFacts) -> str:
    if facts.model_type == "chroma":
        return "chroma/lora"
    return f"flux-1-{'schnell' if facts.is_schnell else 'dev'}/lora"


def thumbnail_data_url(thumbnail: str) -> str:
    """A data URL of the picture file that `thumbnail` names, or `thumbnail` itself when it is one already."""
    if thumbnail.startswith("data:"):
        return thumbnail
    path = Path(thumbnail)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"the thumbnail cannot be read: {error.strerror or error}",
            str(path),
            "Give a picture file or a data URL.",
            field="metadata_thumbnail",
        ) from error
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def tensor_hashes(serialised: bytes) -> dict[str, str]:
    """The `sshs_` hashes of a safetensors serialisation that holds the `ss_` keys alone as its metadata.

    `sshs_model_hash` covers the tensor data only and is the same for every metadata; `sshs_legacy_hash` is eight digits
    over 64 KiB from the first MiB on, so that all files below a MiB share one.
    """
    data_start = 8 + int.from_bytes(serialised[:8], "little")
    window = serialised[_LEGACY_START : _LEGACY_START + _LEGACY_BYTES]
    return {
        "sshs_model_hash": hashlib.sha256(memoryview(serialised)[data_start:]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(window).hexdigest()[:8],
    }


def legacy_file_hash(path: Path) -> str:
    """The eight-digit hash of a model file, over 64 KiB from its first MiB on. Quick for any size."""
    with path.open("rb") as file:
        file.seek(_LEGACY_START)
        return hashlib.sha256(file.read(_LEGACY_BYTES)).hexdigest()[:8]


def file_sha256(path: Path, progress: Callable[[int, int], None]) -> str:
    """SHA-256 of a whole file, in hexadecimal. Reads all of it: `progress(done, total)` gets bytes and may raise."""
    total, done = path.stat().st_size, 0
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
            done += len(chunk)
            progress(done, total)
    return digest.hexdigest()
