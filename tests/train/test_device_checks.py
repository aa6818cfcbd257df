"""A format that the processor has no instructions for is named before an hour is lost with it."""

from __future__ import annotations

import pytest
import torch

from trainer.train.device_checks import product_seconds, slow_format

CPU = torch.device("cpu")


def measured(dtype: torch.dtype) -> float:
    return 0.0006 if dtype is torch.float32 else 0.2


def test_a_cpu_without_the_instructions_is_told_of_with_the_remedy() -> None:
    text = slow_format(CPU, torch.bfloat16, measured)
    assert text == "this processor computes bfloat16 333 times slower than 32 bit; use --mixed_precision=no here"


@pytest.mark.parametrize(
    ("device", "dtype"),
    [(CPU, torch.float32), (torch.device("cuda"), torch.bfloat16), (torch.device("mps"), torch.half)],
)
def test_32_bit_and_graphics_cards_are_not_measured(device: torch.device, dtype: torch.dtype) -> None:
    def never(dtype: torch.dtype) -> float:
        raise AssertionError

    assert slow_format(device, dtype, never) is None


def test_a_cpu_with_the_instructions_is_not_complained_about() -> None:
    assert slow_format(CPU, torch.bfloat16, lambda dtype: 0.0006 if dtype is torch.float32 else 0.001) is None


def test_what_a_product_takes_is_measured() -> None:
    assert 0 < product_seconds(torch.float32) < 1
