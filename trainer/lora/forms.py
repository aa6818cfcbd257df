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
from dataclasses import dataclass

from torch import Tensor

from trainer.lora.adapter_config import CONFIG_KEY
from trainer.lora.form_limits import refuse_chroma
from trainer.lora.form_names import Form, form_of
from trainer.lora.form_reader import (
    ALPHA_KEY,
    TRAINED_KEY,
    Origin,
    published_tensors,
    read_lora,
    split_layer,
)
from trainer.lora.form_writer import BaseLayers, write_lora
from trainer.lora.lora_tensors import LoraTensors
from trainer.lora.split import MERGED, SPLIT_ALPHA_KEY, num_own_parts


@dataclass(frozen=True)
class Published:
    """A file's tensors and metadata as if it had published keys, and how it was written (None: just so)."""

    state: dict[str, Tensor]
    metadata: dict[str, str]
    origin: Origin | None


def to_published(
    state: Mapping[str, Tensor], metadata: Mapping[str, str], *, where: str = "the LoRA file"
) -> Published:
    """A LoRA file for whoever trains it.

    A file that has published keys already is given back as it is: who trains it knows more of its kinds. Raises
    `UserError` for what no LoRA of FLUX in a known form holds.
    """
    form = form_of(state)
    if form == "sd-scripts" or (form is None and any(key.startswith(("lora_unet_", "oft_unet_")) for key in state)):
        return Published(dict(state), dict(metadata), None)
    tensors, origin = read_lora(state, metadata, where=where)
    return Published(published_tensors(tensors, where=where), _kept(metadata) | _marks(tensors, "sd-scripts"), origin)


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
    """A file's tensors in `form`, its metadata brought up to date, and the form that it had.

    Raises `UserError` (exit code 3) that names what cannot be read, or has no place in `form`.
    """
    tensors, origin = read_lora(state, metadata, where=where)
    if form == "bfl" and origin.form != "bfl":
        refuse_chroma(tensors.adapters, metadata, where)
    written, added = write_lora(tensors, form, origin=origin, base=base, where=where)
    return written, {**_kept(metadata), **_marks(tensors, form), **added}, origin.form


def _kept(metadata: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in metadata.items() if key not in (ALPHA_KEY, TRAINED_KEY, CONFIG_KEY)}


def _marks(tensors: LoraTensors, form: Form) -> dict[str, str]:
    """Says of fused layers on a diagonal that their alpha is right, so that none takes them for those of old files."""
    has_parts = any(num_own_parts(name, split_layer(adapter)) > 1 for name, adapter in tensors.adapters.items())
    return {SPLIT_ALPHA_KEY: MERGED} if form == "sd-scripts" and has_parts else {}
