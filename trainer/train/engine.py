"""The machine a run uses: device, number formats, processes. accelerate is the engine below."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Final, TypeAlias, cast

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, KwargsHandler, broadcast_object_list, gather_object
from torch import Tensor

from trainer.schema.base import UserError
from trainer.schema.options import Options

Autocast: TypeAlias = AbstractContextManager[object]

_DTYPES: Final = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_NOT_CARRIED_OUT: Final = ("FSDP", "DEEPSPEED", "MEGATRON_LM")


class HalfGradScaler(torch.amp.GradScaler):
    """A scaler that takes gradients in fp16 too, which `full_fp16` has; torch's own refuses to unscale them."""

    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        return super()._unscale_grads_(optimizer, inv_scale, found_inf, True)


@dataclass(frozen=True)
class Engine:
    """One process's view of the machine.

    `dtype` is the storage and compute format of the transformer; LoRA parameters stay float32 and autocast brings the
    two together. Where it is fp16, the other models run in formats whose range they cannot leave: see `text_dtype` and
    `autoencoder_dtype`.
    """

    device: torch.device
    dtype: torch.dtype
    rank: int
    num_processes: int
    reduce_mean: Callable[[Tensor], Tensor]

    @classmethod
    def start(cls, options: Options) -> Engine:
        """accelerate decides about device and processes, unless `--device` names the device.

        Raises `UserError` when accelerate's own configuration asks for a way of sharding that is not carried out here.
        """
        _refuse_sharding()
        # Several processes without a GPU only find each other when accelerate is told so; else each trains by itself.
        shares_cpu = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available()
        # Precision stays out of accelerate: on a CPU it drops fp16 without a word; autocast and scaler are our own.
        accelerator = Accelerator(
            cpu=options.device == "cpu" or shares_cpu, mixed_precision="no", kwargs_handlers=_process_group(options)
        )
        device = cast(torch.device, accelerator.device)
        if options.device not in ("auto", device.type):
            device = torch.device(options.device)

        if options.mixed_precision == "fp16":
            # Partial sums kept in fp16 overflow where the sum does not.
            torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False

        def reduce_mean(tensor: Tensor) -> Tensor:
            return cast(Tensor, accelerator.reduce(tensor, reduction="mean"))

        return cls(
            device=device,
            dtype=_DTYPES[options.mixed_precision],
            rank=accelerator.process_index,
            num_processes=accelerator.num_processes,
            reduce_mean=reduce_mean,
        )

    def end(self) -> None:
        """Leaves the group of processes. Without it, its threads can be alive at exit, which aborts the process."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def text_dtype(self) -> torch.dtype:
        """The text encoders' format: T5-XXL's activations leave fp16's range, so in an fp16 run bf16."""
        return torch.bfloat16 if self.dtype is torch.float16 else self.dtype

    def autoencoder_dtype(self, *, no_half: bool) -> torch.dtype:
        """The autoencoder's format: float32 in an fp16 run, whose range its activations leave, and when asked for."""
        return torch.float32 if no_half or self.dtype is torch.float16 else self.dtype

    def autocast(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Autocast:
        """Mixed precision for a forward pass of a model in `dtype` (the transformer's) on `device` (the run's)."""
        dtype = dtype or self.dtype
        if dtype is torch.float32:
            return contextlib.nullcontext()
        return torch.autocast((device or self.device).type, dtype)

    def text_autocast(self, device: torch.device | None = None) -> Autocast:
        """Mixed precision for the text encoders."""
        return self.autocast(self.text_dtype, device)

    def scaler(self) -> torch.amp.GradScaler:
        """Keeps small float16 gradients from vanishing; does nothing in the other formats."""
        return HalfGradScaler(self.device.type, enabled=self.dtype is torch.float16)

    def share(self, value: int) -> int:
        """Rank 0's value on every rank."""
        if self.num_processes == 1:
            return value
        values = [value]
        broadcast_object_list(values)
        return values[0]

    def gather(self, value: object) -> Sequence[object]:
        """The values of all ranks, by rank, on every rank."""
        if self.num_processes == 1:
            return [value]
        return cast("list[object]", gather_object([value]))

    def peak_bytes(self) -> int:
        """The most device memory in use since `reset_peak`; 0 on a CPU, where it is the host's."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0

    def reset_peak(self) -> None:
        """Forgets the most device memory that was in use."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def total_bytes(self) -> int | None:
        """The card's memory; None for devices that share the machine's."""
        return torch.cuda.mem_get_info(self.device)[1] if self.device.type == "cuda" else None

    def free_bytes(self) -> int | None:
        """What is free on the card now, torch's own reserve included; None for devices that share the machine's."""
        if self.device.type != "cuda":
            return None
        reserve = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return torch.cuda.mem_get_info(self.device)[0] + reserve

    def free_cached_memory(self) -> None:
        """Gives memory of freed models back, so that the next phase's peak starts low."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def name(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return self.device.type


def _process_group(options: Options) -> list[KwargsHandler]:
    """What accelerate is told of how the processes find each other, beside its own configuration."""
    minutes = options.ddp_timeout
    return [] if minutes is None else [InitProcessGroupKwargs(timeout=timedelta(minutes=minutes))]


def _refuse_sharding() -> None:
    for kind in _NOT_CARRIED_OUT:
        if os.environ.get(f"ACCELERATE_USE_{kind}", "").lower() in ("1", "true"):
            raise UserError(
                f"accelerate is set up for {kind}, which is not supported yet",
                "accelerate's configuration",
                "Run accelerate config again without it; --blocks_to_swap saves memory.",
                exit_code=2,
            )
