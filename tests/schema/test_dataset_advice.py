"""What the checks say about settings of a dataset that have no effect."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainer.schema.base import UserError
from trainer.schema.cli import parse_command_line
from trainer.schema.dataset_advice import dataset_advice
from trainer.schema.dataset_file import dataset_config


def advice(folder: Path, dataset: dict[str, object], subset: dict[str, object], *command: str) -> list[str]:
    path = folder / "dataset.json"
    path.write_text(
        json.dumps({"datasets": [{"resolution": 512, **dataset, "subsets": [{"image_dir": "cats", **subset}]}]})
    )
    options = parse_command_line([f"--dataset_config={path}", *command]).options
    return list(dataset_advice(dataset_config(options), options))


@pytest.mark.parametrize(
    ("dataset", "subset", "command", "line"),
    [
        ({"network_multiplier": 0.5}, {}, (), "network_multiplier of dataset 1 has no effect, in sd-scripts neither"),
        ({"bucket_reso_steps": 32}, {}, (), "bucket_reso_steps of dataset 1 have no effect without enable_bucket"),
        ({}, {}, ("--bucket_no_upscale",), "bucket_no_upscale of dataset 1 have no effect without enable_bucket"),
        (
            {"enable_bucket": True, "bucket_no_upscale": True, "max_bucket_reso": 2048},
            {},
            (),
            "max_bucket_reso of dataset 1 have no effect beside bucket_no_upscale",
        ),
        ({}, {"cache_info": True}, (), "cache_info of cats has no effect: captions and sizes are read at every start"),
        ({}, {"custom_attributes": {"a": 1, "b": 2}}, (), "custom_attributes of cats have no effect: a, b"),
        (
            {"enable_bucket": True},
            {"face_crop_aug_range": [1, 2]},
            (),
            "face_crop_aug_range of cats has no effect beside enable_bucket",
        ),
        ({}, {}, ("--masked_loss",), "masked_loss has no effect: no subset has a conditioning_data_dir or alpha_mask"),
        (
            {},
            {},
            ("--masked_loss_normalize",),
            "masked_loss_normalize has no effect: no subset has a conditioning_data_dir or alpha_mask",
        ),
        (
            {},
            {"alpha_mask": True, "conditioning_data_dir": "masks"},
            ("--masked_loss",),
            "alpha_mask of cats has no effect: its masks are in masks",
        ),
    ],
)
def test_what_has_no_effect_is_said(
    tmp_path: Path, dataset: dict[str, object], subset: dict[str, object], command: tuple[str, ...], line: str
) -> None:
    assert advice(tmp_path, dataset, subset, *command) == [line]


def test_nothing_is_said_about_settings_that_count(tmp_path: Path) -> None:
    dataset: dict[str, object] = {"enable_bucket": True, "bucket_reso_steps": 16, "max_bucket_reso": 2048}
    subset: dict[str, object] = {"alpha_mask": True, "custom_attributes": {"diff_output_preservation": True}}
    assert advice(tmp_path, dataset, subset, "--masked_loss", "--masked_loss_normalize") == []


def test_a_metadata_file_on_the_command_line_is_one_subset(tmp_path: Path) -> None:
    metadata = tmp_path / "meta.json"
    metadata.write_text("{}")
    words = [f"--in_json={metadata}", f"--train_data_dir={tmp_path}", "--resolution=512", "--dataset_repeats=3"]
    command = parse_command_line([*words, "--face_crop_aug_range=2,4.5", "--alpha_mask", "--color_aug"])
    (dataset,) = dataset_config(command.options).datasets
    (subset,) = dataset.subsets
    assert (subset.image_dir, subset.metadata_file, subset.num_repeats) == (tmp_path, metadata, 3)
    assert (subset.face_crop_aug_range, subset.alpha_mask, subset.color_aug) == ((2.0, 4.5), True, True)
    assert (subset.is_reg, subset.class_tokens, subset.place) == (False, None, tmp_path)
    notes = parse_command_line([*words, f"--reg_data_dir={tmp_path}"]).notes
    assert "reg_data_dir has no effect beside in_json" in notes
    beside = parse_command_line([*words, "--dataset_config=x.toml"]).notes
    assert "in_json has no effect beside dataset_config" in beside


@pytest.mark.parametrize("name", ["color_aug", "random_crop", "face_crop_aug_range"])
def test_options_that_change_pixels_in_every_step_are_refused_beside_cached_latents(name: str) -> None:
    word = "--face_crop_aug_range=2,4" if name == "face_crop_aug_range" else f"--{name}"
    with pytest.raises(UserError) as error:
        parse_command_line([word, "--cache_latents_to_disk"])
    (problem,) = error.value.problems
    assert problem.what.startswith(name)
    assert problem.what.endswith("in every step, which cache_latents rules out")
    assert parse_command_line([word]).options is not None


@pytest.mark.parametrize("value", ["4,2", "0,2", "2", "a,b", "1,2,3", "nan,2"])
def test_a_wrong_face_crop_is_explained(value: str) -> None:
    with pytest.raises(UserError, match=r"face_crop_aug_range is .*; it must be two numbers"):
        parse_command_line([f"--face_crop_aug_range={value}"])
