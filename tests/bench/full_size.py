"""A transformer of random weights on the device, swapped and stored as asked, and its training step.

Weights are drawn where the computing is done, one layer at a time, and go to main memory where their block is swapped:
no file and no second copy are needed.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from trainer.lora.network import LoraNetwork
from trainer.model.flux import Flux
from trainer.model.packing import image_ids, text_ids
from trainer.model.stored_linear import PackedStorage, use_storage
from trainer.offload.block_swap import BlockSwap, swapped_prefixes
from trainer.offload.mover import Mover, make_mover
from trainer.schema.checkpoint_header import FluxParams
from trainer.schema.lora_spec import LoraSpec
from trainer.schema.storage import Storage

RANK = 16
DEVIATION = 0.02
"""Of the weights: activations neither die nor explode."""


@dataclass(frozen=True)
class Shape:
    """One batch: image tokens in `rows` x `columns`, `num_text` text tokens."""

    rows: int
    columns: int
    num_text: int

    @classmethod
    def of_square(cls, side: int, num_text: int) -> Shape:
        """A picture of `side` pixels."""
        return cls(side // 16, side // 16, num_text)


class Random:
    """Draws values on a device."""

    def __init__(self, device: torch.device, seed: int = 1) -> None:
        self.device = device
        self._generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=self._generator, device=self.device, dtype=dtype)


def random_flux(
    params: FluxParams, storage: Storage, blocks_to_swap: int, device: torch.device, dtype: torch.dtype
) -> Flux:
    """A frozen transformer; the blocks that `blocks_to_swap` names lie in main memory."""
    draw = Random(device)
    on_host = swapped_prefixes(params, blocks_to_swap)
    with torch.device("meta"):
        model = Flux(params)

    def place(name: str) -> torch.device:
        return torch.device("cpu") if name.startswith(on_host) else device

    if storage != "compute":
        packed: PackedStorage = storage
        for kind in ("double_blocks", "single_blocks"):
            for path, linear in use_storage(model.get_submodule(kind), packed).items():
                name = f"{kind}.{path}"
                dense = draw((linear.out_features, linear.in_features), dtype).mul_(DEVIATION)
                weight, scale = linear.pack(dense)
                linear.set_stored(weight.to(place(name)), scale.to(place(name)))
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            value = draw(tuple(parameter.shape), dtype).mul_(DEVIATION)
            if name.endswith("scale"):
                value.fill_(1)
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, nn.Parameter(value.to(place(name)), requires_grad=False))
    return model.eval()


def attach_lora(model: Flux, device: torch.device) -> LoraNetwork:
    """A LoRA of rank 16 on every Linear of the blocks, in float32."""
    spec = LoraSpec(rank=RANK, alpha=RANK)
    network = LoraNetwork.attach(model, None, spec, torch.Generator().manual_seed(2))
    network.to(device).train()
    return network


def training_step(
    model: Flux, network: LoraNetwork, shape: Shape, device: torch.device, dtype: torch.dtype
) -> Callable[[], None]:
    """Forward, backward, clipping and AdamW, as the trainer does them; nothing waits for the device."""
    given = inputs(model.params, shape, device, dtype)
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)

    def step() -> None:
        with autocast(device, dtype):
            output = model(
                given["img"],
                image_ids(shape.rows, shape.columns, device),
                given["txt"],
                text_ids(shape.num_text, device),
                given["timesteps"],
                given["y"],
                given["guidance"],
            )
        (output.float() - given["target"]).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def diffusers_step(params: FluxParams, shape: Shape, device: torch.device, dtype: torch.dtype) -> Callable[[], None]:
    """The same of diffusers + peft, with checkpointing; all blocks on the device."""
    from peft import LoraConfig  # noqa: PLC0415 - only this needs them

    from tests.diffusers_flux import FluxTransformer2DModel  # noqa: PLC0415

    draw = Random(device)
    with torch.device("meta"):
        model = cast(
            "Any",
            FluxTransformer2DModel(
                in_channels=params.in_channels,
                num_layers=params.depth,
                num_single_layers=params.depth_single_blocks,
                attention_head_dim=params.hidden_size // params.num_heads,
                num_attention_heads=params.num_heads,
                joint_attention_dim=params.context_in_dim,
                pooled_projection_dim=params.vec_in_dim,
                guidance_embeds=params.guidance_embed,
                axes_dims_rope=cast("tuple[int, int, int]", params.axes_dim),
            ),
        )
    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        value = draw(tuple(parameter.shape), dtype).mul_(DEVIATION)
        setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
    blocks = (model.transformer_blocks, model.single_transformer_blocks)
    linears = {id(module) for group in blocks for module in group.modules() if isinstance(module, nn.Linear)}
    targets = [name for name, module in model.named_modules() if id(module) in linears]
    model.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets, init_lora_weights="gaussian"))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float().to(device)
    model.to(device).train()
    model.enable_gradient_checkpointing()
    given = inputs(params, shape, device, dtype)
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)

    def step() -> None:
        with autocast(device, dtype):
            output = model(
                hidden_states=given["img"],
                encoder_hidden_states=given["txt"],
                pooled_projections=given["y"],
                timestep=given["timesteps"],
                img_ids=image_ids(shape.rows, shape.columns, device)[0],
                txt_ids=text_ids(shape.num_text, device)[0],
                guidance=given["guidance"],
                return_dict=False,
            )[0]
        (output.float() - given["target"]).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def inputs(params: FluxParams, shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """A batch of one, of random numbers."""
    draw = Random(device, seed=3)
    num_image = shape.rows * shape.columns
    return {
        "img": draw((1, num_image, params.in_channels), dtype),
        "txt": draw((1, shape.num_text, params.context_in_dim), dtype),
        "y": draw((1, params.vec_in_dim), dtype),
        "timesteps": torch.tensor([0.6], device=device),
        "guidance": torch.tensor([1.0], device=device),
        "target": draw((1, num_image, params.in_channels), torch.float32),
    }


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[object]:
    return contextlib.nullcontext() if dtype is torch.float32 else torch.autocast(device.type, dtype)


class CountedSwap:
    """A block swap that counts the bytes it brings to the device."""

    def __init__(self, model: Flux, blocks_to_swap: int, device: torch.device) -> None:
        self.fetched_bytes = 0
        mover = make_mover(device)
        self._fetch = mover.fetch
        mover.fetch = self._counted  # pyright: ignore[reportAttributeAccessIssue]
        self._mover: Mover = mover
        self.swap = BlockSwap(list(model.double_blocks), list(model.single_blocks), blocks_to_swap, mover)

    def _counted(self, key: int, slot: int) -> None:
        before = self._mover.resident_bytes()
        self._fetch(key, slot)
        self.fetched_bytes += self._mover.resident_bytes() - before


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(step: Callable[[], object], device: torch.device, count: int) -> Iterator[float]:
    """Seconds of each of `count` calls, the device's work included."""
    for _ in range(count):
        synchronize(device)
        started = time.perf_counter()
        step()
        synchronize(device)
        yield time.perf_counter() - started


def copy_rate(device: torch.device, num_bytes: int) -> float:
    """Bytes a second from page-locked main memory to the device; from ordinary memory where there is no GPU."""
    source = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    seconds = min(timed(lambda: target.copy_(source, non_blocking=True), device, 3))
    return num_bytes / seconds
