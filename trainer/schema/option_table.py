"""The reference trainer's options that are not ours to carry out yet, or that mean nothing for FLUX.

Each has its reference type, choices and default, so that the parser knows all of them, and one plain reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from trainer.schema.base import OptionStatus, ValueType


def _inert(
    group: str,
    help_text: str,
    reason: str,
    value_type: ValueType = "flag",
    *,
    default: object = None,
    choices: tuple[str, ...] = (),
    unit: str | None = None,
) -> OptionStatus:
    off: object = False if value_type == "flag" else default
    return OptionStatus(
        "inert", value_type, reason, choices, default=off, group=group, level="expert", help=help_text, unit=unit
    )


def _refused(
    group: str,
    help_text: str,
    reason: str,
    value_type: ValueType = "flag",
    *,
    default: object = None,
    choices: tuple[str, ...] = (),
    is_list: bool = False,
    unit: str | None = None,
) -> OptionStatus:
    off: object = False if value_type == "flag" else default
    return OptionStatus(
        "refused", value_type, reason, choices, is_list, off, group=group, level="expert", help=help_text, unit=unit
    )


_ATTENTION: Final = "attention always runs through torch's scaled dot product attention"
_NOISE: Final = "it does not apply to FLUX's noise"
_OTHER_LOSS: Final = "it does not apply to FLUX's loss"
_DEEPSPEED: Final = (
    "DeepSpeed shares what trains among devices, of which a LoRA has little; use --blocks_to_swap or --base_storage, which "
    "save memory on every device"
)
_DDP: Final = "devices average their gradients once a step, without the wrapper of torch that it sets up"

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
NOT_SUPPORTED: Final[Mapping[str, OptionStatus]] = MappingProxyType(
    {
        # Meaningless for FLUX, in the reference too.
        "v2": _inert("model", "The model is Stable Diffusion 2.", "FLUX has no version 2"),
        "v_parameterization": _inert(
            "flow", "Stable Diffusion 2's kind of prediction.", "FLUX predicts a velocity whatever this says"
        ),
        "clip_skip": _inert(
            "model",
            "Take CLIP's output from so many layers before its last.",
            "FLUX uses CLIP-L's pooled output",
            "integer",
        ),
        "max_token_length": _inert(
            "model",
            "Longest caption in CLIP's tokens.",
            "use --t5xxl_max_token_length",
            "integer",
            choices=("150", "225"),
        ),
        "vae": _inert(
            "model", "Another autoencoder for Stable Diffusion.", "FLUX's autoencoder is given with --ae", "path"
        ),
        "controlnet_model_name_or_path": _inert(
            "model", "A ControlNet.", "a LoRA is trained without a ControlNet", "path"
        ),
        "conditioning_data_dir": _inert(
            "dataset", "Folder of mask pictures.", "it is a key of the dataset file's subsets", "path"
        ),
        "sample_sampler": _inert(
            "samples",
            "How samples are drawn.",
            "samples always use FLUX's Euler steps",
            "text",
            default="ddim",
            choices=SAMPLERS,
        ),
        "noise_offset": _inert("flow", "Shift each picture's noise by a random amount of this size.", _NOISE, "number"),
        "noise_offset_random_strength": _inert(
            "flow", "Draw the strength of noise_offset anew, up to its value.", _NOISE
        ),
        "multires_noise_iterations": _inert("flow", "Add noise of so many coarser sizes.", _NOISE, "integer"),
        "multires_noise_discount": _inert(
            "flow", "How quickly coarser noise gets weaker.", _NOISE, "number", default=0.3
        ),
        "adaptive_noise_scale": _inert("flow", "Let noise_offset follow the picture's mean.", _NOISE, "number"),
        "zero_terminal_snr": _inert("flow", "Make the last timestep pure noise.", _NOISE),
        "min_snr_gamma": _inert("flow", "Give noise levels with little noise less weight.", _OTHER_LOSS, "number"),
        "v_pred_like_loss": _inert("flow", "Add a part of Stable Diffusion 2's loss.", _OTHER_LOSS, "number"),
        "scale_v_pred_loss_like_noise_pred": _inert("flow", "Weigh the loss as if noise were predicted.", _OTHER_LOSS),
        "debiased_estimation_loss": _inert("flow", "Weigh the loss by the noise level.", _OTHER_LOSS),
        # Without effect in this trainer.
        "sdpa": _inert("memory", "Torch's attention.", _ATTENTION),
        "xformers": _inert("memory", "Attention of the package xformers.", _ATTENTION),
        "mem_eff_attn": _inert("memory", "An older attention that saves memory.", _ATTENTION),
        "persistent_data_loader_workers": _inert(
            "dataset",
            "Keep the processes that load pictures between epochs.",
            "pictures are read by threads, which start in no time",
        ),
        "lowram": _inert(
            "memory",
            "Keep models on the GPU where main memory is small.",
            "models are loaded block by block and freed after use anyway",
        ),
        "highvram": _inert(
            "memory", "Do not free GPU memory between the pictures that are encoded.", "memory is managed by need"
        ),
        "disable_mmap_load_safetensors": _inert(
            "memory",
            "Read model files without mapping them into memory.",
            "how model files are read is chosen by the program",
        ),
        # Data.
        "cache_info": _inert(
            "dataset",
            "Keep captions and sizes in a file.",
            "captions and sizes are read from the files at every start, so that they are never out of date",
        ),
        "dataset_class": _refused(
            "dataset",
            "A Python class that makes the dataset.",
            "such a class is made of sd-scripts' own parts, which do not exist here; put its pictures and captions into "
            "folders and use --dataset_config",
            "text",
        ),
        "weighted_captions": _inert(
            "dataset",
            "Weigh words that are in (brackets).",
            "FLUX's text encoders have no weighted form, in sd-scripts either: brackets and numbers are read as text",
        ),
        # Output.
        "skip_until_initial_step": _inert(
            "course",
            "Pass over the batches before the first step.",
            "training always goes on with the batch at which it left off",
        ),
        # Hardware and number formats.
        "ddp_gradient_as_bucket_view": _inert("memory", "Save memory for gradients with several devices.", _DDP),
        "ddp_static_graph": _inert("memory", "Promise torch that every step uses the same layers.", _DDP),
        "deepspeed": _refused("devices", "Train with DeepSpeed.", _DEEPSPEED),
        "zero_stage": _refused(
            "devices",
            "How much DeepSpeed shares among the devices.",
            _DEEPSPEED,
            "integer",
            default=2,
            choices=("0", "1", "2", "3"),
        ),
        "offload_optimizer_device": _refused(
            "devices", "Where DeepSpeed keeps the optimizer.", _DEEPSPEED, "text", choices=("cpu", "nvme")
        ),
        "offload_optimizer_nvme_path": _refused("devices", "Folder for that on an NVMe disk.", _DEEPSPEED, "text"),
        "offload_param_device": _refused(
            "devices", "Where DeepSpeed keeps weights.", _DEEPSPEED, "text", choices=("cpu", "nvme")
        ),
        "offload_param_nvme_path": _refused("devices", "Folder for those on an NVMe disk.", _DEEPSPEED, "text"),
        "zero3_init_flag": _refused(
            "devices", "Share the weights among the devices while they are loaded.", _DEEPSPEED
        ),
        "zero3_save_16bit_model": _refused("devices", "Save a whole model in 16 bit with stage 3.", _DEEPSPEED),
        "fp16_master_weights_and_gradients": _refused(
            "devices", "Keep DeepSpeed's weights and gradients in fp16.", _DEEPSPEED
        ),
        # Optimizer and schedule.
        "fused_backward_pass": _inert(
            "optimizer",
            "Change weights during the backward pass, to save memory for gradients.",
            "a LoRA's gradients are too small to be worth freeing one by one",
        ),
    }
)

_PICKLE: Final = "is not written: such files can hold code; use safetensors"
_NETWORK_SD: Final = "does not fit FLUX; use networks.lora_flux"

REFUSED_VALUES: Final[Mapping[str, Mapping[str, str]]] = MappingProxyType(
    {
        "save_model_as": dict.fromkeys(("ckpt", "pt"), _PICKLE),
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
