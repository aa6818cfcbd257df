"""The reference trainer's options that are not ours to carry out yet, or that mean nothing for FLUX.

Each has its reference type, choices and default, so that the parser knows all of them, and one plain reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, Literal

Status = Literal["supported", "inert", "refused"]
ValueType = Literal["flag", "text", "path", "integer", "number", "steps"]
"""`steps` is a whole number, or a part of the run as 0.1 or 10%."""


@dataclass(frozen=True)
class OptionStatus:
    """What is known about one option, whether or not it is supported.

    `reason` says why an option is inert or refused, and names the alternative where there is one. `choices` are the
    reference's; `refused_values` maps those that are refused, as they are spelt, to the reason. A refused option may
    still be given at its default, where it changes nothing.
    """

    status: Status
    value_type: ValueType
    reason: str = ""
    choices: tuple[str, ...] = ()
    is_list: bool = False
    default: object = None
    is_ours: bool = False
    refused_values: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


def _inert(
    reason: str, value_type: ValueType = "flag", *, default: object = None, choices: tuple[str, ...] = ()
) -> OptionStatus:
    return _entry("inert", reason, value_type, default, choices)


def _refused(
    reason: str,
    value_type: ValueType = "flag",
    *,
    default: object = None,
    choices: tuple[str, ...] = (),
    is_list: bool = False,
) -> OptionStatus:
    return _entry("refused", reason, value_type, default, choices, is_list=is_list)


def _entry(
    status: Status,
    reason: str,
    value_type: ValueType,
    default: object,
    choices: tuple[str, ...],
    *,
    is_list: bool = False,
) -> OptionStatus:
    off: object = False if value_type == "flag" else default
    return OptionStatus(status, value_type, reason, choices, is_list, off)


_ATTENTION: Final = "attention always runs through torch's scaled dot product attention"
_NOISE: Final = "it does not apply to FLUX's noise"
_OTHER_LOSS: Final = "it does not apply to FLUX's loss"
_LOADER: Final = "data is loaded in the training process"
_HUB: Final = "uploading is not supported yet; upload the finished file yourself"
_STATE: Final = "saving and resuming the state of a run is not supported yet; start from a LoRA with --network_weights"
_VALIDATION: Final = "validation is not supported yet; leave it out"
_DEEPSPEED: Final = "DeepSpeed is not supported yet; --blocks_to_swap saves memory on one device"
_DDP: Final = "training on several devices is not supported yet; leave it out"
_WANDB: Final = "Weights & Biases is not supported yet; use --log_with=tensorboard"
_SCHEDULE: Final = (
    "its schedule is not supported yet; use --lr_scheduler constant, constant_with_warmup, cosine or linear"
)
_CAPTION: Final = "it is not supported yet; write the captions out as they should be used"

SAMPLERS: Final = (
    "ddim",
    "pndm",
    "lms",
    "euler",
    "euler_a",
    "heun",
    "dpm_2",
    "dpm_2_a",
    "dpmsolver",
    "dpmsolver++",
    "dpmsingle",
    "k_lms",
    "k_euler",
    "k_euler_a",
    "k_dpm_2",
    "k_dpm_2_a",
)
DYNAMO_BACKENDS: Final = (
    "eager",
    "aot_eager",
    "inductor",
    "aot_ts_nvfuser",
    "nvprims_nvfuser",
    "cudagraphs",
    "ofi",
    "fx2trt",
    "onnxrt",
    "tensort",
    "ipex",
    "tvm",
)

NOT_SUPPORTED: Final[Mapping[str, OptionStatus]] = MappingProxyType(
    {
        # Meaningless for FLUX, in the reference too.
        "v2": _inert("FLUX has no version 2"),
        "v_parameterization": _inert("FLUX predicts a velocity whatever this says"),
        "clip_skip": _inert("FLUX uses CLIP-L's pooled output", "integer"),
        "max_token_length": _inert("use --t5xxl_max_token_length", "integer", choices=("150", "225")),
        "vae": _inert("FLUX's autoencoder is given with --ae", "path"),
        "controlnet_model_name_or_path": _inert("a LoRA is trained without a ControlNet", "path"),
        "conditioning_data_dir": _inert("it is a key of the dataset file's subsets", "path"),
        "sample_sampler": _inert("samples always use FLUX's Euler steps", "text", default="ddim", choices=SAMPLERS),
        "noise_offset": _inert(_NOISE, "number"),
        "noise_offset_random_strength": _inert(_NOISE),
        "multires_noise_iterations": _inert(_NOISE, "integer"),
        "multires_noise_discount": _inert(_NOISE, "number", default=0.3),
        "adaptive_noise_scale": _inert(_NOISE, "number"),
        "zero_terminal_snr": _inert(_NOISE),
        "min_snr_gamma": _inert(_OTHER_LOSS, "number"),
        "v_pred_like_loss": _inert(_OTHER_LOSS, "number"),
        "scale_v_pred_loss_like_noise_pred": _inert(_OTHER_LOSS),
        "debiased_estimation_loss": _inert(_OTHER_LOSS),
        # Without effect in this trainer.
        "sdpa": _inert(_ATTENTION),
        "xformers": _inert(_ATTENTION),
        "mem_eff_attn": _inert(_ATTENTION),
        "max_data_loader_n_workers": _inert(_LOADER, "integer", default=8),
        "persistent_data_loader_workers": _inert(_LOADER),
        "lowram": _inert("models are loaded block by block and freed after use anyway"),
        "highvram": _inert("memory is managed by need"),
        "skip_cache_check": _inert("what is kept on disk is named after its content, so there is no check to skip"),
        "disable_mmap_load_safetensors": _inert("how model files are read is chosen by the program"),
        "dynamo_backend": _inert(
            "it belongs to --torch_compile, which is not supported yet",
            "text",
            default="inductor",
            # "no" is what kohya_ss writes into its files; the reference checks no choices there.
            choices=(*DYNAMO_BACKENDS, "no"),
        ),
        # Data.
        "cache_info": _inert(
            "sizes and captions are read from the files at every start, so that they cannot be out of date"
        ),
        "keep_tokens_separator": _refused("it is not supported yet; use --keep_tokens", "text", default=""),
        "secondary_separator": _refused(_CAPTION, "text"),
        "enable_wildcard": _refused(_CAPTION),
        "debug_dataset": _refused("it is not supported; python -m trainer check reports on options and files"),
        "token_warmup_min": _refused("token warm-up is not supported yet; leave it out", "integer", default=1),
        "token_warmup_step": _refused("token warm-up is not supported yet; leave it out", "number", default=0.0),
        "dataset_class": _refused("it runs code of another program and is not supported; use --dataset_config", "text"),
        "caption_dropout_every_n_epochs": _refused(
            "it is not supported yet; use --caption_dropout_rate", "integer", default=0
        ),
        "caption_tag_dropout_rate": _refused(
            "it is not supported yet; use --caption_dropout_rate", "number", default=0.0
        ),
        "weighted_captions": _refused("FLUX's text encoders have no weighted form; leave it out"),
        # Output.
        "huggingface_repo_id": _refused(_HUB, "text"),
        "huggingface_repo_type": _refused(_HUB, "text"),
        "huggingface_path_in_repo": _refused(_HUB, "text"),
        "huggingface_token": _refused(_HUB, "text"),
        "huggingface_repo_visibility": _refused(_HUB, "text"),
        "save_state_to_huggingface": _refused(_HUB),
        "resume_from_huggingface": _refused(_HUB),
        "async_upload": _refused(_HUB),
        "save_n_epoch_ratio": _refused("it is not supported yet; use --save_every_n_epochs", "integer"),
        "save_last_n_epochs_state": _refused(_STATE, "integer"),
        "save_last_n_steps_state": _refused(_STATE, "integer"),
        "save_state": _refused(_STATE),
        "save_state_on_train_end": _refused(_STATE),
        "resume": _refused(_STATE, "path"),
        "skip_until_initial_step": _refused(_STATE),
        "initial_epoch": _refused(_STATE, "integer"),
        "initial_step": _refused(_STATE, "integer"),
        "output_config": _refused("it is not supported yet; write the options into a TOML file for --config_file"),
        # Logs.
        "wandb_run_name": _refused(_WANDB, "text"),
        "wandb_api_key": _refused(_WANDB, "text"),
        "log_tracker_config": _refused("it is not supported yet; use --log_tracker_name and --log_prefix", "path"),
        "log_config": _refused("it is not supported yet; the options are in the LoRA's metadata"),
        # Hardware and number formats.
        "torch_compile": _refused("it is not supported yet; leave it out"),
        "full_fp16": _refused("it is not supported yet; use --mixed_precision=fp16"),
        "full_bf16": _refused("it is not supported yet; use --mixed_precision=bf16"),
        "fp8_base": _refused("it is not supported yet; --blocks_to_swap saves memory"),
        "fp8_base_unet": _refused("it is not supported yet; --blocks_to_swap saves memory"),
        "cpu_offload_checkpointing": _refused("it is not supported yet; use --blocks_to_swap"),
        "ddp_timeout": _refused(_DDP, "integer"),
        "ddp_gradient_as_bucket_view": _refused(_DDP),
        "ddp_static_graph": _refused(_DDP),
        "deepspeed": _refused(_DEEPSPEED),
        "zero_stage": _refused(_DEEPSPEED, "integer", default=2, choices=("0", "1", "2", "3")),
        "offload_optimizer_device": _refused(_DEEPSPEED, "text", choices=("cpu", "nvme")),
        "offload_optimizer_nvme_path": _refused(_DEEPSPEED, "text"),
        "offload_param_device": _refused(_DEEPSPEED, "text", choices=("cpu", "nvme")),
        "offload_param_nvme_path": _refused(_DEEPSPEED, "text"),
        "zero3_init_flag": _refused(_DEEPSPEED),
        "zero3_save_16bit_model": _refused(_DEEPSPEED),
        "fp16_master_weights_and_gradients": _refused(_DEEPSPEED),
        # Optimizer and schedule.
        "use_lion_optimizer": _refused("Lion is not supported yet; use --optimizer_type AdamW or AdamW8bit"),
        "lr_scheduler_type": _refused(
            "schedules of other packages are not supported yet; use --lr_scheduler", "text", default=""
        ),
        "lr_scheduler_args": _refused(_SCHEDULE, "text", is_list=True),
        "lr_decay_steps": _refused(_SCHEDULE, "steps", default=0),
        "lr_scheduler_timescale": _refused(_SCHEDULE, "integer"),
        "lr_scheduler_min_lr_ratio": _refused(_SCHEDULE, "number"),
        "lr_scheduler_num_cycles": _inert(
            "only schedules that are not supported yet have cycles", "integer", default=1
        ),
        "lr_scheduler_power": _inert(
            "only the polynomial schedule, which is not supported yet, has one", "number", default=1
        ),
        "fused_backward_pass": _refused("it works for Adafactor only, which is not supported yet; leave it out"),
        # Network and model.
        # Validation.
        "validation_seed": _refused(_VALIDATION, "integer"),
        "validation_split": _refused(_VALIDATION, "number", default=0.0),
        "validate_every_n_steps": _refused(_VALIDATION, "integer"),
        "validate_every_n_epochs": _refused(_VALIDATION, "integer"),
        "max_validation_steps": _refused(_VALIDATION, "integer"),
    }
)

_OPTIMIZER: Final = "is not supported yet; use AdamW or AdamW8bit"
_LR_SCHEDULER: Final = "is not supported yet; use constant, constant_with_warmup, cosine or linear"
_PICKLE: Final = "is not written: such files can hold code; use safetensors"
_TRACKER: Final = "is not supported yet; use tensorboard"
_NETWORK_SD: Final = "does not fit FLUX; use networks.lora_flux"

REFUSED_VALUES: Final[Mapping[str, Mapping[str, str]]] = MappingProxyType(
    {
        "save_model_as": dict.fromkeys(("ckpt", "pt"), _PICKLE),
        "log_with": dict.fromkeys(("wandb", "all"), _TRACKER),
        "optimizer_type": dict.fromkeys(
            (
                "SGDNesterov",
                "SGDNesterov8bit",
                "Lion",
                "Lion8bit",
                "PagedAdamW",
                "PagedAdamW8bit",
                "PagedAdamW32bit",
                "PagedLion8bit",
                "DAdaptation",
                "DAdaptAdamPreprint",
                "DAdaptAdaGrad",
                "DAdaptAdam",
                "DAdaptAdan",
                "DAdaptAdanIP",
                "DAdaptLion",
                "DAdaptSGD",
                "Prodigy",
                "Adafactor",
                "RAdamScheduleFree",
                "AdamWScheduleFree",
                "SGDScheduleFree",
            ),
            _OPTIMIZER,
        ),
        "lr_scheduler": dict.fromkeys(
            (
                "cosine_with_restarts",
                "polynomial",
                "inverse_sqrt",
                "cosine_with_min_lr",
                "cosine_warmup_with_min_lr",
                "warmup_stable_decay",
                "piecewise_constant",
                "reduce_lr_on_plateau",
                "adafactor",
            ),
            _LR_SCHEDULER,
        ),
        "network_module": {
            **dict.fromkeys(
                ("networks.lora_fa", "networks.dylora", "networks.oft", "networks.lora_sd3", "networks.loha"),
                _NETWORK_SD,
            ),
        },
    }
)
"""Known values of supported options that are refused, with the rest of the sentence."""

# Supported options whose reference type is open text; what our type allows is not a list of choices there.
OPEN_TEXT: Final = frozenset({"optimizer_type", "lr_scheduler", "network_module"})
