"""The transformer, the network around its layers and the swap of its blocks, as the options want them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping
from pathlib import Path

import torch
from torch import nn

from trainer.lora.form_reader import Origin
from trainer.lora.forms import to_published
from trainer.lora.lora_file import read_lora_file
from trainer.lora.lycoris import AnyNetwork, LycorisNetwork
from trainer.lora.network import LoraNetwork
from trainer.lora.targets import settings_without_layers
from trainer.model.compiled import compile_blocks
from trainer.model.host_linear import count_mapped
from trainer.model.joint import run_again_in_backward
from trainer.model.storage_cache import StorageCache
from trainer.model.stored_linear import PackedStorage, StoredLinear
from trainer.model.transformer import Transformer, load_transformer
from trainer.model.weights import FileStorage, ModulationOnHost
from trainer.offload.activations import OffloadedCheckpoint
from trainer.offload.block_swap import BlockSwap, swapped_prefixes
from trainer.offload.courier import make_courier
from trainer.offload.mover import make_mover
from trainer.schema.chroma_header import TransformerParams
from trainer.schema.lora_spec import LoraSpec
from trainer.schema.option_rules import compiles
from trainer.schema.options import Options
from trainer.schema.storage import keeps_file, stored_as
from trainer.schema.swap_counts import chosen_swap
from trainer.train.base_weights import base_weights_change, base_weights_identity
from trainer.train.engine import Engine
from trainer.train.reporting import Reporter


def load_model(options: Options, flux: TransformerParams, engine: Engine, tell: Callable[[str], None]) -> Transformer:
    """The transformer on the device, except what will be swapped, which never stays there. `tell` gets notes."""
    if options.pretrained_model_name_or_path is None:
        raise AssertionError("the checks demand the model")
    storage = stored_as(options, flux)
    asked = asked_storage(options, flux, engine.device)
    if asked is None:
        storage = "compute"
    if storage == "fp8" and stored_as(options) == "compute":
        tell(
            "the model's file is fp8 and is kept so; its numbers are converted whenever they are used "
            "(--base_storage=compute does it once: twice the memory, a little faster)"
        )
    if flux.fp8_linears and asked is None and options.base_storage is None:
        tell(f"the model's fp8 file is expanded to twice its size: {_why_expanded(options)}")
    on_host = swapped_prefixes(flux, chosen_swap(options.blocks_to_swap))
    cache = options.base_storage_cache
    if cache is not None and storage == "fp8" and flux.fp8_linears and not options.base_weights:
        tell("base_storage_cache has no effect: the model's file is fp8 already")
        cache = None
    place = options.offload_modulation
    model = load_transformer(
        options.pretrained_model_name_or_path,
        options.model_type,
        engine.dtype,
        engine.device,
        device_of=lambda name: "cpu" if name.startswith(on_host) else engine.device,
        storage=asked,
        change_of=None if storage == "compute" else base_weights_change(options, "unet"),
        cache=None if cache is None else StorageCache(cache, base_weights_identity(options, ["unet"]), tell),
        modulation=None if place is None else ModulationOnHost(make_courier(engine.device), place == "file"),
    )
    num_kept = sum(isinstance(module, StoredLinear) for module in model.modules())
    if storage == "compute" and num_kept:
        tell(f"{num_kept} layers are fp8 in the model's file and are kept so; --base_storage=compute expands them")
    if place == "file":
        num_mapped, num_all = count_mapped(model)
        if num_mapped < num_all:
            tell(
                f"{num_all - num_mapped} of {num_all} modulation weights are in main memory: the model's file has them in "
                "another form than they are computed with"
            )
    offloads = options.cpu_offload_checkpointing and options.gradient_checkpointing
    if offloads and engine.device.type == "cpu":
        tell("cpu_offload_checkpointing has no effect: the CPU computes in main memory")
        offloads = False
    model.enable_gradient_checkpointing(
        options.gradient_checkpointing,
        num_blocks=options.checkpoint_blocks,
        run=OffloadedCheckpoint(engine.device) if offloads else run_again_in_backward,
    )
    return model


def asked_storage(
    options: Options, flux: TransformerParams, device: torch.device
) -> PackedStorage | FileStorage | None:
    """How the blocks' weights are to be loaded: `file` where of a file that has some layers in fp8 these stay so."""
    storage, can_keep = stored_as(options, flux), keeps_file(options) and device.type != "mps"
    if storage == "compute" or (stored_as(options) == "compute" and not can_keep):
        return "file" if can_keep else None
    return storage


def _why_expanded(options: Options) -> str:
    if options.network_module == "lycoris.kohya":
        return "lycoris.kohya computes with the weights themselves"
    if options.base_weights:
        return "base_weights are merged into it (--base_storage=fp8 rounds the result to fp8 again)"
    return "an Apple GPU does not compute with fp8"


def compile_model(options: Options, model: Transformer, engine: Engine, tell: Callable[[str], None]) -> None:
    """`torch_compile`: the blocks with the adapters around their layers are compiled when they first run."""
    if compiles(options):
        compile_blocks(model, backend=options.dynamo_backend)
        tell(f"the first steps compile the blocks with {options.dynamo_backend}, which takes minutes")


def may_swap_more(options: Options, network: AnyNetwork) -> bool:
    """Whether blocks may begin to be swapped when memory runs out: not where weights are kept for backward."""
    keeps_weights = compiles(options) and (not options.gradient_checkpointing or options.checkpoint_blocks is not None)
    return not isinstance(network, LycorisNetwork) and not keeps_weights


def attach_network(
    options: Options,
    spec: LoraSpec,
    model: Transformer,
    engine: Engine,
    reporter: Reporter,
    seed: int,
    *,
    clip: nn.Module | None = None,
    t5: nn.Module | None = None,
) -> tuple[AnyNetwork, Origin | None]:
    """The network around the transformer's layers, and those of the text encoders that are given, on the device; and how
    the file was written that it starts from."""
    network: AnyNetwork
    for line in settings_without_layers(model, spec, clip, t5):
        reporter.warning(line)
    if spec.kind == "lycoris":
        if engine.dtype is torch.float16:
            reporter.warning("lycoris.kohya does not keep fp16's range; if a loss is no number, use bf16")
        network = LycorisNetwork.attach(model, clip, spec, seed)
        if network.lacks_ups:
            reporter.warning("the LoRA+ ratios have no effect: this algorithm has no ups to learn faster")
    else:
        flux = None if options.network_train_text_encoder_only else model
        network = LoraNetwork.attach(flux, clip, spec, torch.Generator().manual_seed(seed), t5)
    network.to(engine.device)
    origin = None
    if options.network_weights is not None:
        origin = _load_weights(network, options.network_weights, reporter)
    if options.full_bf16 or options.full_fp16:
        network.train_in(torch.bfloat16 if options.full_bf16 else torch.float16)
    return network, origin


def _load_weights(network: AnyNetwork, path: Path, reporter: Reporter) -> Origin | None:
    state, metadata = read_lora_file(path)
    published = to_published(state, metadata, where=str(path))
    origin = published.origin
    report = network.load_published(published.state, where=str(path), metadata=published.metadata)
    reporter.note(f"starting from {path}" if origin is None else f"starting from {path}, a file in {origin.form} form")
    if report.num_corrected:
        reporter.note(
            f"{report.num_corrected} layers of it were trained with split_qkv and saved with an alpha that is too small; "
            "they are used at the strength they were trained with"
        )
    for names, what in (
        (report.missing, "layers are not in the file and start anew"),
        (report.unexpected, "layers of the file are not trained here and are left out"),
    ):
        if names:
            reporter.warning(f"{len(names)} {what}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}")
    return origin


def describe_network(network: AnyNetwork, spec: LoraSpec) -> str:
    """One line about what is trained."""
    if spec.kind == "oft":
        return f"OFT on {network.num_modules} layers, {spec.rank} blocks each, constraint {spec.alpha:g}"
    if spec.kind == "lycoris":
        return f"LyCORIS ({spec.lycoris.get('algo', 'lora')}) on {network.num_modules} layers"
    kinds = [
        name
        for name, is_on in (
            ("DoRA", spec.dora),
            ("rsLoRA", spec.rslora),
            ("PiSSA", spec.pissa),
            ("split qkv", spec.split_qkv),
            ("GGPO", spec.ggpo_sigma is not None),
        )
        if is_on
    ]
    more = f", {', '.join(kinds)}" if kinds else ""
    if spec.file_ranks is not None:
        return f"LoRA on {network.num_modules} layers, ranks and alphas of the file{more}"
    return f"LoRA on {network.num_modules} layers, rank {spec.rank}, alpha {spec.alpha}{more}"


def hold_norms(network: AnyNetwork, limit: float | None) -> Mapping[str, float]:
    """`scale_weight_norms` after a step, and what is logged of it under the reference's names."""
    if limit is None:
        return {}
    report = network.hold_norms(limit)
    return {
        "max_norm/keys_scaled": report.num_scaled,
        "norm/avg_key_norm": report.mean,
        "max_norm/max_key_norm": report.largest,
    }


@contextlib.contextmanager
def network_off(network: AnyNetwork) -> Generator[None, None, None]:
    """The base model alone, while entered."""
    network.set_multiplier(0.0)
    try:
        yield
    finally:
        network.set_multiplier(1.0)


def block_swap(options: Options, model: Transformer, engine: Engine, reporter: Reporter) -> BlockSwap:
    """The swap, not attached yet; of no blocks it does nothing until it is changed."""
    wanted = chosen_swap(options.blocks_to_swap)
    if wanted:
        reporter.note(f"swapping {wanted} blocks between main memory and {engine.device.type}")
    return BlockSwap(
        list(model.double_blocks), list(model.single_blocks), wanted, make_mover(engine.device, reporter.warning)
    )


def unet_rate(options: Options) -> float:
    return options.learning_rate if options.unet_lr is None else options.unet_lr


def text_encoder_rates(options: Options) -> tuple[float, float]:
    """The rates of CLIP-L and T5: one number is for both."""
    rates = options.text_encoder_lr or (options.learning_rate,)
    return rates[0], rates[-1]
