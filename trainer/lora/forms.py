"""LoRA files of every form, as pure functions between state dicts.

Reading and writing lose nothing: a file read and written in its own form has the same tensors to the last bit, and so
has one that went through another form, as far as that form can hold it. What the loaders do with alpha decides how it
is written:

    sd-scripts   a tensor beside the weights; every loader multiplies with alpha / rank
    diffusers    folded into lora_A, since most loaders take the weights as they are; where this would round, beside
                 the weights as `.alpha`, which diffusers and ComfyUI apply
    BFL, XLabs   folded into lora_A and rounded where it must be: their loaders know no alpha

A fused layer that diffusers cuts up gets no larger rank by it, so alpha / rank stays what was trained. Parts that were
trained apart stand on the diagonal of a larger adapter, whose alpha grows with its rank.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from trainer.lora.form_names import Form, form_of
from trainer.lora.form_reader import (
    ALPHA_KEY,
    NETWORK_ARGS_KEY,
    TRAINED_KEY,
    Origin,
    published_tensors,
    read_lora,
    was_saved_too_weak,
    without_split_qkv,
)
from trainer.lora.form_writer import BaseLayers, write_lora


def to_published(
    state: Mapping[str, Tensor], metadata: Mapping[str, str], *, where: str = "the LoRA file"
) -> tuple[dict[str, Tensor], Origin | None]:
    """A file's tensors under published keys, and how the file was written.

    A file that has published keys already is given back as it is, with None: whoever trains it knows more of its kinds.
    Raises `UserError` for what no LoRA of FLUX in a known form holds.
    """
    form = form_of(state)
    if form == "sd-scripts" or (form is None and any(key.startswith(("lora_unet_", "oft_unet_")) for key in state)):
        return dict(state), None
    tensors, origin = read_lora(state, metadata, where=where)
    return published_tensors(tensors, where=where), origin


def from_published(
    state: Mapping[str, Tensor],
    form: Form,
    *,
    origin: Origin | None = None,
    base: BaseLayers | None = None,
    where: str = "the LoRA",
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Published tensors in another form, and the metadata to add. See `write_lora`."""
    if form == "sd-scripts":
        return dict(state), {}
    tensors, _ = read_lora(state, {}, where=where)
    return write_lora(tensors, form, origin=origin, base=base, where=where)


def converted(
    state: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    form: Form,
    *,
    base: BaseLayers | None = None,
    where: str = "the LoRA file",
) -> tuple[dict[str, Tensor], dict[str, str], Form]:
    """A file's tensors in `form`, its metadata brought up to date, and the form that it had."""
    tensors, origin = read_lora(state, metadata, where=where)
    written, added = write_lora(tensors, form, origin=origin, base=base, where=where)
    kept = {key: value for key, value in metadata.items() if key not in (ALPHA_KEY, TRAINED_KEY)}
    if origin.form == "sd-scripts" and was_saved_too_weak(metadata):
        # The alpha is right from here on; who reads the file must not correct it once more.
        kept[NETWORK_ARGS_KEY] = without_split_qkv(metadata[NETWORK_ARGS_KEY])
    return written, {**kept, **added}, origin.form
