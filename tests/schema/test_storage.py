"""The bytes of each form of storage, and which one the options ask for."""

from __future__ import annotations

import math

import pytest

from tests.schema.test_chroma import PUBLISHED as CHROMA
from tests.schema.test_memory import DEV
from trainer.schema.checkpoint_header import FluxParams
from trainer.schema.chroma_header import ChromaParams
from trainer.schema.options import Options
from trainer.schema.parameter_counts import flux_counts
from trainer.schema.storage import (
    Storage,
    block_bytes,
    kept_shapes,
    linear_bytes,
    saved_bytes,
    scratch_bytes,
    stored_as,
    stored_shapes,
)


@pytest.mark.parametrize("flux", [DEV, CHROMA], ids=["dev", "Chroma"])
def test_the_shapes_are_all_linears_of_the_blocks(flux: FluxParams | ChromaParams) -> None:
    counts = flux_counts(flux)
    for index, expected in enumerate((counts.double_linear, counts.single_linear)):
        shapes = (*stored_shapes(flux)[index], *kept_shapes(flux)[index])
        assert sum(math.prod(shape) for shape in shapes) == expected
    assert block_bytes(flux, "compute", 2) == (2 * counts.double_linear, 2 * counts.single_linear)
    assert saved_bytes(flux, "compute", 2) == 0 == scratch_bytes(flux, "compute", 2)


def test_the_blocks_of_dev_without_modulation_shrink_to_what_the_storage_says() -> None:
    plain = 2 * (19 * 12 * 2 + 38 * 12) * 3072**2
    shares: dict[Storage, float] = {"fp8": 0.5, "int8": 0.5, "nf4": 4.25 / 16}
    for storage, share in shares.items():
        stored = plain - saved_bytes(DEV, storage, 2)
        assert stored / plain == pytest.approx(share, rel=0.002)
    assert scratch_bytes(DEV, "nf4", 2) == 21504 * 3072 * 2


@pytest.mark.parametrize(
    ("shape", "storage", "expected"),
    [
        ((5, 7), "compute", 70),
        ((5, 7), "fp8", 35 + 20),
        ((5, 7), "int8", 35 + 20),
        ((5, 7), "nf4", 18 + 2),
        ((13, 10), "nf4", 65 + 2 * 3),
    ],
)
def test_bytes_of_a_linear(shape: tuple[int, int], storage: Storage, expected: int) -> None:
    assert linear_bytes(shape, storage, 2) == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "compute"),
        ({"fp8_base": True}, "fp8"),
        ({"fp8_base_unet": True}, "fp8"),
        ({"base_storage": "nf4"}, "nf4"),
        ({"base_storage": "fp8", "fp8_base": True}, "fp8"),
    ],
)
def test_which_storage_the_options_ask_for(given: dict[str, object], expected: Storage) -> None:
    assert stored_as(Options.model_validate(given)) == expected
