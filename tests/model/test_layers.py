"""The layers, each against a plain formulation of the same arithmetic."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.model.attention import NORM_EPS, QKNorm, attention, rotation_table, split_norm_rotate
from trainer.model.frozen_linear import FrozenLinear
from trainer.model.layers import modulated_norm, timestep_embedding

AXES = (4, 10, 10)
HEADS, HEAD_DIM = 3, 24
DIM = HEADS * HEAD_DIM


# --------------------------------------------------------------------------------------------------- frozen linear


def frozen_pair(dtype: torch.dtype = torch.float32, bias: bool = True) -> tuple[FrozenLinear, nn.Linear]:
    """A FrozenLinear and a plain frozen Linear with the same weights."""
    torch.manual_seed(0)
    frozen = FrozenLinear(24, 40, bias=bias).to(dtype).requires_grad_(False)
    plain = nn.Linear(24, 40, bias=bias).to(dtype).requires_grad_(False)
    plain.load_state_dict(frozen.state_dict())
    return frozen, plain


def output_and_gradient(layer: nn.Module, x: Tensor, autocast: torch.dtype | None) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        output = layer(x)
    output.square().mean().backward()
    assert x.grad is not None
    return output.detach(), x.grad


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 24), (2, 7, 24)])
@pytest.mark.parametrize(
    ("weight_dtype", "input_dtype", "autocast"),
    [
        (torch.float32, torch.float32, None),
        (torch.bfloat16, torch.bfloat16, None),
        (torch.float32, torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32, torch.float16),
    ],
)
def test_frozen_linear_equals_linear_bit_for_bit(
    weight_dtype: torch.dtype,
    input_dtype: torch.dtype,
    autocast: torch.dtype | None,
    shape: tuple[int, ...],
    bias: bool,
) -> None:
    frozen, plain = frozen_pair(weight_dtype, bias)
    x = torch.randn(shape, dtype=input_dtype)
    ours, ours_grad = output_and_gradient(frozen, x, autocast)
    theirs, theirs_grad = output_and_gradient(plain, x, autocast)
    assert ours.dtype == theirs.dtype
    assert ours_grad.dtype == theirs_grad.dtype
    assert torch.equal(ours, theirs)
    assert torch.equal(ours_grad, theirs_grad)


def test_backward_inside_an_autocast_region_keeps_the_type_of_forward() -> None:
    frozen, _ = frozen_pair()
    x = torch.randn(2, 7, 24, requires_grad=True)
    weights = torch.randn(2, 7, 40)
    output = frozen(x)
    with torch.autocast("cpu", torch.bfloat16):
        (gradient,) = torch.autograd.grad(output, x, weights)
    assert torch.equal(gradient, (weights.view(14, 40) @ frozen.weight).view_as(x))


def test_backward_reads_the_weight_that_is_in_place_then() -> None:
    frozen, plain = frozen_pair()
    x = torch.randn(5, 24, requires_grad=True)
    output = frozen(x)
    kept = frozen.weight.data
    frozen.weight.data = torch.empty(0)  # evicted after forward
    frozen.weight.data = kept.clone()  # fetched to another place before backward
    kept.fill_(float("nan"))
    output.sum().backward()
    assert x.grad is not None
    expected = torch.ones(5, 40) @ plain.weight
    assert torch.equal(x.grad, expected)


def test_autograd_keeps_no_weight_of_a_frozen_linear() -> None:
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    frozen, _ = frozen_pair()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        frozen(torch.randn(5, 24, requires_grad=True))
    assert saved == []


def test_a_weight_that_trains_gets_its_gradient() -> None:
    layer = FrozenLinear(24, 40)
    layer(torch.randn(5, 24)).sum().backward()
    assert layer.weight.grad is not None
    assert layer.bias.grad is not None


# ---------------------------------------------------------------------------------------------------------- the rest


def test_timestep_embedding_is_cosines_then_sines_of_the_thousandfold_time() -> None:
    t = torch.tensor([0.0, 0.25, 1.0])
    embedding = timestep_embedding(t, 256)
    frequencies = 10_000.0 ** -(torch.arange(128).double() / 128)
    angles = 1000 * t.double()[:, None] * frequencies
    expected = torch.cat((angles.cos(), angles.sin()), dim=1)
    assert embedding.dtype == torch.float32
    torch.testing.assert_close(embedding.double(), expected, atol=1e-4, rtol=0)


def test_rotation_angles_are_exact_at_far_positions() -> None:
    ids = torch.zeros(1, 2, 3)
    ids[0, 1] = torch.tensor([0.0, 16_777_215.0, 3.0])
    table = rotation_table(ids, AXES, 10_000)
    assert table.dtype == torch.complex64
    assert table.shape == (1, 2, 12)
    assert torch.equal(table[0, 0], torch.ones(12, dtype=torch.complex64))
    frequency = 10_000.0 ** -(torch.arange(0, 10, 2).double() / 10)
    for axis, columns in ((1, slice(2, 7)), (2, slice(7, 12))):
        angle = ids[0, 1, axis].double() * frequency
        torch.testing.assert_close(table[0, 1, columns].real.double(), angle.cos(), atol=1e-7, rtol=0)
        torch.testing.assert_close(table[0, 1, columns].imag.double(), angle.sin(), atol=1e-7, rtol=0)


@pytest.mark.parametrize("batch", [1, 3])
def test_modulated_norm_and_its_gradients_equal_the_plain_formula(batch: int) -> None:
    torch.manual_seed(1)
    x = torch.randn(batch, 5, DIM, dtype=torch.float64, requires_grad=True)
    shift, scale = (torch.randn(batch, DIM, dtype=torch.float64, requires_grad=True) for _ in range(2))
    ours = modulated_norm(x, shift, scale)
    plain = (1 + scale[:, None]) * F.layer_norm(x, (DIM,), eps=NORM_EPS) + shift[:, None]
    torch.testing.assert_close(ours, plain, atol=1e-12, rtol=0)
    weights = torch.randn_like(ours)
    for ours_grad, plain_grad in zip(
        torch.autograd.grad((ours * weights).sum(), (x, shift, scale)),
        torch.autograd.grad((plain * weights).sum(), (x, shift, scale)),
        strict=True,
    ):
        torch.testing.assert_close(ours_grad, plain_grad, atol=1e-11, rtol=0)


def test_modulated_norm_keeps_the_type_under_autocast() -> None:
    x, shift, scale = torch.randn(2, 5, DIM).bfloat16(), torch.randn(2, DIM).bfloat16(), torch.randn(2, DIM).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert modulated_norm(x, shift, scale).dtype == torch.bfloat16


def plain_split_norm_rotate(
    streams: tuple[Tensor, ...], norms: tuple[QKNorm, ...], pe: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same in single steps, with real rotation matrices."""
    queries: list[Tensor] = []
    keys: list[Tensor] = []
    values: list[Tensor] = []
    for stream, norm in zip(streams, norms, strict=True):
        query, key, value = stream[..., : 3 * DIM].unflatten(-1, (3, HEADS, HEAD_DIM)).unbind(2)
        queries.append(norm.query_norm(query))
        keys.append(norm.key_norm(key))
        values.append(value)

    def rotate(x: Tensor) -> Tensor:
        first, second = x[..., 0::2], x[..., 1::2]
        cos, sin = pe.real[:, :, None].to(x.dtype), pe.imag[:, :, None].to(x.dtype)
        return torch.stack((cos * first - sin * second, sin * first + cos * second), dim=-1).flatten(-2)

    rest = streams[0][..., 3 * DIM :]
    return rotate(torch.cat(queries, 1)), rotate(torch.cat(keys, 1)), torch.cat(values, 1), rest


def example_streams(num_streams: int, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], tuple[QKNorm, ...], Tensor]:
    torch.manual_seed(2)
    rest = 16 if num_streams == 1 else 0
    streams = tuple(
        torch.randn(2, 4 + index, 3 * DIM + rest, dtype=dtype, requires_grad=True) for index in range(num_streams)
    )
    norms = tuple(QKNorm(HEAD_DIM).to(dtype) for _ in range(num_streams))
    for norm in norms:
        for parameter in norm.parameters():
            parameter.data.uniform_(0.5, 1.5)
    length = sum(stream.shape[1] for stream in streams)
    pe = rotation_table(torch.randint(0, 40, (1, length, 3)), AXES, 10_000)
    return streams, norms, pe


@pytest.mark.parametrize("num_streams", [1, 2])
def test_split_norm_rotate_and_its_gradients_equal_single_steps(num_streams: int) -> None:
    streams, norms, pe = example_streams(num_streams, torch.float64)
    scales = [parameter for norm in norms for parameter in norm.parameters()]
    ours = split_norm_rotate(streams, norms, HEADS, pe)
    plain = plain_split_norm_rotate(streams, norms, pe)
    weights = [torch.randn_like(part) for part in plain]
    for ours_part, plain_part in zip(ours, plain, strict=True):
        torch.testing.assert_close(ours_part, plain_part, atol=1e-12, rtol=0)
    inputs = [*streams, *scales]
    ours_grads = torch.autograd.grad(ours, inputs, weights)
    plain_grads = torch.autograd.grad(plain, inputs, weights)
    for ours_grad, plain_grad in zip(ours_grads, plain_grads, strict=True):
        torch.testing.assert_close(ours_grad, plain_grad, atol=1e-11, rtol=0)


@pytest.mark.parametrize("num_streams", [1, 2])
def test_split_norm_rotate_in_bf16_is_one_rounding_from_exact(num_streams: int) -> None:
    streams, norms, pe = example_streams(num_streams, torch.bfloat16)
    exact_norms = tuple(QKNorm(HEAD_DIM).double() for _ in norms)
    for exact, norm in zip(exact_norms, norms, strict=True):
        exact.load_state_dict(norm.state_dict())
    query, key, value, _ = split_norm_rotate(streams, norms, HEADS, pe)
    exact = plain_split_norm_rotate(tuple(stream.double() for stream in streams), exact_norms, pe)
    assert query.dtype == key.dtype == value.dtype == torch.bfloat16
    torch.testing.assert_close(query.double(), exact[0], atol=1e-6, rtol=2**-8)
    torch.testing.assert_close(key.double(), exact[1], atol=1e-6, rtol=2**-8)
    torch.testing.assert_close(value.double(), exact[2], atol=0, rtol=0)


def test_masked_keys_are_as_good_as_absent() -> None:
    torch.manual_seed(3)
    query, key, value = (torch.randn(2, 6, HEADS, HEAD_DIM) for _ in range(3))
    mask = torch.tensor([True, True, False, False, True, True]).expand(2, 1, 1, 6)
    masked = attention(query, key, value, mask)
    kept = [0, 1, 4, 5]
    without = attention(query, key[:, kept], value[:, kept], None)
    torch.testing.assert_close(masked, without, atol=1e-6, rtol=0)
