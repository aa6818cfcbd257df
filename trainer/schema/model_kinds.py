"""What a model file holds, told from its tensor names and shapes: the kind that an option takes, and a name for a person.

The marks are names that only one family of published models has. Models of FLUX.1's own family differ in the width of
their input: a control model (Fill, Canny, Depth) reads a condition beside the noisy latents. Krea and Kontext have the
names and shapes of dev and can't be told from it by the header: what is said of such a file names all three. They are
trained as dev.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Final, Literal

from trainer.schema.safetensors_header import Header, TensorInfo

ModelKind = Literal["flux", "chroma", "autoencoder", "clip_l", "t5xxl", "text_encoder", "lora", "unknown"]
Identity = tuple[ModelKind, str, str]
"""Kind, title, and a noun phrase to stand in a sentence."""

COMFYUI_PREFIX: Final = "model.diffusion_model."
# Parts of an all-in-one file that stand beside the transformer under COMFYUI_PREFIX.
ALL_IN_ONE_PARTS: Final = ("text_encoders.", "vae.", "first_stage_model.", "cond_stage_model.", "conditioner.")
DTYPE_NAMES: Final[Mapping[str, str]] = {
    "F64": "fp64",
    "F32": "fp32",
    "F16": "fp16",
    "BF16": "bf16",
    "F8_E4M3": "fp8 e4m3",
    "F8_E5M2": "fp8 e5m2",
}
# Width of img_in of FLUX.1's control models: 64 for the noisy latents, the rest for the condition.
CONTROL_MODELS: Final[Mapping[int, tuple[str, str]]] = {
    384: ("FLUX.1 Fill", "a masked picture and its mask"),
    128: ("FLUX.1 Canny or Depth", "an edge or depth picture"),
}

_PUBLISHED_WIDTH: Final = 3072
_PUBLISHED_DEPTHS: Final = (19, 38)
_DOUBLE_BLOCKS: Final = ("double_blocks.", "transformer_blocks.")
_SINGLE_BLOCKS: Final = ("single_blocks.", "single_transformer_blocks.")

_LORA_MARKS: Final = (
    ".lora_down.",
    ".lora_up.",
    ".lora_A.",
    ".lora_B.",
    ".lora.down.",
    ".lora.up.",
    ".lora_linear_layer.",
    "_lora.down.",
    "_lora1.down.",
    "_lora2.down.",
    ".lokr_w",
    ".hada_w",
    ".oft_blocks",
    ".oft_diag",
)
# Models that are neither trained nor used here: a name that marks them, and what they are. The first that fits counts.
_OTHER_MODELS: Final[tuple[tuple[str, str], ...]] = (
    ("double_stream_modulation_img.lin.weight", "FLUX.2"),
    ("double_stream_modulation_img.linear.weight", "FLUX.2"),
    ("joint_blocks.0.context_block.attn.qkv.weight", "Stable Diffusion 3"),
    ("conditioner.embedders.1.model.ln_final.weight", "SDXL"),
    ("conditioner.embedders.0.model.ln_final.weight", "SDXL refiner"),
    ("cond_stage_model.model.ln_final.weight", "Stable Diffusion 2"),
    ("cond_stage_model.transformer.text_model.final_layer_norm.weight", "Stable Diffusion 1"),
    ("label_emb.0.0.weight", "SDXL"),
    ("input_blocks.0.0.weight", "Stable Diffusion 1 or 2"),
    ("add_embedding.linear_1.weight", "SDXL"),
    ("down_blocks.0.resnets.0.conv1.weight", "Stable Diffusion 1 or 2"),
    ("double_blocks.0.img_attn_qkv.weight", "HunyuanVideo"),
    ("head.modulation", "Wan"),
    ("noise_refiner.0.attention.qkv.weight", "Lumina 2 or Z-Image"),
    ("double_layers.0.attn.w1q.weight", "AuraFlow"),
    ("adaln_single.linear.weight", "PixArt or LTX"),
)


def identify(header: Header) -> ModelKind:
    """What the file holds, told from its tensor names and shapes."""
    return _identify(header)[0]


def describe(header: Header) -> str:
    """What the file holds, for a person: "FLUX.1 dev, bf16, 23.8 GB"."""
    name = _identify(header)[1]
    dtype = _main_dtype(header)
    return ", ".join([name, *([dtype] if dtype else []), format_bytes(header.file_bytes)])


def noun(header: Header) -> str:
    """What the file holds without its size, to stand in a sentence: "a CLIP text encoder"."""
    return _identify(header)[2]


def format_bytes(num_bytes: int) -> str:
    """`num_bytes` in decimal units, as download pages give them."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes} bytes"


def strip_prefix(tensors: Mapping[str, TensorInfo]) -> Mapping[str, TensorInfo]:
    """The transformer's tensors under their own names; unchanged when the file has no ComfyUI prefix.

    An all-in-one file holds text encoders and autoencoder beside the transformer; they are left out.
    """
    if not any(name.startswith(COMFYUI_PREFIX) for name in tensors):
        return tensors
    return {
        name.removeprefix(COMFYUI_PREFIX): info
        for name, info in tensors.items()
        if not name.startswith(ALL_IN_ONE_PARTS)
    }


def is_diffusers_flux(stripped: Mapping[str, TensorInfo]) -> bool:
    """Whether a FLUX.1 transformer, without prefix, has the names of diffusers rather than the published ones."""
    return "x_embedder.weight" in stripped


def is_diffusers_autoencoder(tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether an autoencoder has the names of diffusers rather than the published ones."""
    return "encoder.down_blocks.0.resnets.0.conv1.weight" in tensors


def _identify(header: Header) -> Identity:
    """Kind, title and noun phrase of a file. The first rule that fits decides, so the narrow ones stand first."""
    tensors = header.tensors
    if not tensors:
        return "unknown", "empty file", "a file without any tensor"
    if any(mark in name for name in tensors for mark in _LORA_MARKS):
        return "lora", "LoRA", "a LoRA"
    stripped = strip_prefix(tensors)
    addition = _identify_addition(stripped)
    if addition is not None:
        return addition
    if "double_blocks.0.img_attn.qkv.weight" in stripped:
        return _identify_flux(stripped)
    if "transformer_blocks.0.attn.add_k_proj.weight" in stripped:
        return _identify_diffusers(stripped)
    for identify_part in (_identify_text_encoder, _identify_autoencoder):
        part = identify_part(tensors)
        if part is not None:
            return part
    for mark, name in _OTHER_MODELS:
        if mark in stripped or mark in tensors:
            return _other(name)
    return "unknown", "unknown model", f"a file of unknown content (its first tensor is {min(tensors)!r})"


def _identify_addition(stripped: Mapping[str, TensorInfo]) -> Identity | None:
    """Parts that are put on FLUX.1 and are no model by themselves."""
    if "redux_up.weight" in stripped:
        return "unknown", "FLUX.1 Redux", "the FLUX.1 Redux adapter, which holds no transformer"
    if any(name.startswith(("controlnet_", "controlnet_blocks.")) for name in stripped):
        return "unknown", "ControlNet", "a ControlNet"
    if any("ip_adapter" in name for name in stripped):
        return "unknown", "IP-Adapter", "an IP-Adapter"
    return None


def _identify_flux(stripped: Mapping[str, TensorInfo]) -> Identity:
    if any(name.startswith("distilled_guidance_layer.") for name in stripped):
        return "chroma", "Chroma", "a Chroma model"
    if "double_blocks.0.img_mod.lin.weight" not in stripped or "vector_in.in_layer.weight" not in stripped:
        return "unknown", "another FLUX-like model", "a FLUX-like model that is not FLUX.1"
    return _variant(stripped, "img_in.weight", "final_layer.linear.weight", "guidance_in.in_layer.weight")


def _identify_diffusers(stripped: Mapping[str, TensorInfo]) -> Identity:
    """Models with joint attention, under the names of diffusers."""
    if any(name.startswith("double_stream_modulation_img.") for name in stripped):
        return _other("FLUX.2")
    if any(name.startswith("distilled_guidance_layer.") for name in stripped):
        return "chroma", "Chroma", "a Chroma model"
    if "pos_embed.proj.weight" in stripped:
        return _other("Stable Diffusion 3")
    if "transformer_blocks.0.img_mlp.net.0.proj.weight" in stripped:
        return _other("Qwen-Image")
    has_single = any(name.startswith("single_transformer_blocks.") for name in stripped)
    if "x_embedder.weight" not in stripped or not has_single:
        return "unknown", "another diffusion model", "a diffusion model other than FLUX.1"
    return _variant(
        stripped,
        "x_embedder.weight",
        "proj_out.weight",
        "time_text_embed.guidance_embedder.linear_1.weight",
    )


def _variant(stripped: Mapping[str, TensorInfo], first: str, last: str, guidance: str) -> Identity:
    """Which FLUX.1: `first` and `last` name the layers at its ends, `guidance` one that schnell lacks."""
    variant = "dev" if guidance in stripped else "schnell"
    control = None
    if first in stripped and last in stripped:
        num_in, num_out = stripped[first].shape[-1:], stripped[last].shape[:1]
        if num_in != num_out and num_in:
            control = CONTROL_MODELS.get(num_in[0])
    if control is not None:
        return "flux", control[0], f"a {control[0]} model"
    if first not in stripped or stripped[first].shape[:1] != (_PUBLISHED_WIDTH,):
        return "flux", f"FLUX.1 {variant}", f"a FLUX.1 {variant} model"
    depths = tuple(_num_blocks(stripped, names) for names in (_DOUBLE_BLOCKS, _SINGLE_BLOCKS))
    if depths != _PUBLISHED_DEPTHS:
        size = f"{depths[0]} + {depths[1]} blocks"
        return "flux", f"FLUX.1 {variant} of {size}", f"a FLUX.1 {variant} model of {size} instead of 19 + 38"
    alike = " (or Krea, Kontext)" if variant == "dev" else ""
    return "flux", f"FLUX.1 {variant}{alike}", f"a FLUX.1 {variant} model{alike}"


def _num_blocks(stripped: Mapping[str, TensorInfo], prefixes: tuple[str, ...]) -> int:
    return len({name.split(".")[1] for name in stripped if name.startswith(prefixes)})


def _identify_text_encoder(tensors: Mapping[str, TensorInfo]) -> Identity | None:
    if "encoder.block.0.layer.0.SelfAttention.q.weight" in tensors:
        if "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight" in tensors:
            return "text_encoder", "UMT5 text encoder", "a UMT5 text encoder"
        if "encoder.block.0.layer.1.DenseReluDense.wi_0.weight" not in tensors:
            return "text_encoder", "T5 v1.0 text encoder", "a T5 v1.0 text encoder (FLUX.1 uses v1.1)"
        return "t5xxl", "T5 text encoder", "a T5 text encoder"
    for prefix in ("text_model.", ""):
        embedding = tensors.get(f"{prefix}embeddings.token_embedding.weight")
        if embedding is not None and f"{prefix}encoder.layers.0.self_attn.q_proj.weight" in tensors:
            width = embedding.shape[-1] if embedding.shape else 0
            if width > 768:
                return "text_encoder", "CLIP text encoder", f"a CLIP text encoder of width {width} (CLIP-L has 768)"
            return "clip_l", "CLIP text encoder", "a CLIP text encoder"
    if "vision_model.embeddings.patch_embedding.weight" in tensors:
        return "text_encoder", "vision encoder", "a vision encoder"
    if any(name.startswith(("transformer.resblocks.", "text_model.transformer.resblocks.")) for name in tensors):
        return "text_encoder", "OpenCLIP text encoder", "a text encoder in OpenCLIP layout"
    if "model.layers.0.self_attn.q_proj.weight" in tensors:
        return "text_encoder", "language model", "a language model"
    return None


def _identify_autoencoder(tensors: Mapping[str, TensorInfo]) -> Identity | None:
    diffusers = is_diffusers_autoencoder(tensors)
    if not diffusers and "encoder.down.0.block.0.conv1.weight" not in tensors:
        return None
    conv_in = tensors.get("decoder.conv_in.weight")
    if conv_in is None:
        return None
    # FLUX.1's has no convolutions between the moments and the latents; all older ones do.
    if "quant_conv.weight" in tensors or len(conv_in.shape) != 4:
        return "unknown", "autoencoder of another model", "the autoencoder of another model (not FLUX.1)"
    layout = " in diffusers layout" if diffusers else ""
    return "autoencoder", f"FLUX.1 autoencoder{layout}", "a FLUX.1 autoencoder"


def _other(name: str) -> Identity:
    article = "an" if name.startswith(("SD", "Au")) else "a"
    return "unknown", f"{name} model", f"{article} {name} model"


def _main_dtype(header: Header) -> str:
    """The type that most bytes of the file are stored in."""
    count: Counter[str] = Counter()
    for info in header.tensors.values():
        count[info.dtype] += info.end - info.start
    if not count:
        return ""
    dtype = count.most_common(1)[0][0]
    return DTYPE_NAMES.get(dtype, dtype.lower())
