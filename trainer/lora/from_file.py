"""Ranks and alphas of a LoRA file as the spec of a network that goes on with it (`dim_from_weights`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from torch import Tensor

from trainer.lora.adapter import wrong_part
from trainer.lora.naming import foreign_format, layers_of
from trainer.lora.split import is_block_diagonal, read_as_trained
from trainer.schema.lora_spec import LoraSpec
from trainer.schema.network_args import DoraAxis, fused_parts


def spec_from_file(spec: LoraSpec, state: Mapping[str, Tensor], metadata: Mapping[str, str], where: str) -> LoraSpec:
    """`spec` with layers, ranks and alphas of the file; dropouts, rates and the like stay.

    A layer without alpha has its rank's. Layers trained in parts (`split_qkv`), magnitudes (DoRA) and T5 are recognised.
    Unlike here, the reference forgets all other network settings, and does not read files without alpha.
    """
    layers, _ = read_as_trained(layers_of(state), metadata)
    layers = {name: tensors for name, tensors in layers.items() if "lora_down.weight" in tensors}
    if not layers:
        raise wrong_part(f"this is {foreign_format(state) or 'no LoRA of this format'}", where)
    split_qkv = spec.split_qkv or any(is_block_diagonal(name, tensors) for name, tensors in layers.items())
    scales = [tensors["dora_scale"] for tensors in layers.values() if "dora_scale" in tensors]
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, tensors in layers.items():
        down, up = tensors["lora_down.weight"], tensors.get("lora_up.weight", tensors["lora_down.weight"])
        factor = len(fused_parts(name, down.shape[1], up.shape[0])) if split_qkv else 1
        factor *= 2 if spec.pissa else 1
        rank = down.shape[0]
        if rank % factor:
            raise wrong_part(
                f"{name} has rank {rank}, which cannot be divided by the {factor} that the settings ask for",
                where,
                "Leave split_qkv and pissa out.",
            )
        alpha: float = tensors["alpha"].item() if "alpha" in tensors else rank
        ranks[name] = rank // factor
        alphas[name] = alpha // factor if isinstance(alpha, int) and alpha % factor == 0 else alpha / factor
    return replace(
        spec,
        rank=max(ranks.values()),
        alpha=Counter(alphas.values()).most_common(1)[0][0],
        file_ranks=MappingProxyType(ranks),
        file_alphas=MappingProxyType(alphas),
        split_qkv=split_qkv,
        dora=spec.dora or bool(scales),
        dora_axis=_axis(scales) or spec.dora_axis,
        train_t5xxl=any(name.startswith("lora_te3_") for name in ranks),
    )


def _axis(scales: Sequence[Tensor]) -> DoraAxis | None:
    """What the magnitudes of a file belong to; None when it has none."""
    return None if not scales else "in" if all(scale.shape[0] == 1 for scale in scales) else "out"
