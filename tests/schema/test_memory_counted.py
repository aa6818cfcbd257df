"""The estimate against counted bytes: what lies in the tensors of real, small trainings.

Counted are the parameters that are on the device, the slots of the swap, the LoRA, its gradients and its optimizer's state,
and every storage that autograd keeps from the forward to the backward pass. All Linears have a LoRA.
"""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Iterable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from tests.live_bytes import LiveBytes
from tests.schema.test_memory import usual_options
from trainer.lora.network import LoraNetwork
from trainer.model.flux import Flux
from trainer.model.host_linear import keep_modulation_on_host
from trainer.model.packing import image_ids, text_ids
from trainer.model.stored_linear import use_storage
from trainer.offload.block_swap import BlockSwap
from trainer.offload.courier import Courier
from trainer.offload.mover import HostMover
from trainer.schema.checkpoint_header import FluxParams
from trainer.schema.lora_spec import LoraSpec
from trainer.schema.memory import Estimate, estimate
from trainer.schema.options import Options
from trainer.schema.parameter_counts import PUBLISHED_DEV
from trainer.schema.swap_counts import max_blocks_to_swap

SHARE = 0.02
"""So much more than was counted the estimate may say."""
COUNTED = ("saved block inputs", "saved activations", "latents, noise, text and loss")


@dataclass(frozen=True)
class Configuration:
    flux: FluxParams
    rows: int
    columns: int
    num_text: int
    batch: int
    rank: int
    swap: int
    precision: str
    checkpointing: bool
    storage: str | None
    num_checkpointed: int | None
    modulates_outside: bool

    @property
    def options(self) -> Options:
        return usual_options(
            device="cpu",
            network_dim=self.rank,
            mixed_precision=self.precision,
            gradient_checkpointing=self.checkpointing,
            checkpoint_blocks=self.num_checkpointed,
            offload_modulation="host" if self.modulates_outside else None,
            blocks_to_swap=self.swap,
            base_storage=self.storage,
            optimizer_type="AdamW",
            t5xxl_max_token_length=self.num_text,
        )

    def estimated(self) -> Estimate:
        return estimate(self.flux, self.options, width=16 * self.columns, height=16 * self.rows, batch_size=self.batch)


def configurations(count: int) -> list[Configuration]:
    draw, more = random.Random(20), random.Random(18)
    found: list[Configuration] = []
    for _ in range(count):
        heads, depth, depth_single = draw.choice((2, 3, 4)), draw.randint(1, 3), draw.randint(2, 5)
        flux = FluxParams(
            16,
            16,
            32,
            64,
            32 * heads,
            draw.choice((2.0, 4.0)),
            heads,
            depth,
            depth_single,
            (4, 14, 14),
            10_000,
            True,
            True,
        )
        found.append(
            Configuration(
                flux,
                draw.randint(2, 10),
                draw.randint(2, 10),
                draw.randint(4, 40),
                draw.randint(1, 3),
                draw.choice((2, 4, 16)),
                draw.randint(0, max_blocks_to_swap(depth, depth_single)),
                draw.choice(("no", "bf16", "fp16")),
                draw.random() < 0.5,
                draw.choice((None, None, "fp8", "int8", "nf4")),
                more.choice((None, more.randint(0, depth + depth_single))),
                more.random() < 0.3,
            )
        )
    return found


class OpenMover(HostMover):
    """Tells what it has."""

    def swapped(self) -> set[int]:
        return {id(parameter) for block in self._blocks.values() for parameter in block.parameters}

    def slots(self) -> list[Tensor]:
        return self._slots


def num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def counted(case: Configuration) -> tuple[int, int]:
    """Bytes that the training really has at the end of its forward pass, with gradients and state of an earlier step; and
    the most that is alive at one moment of a whole forward and backward pass, what comes and goes included."""
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[case.precision]
    flux = case.flux
    model = Flux(flux).requires_grad_(False).to(dtype)
    if case.storage is not None:
        for blocks in (model.double_blocks, model.single_blocks):
            for linear in use_storage(blocks, case.storage).values():  # pyright: ignore[reportArgumentType]
                weight, scale = linear.empty("cpu")
                linear.set_stored(weight.zero_(), scale.fill_(1))
                linear.bias = nn.Parameter(torch.zeros(linear.out_features, dtype=dtype), requires_grad=False)
    elsewhere: set[int] = set()
    if case.modulates_outside:
        for linear in keep_modulation_on_host(model, Courier(torch.device("cpu"))).values():
            weight = torch.zeros(linear.out_features, linear.in_features, dtype=dtype)
            linear.weight = nn.Parameter(weight, requires_grad=False)
            linear.bias = nn.Parameter(torch.zeros(linear.out_features, dtype=dtype), requires_grad=False)
            elsewhere.add(id(linear.weight))
    network = LoraNetwork.attach(model, None, LoraSpec(rank=case.rank, alpha=1), torch.Generator().manual_seed(1))
    network.train()
    model.enable_gradient_checkpointing(case.checkpointing, num_blocks=case.num_checkpointed)
    optimizer = torch.optim.AdamW(network.parameters())
    generator = torch.Generator().manual_seed(2)
    num_image = case.rows * case.columns
    latents, noise = (torch.randn(case.batch, num_image, flux.in_channels, generator=generator) for _ in range(2))
    noisy, target = 0.5 * latents + 0.5 * noise, noise - latents
    text = torch.randn(case.batch, case.num_text, flux.context_in_dim, generator=generator).to(dtype)
    vec = torch.randn(case.batch, flux.vec_in_dim, generator=generator).to(dtype)
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    def forward() -> Tensor:
        output = model(
            noisy,
            image_ids(case.rows, case.columns).expand(case.batch, -1, -1),
            text,
            text_ids(case.num_text).expand(case.batch, -1, -1),
            torch.full((case.batch,), 0.5),
            vec,
            torch.ones(case.batch),
        )
        return (output.float() - target).square().mean()

    autocast = contextlib.nullcontext() if case.precision == "no" else torch.autocast("cpu", dtype)
    mover = OpenMover(torch.device("cpu"))
    with BlockSwap(list(model.double_blocks), list(model.single_blocks), case.swap, mover), autocast:
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = forward()
        away = mover.swapped() | elsewhere
        resident = [parameter for parameter in model.parameters() if id(parameter) not in away]
        state = [value for values in optimizer.state.values() for value in values.values()]
        gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
        assert len(gradients) == len(list(network.parameters()))
        everything = [*resident, *network.parameters(), *gradients, *state, *mover.slots(), *kept]
        everything += [latents, noise, noisy, target, text]
        assert loss.requires_grad
        stays = [
            *resident,
            *network.parameters(),
            *gradients,
            *state,
            *mover.slots(),
            latents,
            noise,
            noisy,
            target,
            text,
        ]
        kept_bytes = num_bytes(tensor for tensor in everything if isinstance(tensor, Tensor))
        del loss
        kept.clear()
        base = num_bytes(tensor for tensor in stays if isinstance(tensor, Tensor))
        with LiveBytes() as alive:
            forward().backward()
        return kept_bytes, base + alive.peak


def exact_bytes(result: Estimate) -> int:
    training = next(phase for phase in result.phases if phase.name == "training")
    return sum(
        part.bytes for part in training.parts if part.name in COUNTED or part.kind not in ("activations", "workspace")
    )


def test_the_estimate_is_never_below_the_counted_bytes_and_hardly_above() -> None:
    cases = configurations(50)
    assert {case.storage for case in cases} == {None, "fp8", "int8", "nf4"}
    assert len({(case.precision, case.checkpointing, case.swap > 0) for case in cases}) == 12
    for case in cases:
        (found, most), result = counted(case), case.estimated()
        expected = exact_bytes(result)
        assert found <= expected <= (1 + SHARE) * found, f"{expected / found - 1:+.2%} {case}"
        training = next(phase for phase in result.phases if phase.name == "training")
        assert most <= training.peak_bytes, f"{training.peak_bytes / most - 1:+.2%} {case}"


# ---- more of one thing never needs less ----

LESS_AND_MORE: dict[str, tuple[object, ...]] = {
    "blocks_to_swap": tuple(range(38, -1, -1)),
    "gradient_checkpointing": (True, False),
    "checkpoint_blocks": (None, 57, 40, 19, 1, 0),
    "cpu_offload_checkpointing": (True, False),
    "offload_modulation": ("file", None),
    "network_dim": (1, 2, 16, 64, 128),
    "mixed_precision": ("bf16", "no"),
    "optimizer_type": ("AdamW8bit", "AdamW"),
    "t5xxl_max_token_length": (16, 64, 256, 512),
    "cache_latents": (True, False),
    "cache_text_encoder_outputs": (True, False),
    "vae_batch_size": (1, 2, 8),
    "no_half_vae": (False, True),
    "network_train_unet_only": (True, False),
    "side": (256, 512, 768, 1024, 1536),
    "batch": (1, 2, 4),
}
STORAGES = (
    ("nf4", "int8"),
    ("nf4", "fp8"),
    ("nf4", None),
    ("int8", None),
    ("fp8", None),
    ("int8", "fp8"),
    ("fp8", "int8"),
)
"""fp8 and int8 take the same."""


def peak(settings: dict[str, object]) -> int:
    options = dict(settings)
    side, batch = options.pop("side"), options.pop("batch")
    assert isinstance(side, int)
    assert isinstance(batch, int)
    return estimate(PUBLISHED_DEV, usual_options(**options), width=side, height=side, batch_size=batch).peak_bytes


@pytest.mark.parametrize("name", [*LESS_AND_MORE, "base_storage"])
def test_each_memory_option_is_monotone_whatever_the_others_are(name: str) -> None:
    draw = random.Random(name)
    for _ in range(15):
        others: dict[str, object] = {key: draw.choice(values) for key, values in LESS_AND_MORE.items()}
        others["base_storage"] = draw.choice((None, "fp8", "int8", "nf4"))
        if name == "cache_latents":
            # Encoded many at once, latents that are cached can need more than those that are made one by one.
            others["vae_batch_size"] = 1
        if name == "base_storage":
            less, more = draw.choice(STORAGES)
        else:
            values = LESS_AND_MORE[name]
            first, second = sorted(draw.sample(range(len(values)), 2))
            less, more = values[first], values[second]
        smaller, larger = peak({**others, name: less}), peak({**others, name: more})
        assert smaller <= larger, (less, more, others)


def test_host_memory_grows_with_what_is_swapped_and_shrinks_with_its_storage() -> None:
    def host(**changes: object) -> int:
        options = usual_options(**changes)
        return estimate(PUBLISHED_DEV, options, width=512, height=512, batch_size=1).host_peak_bytes

    assert all(a < b for a, b in itertools.pairwise(host(blocks_to_swap=count) for count in range(39)))
    stored = [host(blocks_to_swap=38, base_storage=storage) for storage in ("nf4", "fp8", None)]
    assert stored == sorted(stored)
    assert host(blocks_to_swap=18, cache_latents_to_disk=True) < host(blocks_to_swap=18)
