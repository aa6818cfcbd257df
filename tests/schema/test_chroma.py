"""Chroma in the schema: its file's sizes, what its options imply, which files fit, what memory it needs."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from tests.tiny import TinyModels
from trainer.schema.base import UserError
from trainer.schema.checkpoint_header import read_header
from trainer.schema.chroma_header import ChromaParams, chroma_params, chroma_shapes, read_transformer
from trainer.schema.file_checks import check_files
from trainer.schema.lora_spec import LoraSpec
from trainer.schema.memory import GIB, estimate
from trainer.schema.model_check import check_kind
from trainer.schema.option_reading import Given, Reading, read_options
from trainer.schema.parameter_counts import usual_models
from trainer.schema.trained_counts import trained_sizes
from trainer.tools.tiny_models import make_chroma

PUBLISHED = ChromaParams(64, 64, 4096, 3072, 4.0, 24, 19, 38, (16, 56, 56), 10_000, True, 64, 5120, 5)


def read(**values: object) -> Reading:
    return read_options({name: Given(value, f"--{name}") for name, value in values.items()})


def write_header(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    """A safetensors file of zeros."""
    entries: dict[str, object] = {}
    offset = 0
    for name, shape in shapes.items():
        size = 2
        for side in shape:
            size *= side
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(offset))
    return path


SMALL = ChromaParams(16, 16, 24, 32, 4.0, 2, 3, 5, (4, 6, 6), 10_000, True, 16, 40, 2)


def test_sizes_come_from_the_header(tmp_path: Path) -> None:
    path = write_header(tmp_path / "chroma.safetensors", chroma_shapes(SMALL))
    assert chroma_params(read_header(path)) == SMALL
    assert check_kind(read_header(path), "chroma", "pretrained_model_name_or_path") is None


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("single_blocks.4.linear2.weight", "1 tensors are missing (single_blocks.4.linear2.weight)"),
        ("distilled_guidance_layer.norms.1.scale", "1 tensors are missing (distilled_guidance_layer.norms.1.scale)"),
        ("+vector_in.in_layer.weight", "1 tensors do not belong to it (vector_in.in_layer.weight)"),
        ("+nerf_blocks.0.norm.scale", "Chroma1-Radiance"),
    ],
)
def test_a_file_that_is_not_exactly_chroma_says_what_is_wrong(tmp_path: Path, change: str, expected: str) -> None:
    shapes = dict(chroma_shapes(SMALL))
    if change.startswith("+"):
        shapes[change[1:]] = (8, 8)
    else:
        del shapes[change]
    problem = check_kind(read_header(write_header(tmp_path / "c.safetensors", shapes)), "chroma", "model")
    assert problem is not None
    assert expected in problem.what


def test_a_wrong_model_type_names_the_right_one(tiny_models: TinyModels, tmp_path: Path) -> None:
    chroma = make_chroma(tmp_path / "chroma.safetensors")
    for path, model_type, what, hint in (
        (chroma, "flux", "this is a Chroma model", "Add --model_type=chroma."),
        (tiny_models.flux_dev, "chroma", "this is a FLUX.1 dev model", "Leave --model_type=chroma out."),
        (tiny_models.flux_schnell, "chroma", "this is a FLUX.1 schnell model", "Leave --model_type=chroma out."),
    ):
        reading = read(pretrained_model_name_or_path=str(path), model_type=model_type)
        assert not reading.problems
        (problem,) = [p for p in check_files(reading.options) if p.field == "pretrained_model_name_or_path"]
        assert (problem.what, problem.hint) == (what, hint)
        with pytest.raises(UserError, match=what):
            read_transformer(path, reading.options.model_type)


def test_a_chroma_file_as_another_option_is_no_matter_of_the_model_type(tmp_path: Path) -> None:
    problem = check_kind(read_header(make_chroma(tmp_path / "chroma.safetensors")), "t5xxl", "t5xxl")
    assert problem is not None
    assert problem.what == "this is a Chroma model, given as --t5xxl"
    assert problem.hint is not None
    assert "--pretrained_model_name_or_path" in problem.hint


def test_chroma_needs_no_clip_and_flux_does() -> None:
    for model_type, is_needed in (("flux", True), ("chroma", False)):
        options = read(model_type=model_type).options
        assert options is not None
        assert ("clip_l" in [problem.field for problem in check_files(options)]) is is_needed


def test_chroma_implies_its_mask_its_guidance_and_no_clip() -> None:
    reading = read(model_type="chroma", clip_l="clip_l.safetensors")
    options = reading.options
    assert options is not None
    assert options.clip_l is None
    assert (options.apply_t5_attn_mask, options.network_train_unet_only) == (True, True)
    assert options.guidance_scale == 0
    text = "\n".join(reading.notes)
    for note in (
        "clip_l has no effect",
        "only the transformer is trained",
        "apply_t5_attn_mask is on",
        "guidance_scale is 0, with which Chroma was made",
    ):
        assert text.count(note) == 1
    assert "FLUX.1 dev" not in text


def test_a_guidance_that_is_given_for_chroma_is_kept_and_remarked_on() -> None:
    reading = read(model_type="chroma", guidance_scale=3.5)
    assert not reading.problems
    assert reading.options.guidance_scale == 3.5
    assert "guidance_scale is 3.5; Chroma was made with 0" in reading.notes


def test_the_memory_estimate_counts_chroma_without_modulation_and_clip() -> None:
    options = read(
        model_type="chroma",
        mixed_precision="bf16",
        gradient_checkpointing=True,
        cache_latents=True,
        cache_text_encoder_outputs=True,
        network_dim=16,
    ).options
    assert options is not None
    result = estimate(PUBLISHED, options, width=1024, height=1024, batch_size=1)
    training = next(phase for phase in result.phases if phase.name == "training")
    parts = {part.name: part.bytes for part in training.parts}
    assert parts["Chroma weights"] == 2 * 8_899_983_424
    assert not any("CLIP" in part.name for phase in result.phases for part in phase.parts)
    assert 18 * GIB < result.peak_bytes < 22 * GIB
    swapped = estimate(PUBLISHED, options, width=1024, height=1024, batch_size=1, blocks_to_swap=38)
    assert swapped.peak_bytes < 11 * GIB


def test_lora_sizes_are_those_of_the_228_linears_without_modulation() -> None:
    sizes = list(trained_sizes(PUBLISHED, LoraSpec(rank=16), usual_models(PUBLISHED).clip))
    assert len(sizes) == 2 * (19 * 8 + 38 * 2) == 2 * 228
    c, m = 3072, 12288
    double = 2 * (c + 3 * c + 2 * c + (c + m) * 2)
    assert sum(sizes) == 16 * (19 * double + 38 * (c + 3 * c + m + c + m + c))
