"""Option groups: the model's files, the device and its memory, and the LoRA network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from trainer.schema.base import Opt


class OptionGroup(BaseModel):
    """Base of every group: immutable, and closed to names that are not options."""

    # Deferred, as the groups are never used alone: building their validators would take most of the import.
    model_config = ConfigDict(
        frozen=True, extra="forbid", coerce_numbers_to_str=True, allow_inf_nan=False, defer_build=True
    )


def split_words(value: object) -> object:
    """The words of a text where a list is asked for; anything else as it is."""
    return tuple(value.split()) if isinstance(value, str) else value


class ModelOptions(OptionGroup):
    """Model files and tokenizers."""

    pretrained_model_name_or_path: Annotated[
        Path | None,
        Opt("The FLUX.1 transformer: a .safetensors file, a diffusers folder, or a hub id.", "FLUX.1 model", "basic"),
    ] = None
    clip_l: Annotated[
        Path | None, Opt("The CLIP-L text encoder: a .safetensors file, a folder, or a hub id.", "CLIP-L", "basic")
    ] = None
    t5xxl: Annotated[
        Path | None, Opt("The T5-XXL text encoder: a .safetensors file, a folder, or a hub id.", "T5-XXL", "basic")
    ] = None
    ae: Annotated[
        Path | None, Opt("The FLUX autoencoder: a .safetensors file, a folder, or a hub id.", "Autoencoder", "basic")
    ] = None
    model_type: Annotated[
        Literal["flux", "chroma"],
        Opt("The family of the transformer: flux for FLUX.1 dev and schnell, chroma for Chroma1.", "Model type"),
    ] = "flux"
    tokenizer_cache_dir: Annotated[
        Path | None,
        Opt("Folder where downloaded tokenizers are kept and looked up first.", "Tokenizer cache folder", "expert"),
    ] = None
    clip_l_tokenizer: Annotated[
        str | None,
        Opt(
            "CLIP-L's tokenizer: a folder, a tokenizer.json, or a Hugging Face id. "
            "Empty: openai/clip-vit-large-patch14.",
            "CLIP-L tokenizer",
            "expert",
        ),
    ] = None
    t5xxl_tokenizer: Annotated[
        str | None,
        Opt(
            "T5-XXL's tokenizer: a folder, a tokenizer.json, or a Hugging Face id. Empty: google/t5-v1_1-xxl.",
            "T5-XXL tokenizer",
            "expert",
        ),
    ] = None
    clip_l_activation: Annotated[
        Literal["quick_gelu", "gelu"],
        Opt(
            "CLIP-L's activation: quick_gelu is what CLIP-L was trained with, gelu what sd-scripts computes.",
            "CLIP-L activation",
            "expert",
        ),
    ] = "quick_gelu"
    t5xxl_max_token_length: Annotated[
        int | None,
        Field(ge=1),
        Opt("T5 tokens for each caption. Empty: 512, or 256 for schnell.", "T5 token length", "advanced", "tokens"),
    ] = None
    apply_t5_attn_mask: Annotated[
        bool, Opt("Leave the padding of short captions out of T5's and FLUX's attention.", "Mask T5 padding")
    ] = False
    guidance_scale: Annotated[
        float,
        Opt("Guidance value given to FLUX.1 dev in training; 1 is usual for a LoRA.", "Training guidance"),
    ] = 3.5


class MemoryOptions(OptionGroup):
    """Device, number formats and what trades time for memory."""

    device: Annotated[
        Literal["auto", "cpu", "cuda", "mps"],
        Opt("Where to train; auto takes a GPU when there is one.", "Device", "advanced"),
    ] = "auto"
    mixed_precision: Annotated[
        Literal["no", "fp16", "bf16"],
        Opt("Number format of the frozen models and of the computation; no means 32 bit.", "Precision", "basic"),
    ] = "no"
    full_bf16: Annotated[
        bool,
        Opt(
            "Keep the LoRA, its gradients and the optimizer's state in bf16 too: a little memory less, and small changes "
            "are lost.",
            "LoRA in bf16",
            "expert",
        ),
    ] = False
    full_fp16: Annotated[
        bool,
        Opt(
            "Keep the LoRA, its gradients and the optimizer's state in fp16 too: a little memory less, and small numbers "
            "are lost.",
            "LoRA in fp16",
            "expert",
        ),
    ] = False
    base_storage: Annotated[
        Literal["compute", "fp8", "int8", "nf4"] | None,
        Opt(
            "Store the frozen transformer's blocks in fewer bits: fp8 and int8 halve them, nf4 makes them a quarter. "
            "Empty: an fp8 file stays as it is, everything else is stored in the type that is computed in; compute: that "
            "for fp8 files, too, which takes twice their memory and is a little faster.",
            "Storage of the model",
            "basic",
        ),
    ] = None
    base_storage_cache: Annotated[
        Path | None,
        Opt(
            "Folder where the model is kept as base_storage stores it (up to 9 GB for each model): the next start is fast.",
            "Folder for the stored model",
            "expert",
        ),
    ] = None
    fp8_base: Annotated[
        bool,
        Opt("Store the frozen transformer in 8 bit; the same as --base_storage=fp8.", "Model in fp8", "advanced"),
    ] = False
    fp8_base_unet: Annotated[
        bool, Opt("The same as --fp8_base: the text encoders are never stored in 8 bit.", "FLUX in fp8", "expert")
    ] = False
    no_half_vae: Annotated[
        bool,
        Opt("Run the autoencoder in 32 bit whatever the precision; fp16 always does.", "32-bit autoencoder", "expert"),
    ] = False
    gradient_checkpointing: Annotated[
        bool, Opt("Compute activations twice instead of keeping them: slower, much less memory.", "Save activations")
    ] = False
    checkpoint_blocks: Annotated[
        Annotated[int, Field(ge=0)] | None,
        Opt(
            "With gradient_checkpointing, so many blocks compute their activations twice; the others keep them. Empty: all.",
            "Blocks that save activations",
            "advanced",
            "blocks",
        ),
    ] = None
    cpu_offload_checkpointing: Annotated[
        bool,
        Opt(
            "With gradient_checkpointing, keep what each block is given in main memory until it is needed.",
            "Saved activations in main memory",
            "advanced",
        ),
    ] = False
    offload_modulation: Annotated[
        Literal["host", "file"] | None,
        Opt(
            "Keep the modulation weights, a quarter of FLUX.1, off the device and bring each once a step: from main memory "
            "(host), or from the model's file, which takes no memory (file). Empty: they stay with their blocks.",
            "Modulation off the device",
            "advanced",
        ),
    ] = None
    torch_compile: Annotated[
        bool,
        Opt("Compile each block with torch: faster steps after a start that takes minutes.", "Compile", "advanced"),
    ] = False
    dynamo_backend: Annotated[
        Literal[
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
            "no",
        ],
        Opt(
            "What torch_compile compiles with: inductor makes kernels, eager and aot_eager find faults.",
            "Compiler",
            "expert",
        ),
    ] = "inductor"
    blocks_to_swap: Annotated[
        Annotated[int, Field(ge=0)] | Literal["auto"] | None,
        Opt(
            "How many transformer blocks stay in main memory until needed; auto takes the fewest that fit.",
            "Blocks to swap",
            "basic",
            "blocks",
        ),
    ] = None
    no_oom_recovery: Annotated[
        bool,
        Opt(
            "End when the device runs out of memory in a step, instead of swapping more blocks and computing it again.",
            "Stop when memory runs out",
            "expert",
        ),
    ] = False
    split_mode: Annotated[bool, Opt("Old name of --blocks_to_swap=18.", "Split mode", "expert")] = False
    ddp_timeout: Annotated[
        Annotated[int, Field(ge=1)] | None,
        Opt(
            "How long a process waits for those on the other devices before it gives up. Empty: torch's 10 or 30 minutes.",
            "Wait for other devices",
            "expert",
            "minutes",
        ),
    ] = None


class NetworkOptions(OptionGroup):
    """The LoRA network."""

    network_module: Annotated[
        Literal["networks.lora_flux", "networks.lora", "networks.oft_flux", "lycoris.kohya"] | None,
        Opt("The kind of network: networks.lora_flux, networks.oft_flux or lycoris.kohya.", "Network", "expert"),
    ] = None
    network_dim: Annotated[
        int | None,
        Field(ge=1, le=1024),
        Opt("The LoRA's rank; 16 is a usual choice for a character. Empty: 4.", "Rank", "basic"),
    ] = None
    network_alpha: Annotated[
        float,
        Field(ge=0),
        Opt("The LoRA's strength is alpha divided by rank; 0 means alpha = rank.", "Alpha", "basic"),
    ] = 1
    network_dropout: Annotated[
        float | None,
        Field(ge=0, lt=1),
        Opt("Part of the LoRA's inner values dropped at random in each step.", "Dropout", "expert"),
    ] = None
    network_args: Annotated[
        tuple[str, ...] | None,
        BeforeValidator(split_words),
        Opt("More settings of the network, each as key=value.", "Network settings", "expert"),
    ] = None
    network_weights: Annotated[Path | None, Opt("A LoRA file to start from.", "Start from LoRA", "advanced")] = None
    dim_from_weights: Annotated[
        bool, Opt("Take ranks and alphas from the LoRA file to start from.", "Ranks from file", "expert")
    ] = False
    scale_weight_norms: Annotated[
        float | None,
        Field(gt=0),
        Opt("Largest norm of a layer's LoRA; it is scaled down after each step. 1 is usual.", "Norm limit", "expert"),
    ] = None
    base_weights: Annotated[
        tuple[Path, ...] | None,
        BeforeValidator(split_words),
        Opt("LoRA files that are merged into the model before training.", "Merge LoRAs", "expert"),
    ] = None
    base_weights_multiplier: Annotated[
        tuple[float, ...] | None,
        BeforeValidator(split_words),
        Opt("Strength of each merged LoRA. Empty: 1.", "Strength of merged LoRAs", "expert"),
    ] = None
    network_train_text_encoder_only: Annotated[
        bool, Opt("Train the text encoders' LoRA only, none of FLUX.", "Text encoders only", "expert")
    ] = False
    network_train_unet_only: Annotated[bool, Opt("Train FLUX only; otherwise CLIP-L gets a LoRA too.", "FLUX only")] = (
        False
    )
