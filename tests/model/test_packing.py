"""Packing latents into tokens and back."""

from __future__ import annotations

import pytest
import torch

from trainer.model.packing import image_ids, pack_latents, text_ids, unpack_latents


def test_a_token_holds_channel_then_row_then_column() -> None:
    latents = torch.arange(2 * 16 * 4 * 6).reshape(2, 16, 4, 6)
    tokens = pack_latents(latents)
    assert tokens.shape == (2, 6, 64)
    # Token 4 is patch row 1, column 1; feature 4 * channel + 2 * row + column.
    assert tokens[1, 4, 4 * 5 + 2 * 1 + 0] == latents[1, 5, 2 * 1 + 1, 2 * 1 + 0]
    assert tokens[0, 2, 4 * 3 + 2 * 0 + 1] == latents[0, 3, 0, 2 * 2 + 1]


def test_unpacking_restores_the_latents() -> None:
    latents = torch.randn(2, 16, 6, 4)
    assert torch.equal(unpack_latents(pack_latents(latents), 6, 4), latents)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 2"):
        pack_latents(torch.zeros(1, 16, 3, 4))
    with pytest.raises(ValueError, match="do not make latents"):
        unpack_latents(torch.zeros(1, 5, 64), 4, 6)


def test_ids_count_rows_and_columns() -> None:
    ids = image_ids(2, 3)
    assert ids.shape == (1, 6, 3)
    assert ids[0].tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 1, 1], [0, 1, 2]]
    assert text_ids(4).tolist() == [[[0.0] * 3] * 4]
