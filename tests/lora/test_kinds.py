"""What defines each kind of adapter: DoRA, rsLoRA, PiSSA, OFT, GGPO and the norm limit, on single layers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.lora.dense import changed_weight, dense_weights
from tests.lora.test_network_settings import fill, forward_inputs
from trainer.lora.adapter import Adapter
from trainer.lora.dora import DoraLinear
from trainer.lora.ggpo import Perturbation, row_norms
from trainer.lora.lora import LoraLinear
from trainer.lora.max_norm import hold_norms
from trainer.lora.merge import merge_file
from trainer.lora.network import LoraNetwork
from trainer.lora.oft import OftLinear
from trainer.model.weights import load_clip_l, load_flux, load_t5xxl
from trainer.schema.base import UserError
from trainer.schema.lora_spec import LoraSpec, spec_from_network_args
from trainer.schema.network_args import DoraAxis

IN, OUT, RANK = 12, 18, 3
PARTS = (6, 6, 6)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear(dtype: torch.dtype = torch.float32) -> nn.Linear:
    base = nn.Linear(IN, OUT)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator(1)))
    return base.requires_grad_(False).to(dtype)


def shaken(adapter: Adapter, size: float = 0.3) -> Adapter:
    with torch.no_grad():
        for entry in adapter.trained():
            entry.parameter.add_(size * torch.randn(entry.parameter.shape, generator=generator(5)))
    return adapter


def effective_weight(adapter: Adapter) -> Tensor:
    """The weight that the layer as a whole applies, read off its outputs."""
    with torch.no_grad():
        bias = adapter(torch.zeros(1, IN))
        return (adapter(torch.eye(IN)) - bias).t()


# ------------------------------------------------------------------------------------------------------------- DoRA


@pytest.mark.parametrize(("axis", "summed"), [("in", 0), ("out", 1)])
def test_dora_sets_every_norm_to_its_magnitude_and_the_direction_by_the_lora(axis: DoraAxis, summed: int) -> None:
    adapter = DoraLinear(linear(), RANK, RANK, generator(), splits=PARTS, axis=axis)
    torch.testing.assert_close(effective_weight(adapter), adapter.base.weight, atol=1e-5, rtol=0)
    shaken(adapter)
    weight = effective_weight(adapter)
    torch.testing.assert_close(weight.norm(dim=summed), adapter.magnitude.abs(), atol=1e-4, rtol=1e-4)
    direction = adapter.base.weight + torch.cat([adapter.lora_up[p] @ block for p, block in _blocks(adapter)])
    expected = F.normalize(direction, dim=summed) * adapter.magnitude.detach().unsqueeze(summed)
    torch.testing.assert_close(weight, expected, atol=1e-4, rtol=1e-4)
    state = {f"x.{part}": tensor for part, tensor in adapter.published().items()}
    torch.testing.assert_close(weight, changed_weight(adapter.base.weight, state, "x"), atol=1e-4, rtol=1e-4)


def _blocks(adapter: LoraLinear) -> list[tuple[slice, Tensor]]:
    return list(zip(adapter.parts, adapter.lora_down.chunk(len(adapter.parts)), strict=True))


def test_doras_magnitude_learns_apart_from_the_direction() -> None:
    """A larger magnitude scales the column and nothing else."""
    adapter = cast("DoraLinear", shaken(DoraLinear(linear(), RANK, RANK, generator())))
    before = effective_weight(adapter)
    with torch.no_grad():
        adapter.magnitude[4] *= 2
    after = effective_weight(adapter)
    torch.testing.assert_close(after[:, 4], 2 * before[:, 4], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(after[:, :4], before[:, :4])


def test_a_lora_without_magnitudes_keeps_its_effect_in_dora_and_the_other_way_round_is_refused(golden: Path) -> None:
    plain = shaken(LoraLinear(linear(), RANK, 1, generator()))
    dora = DoraLinear(linear(), RANK, 1, generator(9))
    dora.load(plain.published(), "x", "file")
    torch.testing.assert_close(effective_weight(dora), effective_weight(plain), atol=1e-5, rtol=1e-5)
    flux = load_flux(golden / "model_dev.safetensors", torch.float32, "cpu")
    state = LoraNetwork.attach(flux, None, LoraSpec(dora=True), generator()).published_state_dict(None)
    flux = load_flux(golden / "model_dev.safetensors", torch.float32, "cpu")
    with pytest.raises(UserError, match=r'DoRA.*Add "dora=True"'):
        LoraNetwork.attach(flux, None, LoraSpec(), generator()).load_published(state)


# ----------------------------------------------------------------------------------------------------- rsLoRA, PiSSA


def test_rslora_scales_by_the_root_of_the_rank_in_every_loader() -> None:
    for rank in (1, 4, 16):
        alpha = LoraSpec(rank=rank, alpha=3, rslora=True).alpha_of("x", rank)
        assert alpha / rank == pytest.approx(3 / rank**0.5)


def test_the_size_of_rsloras_gradients_does_not_depend_on_the_rank() -> None:
    """The paper's property; with alpha / rank they shrink with the rank."""
    sizes: dict[bool, list[float]] = {}
    for is_stable in (True, False):
        for rank in (4, 64, 1024):
            spec = LoraSpec(rank=rank, alpha=1, rslora=is_stable)
            adapter = LoraLinear(linear(), rank, spec.alpha_of("x", rank), generator())
            optimizer = torch.optim.SGD([adapter.lora_up], lr=1.0)
            x, target = torch.randn(32, IN, generator=generator(2)), torch.randn(32, OUT, generator=generator(3))
            base = adapter.base(x)
            (adapter(x) * target).mean().backward()
            optimizer.step()
            sizes.setdefault(is_stable, []).append(float((adapter(x) - base).detach().norm()))
    stable, unstable = sizes[True], sizes[False]
    assert max(stable) / min(stable) < 2
    assert unstable[0] / unstable[2] > 50


def test_pissa_begins_at_the_largest_singular_values_and_leaves_the_rest_frozen() -> None:
    base = linear()
    adapter = LoraLinear(base, RANK, 2, generator(), pissa_niter=4)
    principal = adapter.scale * adapter.lora_up @ adapter.lora_down
    values = torch.linalg.svdvals(base.weight)
    torch.testing.assert_close(torch.linalg.svdvals(principal)[:RANK], values[:RANK], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.linalg.svdvals(base.weight - principal)[0], values[RANK], atol=1e-4, rtol=1e-4)
    x = torch.randn(4, IN, generator=generator(2))
    assert torch.equal(adapter(x), base(x)), "and starts exactly at the base"
    adapter(x).square().sum().backward()
    assert min(float(cast("Tensor", entry.parameter.grad).norm()) for entry in adapter.trained()) > 0


def test_pissas_file_is_a_lora_of_twice_the_rank_for_the_unmodified_base() -> None:
    adapter = shaken(LoraLinear(linear(), RANK, 2, generator(), pissa_niter=4, splits=PARTS))
    state = {f"x.{part}": tensor for part, tensor in adapter.published().items()}
    assert state["x.lora_down.weight"].shape == (2 * RANK * 3, IN)
    expected = changed_weight(adapter.base.weight, state, "x")
    torch.testing.assert_close(effective_weight(adapter), expected, atol=1e-4, rtol=1e-4)


def test_large_weights_have_their_principal_part_approximated_well() -> None:
    values = torch.logspace(2, -1, 600)
    u = torch.linalg.qr(torch.randn(700, 600, generator=generator(1))).Q
    v = torch.linalg.qr(torch.randn(600, 600, generator=generator(2))).Q
    base = nn.Linear(600, 700, bias=False).requires_grad_(False)
    base.weight.data.copy_(u * values @ v.t())
    adapter = LoraLinear(base, 8, 8, generator(), pissa_niter=LoraSpec().pissa_niter)
    found = torch.linalg.svdvals(adapter.lora_up @ adapter.lora_down)[:8]
    torch.testing.assert_close(found, values[:8], rtol=1e-2, atol=0)


# --------------------------------------------------------------------------------------------------------------- OFT


@pytest.mark.parametrize("multiplier", [1.0, 0.4])
def test_oft_rotates_and_keeps_every_angle_and_length(multiplier: float) -> None:
    adapter = shaken(OftLinear(linear(), 3, 10.0, PARTS))
    adapter.multiplier = multiplier
    weight, base = effective_weight(adapter), adapter.base.weight
    state = {f"x.{part}": tensor for part, tensor in adapter.published().items()}
    rotated = changed_weight(base, state, "x")
    torch.testing.assert_close(weight, base + multiplier * (rotated - base), atol=1e-4, rtol=1e-4)
    if multiplier == 1:
        for part in (slice(0, 2), slice(2, 4), slice(16, 18)):
            torch.testing.assert_close(
                weight[part].t() @ weight[part], base[part].t() @ base[part], atol=1e-4, rtol=1e-4
            )
    assert (weight - base).abs().max() > 0.1


def test_ofts_turns_are_the_cayley_rotations_of_the_paper() -> None:
    """R = (I + Q) (I - Q)^-1 of a skew Q: orthogonal, of determinant 1, and never a mirroring."""
    adapter = cast("OftLinear", shaken(OftLinear(linear(), 3, 10.0, PARTS)))
    for blocks, turns in zip(adapter.blocks(), adapter.turns(), strict=True):
        for block, turn in zip(blocks.detach(), turns, strict=True):
            identity, q = torch.eye(len(block)), block - block.t()
            rotation = turn.detach() + identity
            torch.testing.assert_close(rotation @ (identity - q), identity + q, atol=1e-5, rtol=0)
            torch.testing.assert_close(rotation @ rotation.t(), identity, atol=1e-5, rtol=0)
            assert float(torch.linalg.det(rotation)) == pytest.approx(1, abs=1e-5)
    whole = torch.block_diag(*(turn.detach() + torch.eye(2) for turns in adapter.turns() for turn in turns))
    x = torch.randn(4, IN, generator=generator(2))
    expected = F.linear(x, adapter.base.weight) @ whole + adapter.base.bias
    torch.testing.assert_close(adapter(x), expected, atol=1e-4, rtol=1e-4)


def test_ofts_constraint_holds_the_rotation_back() -> None:
    adapter = shaken(OftLinear(linear(), 3, 1e-4, (OUT,)), size=5.0)
    for turn in cast("OftLinear", adapter).turns():
        # For small Q the rotation is the identity and 2 Q, whose norm is at most alpha times the size of the part.
        assert float(turn.detach().norm()) == pytest.approx(2 * 1e-4 * OUT, rel=1e-2)


def test_ofts_gradients_are_those_of_the_rotated_weight_with_the_base_gone_in_between() -> None:
    adapter = cast("OftLinear", shaken(OftLinear(linear(), 3, 10.0, PARTS)))
    x = torch.randn(2, 5, IN, generator=generator(3), requires_grad=True)
    weighting = torch.randn(2, 5, OUT, generator=generator(4))
    wanted = [x, *adapter.blocks()]
    turns = [torch.block_diag(*(turn + torch.eye(turn.shape[-1]))) for turn in adapter.turns()]
    weight = torch.block_diag(*turns).t() @ adapter.base.weight
    expected = torch.autograd.grad((F.linear(x, weight, adapter.base.bias) * weighting).sum(), wanted)
    found = _gradients_with_an_absent_base(adapter, lambda: (adapter(x) * weighting).sum(), wanted)
    for ours, correct in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, correct, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "make",
    [
        lambda: LoraLinear(linear(), RANK, 1, generator(), splits=PARTS),
        lambda: LoraLinear(linear(), RANK, 1, generator(), splits=PARTS, pissa_niter=2),
        lambda: DoraLinear(linear(), RANK, 1, generator()),
        lambda: DoraLinear(linear(), RANK, 1, generator(), splits=PARTS, axis="out"),
    ],
)
def test_no_adapter_keeps_the_base_weight_for_backward(make: Callable[[], Adapter]) -> None:
    adapter = shaken(make())
    x = torch.randn(4, IN, generator=generator(3), requires_grad=True)
    wanted = [x, *(entry.parameter for entry in adapter.trained())]
    expected = torch.autograd.grad(adapter(x).square().sum(), wanted)
    found = _gradients_with_an_absent_base(adapter, lambda: adapter(x).square().sum(), wanted)
    for ours, correct in zip(found, expected, strict=True):
        assert torch.equal(ours, correct)


def _gradients_with_an_absent_base(
    adapter: Adapter, loss: Callable[[], Tensor], wanted: list[Any]
) -> tuple[Tensor, ...]:
    """As block swap does it: the weight's storage is overwritten after forward, and it is back elsewhere in backward."""
    weight = adapter.base.weight.data
    value = loss()
    adapter.base.weight.data = weight.clone()
    weight.fill_(float("nan"))
    return torch.autograd.grad(value, wanted)


@pytest.mark.parametrize("kind", ["split", "dora", "pissa", "oft"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_kind_works_under_autocast_on_a_half_precision_base(kind: str, dtype: torch.dtype) -> None:
    def make(base: nn.Linear) -> Adapter:
        if kind == "oft":
            return OftLinear(base, 3, 10.0, PARTS)
        maker = DoraLinear if kind == "dora" else LoraLinear
        return maker(base, RANK, 1, generator(), splits=PARTS, pissa_niter=2 if kind == "pissa" else None)

    half, exact = shaken(make(linear(dtype))), shaken(make(linear(dtype).float()))
    x = torch.randn(8, IN, generator=generator(4))
    with torch.autocast("cpu", dtype):
        output = half(x)
    output.float().square().mean().backward()
    exact(x).square().mean().backward()
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), exact(x), atol=0.15 if dtype is torch.bfloat16 else 0.02, rtol=0.02)
    for ours, correct in zip(half.trained(), exact.trained(), strict=True):
        assert ours.parameter.dtype == torch.float32
        found, expected = cast("Tensor", ours.parameter.grad), cast("Tensor", correct.parameter.grad)
        assert float((found - expected).norm() / expected.norm()) < 0.05


def test_a_base_in_8_bit_is_converted_for_the_moment() -> None:
    base = linear()
    base.weight.data = base.weight.data.to(torch.float8_e4m3fn)
    adapter = shaken(LoraLinear(base, RANK, 1, generator()))
    x = torch.randn(4, IN, generator=generator(4), requires_grad=True)
    expected = F.linear(x, base.weight.float() + adapter.alpha / RANK * _product(adapter), base.bias)
    torch.testing.assert_close(adapter(x), expected, atol=1e-4, rtol=1e-4)
    adapter(x).sum().backward()
    assert x.grad is not None


def _product(adapter: Adapter) -> Tensor:
    lora = cast("LoraLinear", adapter)
    return lora.lora_up @ lora.lora_down


# ------------------------------------------------------------------------------------------------ GGPO, norm limit


def test_ggpos_noise_follows_its_formula() -> None:
    adapter = cast("LoraLinear", shaken(LoraLinear(linear(), RANK, 2, generator())))
    sigma, beta = 0.3, 2.0
    adapter.perturbation = Perturbation(adapter.base, sigma, beta)
    x = torch.randn(4, IN, generator=generator(4))
    quiet = adapter(x)
    torch.testing.assert_close(
        quiet, F.linear(x, adapter.base.weight + 2 / RANK * _product(adapter), adapter.base.bias)
    )
    quiet.square().mean().backward()
    down, up = adapter.lora_down, adapter.lora_up
    grads = cast("Tensor", down.grad), cast("Tensor", up.grad)
    with torch.no_grad():
        adapter.perturbation.update(down, up, adapter.parts, grads, adapter.scale)
        slope = (adapter.scale * (up @ grads[0] + grads[1] @ down)).norm(dim=1)
        mean_row = adapter.base.weight.norm(dim=1).mean()
        row = ((up @ down).square().sum(dim=1) + mean_row**2).sqrt()
        expected = (sigma * row + beta * slope**2) / OUT**0.5
        torch.testing.assert_close(adapter.perturbation.deviation, expected)
        torch.manual_seed(0)
        draws = torch.stack([adapter(torch.eye(IN)) - adapter.base.bias for _ in range(3000)])
        spread = draws.std(dim=0).mean(dim=0)
        torch.testing.assert_close(spread, expected, rtol=0.05, atol=0)
        adapter.eval()
        assert torch.equal(adapter(x), quiet)


def test_no_gradient_passes_through_ggpos_noise_whose_mean_is_zero() -> None:
    adapter = cast("LoraLinear", shaken(LoraLinear(linear(), RANK, 2, generator())))
    x = torch.randn(4, IN, generator=generator(4), requires_grad=True)
    weighting = torch.randn(4, OUT, generator=generator(6))
    wanted = [x, adapter.lora_down, adapter.lora_up]
    quiet = adapter(x)
    expected = torch.autograd.grad((quiet * weighting).sum(), wanted)
    adapter.perturbation = Perturbation(adapter.base, 0.3, 2.0)
    adapter.perturbation.update(
        adapter.lora_down, adapter.lora_up, adapter.parts, (expected[1], expected[2]), adapter.scale
    )
    torch.manual_seed(0)
    noisy = adapter(x)
    assert not torch.equal(noisy, quiet)
    for ours, correct in zip(torch.autograd.grad((noisy * weighting).sum(), wanted), expected, strict=True):
        assert torch.equal(ours, correct)
    with torch.no_grad():
        added = torch.stack([adapter(x) - quiet for _ in range(2000)])
    assert (added.mean(dim=0).abs() < 5 * added.std(dim=0) / 2000**0.5).all()


def test_row_norms_are_those_of_the_product() -> None:
    up, down = torch.randn(7, 3, generator=generator(1)), torch.randn(3, 9, generator=generator(2))
    torch.testing.assert_close(row_norms(up, down), (up @ down).norm(dim=1))


def test_the_norm_limit_scales_down_what_is_larger_and_leaves_the_rest() -> None:
    small = shaken(LoraLinear(linear(), RANK, 1, generator()), size=0.01)
    large = shaken(LoraLinear(linear(), RANK, 2, generator(), splits=PARTS), size=1.0)
    adapters = [cast("LoraLinear", small), cast("LoraLinear", large)]
    before = [effective_weight(a) - a.base.weight for a in adapters]
    norms = [float(change.norm()) for change in before]
    assert norms[0] < 1 < norms[1]
    report = hold_norms(adapters, 1.0)
    assert report.num_scaled == 1
    assert report.largest == pytest.approx(1.0, rel=1e-4)
    assert report.mean == pytest.approx((norms[0] + 1) / 2, rel=1e-3)
    after = [effective_weight(a) - a.base.weight for a in adapters]
    torch.testing.assert_close(after[0], before[0])
    torch.testing.assert_close(after[1], before[1] / norms[1], atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------------------------------- text encoders, base weights


def test_clip_and_t5_get_the_recorded_keys_and_rates(golden: Path) -> None:
    variant = json.loads((golden / "lora_keys_tiny.json").read_text(encoding="utf-8"))["variants"]["clip_l_and_t5xxl"]
    network = _whole_network(
        golden, ["train_t5xxl=True", "loraplus_text_encoder_lr_ratio=2", "network_reg_lrs=te3_.*wo=0.5"]
    )
    state = network.published_state_dict(None)
    shapes = {key: [list(t.shape), str(t.dtype).removeprefix("torch.")] for key, t in state.items()}
    assert shapes == variant["keys"]
    order = list(dict.fromkeys(key.split(".")[0] for key in shapes))
    assert order == list(dict.fromkeys(key.split(".")[0] for key in variant["keys"]))
    groups = [(g["name"], g["lr"], len(cast("list[Tensor]", g["params"]))) for g in network.parameter_groups(1, 2, 3)]
    assert groups == [
        ("textencoder", 2, 12),
        ("textencoder plus", 4, 12),
        ("textencoder 2 reg_lr_0", 0.5, 2),
        ("textencoder 2 reg_lr_0 plus", 1.0, 2),
        ("textencoder 2", 3, 12),
        ("textencoder 2 plus", 6, 12),
        ("unet", 1, 64),
    ]


def _whole_network(golden: Path, settings: list[str]) -> LoraNetwork:
    return LoraNetwork.attach(
        load_flux(golden / "model_dev.safetensors", torch.float32, "cpu"),
        load_clip_l(golden / "model_clip_l.safetensors", torch.float32, "cpu"),
        spec_from_network_args(settings, network_dim=4),
        generator(),
        load_t5xxl(golden / "model_t5xxl.safetensors", torch.float32, "cpu"),
    )


def test_what_trains_has_a_key_of_its_own_for_every_part(golden: Path) -> None:
    network = _whole_network(golden, ["split_qkv=1", "dora=1"])
    tensors = network.training_tensors()
    name = "lora_unet_single_blocks_1_linear1"
    shapes = {key: parameter[rows].shape for key, (parameter, rows) in tensors.items() if key.startswith(name)}
    assert shapes == {
        **{f"{name}.lora_down.{part}.weight": (4, 96) for part in range(4)},
        **{f"{name}.lora_up.{part}.weight": (384 if part == 3 else 96, 4) for part in range(4)},
        f"{name}.dora_scale": (96,),
    }
    trained = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    assert sum(parameter[rows].numel() for parameter, rows in tensors.values()) == trained
    oft = OftLinear(linear(), 3, 10.0, PARTS)
    assert list(LoraNetwork({"oft_unet_x": oft}).training_tensors()) == [f"oft_unet_x.oft_blocks.{n}" for n in range(3)]


@pytest.mark.parametrize(
    "settings", [["dora=1"], ["dora=1", "dora_axis=out"], ["split_qkv=1", "in_dims=1,2,3,4,5"], ["oft"]]
)
def test_a_merged_file_has_the_effect_of_the_dense_weights(golden: Path, settings: list[str]) -> None:
    flux = load_flux(golden / "model_dev.safetensors", torch.float32, "cpu")
    spec = LoraSpec(kind="oft", alpha=1.0, enable_all_linear=True) if settings == ["oft"] else None
    network = LoraNetwork.attach(flux, None, spec or spec_from_network_args(settings), generator())
    fill(network, 3)
    state = network.published_state_dict(None)
    merged, dense = (load_flux(golden / "model_dev.safetensors", torch.float32, "cpu") for _ in range(2))
    state["lora_unet_not_there.lora_down.weight"] = torch.zeros(1, 1)
    num_merged, unknown = merge_file({"unet": merged}, state, network.file_metadata, 0.7, "file")
    assert (num_merged, unknown) == (network.num_modules, ("lora_unet_not_there",))
    dense_weights(dense, state, 0.7)
    given = forward_inputs(golden)
    with torch.no_grad():
        network.set_multiplier(0.7)
        expected = dense(**given)
        torch.testing.assert_close(merged(**given), expected, atol=2e-5, rtol=0)
        torch.testing.assert_close(flux(**given), expected, atol=2e-5, rtol=0)
