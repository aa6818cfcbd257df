"""A masked-loss project with regularisation and preserved pictures, trained as a command would, in this process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from tests.data.specs import picture
from tests.tiny import TinyModels
from trainer.schema.cli import parse_command_line
from trainer.train.recipe import train
from trainer.train.reporting import Reporter

DATASET = """
[general]
enable_bucket = true
caption_extension = ".txt"
bucket_reso_steps = 16
min_bucket_reso = 32

[[datasets]]
resolution = 64
batch_size = 2

  [[datasets.subsets]]
  image_dir = "{0}/images"
  conditioning_data_dir = "{0}/masks"
  num_repeats = 2
  flip_aug = true

  [[datasets.subsets]]
  image_dir = "{0}/reg"
  is_reg = true
  class_tokens = "cat"
  custom_attributes = {{diff_output_preservation = {1}}}
"""


def project(folder: Path, *, preserves: str = "true", shown: int = 32) -> Path:
    """Two pictures with masks that show their left part, and two of the class."""
    for number in range(2):
        picture(folder / "images" / f"{number}.png", 64, 64, seed=number, caption="my cat")
        picture(folder / "reg" / f"{number}.png", 64, 64, seed=5 + number)
        mask = Image.new("L", (64, 64))
        mask.paste(255, (0, 0, shown, 64))
        (folder / "masks").mkdir(exist_ok=True)
        mask.save(folder / "masks" / f"{number}.png")
    path = folder / "dataset.toml"
    path.write_text(DATASET.format(folder.as_posix(), preserves))
    return path


def run(models: TinyModels, dataset: Path, output: Path, *more: str) -> dict[str, torch.Tensor]:
    words = [
        *models.arguments(),
        f"--dataset_config={dataset}",
        f"--output_dir={output}",
        "--output_name=x",
        "--device=cpu",
        "--seed=5",
        "--network_dim=2",
        "--network_train_unet_only",
        "--masked_loss",
        "--prior_loss_weight=0.5",
        "--cache_text_encoder_outputs",
        "--t5xxl_max_token_length=16",
        "--model_prediction_type=raw",
        "--timestep_sampling=sigmoid",
        "--learning_rate=1e-2",
        "--max_train_steps=2",
        *more,
    ]
    train(parse_command_line(words), Reporter(is_main=False))
    return load_file(output / "x.safetensors")


@pytest.mark.timeout(400)
def test_masks_and_preserved_pictures_train_alike_from_every_source(tiny_models: TinyModels, tmp_path: Path) -> None:
    dataset = project(tmp_path)
    to_disk = run(tiny_models, dataset, tmp_path / "one", "--cache_latents_to_disk")
    again = run(tiny_models, dataset, tmp_path / "two", "--cache_latents_to_disk")
    assert all(torch.equal(again[name], tensor) for name, tensor in to_disk.items())
    assert list((tmp_path / "masks" / ".flux_cache").glob("masks-*.safetensors")), "masks are kept beside latents"
    in_memory = run(tiny_models, dataset, tmp_path / "three", "--cache_latents")
    assert all(torch.equal(in_memory[name], tensor) for name, tensor in to_disk.items())
    # What would be different without them.
    wider = run(tiny_models, project(tmp_path, shown=48), tmp_path / "four", "--cache_latents")
    learnt = run(tiny_models, project(tmp_path, preserves="false"), tmp_path / "five", "--cache_latents")
    by_area = run(tiny_models, project(tmp_path), tmp_path / "six", "--cache_latents", "--masked_loss_normalize")
    for other in (wider, learnt, by_area):
        assert not all(torch.equal(other[name], tensor) for name, tensor in to_disk.items())
    with safe_open(str(tmp_path / "one" / "x.safetensors"), framework="pt") as file:
        (described,) = json.loads(file.metadata()["ss_datasets"])
    assert described["is_dreambooth"] is True
    assert (described["num_train_images"], described["num_reg_images"]) == (4, 2)
    assert [subset["is_reg"] for subset in described["subsets"]] == [False, True]


@pytest.mark.timeout(400)
def test_live_latents_are_masked_too_and_metadata_files_are_named(tiny_models: TinyModels, tmp_path: Path) -> None:
    project(tmp_path)
    listed = {f"{number}.png": {"caption": "a cat", "tags": "small"} for number in range(2)}
    (tmp_path / "meta.json").write_text(json.dumps(listed))
    (tmp_path / "dataset.toml").write_text(
        "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\n"
        f'image_dir = "{(tmp_path / "images").as_posix()}"\nmetadata_file = "{(tmp_path / "meta.json").as_posix()}"\n'
        f'conditioning_data_dir = "{(tmp_path / "masks").as_posix()}"\ncolor_aug = true\nrandom_crop = true\n'
    )
    masked = run(tiny_models, tmp_path / "dataset.toml", tmp_path / "one")
    for number in range(2):
        Image.new("L", (64, 64), 255).save(tmp_path / "masks" / f"{number}.png")
    whole = run(tiny_models, tmp_path / "dataset.toml", tmp_path / "two")
    assert not all(torch.equal(whole[name], tensor) for name, tensor in masked.items())
    with safe_open(str(tmp_path / "one" / "x.safetensors"), framework="pt") as file:
        (described,) = json.loads(file.metadata()["ss_datasets"])
    assert described["is_dreambooth"] is False
    (subset,) = described["subsets"]
    assert (subset["metadata_file"], subset["color_aug"], "image_dir" in subset) == ("meta.json", True, False)
    assert described["tag_frequency"] == {"meta.json": {"a cat": 2, "small": 2}}
