"""The network of a run: what it is, and whether it fits the model."""

from __future__ import annotations

from pathlib import Path

from trainer.schema.base import Problem
from trainer.schema.chroma_header import TransformerParams
from trainer.schema.lora_spec import LoraSpec
from trainer.schema.options import Options
from trainer.schema.storage import stored_as
from trainer.schema.swap_counts import chosen_swap, max_blocks_to_swap
from trainer.train.findings import EXIT_OPTIONS, Findings


def spec_from_weights(options: Options, spec: LoraSpec, findings: Findings) -> LoraSpec | None:
    """The spec with the ranks of the file to start from."""
    if options.network_weights is None:
        return spec
    from trainer.lora.forms import to_published  # noqa: PLC0415 - torch takes seconds to load
    from trainer.lora.from_file import spec_from_file  # noqa: PLC0415
    from trainer.lora.lora_file import read_lora_file  # noqa: PLC0415

    path = options.network_weights

    def from_file() -> LoraSpec:
        published = to_published(*read_lora_file(path), where=str(path))
        return spec_from_file(spec, published.state, published.metadata, str(path))

    found = findings.attempt(from_file)
    if found is not None and found.train_t5xxl and options.cache_text_encoder_outputs:
        findings.add(
            Problem(
                "this LoRA has layers of T5, whose outputs cache_text_encoder_outputs keeps from before",
                str(path),
                "Turn cache_text_encoder_outputs off, or leave dim_from_weights out.",
                "cache_text_encoder_outputs",
            ),
            EXIT_OPTIONS,
        )
    return found


def check_weights(path: Path, findings: Findings) -> None:
    """Whether the file to start from holds a LoRA in a known form."""
    from trainer.lora.forms import to_published  # noqa: PLC0415 - torch takes seconds to load
    from trainer.lora.lora_file import read_lora_file  # noqa: PLC0415

    findings.attempt(lambda: to_published(*read_lora_file(path), where=str(path)))


def _check_network_kind(options: Options, spec: LoraSpec, flux: TransformerParams, findings: Findings) -> None:
    """What other networks than LoRA ask for."""
    if spec.kind == "oft":
        mlp = round(flux.hidden_size * flux.mlp_ratio)
        sizes = (flux.hidden_size, mlp) if spec.enable_all_linear else (flux.hidden_size,)
        for size in sizes:
            if size % spec.rank:
                findings.add(
                    Problem(
                        f"network_dim is the number of OFT's blocks, but {size} cannot be divided by {spec.rank}",
                        "--network_dim",
                        "Use a power of two, such as 4.",
                        "network_dim",
                    ),
                    EXIT_OPTIONS,
                )
    if spec.kind == "lycoris":
        from trainer.lora import lycoris  # noqa: PLC0415 - torch takes seconds to load

        if not lycoris.is_installed():
            findings.add(lycoris.not_installed().problems[0], EXIT_OPTIONS)
        if stored_as(options) != "compute":
            name = "fp8_base" if options.base_storage is None else "base_storage"
            findings.add(
                Problem(
                    f"lycoris.kohya computes with the model's own weights, which {name} stores in fewer bits",
                    f"--{name}",
                    "Leave it out, or use networks.lora_flux.",
                    name,
                ),
                EXIT_OPTIONS,
            )
        if chosen_swap(options.blocks_to_swap):
            findings.add(
                Problem(
                    "lycoris.kohya keeps weights for backward, which blocks_to_swap moves away",
                    "--blocks_to_swap",
                    "Leave it out, or use networks.lora_flux.",
                    "blocks_to_swap",
                ),
                EXIT_OPTIONS,
            )


def check_against_model(options: Options, spec: LoraSpec | None, flux: TransformerParams, findings: Findings) -> None:
    wanted = chosen_swap(options.blocks_to_swap)
    largest = max_blocks_to_swap(flux.depth, flux.depth_single_blocks)
    if wanted > largest:
        findings.add(
            Problem(
                f"blocks_to_swap is {wanted}, but this model has {flux.depth} double and {flux.depth_single_blocks} "
                f"single blocks",
                "--blocks_to_swap",
                f"The largest allowed is {largest}.",
                "blocks_to_swap",
            ),
            EXIT_OPTIONS,
        )
    if spec is None:
        return
    _check_network_kind(options, spec, flux, findings)
    for kind, indices, count in (
        ("double", spec.double_indices, flux.depth),
        ("single", spec.single_indices, flux.depth_single_blocks),
    ):
        beyond = sorted(index for index in indices or () if index >= count)
        if beyond:
            findings.add(
                Problem(
                    f"train_{kind}_block_indices names block {beyond[0]}, but this model has {kind} blocks 0 to {count - 1}",
                    "--network_args",
                    field="network_args",
                ),
                EXIT_OPTIONS,
            )
