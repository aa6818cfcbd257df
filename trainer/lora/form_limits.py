"""What a form has no place for, refused by name before anything is written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from trainer.lora.form_names import Form, inexpressible
from trainer.lora.form_reader import listed
from trainer.lora.layer_names import is_chroma_only
from trainer.lora.lora_tensors import LayerTensors, LoraTensors
from trainer.schema.base import UserError

_FORM_NOUNS: Final[Mapping[Form, str]] = {
    "sd-scripts": "sd-scripts' form",
    "diffusers": "the diffusers form",
    "bfl": "Black Forest Labs' form",
    "xlabs": "XLabs' form",
}


def refuse_inexpressible(tensors: LoraTensors, form: Form, where: str, *, is_as_it_was: bool = False) -> None:
    """Raises `UserError` when `form` has no place for an adapter, a norm or a magnitude.

    `is_as_it_was`: whether the tensors come from a file of this form.
    """
    _refuse_magnitudes(tensors, form, where, is_as_it_was=is_as_it_was)
    touches_mlp = [name for name, a in tensors.adapters.items() if name.endswith("_linear1") and _adapts_mlp(a)]
    refused = inexpressible(form, tensors.adapters, is_linear1_whole=False)
    if form == "xlabs":
        refused += touches_mlp
        refused += [f"the bias of {name}" for name, a in tensors.adapters.items() if a.bias is not None]
        refused += list(tensors.norms)
    if refused:
        raise UserError(
            f"{_FORM_NOUNS[form]} has no place for {len(refused)} layers of this LoRA: {listed(refused)}",
            where,
            "It holds FLUX's attention only." if form == "xlabs" else "It holds FLUX's layers only.",
            field="lora_form",
        )


def _refuse_magnitudes(tensors: LoraTensors, form: Form, where: str, *, is_as_it_was: bool) -> None:
    of_rows = [name for name, a in tensors.adapters.items() if a.magnitude is not None and a.has_row_magnitude]
    of_columns = [name for name, a in tensors.adapters.items() if a.magnitude is not None and not a.has_row_magnitude]
    refused, why = list[str](), ""
    if form in ("bfl", "xlabs"):
        refused, why = of_rows + of_columns, "has no place for magnitudes (DoRA)"
    elif form == "diffusers":
        refused, why = of_columns, "has a magnitude (DoRA) for each out feature, and this LoRA one for each in feature"
    elif not is_as_it_was:
        refused, why = (
            of_rows,
            "is read with a magnitude (DoRA) for each in feature, and this LoRA has one for each out",
        )
    if refused:
        raise UserError(
            f"{_FORM_NOUNS[form]} {why}: {listed(refused)}",
            where,
            "It must be trained for the form: dora_axis=in for sd-scripts', dora_axis=out for diffusers'.",
            field="lora_form",
        )


def _adapts_mlp(adapter: LayerTensors) -> bool:
    return bool(adapter.up[3 * adapter.down.shape[1] :].any())


def refuse_chroma(names: Iterable[str], metadata: Mapping[str, str], where: str) -> None:
    """Raises `UserError` for a LoRA for Chroma, told by its layers or its metadata: Black Forest Labs' loader, and those
    of ComfyUI and diffusers for its form, know FLUX.1 only."""
    own = next(filter(is_chroma_only, names), None)
    told = "chroma" in (metadata.get("ss_base_model_version"), metadata.get("modelspec.architecture", "").split("/")[0])
    if own is not None or told:
        reason = f"it adapts {own}" if own is not None else "its metadata say so"
        raise UserError(
            f"{_FORM_NOUNS['bfl']} is for FLUX.1, and this is a LoRA for Chroma: {reason}",
            where,
            "Use --form=diffusers or --form=sd-scripts.",
            field="lora_form",
        )
