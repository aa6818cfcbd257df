"""Which network settings are about layers that the models of a run have not, known before a weight is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer.schema.checkpoint_header import FluxParams
from trainer.train.check import CheckedRun, trains_clip, trains_t5

if TYPE_CHECKING:
    from torch import nn


def layer_notes(checked: CheckedRun) -> list[str]:
    """The lines that training says when it puts the network on its models, from the sizes in the files' headers."""
    spec = checked.spec
    if not (spec.in_dims or spec.type_dims or spec.reg_dims or spec.reg_lrs):
        return []
    import torch  # noqa: PLC0415 - seconds to import

    from trainer.lora.targets import settings_without_layers  # noqa: PLC0415
    from trainer.model.chroma import Chroma  # noqa: PLC0415
    from trainer.model.flux import Flux  # noqa: PLC0415

    with torch.device("meta"):
        flux = Flux(checked.flux) if isinstance(checked.flux, FluxParams) else Chroma(checked.flux)
    clip: nn.Module | None = None
    t5: nn.Module | None = None
    if spec.reg_dims or spec.reg_lrs:
        # Only expressions can be about the text encoders' layers.
        from trainer.model.weights import empty_clip_l, empty_t5xxl  # noqa: PLC0415 - transformers takes seconds to load

        if trains_clip(checked) and checked.models.clip is not None:
            clip = empty_clip_l(checked.models.clip)
        if trains_t5(checked):
            t5 = empty_t5xxl(checked.models.t5)
    return settings_without_layers(flux, spec, clip, t5)
