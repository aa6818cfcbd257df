"""The transformers against diffusers, live, on 20 freshly drawn configurations with and without text mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.diffusers_flux import chroma_in_diffusers, in_diffusers
from trainer.model.chroma import Chroma
from trainer.model.flux import Flux
from trainer.model.packing import image_ids, text_ids
from trainer.schema.checkpoint_header import FluxParams
from trainer.schema.chroma_header import ChromaParams

SEED, NUM_SHAPES = 20_261_124, 20
TOLERANCE = 5e-6


@dataclass(frozen=True)
class Shape:
    """One drawn configuration; `lengths` are the real text tokens of each sample."""

    variant: str
    head_dims: tuple[int, int, int]
    num_heads: int
    depth: int
    depth_single: int
    context: int
    pooled: int
    in_channels: int
    approximator: tuple[int, int, int]
    rows: int
    columns: int
    num_text: int
    lengths: tuple[int, ...]
    seed: int


def drawn_shapes() -> list[Shape]:
    generator = torch.Generator().manual_seed(SEED)

    def pick(low: int, high: int, step: int = 1) -> int:
        return low + step * int(torch.randint((high - low) // step + 1, (1,), generator=generator))

    shapes: list[Shape] = []
    for index in range(NUM_SHAPES):
        num_text = pick(3, 24)
        shapes.append(
            Shape(
                variant=("dev", "schnell", "chroma")[index % 3],
                head_dims=(pick(2, 8, 2), pick(4, 12, 2), pick(4, 12, 2)),
                num_heads=pick(1, 6),
                depth=pick(1, 4),
                depth_single=pick(1, 6),
                context=pick(8, 96, 8),
                pooled=pick(4, 64, 4),
                in_channels=pick(16, 64, 16),
                approximator=(pick(16, 64, 16), pick(16, 96, 16), pick(1, 5)),
                rows=pick(1, 9),
                columns=pick(1, 9),
                num_text=num_text,
                lengths=tuple(pick(1, num_text) for _ in range(pick(1, 3))),
                seed=pick(0, 10**6),
            )
        )
    return shapes


def build(shape: Shape) -> Flux | Chroma:
    dim = sum(shape.head_dims) * shape.num_heads
    common: dict[str, Any] = {
        "in_channels": shape.in_channels,
        "out_channels": shape.in_channels,
        "context_in_dim": shape.context,
        "hidden_size": dim,
        "mlp_ratio": 4.0,
        "num_heads": shape.num_heads,
        "depth": shape.depth,
        "depth_single_blocks": shape.depth_single,
        "axes_dim": shape.head_dims,
        "theta": 10_000,
        "qkv_bias": True,
    }
    if shape.variant == "chroma":
        size, hidden, depth = shape.approximator
        model = Chroma(
            ChromaParams(**common, approximator_in_dim=size, approximator_hidden_size=hidden, approximator_depth=depth)
        )
    else:
        model = Flux(FluxParams(**common, vec_in_dim=shape.pooled, guidance_embed=shape.variant == "dev"))
    generator = torch.Generator().manual_seed(shape.seed)
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        if name.endswith("scale"):
            drawn = 1 + 0.2 * drawn
        elif parameter.dim() == 2:
            # Modulation of about the size that trained models have; with more, rounding grows from block to block.
            is_modulation = "mod" in name or "adaLN" in name or name.endswith("guidance_layer.out_proj.weight")
            drawn = drawn * (0.3 if is_modulation else 1.0) * parameter.shape[1] ** -0.5
        else:
            drawn = 0.1 * drawn
        parameter.data.copy_(drawn)
    return model.eval().requires_grad_(False)


def example(shape: Shape) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(shape.seed + 1)
    batch = len(shape.lengths)
    return {
        "img": torch.randn(batch, shape.rows * shape.columns, shape.in_channels, generator=generator),
        "txt": torch.randn(batch, shape.num_text, shape.context, generator=generator),
        "y": torch.randn(batch, shape.pooled, generator=generator),
        "timesteps": torch.rand(batch, generator=generator),
        "guidance": 1 + 3 * torch.rand(batch, generator=generator),
    }


def ours(model: Flux | Chroma, shape: Shape, given: dict[str, Tensor], mask: Tensor | None) -> Tensor:
    ids = {"img_ids": image_ids(shape.rows, shape.columns), "txt_ids": text_ids(shape.num_text)}
    if isinstance(model, Chroma):
        # diffusers knows no other guidance than 0.
        rest = {name: given[name] for name in ("img", "txt", "timesteps")}
        return model(**rest, **ids, guidance=torch.zeros_like(given["guidance"]), txt_attention_mask=mask)
    return model(**given, **ids, txt_attention_mask=mask)


def theirs(model: Flux | Chroma, shape: Shape, given: dict[str, Tensor], lengths: tuple[int, ...] | None) -> Tensor:
    """`lengths` are the visible tokens of each sample. For FLUX.1, diffusers has no text mask: padding is cut off."""
    ids = image_ids(shape.rows, shape.columns)[0]
    if isinstance(model, Chroma):
        mask = None
        if lengths is not None:
            mask = torch.cat((visible(shape, lengths), torch.ones(given["img"].shape[:2], dtype=torch.bool)), dim=1)
        return call(
            chroma_in_diffusers(model),
            given,
            img_ids=ids,
            txt_ids=text_ids(shape.num_text)[0],
            attention_mask=mask,
        )
    other = in_diffusers(model)
    kept = lengths or (shape.num_text,) * len(shape.lengths)
    outputs: list[Tensor] = []
    for row, length in enumerate(kept):
        one = {name: tensor[row : row + 1] for name, tensor in given.items()}
        one["txt"] = one["txt"][:, :length]
        outputs.append(
            call(
                other,
                one,
                img_ids=ids,
                txt_ids=text_ids(length)[0],
                pooled_projections=one["y"],
                guidance=one["guidance"] if model.params.guidance_embed else None,
            )
        )
    return torch.cat(outputs)


def call(other: nn.Module, given: dict[str, Tensor], **more: Tensor | None) -> Tensor:
    return other(
        hidden_states=given["img"],
        encoder_hidden_states=given["txt"],
        timestep=given["timesteps"],
        return_dict=False,
        **more,
    )[0]


def visible(shape: Shape, lengths: tuple[int, ...]) -> Tensor:
    return torch.arange(shape.num_text)[None] < torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("is_masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("shape", drawn_shapes(), ids=lambda shape: f"{shape.variant}-{shape.seed}")
def test_forward_of_a_freshly_drawn_model_equals_diffusers(shape: Shape, is_masked: bool) -> None:
    model = build(shape)
    given = example(shape)
    # Outputs of unit spread, so that the tolerance means the same for every shape.
    spread = ours(model, shape, given, None).std()
    model.final_layer.linear.weight.data /= spread
    model.final_layer.linear.bias.data /= spread
    lengths = shape.lengths if is_masked else None
    mask = None if lengths is None else visible(shape, lengths).long()
    found = ours(model, shape, given, mask)
    torch.testing.assert_close(found, theirs(model, shape, given, lengths), atol=TOLERANCE, rtol=0)
    if is_masked and min(shape.lengths) < shape.num_text:
        assert (found - ours(model, shape, given, None)).abs().max() > 100 * TOLERANCE


def test_the_drawn_shapes_cover_every_variant_and_more_than_one_sample() -> None:
    shapes = drawn_shapes()
    assert len(shapes) == NUM_SHAPES
    assert [sum(shape.variant == name for shape in shapes) for name in ("dev", "schnell", "chroma")] == [7, 7, 6]
    assert {len(shape.lengths) for shape in shapes} == {1, 2, 3}
    assert sum(min(shape.lengths) < shape.num_text for shape in shapes) >= NUM_SHAPES - 2
