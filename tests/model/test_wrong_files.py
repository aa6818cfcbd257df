"""Wrong and damaged model files: each is named for what it is, quickly, with exit code 3, before anything is loaded."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.tiny import TinyModels, make_tiny_dataset
from trainer.__main__ import main
from trainer.train import check as check  # loads torch, which is not what is timed

LIMIT_SECONDS = 5.0
FLUX, CLIP, T5, AE = "pretrained_model_name_or_path", "clip_l", "t5xxl", "ae"
LORA = "network_weights"


@dataclass(frozen=True)
class Place:
    """Where a case makes its files, and the right files to spoil."""

    folder: Path
    models: TinyModels

    @property
    def file(self) -> Path:
        return self.folder / "model.safetensors"

    def wrote(self, data: bytes) -> Path:
        self.file.write_bytes(data)
        return self.file

    def saved(self, tensors: Mapping[str, Tensor]) -> Path:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, self.file)
        return self.file

    def zeros(self, **shapes: Sequence[int]) -> Path:
        return self.saved({name.replace("__", "."): torch.zeros(*shape) for name, shape in shapes.items()})

    def changed_flux(self, change: Callable[[dict[str, Tensor]], object]) -> Path:
        tensors = load_file(self.models.flux_schnell)
        change(tensors)
        return self.saved(tensors)

    def headed(self, header: object, data: bytes = b"") -> Path:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return self.wrote(struct.pack("<Q", len(text)) + text + data)


def entry(start: int, end: int) -> dict[str, object]:
    return {"dtype": "F32", "shape": [(end - start) // 4], "data_offsets": [start, end]}


def truncated(place: Place) -> Path:
    return place.wrote(place.models.flux_dev.read_bytes()[:-1000])


def truncated_in_its_header(place: Place) -> Path:
    return place.wrote(place.models.flux_dev.read_bytes()[:300])


def longer_than_its_header_says(place: Place) -> Path:
    return place.wrote(place.models.flux_dev.read_bytes() + b"tail")


def never_downloaded(place: Place) -> Path:
    return place.wrote(bytes(5000))


def scaled_without_scale(place: Place) -> Path:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["scaled_fp8"] = torch.empty(0, dtype=torch.float8_e4m3fn)
        for name, tensor in list(tensors.items()):
            if name.startswith("double_blocks") and tensor.dim() == 2:
                tensors[name] = tensor.to(torch.float8_e4m3fn)
                tensors[name.replace(".weight", ".scale_weight")] = torch.tensor(1.0)
        del tensors["double_blocks.1.txt_mlp.2.scale_weight"]

    return place.changed_flux(change)


def block_scales(place: Place) -> Path:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["img_in.weight"] = tensors["img_in.weight"].to(torch.float8_e4m3fn)
        tensors["img_in.weight_scale"] = torch.ones(64, 2, 1)

    return place.changed_flux(change)


def nvfp4(place: Place) -> Path:
    text = json.dumps({"format": "nvfp4"}).encode()

    def change(tensors: dict[str, Tensor]) -> None:
        tensors["single_blocks.0.linear1.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)

    return place.changed_flux(change)


def integers(place: Place) -> Path:
    return place.changed_flux(
        lambda tensors: tensors.update({"txt_in.weight": tensors["txt_in.weight"].to(torch.int8)})
    )


def missing_block(place: Place) -> Path:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("single_blocks.2.")]:
            del tensors[name]

    return place.changed_flux(change)


def wrong_shape(place: Place) -> Path:
    return place.changed_flux(lambda tensors: tensors.update({"double_blocks.1.img_mod.lin.bias": torch.zeros(7)}))


def foreign_tensor(place: Place) -> Path:
    return place.changed_flux(lambda tensors: tensors.update({"double_blocks.1.extra.weight": torch.zeros(7)}))


def control(num_channels: int) -> Callable[[Place], Path]:
    def make(place: Place) -> Path:
        return place.changed_flux(lambda tensors: tensors.update({"img_in.weight": torch.zeros(64, num_channels)}))

    return make


def chroma_of_unknown_make(place: Place) -> Path:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("vector_in.")]:
            del tensors[name]

    return place.changed_flux(change)


def sharded(place: Place, *, names: Sequence[str] = ("a.safetensors", "b.safetensors")) -> Path:
    """A model in two shards with an index; returns the folder."""
    tensors = load_file(place.models.flux_schnell)
    keys = sorted(tensors)
    half = len(keys) // 2
    parts = dict(zip(names, (keys[:half], keys[half:]), strict=True))
    for file, part in parts.items():
        save_file({key: tensors[key] for key in part}, place.folder / file)
    weight_map = {key: file for file, part in parts.items() for key in part}
    index = place.folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    return place.folder


def shard_missing(place: Place) -> Path:
    folder = sharded(place)
    (folder / "b.safetensors").unlink()
    return folder


def shard_of_a_set_missing(place: Place) -> Path:
    folder = sharded(place, names=("m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"))
    (folder / "m-00001-of-00002.safetensors").unlink()
    return folder / "m-00002-of-00002.safetensors"


def index_of_another_version(place: Place) -> Path:
    folder = sharded(place)
    path = folder / "diffusion_pytorch_model.safetensors.index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    index["weight_map"]["guidance_in.in_layer.weight"] = "b.safetensors"
    path.write_text(json.dumps(index), encoding="utf-8")
    return folder


def index_leads_outside(place: Place) -> Path:
    path = place.folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}), encoding="utf-8")
    return path


def index_without_map(place: Place) -> Path:
    path = place.folder / "model.safetensors.index.json"
    path.write_text('{"metadata": {"total_size": 1}}', encoding="utf-8")
    return path


def index_damaged(place: Place) -> Path:
    path = place.folder / "model.safetensors.index.json"
    path.write_text('{"weight_map": {"a": ', encoding="utf-8")
    return path


def tensor_in_two_shards(place: Place) -> Path:
    folder = sharded(place)
    tensors = load_file(folder / "a.safetensors") | load_file(folder / "b.safetensors")
    save_file(tensors, folder / "b.safetensors")
    return folder


def empty_folder(place: Place) -> Path:
    (place.folder / "empty").mkdir()
    return place.folder / "empty"


def folder_of_pictures(place: Place) -> Path:
    (place.folder / "photo.png").write_bytes(b"\x89PNG")
    return place.folder


def folder_of_pickles(place: Place) -> Path:
    (place.folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    return place.folder


def folder_of_another_pipeline(place: Place) -> Path:
    (place.folder / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}', encoding="utf-8")
    (place.folder / "unet").mkdir()
    return place.folder


def folder_of_two_models(place: Place) -> Path:
    for name in ("one.safetensors", "two.safetensors"):
        (place.folder / name).write_bytes(place.models.flux_dev.read_bytes())
    return place.folder


def stable_diffusion_3_autoencoder(place: Place) -> Path:
    save_file(load_file(place.models.ae), place.folder / "diffusion_pytorch_model.safetensors")
    (place.folder / "config.json").write_text('{"scaling_factor": 1.5305, "shift_factor": 0.0609}', encoding="utf-8")
    return place.folder


def umt5(place: Place) -> Path:
    tensors = load_file(place.models.t5xxl)
    bias = "layer.0.SelfAttention.relative_attention_bias.weight"
    tensors[f"encoder.block.1.{bias}"] = tensors[f"encoder.block.0.{bias}"].clone()
    return place.saved(tensors)


def t5_without_its_last_norm(place: Place) -> Path:
    tensors = load_file(place.models.t5xxl)
    del tensors["encoder.final_layer_norm.weight"]
    return place.saved(tensors)


def older_autoencoder(place: Place) -> Path:
    return place.saved(load_file(place.models.ae) | {"quant_conv.weight": torch.zeros(8, 8, 1, 1)})


CASES: list[tuple[str, Callable[[Place], Path], str]] = [
    # Not whole, or not safetensors.
    (FLUX, lambda p: p.folder / "nowhere.safetensors", "this file does not exist"),
    (FLUX, lambda p: p.wrote(b""), "this file is empty"),
    (FLUX, never_downloaded, "zero bytes: its download never finished"),
    (FLUX, truncated, "this file is not complete: it holds "),
    (FLUX, truncated_in_its_header, "only 300 bytes, part of its header"),
    (FLUX, longer_than_its_header_says, "4 bytes more than its header lists"),
    (FLUX, lambda p: p.wrote(struct.pack("<Q", 1 << 60) + b"{" + bytes(99)), "its header would be 1152921504606846976"),
    (FLUX, lambda p: p.headed(b'{"x": nonsense}'), "it is not JSON"),
    (FLUX, lambda p: p.headed(b"{}"), "a file without any tensor"),
    (FLUX, lambda p: p.headed({"x": entry(0, 8), "y": entry(4, 12)}, bytes(12)), "'y' and 'x' overlap"),
    (FLUX, lambda p: p.headed({"x": entry(0, 8), "y": entry(12, 20)}, bytes(20)), "there is a gap before 'y'"),
    (FLUX, lambda p: p.headed({"x": entry(0, 8) | {"shape": [3]}}, bytes(8)), "the tensor 'x' is damaged"),
    (FLUX, lambda p: p.wrote(b"<!DOCTYPE html><html>Sign in</html>"), "this is a web page"),
    (FLUX, lambda p: p.wrote(b"version https://git-lfs.github.com/spec/v1\noid sha256:0"), "a Git LFS pointer"),
    (FLUX, lambda p: p.wrote(b"PK\x03\x04" + bytes(99)), "PyTorch pickle file"),
    (FLUX, lambda p: p.wrote(b"GGUF\x03" + bytes(99)), "this is a GGUF file"),
    (FLUX, lambda p: p.wrote(b'{"_class_name": "FluxTransformer2DModel"}'), "this is a JSON text"),
    (FLUX, lambda p: p.wrote(b"some words about the model"), "this is not a safetensors file"),
    # Shards and folders.
    (FLUX, shard_missing, "1 of the model's 2 shards are missing (b.safetensors)"),
    (FLUX, shard_of_a_set_missing, "shards are missing (m-00001-of-00002.safetensors)"),
    (FLUX, index_of_another_version, "that the index lists are not in the shards ('guidance_in.in_layer.weight')"),
    (FLUX, index_leads_outside, "a file outside its folder ('../other.safetensors')"),
    (FLUX, index_without_map, "it holds no weight_map"),
    (FLUX, index_damaged, "this JSON file cannot be read"),
    (FLUX, tensor_in_two_shards, "is in two shards (a.safetensors and b.safetensors)"),
    (FLUX, empty_folder, "this folder is empty"),
    (FLUX, folder_of_pictures, "this folder holds no .safetensors file (but 'photo.png')"),
    (FLUX, folder_of_pickles, "pickle files (.bin) only"),
    (FLUX, folder_of_another_pipeline, "a diffusers folder of another model (StableDiffusionXLPipeline)"),
    (FLUX, folder_of_two_models, "2 .safetensors files, and 2 of them are what is needed"),
    # Another model, or another option's.
    (FLUX, lambda p: p.zeros(lora_unet_x__lora_down__weight=(4, 8)), "this is a LoRA, given as"),
    (T5, lambda p: p.models.clip_l, "this is a CLIP text encoder, given as --t5xxl"),
    (CLIP, lambda p: p.models.t5xxl, "this is a T5 text encoder, given as --clip_l"),
    (FLUX, lambda p: p.models.ae, "this is a FLUX.1 autoencoder, given as --pretrained"),
    (AE, lambda p: p.models.flux_dev, "this is a FLUX.1 dev model, given as --ae"),
    (T5, umt5, "a UMT5 text encoder"),
    (AE, older_autoencoder, "the autoencoder of another model"),
    (AE, stable_diffusion_3_autoencoder, "the autoencoder of Stable Diffusion 3"),
    (FLUX, lambda p: p.zeros(model__diffusion_model__label_emb__0__0__weight=(4, 8)), "an SDXL model"),
    (
        FLUX,
        lambda p: p.zeros(
            model__diffusion_model__input_blocks__0__0__weight=(4, 8),
            cond_stage_model__transformer__text_model__final_layer_norm__weight=(4,),
        ),
        "a Stable Diffusion 1 model",
    ),
    (FLUX, lambda p: p.zeros(joint_blocks__0__context_block__attn__qkv__weight=(4, 8)), "a Stable Diffusion 3 model"),
    (FLUX, lambda p: p.zeros(double_stream_modulation_img__lin__weight=(4, 8)), "a FLUX.2 model"),
    (FLUX, control(384), "this is FLUX.1 Fill: it takes 384 input channels"),
    (FLUX, control(128), "this is FLUX.1 Canny or Depth: it takes 128 input channels"),
    (FLUX, lambda p: p.zeros(redux_up__weight=(4, 8), redux_down__weight=(8, 4)), "the FLUX.1 Redux adapter"),
    (FLUX, chroma_of_unknown_make, "a FLUX-like model that is not FLUX.1"),
    (FLUX, lambda p: p.zeros(anything=(4, 8)), "unknown content (its first tensor is 'anything')"),
    (LORA, lambda p: p.models.flux_dev, "this is a FLUX.1 dev model, given as --network_weights"),
    (LORA, lambda p: p.folder, "this is a folder, not a model file"),
    # The right model, not as it should be.
    (FLUX, missing_block, "tensors are missing (single_blocks.2."),
    (FLUX, wrong_shape, "double_blocks.1.img_mod.lin.bias [7] instead of [384]"),
    (FLUX, foreign_tensor, "1 tensors do not belong to it (double_blocks.1.extra.weight)"),
    (T5, t5_without_its_last_norm, "1 tensors are missing (encoder.final_layer_norm.weight)"),
    (FLUX, scaled_without_scale, "1 of its layers have no scale ('double_blocks.1.txt_mlp.2.weight')"),
    (FLUX, block_scales, "one number, or one for each row, was expected"),
    (FLUX, nvfp4, "'single_blocks.0.linear1' is stored as nvfp4"),
    (FLUX, integers, "'txt_in.weight' is stored as I8"),
]


@pytest.mark.parametrize(("option", "make", "message"), CASES, ids=[message[:40] for _, _, message in CASES])
def test_a_wrong_model_file_is_named_with_exit_code_3(
    tiny_models: TinyModels,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    option: str,
    make: Callable[[Place], Path],
    message: str,
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "made").mkdir()
    given = make(Place(tmp_path / "made", tiny_models))
    arguments = dict(argument.removeprefix("--").split("=", 1) for argument in tiny_models.arguments(schnell=True))
    arguments |= {
        option: str(given),
        "dataset_config": str(make_tiny_dataset(tmp_path / "data", count=1)),
        "output_dir": str(tmp_path / "output"),
        "network_module": "networks.lora_flux",
    }
    started = time.process_time()
    code = main(["check", *(f"--{name}={value}" for name, value in arguments.items())])
    assert time.process_time() - started < LIMIT_SECONDS
    printed = capsys.readouterr().err
    assert code == 3, printed
    assert message in printed
    errors = printed[printed.index("error") :].splitlines()
    assert len(errors) == 1, "one message, not several"
    printed = errors[0]
    assert str(given) in printed or given.name in printed, "it says which file"
    assert "Traceback" not in printed


def test_no_two_wrong_files_get_the_same_message() -> None:
    messages = [message for _, _, message in CASES]
    assert len(messages) >= 30
    for message in messages:
        assert sum(message in other for other in messages) == 1
