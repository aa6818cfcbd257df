"""The form in which a run writes its LoRA: whether it can hold what is trained, and what it needs of the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from trainer.schema.base import Problem
from trainer.schema.checkpoint_header import FluxParams
from trainer.schema.chroma_header import ChromaParams, TransformerParams
from trainer.schema.lora_spec import LoraSpec
from trainer.schema.options import Options

_ATTENTION_ONLY = "train_blocks=double img_mlp_dim=0 txt_mlp_dim=0 img_mod_dim=0 txt_mod_dim=0"


def form_problems(options: Options, spec: LoraSpec, flux: TransformerParams) -> Iterator[Problem]:
    """What `--lora_form` has no place for among the layers that are to be trained."""
    form = options.lora_form
    wanted = _other_kind(options, spec)
    if wanted is not None:
        yield Problem(wanted[0], f"--lora_form={form}", wanted[1], "lora_form")
        return
    if form not in ("bfl", "xlabs"):
        return
    if form == "bfl" and isinstance(flux, ChromaParams):
        yield Problem(
            "the bfl form is for FLUX.1, not for Chroma",
            f"--lora_form={form}",
            "Use --lora_form=diffusers, or leave it out.",
            "lora_form",
        )
        return
    trains_text = spec.train_t5xxl or isinstance(flux, FluxParams)
    if trains_text and not options.network_train_unet_only:
        yield Problem(
            f"the {form} form has no place for a text encoder's LoRA",
            f"--lora_form={form}",
            "Add --network_train_unet_only, or use --lora_form=diffusers.",
            "lora_form",
        )
    if form == "xlabs":
        from trainer.lora.form_names import inexpressible  # noqa: PLC0415 - torch takes seconds to load
        from trainer.lora.form_reader import listed  # noqa: PLC0415

        refused = inexpressible(form, _names(spec, flux), is_linear1_whole=True)
        if refused:
            yield Problem(
                f"the xlabs form has no place for {len(refused)} of the layers to be trained: {listed(refused)}",
                f"--lora_form={form}",
                f"It holds attention only: --network_args {_ATTENTION_ONLY}",
                "lora_form",
            )


def _other_kind(options: Options, spec: LoraSpec) -> tuple[str, str] | None:
    """Why the form has no place for this kind of network, and what helps."""
    form = options.lora_form
    if spec.kind != "lora":
        what = f"the {form} form has no place for {options.network_module}"
        return None if form == "sd-scripts" else (what, "Use --lora_form=sd-scripts.")
    if not spec.dora:
        return None
    if form in ("bfl", "xlabs"):
        return f"the {form} form has no place for magnitudes (DoRA)", "Use --lora_form=sd-scripts."
    if form == "diffusers" and spec.dora_axis == "in":
        what = "diffusers knows DoRA with a magnitude for each out feature only"
        return what, "Add dora_axis=out to the network settings, or use --lora_form=sd-scripts."
    if form == "sd-scripts" and spec.dora_axis == "out":
        what = "ComfyUI, which reads this form, applies DoRA with a magnitude for each out feature wrongly"
        return what, "Add --lora_form=diffusers, or leave dora_axis out."
    return None


def _names(spec: LoraSpec, flux: TransformerParams) -> Iterable[str]:
    """The published names of the layers that `spec` selects, from a model without memory."""
    import torch  # noqa: PLC0415 - seconds to import

    from trainer.lora.network import LoraNetwork  # noqa: PLC0415
    from trainer.model.chroma import Chroma  # noqa: PLC0415
    from trainer.model.flux import Flux  # noqa: PLC0415

    with torch.device("meta"):
        model = Chroma(flux) if isinstance(flux, ChromaParams) else Flux(flux)
    return LoraNetwork.attach(model, None, spec, torch.Generator()).names
