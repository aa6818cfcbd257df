"""What the BFL form needs of the base model."""

from __future__ import annotations

from torch import nn

from trainer.lora.form_writer import BaseLayers
from trainer.lora.layer_names import is_flux_path, is_norm_path


def base_layers(flux: nn.Module) -> BaseLayers:
    """The Linears' sizes and copies of the norms, from a model that no LoRA has been put on yet."""
    linears = {
        path: (module.out_features, module.in_features)
        for path, module in flux.named_modules()
        if isinstance(module, nn.Linear) and is_flux_path(path)
    }
    scales = {name.removesuffix(".scale"): parameter for name, parameter in flux.named_parameters()}
    norms = {path: scale.detach().cpu().clone() for path, scale in scales.items() if is_norm_path(path)}
    return BaseLayers(linears, norms)
