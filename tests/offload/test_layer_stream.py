"""T5 whose layers come to the device in turn gives what it gives when all of it is there."""

from __future__ import annotations

import pytest
import torch

from tests.tiny import TinyModels
from trainer.model.text_encoders import encode_t5
from trainer.model.weights import load_t5xxl
from trainer.offload.layer_stream import LayerStream
from trainer.offload.mover import HostMover


class CountingMover(HostMover):
    """Counts arrivals and remembers the most blocks that were there at once."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.fetched: list[int] = []
        self.most = 0

    def fetch(self, key: int, slot: int) -> None:
        super().fetch(key, slot)
        self.fetched.append(key)
        self.most = max(self.most, len(self.resident()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_layers_change_no_bit_and_two_are_there_at_most(tiny_models: TinyModels, dtype: torch.dtype) -> None:
    whole = load_t5xxl(tiny_models.t5xxl, dtype, "cpu")
    streamed = load_t5xxl(tiny_models.t5xxl, dtype, "cpu", layers_on="cpu")
    ids = torch.randint(1, 30, (2, 12), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    layers = list(streamed.encoder.block)
    mover = CountingMover()
    with torch.no_grad():
        expected = encode_t5(whole, ids, mask, apply_mask=True)
        with LayerStream(layers, mover):
            found = [encode_t5(streamed, ids, mask, apply_mask=True) for _ in range(3)]
        after = encode_t5(streamed, ids, mask, apply_mask=True)
    assert all(torch.equal(one, expected) for one in (*found, after))
    assert mover.most == 2
    # Each layer once a pass; of two layers, both stay.
    assert len(mover.fetched) == (3 * len(layers) + 2 if len(layers) > 2 else len(layers))
    assert mover.resident() == frozenset()


def test_only_linear_weights_wait_elsewhere(tiny_models: TinyModels) -> None:
    model = load_t5xxl(tiny_models.t5xxl, torch.float32, "cpu", layers_on="meta")
    away = {name for name, parameter in model.named_parameters() if parameter.is_meta}
    here = {name for name, _ in model.named_parameters()} - away
    assert all(".layer.0.SelfAttention." in name or ".layer.1.DenseReluDense." in name for name in away)
    assert "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight" in here
    assert "shared.weight" in here
