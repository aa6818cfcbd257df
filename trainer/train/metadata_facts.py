"""What the LoRA files of a run tell about it, as plain values: the run, its data, its model files, the user's words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Final, Literal


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
