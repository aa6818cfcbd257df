"""The safetensors header reader: what a file is, that it is whole, and the sizes in it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tests.tiny import TinyModels
from trainer.schema.base import UserError
from trainer.schema.checkpoint_header import (
    FluxParams,
    Header,
    ModelKind,
    TensorInfo,
    autoencoder_params,
    clip_params,
    describe,
    flux_params,
    identify,
    read_header,
    t5_params,
)
from trainer.schema.key_names import flux_in_diffusers
from trainer.schema.model_check import check_kind
from trainer.schema.model_kinds import COMFYUI_PREFIX
from trainer.schema.model_shapes import flux_shapes

BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F8_E4M3": 1, "F8_E5M2": 1, "U8": 1}


def write_file(
    path: Path,
    shapes: Mapping[str, Sequence[int]],
    *,
    dtype: str = "BF16",
    metadata: Mapping[str, str] | None = None,
    dtypes: Mapping[str, str] | None = None,
) -> Path:
    """A safetensors file of zeros with tensors of these shapes."""
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    offset = 0
    for name, shape in shapes.items():
        stored = (dtypes or {}).get(name, dtype)
        end = offset + math.prod(shape) * BYTES[stored]
        header[name] = {"dtype": stored, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    return write_raw(path, header, bytes(offset))


def write_raw(path: Path, header: object, data: bytes) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def shapes_of(path: Path) -> dict[str, tuple[int, ...]]:
    return {name: info.shape for name, info in read_header(path).tensors.items()}


def error_of(path: Path) -> UserError:
    with pytest.raises(UserError) as caught:
        read_header(path)
    assert caught.value.exit_code == 3
    return caught.value


def test_header_gives_types_shapes_places_and_metadata(tmp_path: Path) -> None:
    path = write_file(tmp_path / "a.safetensors", {"x": (2, 3), "y": (4,)}, metadata={"k": "v"})
    header = read_header(path)
    assert header.tensors == {"x": TensorInfo("BF16", (2, 3), 0, 12), "y": TensorInfo("BF16", (4,), 12, 20)}
    assert header.metadata == {"k": "v"}
    assert header.file_bytes == path.stat().st_size


@pytest.mark.parametrize("header_bytes", [60, 640, 0x4850])
def test_header_lengths_that_look_like_another_format_are_read(tmp_path: Path, header_bytes: int) -> None:
    # 60 is "<", 640 begins like a pickle.
    text = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode().ljust(header_bytes)
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    assert list(read_header(path).tensors) == ["x"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "empty"),
        (b"hello", "not a safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
        (b"GGUF\x03\x00\x00\x00\x00\x00\x00\x00", "GGUF"),
        (b"PK\x03\x04" + bytes(40), "pickle"),
        (b"<!DOCTYPE html><html>sign in</html>", "web page"),
        ((200_000_000).to_bytes(8, "little") + b"{" + bytes(50), "not a safetensors file"),
        ((1 << 63).to_bytes(8, "little") + b"{" + bytes(50), "not a safetensors file"),
    ],
)
def test_other_formats_are_named(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    error = error_of(path)
    assert expected in str(error)
    assert str(path) in str(error)


def test_missing_file_and_folder_are_named(tmp_path: Path) -> None:
    assert "does not exist" in str(error_of(tmp_path / "none.safetensors"))
    assert "folder" in str(error_of(tmp_path))


def test_truncated_data_says_how_much_there_is(tmp_path: Path) -> None:
    path = write_file(tmp_path / "a.safetensors", {"x": (100,)})
    whole = path.read_bytes()
    path.write_bytes(whole[:-50])
    assert f"holds {len(whole) - 50} of {len(whole)} bytes" in str(error_of(path))
    path.write_bytes(whole[:20])
    assert "not complete" in str(error_of(path))


def test_bytes_after_the_last_tensor_are_refused(tmp_path: Path) -> None:
    path = write_file(tmp_path / "a.safetensors", {"x": (100,)})
    path.write_bytes(path.read_bytes() + b"more")
    assert "4 bytes more" in str(error_of(path))


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]},
        {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]},
        {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
        [],
        None,
    ],
)
def test_contradicting_entries_are_refused(tmp_path: Path, entry: object) -> None:
    assert "damaged" in str(error_of(write_raw(tmp_path / "a.safetensors", {"x": entry}, bytes(8))))


def test_overlapping_tensors_are_refused(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    assert "damaged" in str(error_of(write_raw(tmp_path / "a.safetensors", {"x": entry, "y": entry}, bytes(4))))


def test_header_that_is_no_json_object_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes((9).to_bytes(8, "little") + b"{not json")
    assert "damaged" in str(error_of(path))
    path.write_bytes((8).to_bytes(8, "little") + b'{"x": 1}')
    assert "damaged" in str(error_of(path))


# ------------------------------------------------------------------------------------------------------ identifying


def test_tiny_files_are_what_they_are(tiny_models: TinyModels, golden: Path) -> None:
    expected: dict[Path, ModelKind] = {
        tiny_models.flux_dev: "flux",
        tiny_models.flux_schnell: "flux",
        tiny_models.ae: "autoencoder",
        tiny_models.clip_l: "clip_l",
        tiny_models.t5xxl: "t5xxl",
        golden / "model_dev.safetensors": "flux",
        golden / "model_ae.safetensors": "autoencoder",
    }
    assert {path: identify(read_header(path)) for path in expected} == expected


def test_descriptions_name_variant_type_and_size(golden: Path) -> None:
    assert describe(read_header(golden / "model_dev.safetensors")) == "FLUX.1 dev, bf16, 2.7 MB"
    assert describe(read_header(golden / "model_schnell.safetensors")) == "FLUX.1 schnell, bf16, 1.2 MB"
    assert describe(read_header(golden / "model_t5xxl.safetensors")) == "T5 text encoder, bf16, 229.4 kB"


@pytest.mark.parametrize("in_diffusers", [False, True])
@pytest.mark.parametrize(
    ("depths", "guidance", "channels", "expected"),
    [
        # Nothing in these files tells the three apart.
        ((19, 38), True, 64, "FLUX.1 dev (or Krea, Kontext), bf16"),
        ((19, 38), False, 64, "FLUX.1 schnell, bf16"),
        ((8, 38), True, 64, "FLUX.1 dev of 8 + 38 blocks, bf16"),
        ((19, 38), True, 384, "FLUX.1 Fill, bf16"),
        ((19, 38), True, 128, "FLUX.1 Canny or Depth, bf16"),
    ],
)
def test_published_sizes_are_named_for_what_they_can_be(
    depths: tuple[int, int], guidance: bool, channels: int, expected: str, in_diffusers: bool
) -> None:
    params = FluxParams(channels, 64, 768, 4096, 3072, 4.0, 24, *depths, (16, 56, 56), 10_000, True, guidance)
    tensors: dict[str, TensorInfo] = {}
    for name, shape in flux_shapes(params).items():
        names = [part.name for part in flux_in_diffusers(name)] if in_diffusers else [name]
        tensors |= {part: TensorInfo("BF16", shape, 0, 2 * math.prod(shape)) for part in names}
    header = Header(Path("model.safetensors"), tensors, {}, 23_800_000_000)
    assert describe(header) == f"{expected}, 23.8 GB"
    if channels != 64:
        with pytest.raises(UserError, match=f"this is FLUX.1 .*: it takes {channels} input channels instead of 64"):
            flux_params(header)


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (
            ["transformer_blocks.0.attn.add_k_proj.weight", "x_embedder.weight", "single_transformer_blocks.0.x"],
            "flux",
        ),
        (["double_blocks.0.img_attn.qkv.weight", "distilled_guidance_layer.in_proj.weight"], "chroma"),
        (["encoder.down_blocks.0.resnets.0.conv1.weight", "decoder.conv_in.weight"], "unknown"),
        (["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"], "lora"),
        (["transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight"], "lora"),
        (["lora_unet_double_blocks_0_img_attn_qkv.lokr_w1"], "lora"),
        (["transformer.resblocks.0.attn.in_proj_weight"], "text_encoder"),
        (["encoder.block.0.layer.0.SelfAttention.q.weight"], "text_encoder"),
        (["input_blocks.0.0.weight"], "unknown"),
        (["anything"], "unknown"),
    ],
)
def test_other_kinds_are_told_apart(tmp_path: Path, names: list[str], kind: ModelKind) -> None:
    header = read_header(write_file(tmp_path / "a.safetensors", dict.fromkeys(names, (8, 8))))
    assert identify(header) == kind
    assert describe(header)


def test_wide_clip_is_not_clip_l(tmp_path: Path) -> None:
    shapes = {
        "text_model.embeddings.token_embedding.weight": (10, 1280),
        "text_model.encoder.layers.0.self_attn.q_proj.weight": (2, 2),
    }
    header = read_header(write_file(tmp_path / "g.safetensors", shapes))
    assert identify(header) == "text_encoder"
    problem = check_kind(header, "clip_l", "clip_l")
    assert problem is not None
    assert "1280" in problem.what


def test_a_swapped_encoder_names_both_options(tiny_models: TinyModels) -> None:
    header = read_header(tiny_models.clip_l)
    assert check_kind(header, "clip_l", "clip_l") is None
    problem = check_kind(header, "t5xxl", "t5xxl")
    assert problem is not None
    assert problem.what == "this is a CLIP text encoder, given as --t5xxl"
    assert problem.where == str(tiny_models.clip_l)
    assert problem.field == "t5xxl"
    assert problem.hint is not None
    assert "--clip_l" in problem.hint


@pytest.mark.parametrize(
    ("names", "kind", "expected"),
    [
        (["double_blocks.0.img_attn.qkv.weight", "distilled_guidance_layer.x"], "flux", "this is a Chroma model"),
        (["a.lora_up.weight"], "flux", "this is a LoRA, given as --pretrained_model_name_or_path"),
    ],
)
def test_layouts_that_are_not_supported_are_refused_by_name(
    tmp_path: Path, names: list[str], kind: ModelKind, expected: str
) -> None:
    header = read_header(write_file(tmp_path / "a.safetensors", dict.fromkeys(names, (8, 8))))
    problem = check_kind(header, kind, "pretrained_model_name_or_path")
    assert problem is not None
    assert expected in problem.what
    assert problem.hint


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ("double_blocks.0.img_attn.qkv.weight_scale_2", "nvfp4"),
        ("double_blocks.0.img_attn.qkv.wscales", "SVDQuant 4-bit"),
        ("double_blocks.0.img_attn.qkv.weight.absmax", "bitsandbytes 4-bit"),
    ],
)
def test_quantised_storage_is_refused_by_name(golden: Path, tmp_path: Path, extra: str, expected: str) -> None:
    shapes = shapes_of(golden / "model_dev.safetensors") | {extra: (1,)}
    problem = check_kind(read_header(write_file(tmp_path / "a.safetensors", shapes)), "flux", "flux")
    assert problem is not None
    assert expected in problem.what


def test_both_kinds_of_plain_fp8_are_accepted_and_integers_are_not(golden: Path, tmp_path: Path) -> None:
    shapes = shapes_of(golden / "model_dev.safetensors")
    config = {"config": json.dumps({"axes_dim": [4, 10, 10]})}
    path = write_file(tmp_path / "a.safetensors", shapes, dtype="F8_E4M3", metadata=config)
    assert check_kind(read_header(path), "flux", "flux") is None
    assert describe(read_header(path)).startswith("FLUX.1 dev, fp8 e4m3, ")
    name = "img_in.weight"
    path = write_file(tmp_path / "b.safetensors", shapes, metadata=config, dtypes={name: "F8_E5M2"})
    assert check_kind(read_header(path), "flux", "flux") is None
    path = write_file(tmp_path / "c.safetensors", shapes, metadata=config, dtypes={name: "U8"})
    problem = check_kind(read_header(path), "flux", "flux")
    assert problem is not None
    assert "'img_in.weight' is stored as U8" in problem.what


# ------------------------------------------------------------------------------------------------------- dimensions


def test_sizes_equal_those_the_models_were_built_with(golden: Path) -> None:
    configs = json.loads((golden / "model_configs.json").read_text())
    for name, key in (("model_dev", "flux_dev"), ("model_schnell", "flux_schnell")):
        params = flux_params(read_header(golden / f"{name}.safetensors"))
        expected = configs[key]
        assert {field: getattr(params, field) for field in expected} == expected | {
            "axes_dim": tuple(expected["axes_dim"])
        }
        assert params.is_schnell == (name == "model_schnell")
    autoencoder = autoencoder_params(read_header(golden / "model_ae.safetensors"))
    expected = configs["ae"]
    assert {field: getattr(autoencoder, field) for field in expected} == expected | {"ch_mult": (1, 1, 2, 2)}
    clip = clip_params(read_header(golden / "model_clip_l.safetensors"))
    sizes = {field: value for field, value in configs["clip_l"].items() if not field.startswith("hidden_act")}
    assert {field: getattr(clip, field) for field in sizes} == sizes
    t5 = t5_params(read_header(golden / "model_t5xxl.safetensors"))
    fields = ("d_model", "d_ff", "d_kv", "num_heads", "num_layers", "vocab_size")
    assert {field: getattr(t5, field) for field in fields} == {field: configs["t5xxl"][field] for field in fields}
    assert (t5.num_buckets, t5.max_distance, t5.layer_norm_epsilon) == (32, 128, 1e-6)


def test_published_head_size_gives_the_published_rotation_axes(golden: Path, tmp_path: Path) -> None:
    shapes = shapes_of(golden / "model_dev.safetensors")
    for name in list(shapes):
        if name.endswith("_norm.scale"):
            shapes[name] = (128,)
        elif 96 in shapes[name]:
            shapes[name] = tuple(128 if size == 96 else size for size in shapes[name])
    params = flux_params(read_header(write_file(tmp_path / "a.safetensors", shapes)))
    assert (params.num_heads, params.axes_dim, params.theta) == (1, (16, 56, 56), 10_000)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"axes_dim": [4, 10, 12]}, "do not add up"),
        ({"axes_dim": [5, 9, 10]}, "must all be even"),
        ({"axes_dim": "4"}, "list of whole numbers"),
        ({"theta": 0}, "theta is 0"),
    ],
)
def test_impossible_metadata_is_refused(golden: Path, tmp_path: Path, config: object, expected: str) -> None:
    shapes = shapes_of(golden / "model_dev.safetensors")
    header = read_header(write_file(tmp_path / "a.safetensors", shapes, metadata={"config": json.dumps(config)}))
    with pytest.raises(UserError, match=expected):
        flux_params(header)


def test_comfyui_prefix_and_all_in_one_files_are_read(golden: Path, tmp_path: Path) -> None:
    original = golden / "model_dev.safetensors"
    shapes = {COMFYUI_PREFIX + name: shape for name, shape in shapes_of(original).items()}
    shapes["vae.decoder.conv_in.weight"] = (2, 2)
    header = read_header(write_file(tmp_path / "a.safetensors", shapes, metadata=dict(read_header(original).metadata)))
    assert identify(header) == "flux"
    assert flux_params(header) == flux_params(read_header(original))


def test_models_with_extra_input_channels_are_refused(golden: Path, tmp_path: Path) -> None:
    shapes = shapes_of(golden / "model_dev.safetensors") | {"img_in.weight": (96, 384)}
    with pytest.raises(UserError, match="384 input channels"):
        flux_params(read_header(write_file(tmp_path / "fill.safetensors", shapes)))


def test_clip_heads_that_cannot_be_told_are_asked_for(golden: Path, tmp_path: Path) -> None:
    shapes = shapes_of(golden / "model_clip_l.safetensors")
    with pytest.raises(UserError, match="num_attention_heads"):
        clip_params(read_header(write_file(tmp_path / "a.safetensors", shapes)))


def test_params_of_another_kind_name_what_the_file_is(golden: Path) -> None:
    header = read_header(golden / "model_t5xxl.safetensors")
    with pytest.raises(UserError, match="this is a T5 text encoder"):
        clip_params(header)
    with pytest.raises(UserError, match="this is a T5 text encoder"):
        flux_params(header)


def test_reader_loads_no_model_library() -> None:
    code = (
        "import sys, trainer.schema.checkpoint_header\n"
        "print([name for name in ('torch', 'safetensors', 'numpy', 'transformers') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
