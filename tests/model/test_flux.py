"""The transformer as a whole: what it refuses, what checkpointing changes, what it computes once."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from trainer.model import joint
from trainer.model.flux import Flux
from trainer.model.frozen_linear import FrozenLinear
from trainer.model.packing import image_ids, text_ids
from trainer.model.weights import load_flux


def inputs(golden: Path) -> dict[str, Tensor]:
    file = load_file(golden / "dev_forward_a.safetensors")
    return {name: file[name] for name in ("img", "img_ids", "txt", "txt_ids", "timesteps", "y", "guidance")}


@pytest.fixture
def dev(golden: Path) -> Flux:
    return load_flux(golden / "model_dev.safetensors", torch.float32, "cpu")


def test_state_dict_has_the_published_names(golden: Path, dev: Flux) -> None:
    assert set(dev.state_dict()) == set(load_file(golden / "model_dev.safetensors"))


def test_dev_needs_guidance(golden: Path, dev: Flux) -> None:
    given = inputs(golden)
    del given["guidance"]
    with pytest.raises(ValueError, match="guidance is needed"):
        dev(**given)


def test_ids_of_one_row_serve_the_whole_batch(golden: Path, dev: Flux) -> None:
    given = inputs(golden)
    expected = dev(**given)
    assert torch.equal(dev(**(given | {"img_ids": given["img_ids"][:1], "txt_ids": given["txt_ids"][:1]})), expected)


def test_the_batch_does_not_mix(golden: Path, dev: Flux) -> None:
    given = inputs(golden)
    both = dev(**given)
    second = dev(**{name: tensor[1:] for name, tensor in given.items()})
    torch.testing.assert_close(both[1:], second, atol=2e-6, rtol=0)


def test_rotation_table_is_made_once_a_forward(golden: Path, dev: Flux, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    original = joint.rotation_table

    def counted(ids: Tensor, axes_dim: tuple[int, ...], theta: int) -> Tensor:
        calls.append(ids.shape[1])
        return original(ids, axes_dim, theta)

    monkeypatch.setattr(joint, "rotation_table", counted)
    dev(**inputs(golden))
    assert calls == [84]


class _AddedRank(nn.Module):
    """A Linear with a trainable low-rank path beside it."""

    def __init__(self, base: FrozenLinear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(2, base.in_features) * 0.05)
        self.up = nn.Parameter(torch.randn(base.out_features, 2) * 0.05)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


def add_ranks(model: Flux) -> list[nn.Parameter]:
    torch.manual_seed(5)
    for block in model.blocks():
        for name, module in list(block.named_modules()):
            if isinstance(module, FrozenLinear):
                owner, _, child = name.rpartition(".")
                setattr(block.get_submodule(owner), child, _AddedRank(module))
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def gradients(model: Flux, trained: list[nn.Parameter], given: dict[str, Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(model(**given).square().mean(), trained))


def test_checkpointing_changes_no_gradient(golden: Path, dev: Flux) -> None:
    trained = add_ranks(dev)
    given = inputs(golden)
    plain = gradients(dev, trained, given)
    dev.enable_gradient_checkpointing()
    assert all(torch.equal(one, other) for one, other in zip(plain, gradients(dev, trained, given), strict=True))


@contextmanager
def saved_bytes(counted: list[int]) -> Generator[None, None, None]:
    """Bytes of the distinct storages that autograd saves inside."""
    storages: dict[int, int] = {}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield
    counted.append(sum(storages.values()))


def test_checkpointing_keeps_only_what_enters_the_blocks(golden: Path, dev: Flux) -> None:
    add_ranks(dev)
    given = inputs(golden)
    counted: list[int] = []
    with saved_bytes(counted):
        dev(**given)
    dev.enable_gradient_checkpointing()
    with saved_bytes(counted):
        dev(**given)
    assert counted[1] < counted[0] / 4


def test_checkpointing_runs_each_block_twice_and_sampling_once(golden: Path, dev: Flux) -> None:
    trained = add_ranks(dev)
    dev.enable_gradient_checkpointing()
    calls: list[nn.Module] = []
    for block in dev.blocks():
        block.register_forward_pre_hook(lambda module, _: calls.append(module))
    given = inputs(golden)
    gradients(dev, trained, given)
    blocks = list(dev.blocks())
    assert calls == blocks + blocks[::-1]
    calls.clear()
    with torch.no_grad():
        dev(**given)
    assert calls == blocks


def test_no_frozen_weight_is_saved_for_backward(golden: Path, dev: Flux) -> None:
    trained = add_ranks(dev)
    weights = {
        module.weight.untyped_storage().data_ptr() for module in dev.modules() if isinstance(module, FrozenLinear)
    }
    saved: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        saved.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = dev(**inputs(golden))
    assert not saved & weights
    torch.autograd.grad(output.sum(), trained)


def test_bf16_under_autocast_stays_near_fp32(golden: Path, dev: Flux) -> None:
    given = inputs(golden)
    exact = dev(**given)
    rounded = load_flux(golden / "model_dev.safetensors", torch.bfloat16, "cpu")
    trained = add_ranks(rounded)
    for parameter in trained:
        parameter.data.zero_()
    with torch.autocast("cpu", torch.bfloat16):
        output = rounded(**given)
    assert output.dtype == torch.bfloat16
    assert (output.float() - exact).abs().max() < 0.06
    grads = torch.autograd.grad(output.float().square().mean(), trained)
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads)


def test_ids_from_packing_are_what_the_reference_used(golden: Path) -> None:
    file = load_file(golden / "dev_forward_a.safetensors")
    rows = int(file["img_ids"][0, :, 1].max()) + 1
    columns = int(file["img_ids"][0, :, 2].max()) + 1
    assert torch.equal(image_ids(rows, columns), file["img_ids"][:1])
    assert torch.equal(text_ids(file["txt"].shape[1]), file["txt_ids"][:1])
