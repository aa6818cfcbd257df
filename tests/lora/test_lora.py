"""The LoRA layer and the network of all layers: values, gradients, dropouts, groups, and files that don't fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.tiny import TinyModels
from trainer.lora.lora import LoraLinear
from trainer.lora.network import LoraNetwork
from trainer.model.flux import Flux
from trainer.model.weights import load_clip_l, load_flux
from trainer.schema.base import UserError
from trainer.schema.lora_spec import LoraSpec, spec_from_network_args

IN, OUT, RANK = 6, 5, 3


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def layer(*, alpha: float = 2.0, bias: bool = True, dtype: torch.dtype = torch.float32, **dropouts: Any) -> LoraLinear:
    """An adapter with weights that are not zero, around a frozen Linear."""
    base = nn.Linear(IN, OUT, bias=bias).requires_grad_(False)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator(1)))
    adapter = LoraLinear(base.to(dtype), RANK, alpha, generator(2), **dropouts)
    with torch.no_grad():
        adapter.lora_up.copy_(torch.randn(OUT, RANK, generator=generator(3)))
    return adapter


def dense(adapter: LoraLinear, x: Tensor) -> Tensor:
    """The same by the formula, which autograd follows step by step."""
    weight = adapter.base.weight + adapter.scale * adapter.lora_up @ adapter.lora_down
    return F.linear(x, weight, adapter.base.bias)


@pytest.fixture
def network(tiny_models: TinyModels) -> LoraNetwork:
    return LoraNetwork.attach(flux(tiny_models), None, LoraSpec(rank=RANK, alpha=RANK), generator())


def flux(tiny_models: TinyModels) -> Flux:
    return load_flux(tiny_models.flux_dev, torch.float32, "cpu")


# ------------------------------------------------------------------------------------------------------- the layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4, IN), (2, 3, IN), (IN,)])
@pytest.mark.parametrize("multiplier", [1.0, -0.5])
def test_values_and_gradients_are_those_of_the_dense_weight(
    bias: bool, shape: tuple[int, ...], multiplier: float
) -> None:
    adapter = layer(bias=bias)
    adapter.multiplier = multiplier
    x = torch.randn(shape, generator=generator(4), requires_grad=True)
    wanted = [x, adapter.lora_down, adapter.lora_up]
    ours, expected = adapter(x), dense(adapter, x)
    torch.testing.assert_close(ours, expected)
    weighting = torch.randn(ours.shape, generator=generator(5))
    for found, correct in zip(
        torch.autograd.grad((ours * weighting).sum(), wanted),
        torch.autograd.grad((expected * weighting).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(found, correct)


def test_an_input_that_needs_no_gradient_gets_none_and_the_lora_still_learns() -> None:
    adapter = layer()
    x = torch.randn(4, IN, generator=generator(4))
    adapter(x).sum().backward()
    assert x.grad is None
    assert adapter.base.weight.grad is None
    for parameter in (adapter.lora_down, adapter.lora_up):
        assert cast("Tensor", parameter.grad).abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_base_under_autocast_agrees_with_the_dense_weight_to_its_precision(dtype: torch.dtype) -> None:
    adapter = layer(dtype=dtype)
    x = torch.randn(8, IN, generator=generator(4), requires_grad=True)
    with torch.autocast("cpu", dtype):
        output = adapter(x)
    assert output.dtype == dtype
    assert adapter.lora_down.dtype == torch.float32
    output.float().square().sum().backward()
    exact = layer(dtype=dtype)
    exact.base.float()
    x_exact = x.detach().clone().requires_grad_()
    expected = dense(exact, x_exact)
    expected.square().sum().backward()
    tolerance = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(output.float(), expected, atol=tolerance * 8, rtol=tolerance)
    for found, correct in ((adapter.lora_down.grad, exact.lora_down.grad), (adapter.lora_up.grad, exact.lora_up.grad)):
        scale = cast("Tensor", correct).abs().max()
        assert cast("Tensor", found).dtype == torch.float32
        assert ((cast("Tensor", found) - cast("Tensor", correct)).abs().max() / scale) < tolerance


def test_up_begins_as_zeros_so_that_training_begins_at_the_base() -> None:
    base = nn.Linear(IN, OUT).requires_grad_(False)
    adapter = LoraLinear(base, RANK, 1, generator())
    x = torch.randn(4, IN, generator=generator(4))
    assert torch.equal(adapter(x), base(x))
    bound = IN**-0.5
    assert adapter.lora_down.abs().max() <= bound
    assert adapter.lora_down.abs().max() > 0.5 * bound


def test_alpha_0_means_the_rank_and_keeps_a_whole_number_whole() -> None:
    base = nn.Linear(IN, OUT)
    assert LoraLinear(base, RANK, 0, generator()).alpha == RANK
    assert LoraLinear(base, RANK, 0, generator()).scale == 1
    assert isinstance(LoraLinear(base, RANK, 1, generator()).alpha, int)


def test_multiplier_0_is_exactly_the_base() -> None:
    adapter = layer()
    adapter.multiplier = 0
    x = torch.randn(4, IN, generator=generator(4))
    assert torch.equal(adapter(x), adapter.base(x))


# --------------------------------------------------------------------------------------------------------- dropouts


def test_neuron_dropout_leaves_the_mean_and_is_off_outside_training() -> None:
    torch.manual_seed(0)
    adapter = layer(dropout=0.4)
    x = torch.randn(1, IN, generator=generator(4))
    draws = torch.stack([adapter(x) for _ in range(4000)])
    assert draws.std(dim=0).min() > 0.1
    torch.testing.assert_close(draws.mean(dim=0), dense(adapter, x), atol=0.25, rtol=0)
    adapter.eval()
    torch.testing.assert_close(adapter(x), dense(adapter, x))


def test_rank_dropout_drops_whole_ranks_for_each_sample_and_scales_what_is_left() -> None:
    torch.manual_seed(0)
    adapter = layer(rank_dropout=0.5)
    x = torch.randn(1, 7, IN, generator=generator(4)).expand(64, -1, -1)
    added = adapter(x) - adapter.base(x)
    inner = F.linear(x[0], adapter.lora_down)
    rank_parts = torch.stack([inner[:, r, None] * adapter.lora_up[:, r] for r in range(RANK)])
    patterns: set[tuple[bool, ...]] = set()
    for sample in added:
        kept = torch.linalg.lstsq(rank_parts.flatten(1).t(), sample.flatten()[:, None]).solution.flatten()
        kept = kept / (adapter.scale / 0.5)
        assert torch.minimum(kept.abs(), (kept - 1).abs()).max() < 1e-3, "each rank is there as a whole or not at all"
        patterns.add(tuple((kept > 0.5).tolist()))
    assert len(patterns) == 2**RANK, "all combinations of three ranks occur in 64 samples"


def test_module_dropout_leaves_out_the_whole_adapter_that_often() -> None:
    torch.manual_seed(0)
    adapter = layer(module_dropout=0.25)
    x = torch.randn(2, IN, generator=generator(4))
    base, full = adapter.base(x), dense(adapter, x)
    dropped = 0
    for _ in range(400):
        output = adapter(x)
        is_base = torch.equal(output, base)
        assert is_base or torch.allclose(output, full, atol=1e-5)
        dropped += is_base
    assert 70 <= dropped <= 130


def test_the_network_switches_all_dropouts(tiny_models: TinyModels) -> None:
    spec = spec_from_network_args(["module_dropout=0.5"], network_dim=RANK, network_dropout=0.5)
    network = LoraNetwork.attach(model := flux(tiny_models), None, spec, generator())
    adapters = [module for module in model.modules() if isinstance(module, LoraLinear)]
    assert len(adapters) == network.num_modules
    for mode in (True, False):
        network.train(mode)
        assert all(adapter.training is mode for adapter in adapters)
    assert {(adapter.dropout, adapter.module_dropout) for adapter in adapters} == {(0.5, 0.5)}


# ------------------------------------------------------------------------------------------------------ the network


def test_only_the_lora_is_a_parameter_of_the_network_and_the_same_seed_gives_the_same(tiny_models: TinyModels) -> None:
    networks = [LoraNetwork.attach(flux(tiny_models), None, LoraSpec(), generator(seed)) for seed in (5, 5, 6)]
    first, again, other = ([parameter.clone() for parameter in network.parameters()] for network in networks)
    assert len(first) == 2 * networks[0].num_modules
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_each_part_trains_at_its_own_rate_and_one_with_rate_0_not_at_all(tiny_models: TinyModels) -> None:
    clip_l = load_clip_l(tiny_models.clip_l, torch.float32, "cpu")
    network = LoraNetwork.attach(flux(tiny_models), clip_l, LoraSpec(), generator())
    num_clip = 2 * sum(name.startswith("lora_te1_") for name in network.names)
    num_flux = 2 * network.num_modules - num_clip
    groups = network.parameter_groups(1e-3, 1e-4)
    facts = [(group["name"], group["lr"], len(cast("list[Tensor]", group["params"]))) for group in groups]
    assert facts == [("textencoder", 1e-4, num_clip), ("unet", 1e-3, num_flux)]
    assert [group["name"] for group in network.parameter_groups(1e-3, 0)] == ["unet"]
    assert [group["name"] for group in network.parameter_groups(0, 1e-3)] == ["textencoder"]
    with pytest.raises(UserError, match="every learning rate is 0") as caught:
        network.parameter_groups(0, 0)
    assert caught.value.exit_code == 2


def test_a_file_gives_back_what_was_saved_and_alpha_with_it(
    tiny_models: TinyModels, network: LoraNetwork, tmp_path: Path
) -> None:
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator(7)))
    save_file(network.published_state_dict(None), tmp_path / "lora.safetensors")
    other = LoraNetwork.attach(flux(tiny_models), None, LoraSpec(rank=RANK, alpha=1.5), generator(8))
    report = other.load_file(tmp_path / "lora.safetensors")
    assert report.missing == report.unexpected == ()
    expected, found = network.published_state_dict(None), other.published_state_dict(None)
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        assert torch.equal(tensor, found[key]), key


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_save_precision_holds_for_every_tensor(network: LoraNetwork, dtype: torch.dtype) -> None:
    assert {tensor.dtype for tensor in network.published_state_dict(dtype).values()} == {dtype}


def test_what_only_one_side_has_is_reported_and_the_rest_is_loaded(tiny_models: TinyModels) -> None:
    small = LoraNetwork.attach(
        flux(tiny_models), None, spec_from_network_args(["train_blocks=single"], network_dim=RANK), generator(9)
    )
    large = LoraNetwork.attach(flux(tiny_models), None, LoraSpec(rank=RANK), generator(10))
    report = large.load_published(small.published_state_dict(None))
    assert report.unexpected == ()
    assert set(report.missing) == {name for name in large.names if "_double_blocks_" in name}
    report = small.load_published(large.published_state_dict(None))
    assert set(report.unexpected) == {name for name in large.names if "_double_blocks_" in name}
    assert report.missing == ()


def test_a_file_of_another_rank_names_the_option_that_makes_it_fit(
    tiny_models: TinyModels, network: LoraNetwork
) -> None:
    other = LoraNetwork.attach(flux(tiny_models), None, LoraSpec(rank=7), generator())
    with pytest.raises(UserError, match=r"rank 7 .* rank 3 is to be trained.* Use --network_dim=7"):
        network.load_published(other.published_state_dict(None))


def test_a_file_of_another_model_or_with_a_part_missing_is_refused(network: LoraNetwork) -> None:
    state = network.published_state_dict(None)
    name = network.names[0]
    wide = {**state, f"{name}.lora_down.weight": torch.zeros(RANK, 999)}
    with pytest.raises(UserError, match="belongs to another model"):
        network.load_published(wide)
    del state[f"{name}.lora_up.weight"]
    with pytest.raises(UserError, match=r"has no lora_up\.weight"):
        network.load_published(state)


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("transformer.single_transformer_blocks.0.proj_mlp.lora_A.weight", "diffusers"),
        ("lycoris_double_blocks_0_img_attn_proj.hada_w1_a", "LyCORIS"),
        ("double_blocks.0.img_attn.proj.weight", "no LoRA"),
    ],
)
def test_a_file_of_another_format_is_told_by_name(network: LoraNetwork, key: str, kind: str) -> None:
    with pytest.raises(UserError, match=kind):
        network.load_published({key: torch.zeros(2, 2)})


def test_blocks_that_the_model_has_not_are_an_error_with_their_range(tiny_models: TinyModels) -> None:
    spec = spec_from_network_args(["train_single_block_indices=1,7"])
    with pytest.raises(
        UserError, match=r"names block 7, but this model has 4 single blocks.*numbered 0 to 3"
    ) as caught:
        LoraNetwork.attach(flux(tiny_models), None, spec, generator())
    assert caught.value.exit_code == 2


def test_nothing_to_train_is_an_error(tiny_models: TinyModels) -> None:
    spec = spec_from_network_args(["train_double_block_indices=none", "train_single_block_indices=none"])
    with pytest.raises(UserError, match="no layer is left to train"):
        LoraNetwork.attach(flux(tiny_models), None, spec, generator())
