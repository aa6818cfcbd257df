"""Metadata against the header of a file that the reference trainer wrote."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save

from trainer.schema.base import UserError
from trainer.train.metadata import lora_metadata, used_settings
from trainer.train.metadata_datasets import tag_frequency
from trainer.train.metadata_facts import DatasetFacts, ModelFileFacts, ModelSpecFacts, SubsetFacts, TrainingFacts
from trainer.train.model_hashes import file_sha256, legacy_file_hash, model_file_facts, tensor_hashes
from trainer.train.model_spec import thumbnail_data_url

CAPTIONS = (
    "a photo of a red square on a blue background",
    "a green circle above a yellow triangle",
    "abstract pattern with diagonal stripes",
    "black and white checkerboard",
    "colourful gradient, smooth shading",
    "dotted texture with soft noise and blur",
)
SUBSET = SubsetFacts(place=Path("data/images"), captions=CAPTIONS, num_repeats=2)
DATASET = DatasetFacts(
    subsets=(SUBSET,),
    resolution=(256, 256),
    batch_size=1,
    enable_bucket=True,
    bucket_no_upscale=False,
    min_bucket_reso=64,
    max_bucket_reso=512,
    buckets=(((192, 320), 6), ((256, 256), 4), ((320, 192), 2)),
    mean_aspect_error=0.06354166666666666,
)
# The run of the recorded file.
FACTS = TrainingFacts(
    session_id=3117209913,
    started_at=1795462603.3886378,
    trainer_version="1.2.3",
    output_name="lora_tiny_bf16",
    learning_rate=1e-3,
    text_encoder_lr=None,
    unet_lr=None,
    num_batches_per_epoch=12,
    num_epochs=2,
    max_train_steps=20,
    gradient_checkpointing=False,
    gradient_accumulation_steps=1,
    num_processes=1,
    lr_warmup_steps=0,
    lr_scheduler="constant",
    optimizer="torch.optim.adamw.AdamW",
    max_grad_norm=1.0,
    network_dim=4,
    network_alpha=1,
    network_dropout=None,
    network_args=None,
    mixed_precision="bf16",
    cache_latents=True,
    seed=42,
    training_comment=None,
    caption_dropout_rate=0.0,
    prior_loss_weight=1.0,
    ip_noise_gamma=None,
    ip_noise_gamma_random_strength=False,
    loss_type="l2",
    huber_schedule="snr",
    huber_scale=1.0,
    huber_c=0.1,
    resize_interpolation=None,
    apply_t5_attn_mask=False,
    weighting_scheme="uniform",
    logit_mean=0.0,
    logit_std=1.0,
    mode_scale=1.29,
    guidance_scale=1.0,
    timestep_sampling="sigmoid",
    sigmoid_scale=1.0,
    model_prediction_type="raw",
    discrete_flow_shift=3.0,
    datasets=(DATASET,),
    uses_dataset_config=True,
    is_schnell=False,
    base_model_name="open_dev.safetensors",
    base_model_legacy_hash="20031823",
    base_model_sha256="aa05d05af2b886b07539d55406a21e0363c4bad8a5e2cef9d295ff7b73d75742",
)
FINISHED_AT = 1795462612.080488


def metadata_of(facts: TrainingFacts, *, no_metadata: bool = False) -> dict[str, str]:
    return lora_metadata(facts, step=20, epoch=2, finished_at=FINISHED_AT, no_metadata=no_metadata)


def test_the_same_run_writes_what_the_reference_wrote(golden: Path) -> None:
    with safe_open(golden / "e2e_lora_tiny_bf16.safetensors", "pt") as file:
        recorded: dict[str, str] = file.metadata()
    ours = metadata_of(FACTS)
    # The hashes are added when the tensors are known; the rest differs on purpose.
    ours_on_purpose = {
        "modelspec.resolution": "256x256",
        "modelspec.implementation_version": "fluxgui/1.2.3",
        "modelspec.date": time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(FINISHED_AT)),
    }
    hashes = {"sshs_model_hash", "sshs_legacy_hash"}
    assert ours == {key: value for key, value in recorded.items() if key not in hashes} | ours_on_purpose


def test_without_a_dataset_file_the_folder_keys_are_written() -> None:
    reg = replace(SUBSET, place=Path("reg/1_thing"), captions=("a thing",), num_repeats=3, is_reg=True)
    dataset = replace(DATASET, subsets=(replace(SUBSET, flip_aug=True), reg), batch_size=2, resolution=(512, 768))
    ours = metadata_of(
        replace(FACTS, uses_dataset_config=False, datasets=(dataset,), num_processes=2, gradient_accumulation_steps=4)
    )
    assert "ss_datasets" not in ours
    assert {key: ours[f"ss_{key}"] for key in ("resolution", "total_batch_size", "flip_aug", "num_reg_images")} == {
        "resolution": "(512, 768)",
        "total_batch_size": "16",
        "flip_aug": "True",
        "num_reg_images": "3",
    }
    assert json.loads(ours["ss_dataset_dirs"]) == {"images": {"n_repeats": 2, "img_count": 6}}
    assert json.loads(ours["ss_reg_dataset_dirs"]) == {"1_thing": {"n_repeats": 3, "img_count": 1}}
    assert json.loads(ours["ss_bucket_info"])["buckets"]["2"] == {"resolution": [320, 192], "count": 2}
    assert json.loads(ours["ss_tag_frequency"])["1_thing"] == {"a thing": 1}
    assert ours["modelspec.resolution"] == "512x768"


def test_a_folder_used_twice_is_listed_twice_and_its_tags_once() -> None:
    ours = metadata_of(replace(FACTS, datasets=(DATASET, replace(DATASET, resolution=(512, 512), enable_bucket=False))))
    assert list(json.loads(ours["ss_dataset_dirs"])) == ["images", "images (2)"]
    assert json.loads(ours["ss_tag_frequency"])["images"]["smooth shading"] == 1
    assert json.loads(ours["ss_datasets"])[1]["bucket_info"] is None
    assert ours["ss_num_train_images"] == "24"


def test_tags_are_counted_in_lower_case_without_empty_ones() -> None:
    subset = replace(SUBSET, captions=("Cat, sits,", "cat , ,runs"))
    assert tag_frequency([subset]) == {"images": {"cat": 2, "sits": 1, "runs": 1}}


def test_network_arguments_and_text_rates_keep_the_references_spelling() -> None:
    ours = metadata_of(
        replace(FACTS, network_args={"train_blocks": "single"}, network_dropout=0.1, text_encoder_lr=(1e-5, 2e-5))
    )
    assert json.loads(ours["ss_network_args"]) == {"train_blocks": "single", "dropout": 0.1}
    assert ours["ss_text_encoder_lr"] == "[1e-05, 2e-05]"
    assert "ss_network_args" not in metadata_of(FACTS)


def test_the_encoders_the_autoencoder_and_our_own_settings_are_recorded_too() -> None:
    models = {
        "ae": ModelFileFacts("ae.safetensors", "01234567", "ab" * 32),
        "clip_l": ModelFileFacts("clip_l.safetensors", "89abcdef"),
    }
    ours = metadata_of(replace(FACTS, other_models=models, own={"blocks_to_swap": 18, "save_precision": "bf16"}))
    plain = metadata_of(FACTS)
    assert {key: value for key, value in ours.items() if key not in plain} == {
        "ss_vae_name": "ae.safetensors",
        "ss_vae_hash": "01234567",
        "ss_new_vae_hash": "ab" * 32,
        "ss_fluxgui_ae_name": "ae.safetensors",
        "ss_fluxgui_ae_hash": "01234567",
        "ss_fluxgui_new_ae_hash": "ab" * 32,
        "ss_fluxgui_clip_l_name": "clip_l.safetensors",
        "ss_fluxgui_clip_l_hash": "89abcdef",
        "ss_fluxgui_blocks_to_swap": "18",
        "ss_fluxgui_save_precision": "bf16",
    }


def test_all_61_keys_and_flux_11_of_the_reference_are_written(golden: Path) -> None:
    with safe_open(golden / "e2e_lora_tiny_bf16.safetensors", "pt") as file:
        recorded: dict[str, str] = file.metadata()
    conditional = {"ss_datasets", "ss_tag_frequency", "ss_dataset_dirs", "ss_sd_model_name", "ss_sd_model_hash"}
    conditional |= {"ss_new_sd_model_hash", "ss_training_finished_at", "ss_steps", "ss_epoch"}
    always = {key for key in recorded if key.startswith("ss_")} - conditional
    assert len(always) == 61 + 11
    assert always <= set(metadata_of(FACTS))


def test_a_setting_that_exists_is_written_at_its_value() -> None:
    class Settings:
        scale_weight_norms = 1.5
        debiased_estimation_loss = True
        learning_rate = 3.0

    used = used_settings(Settings())
    assert used == {"ss_scale_weight_norms": 1.5, "ss_debiased_estimation": True}
    ours = metadata_of(replace(FACTS, settings=used))
    assert (ours["ss_scale_weight_norms"], ours["ss_debiased_estimation"]) == ("1.5", "True")


def test_a_folder_and_a_missing_file_have_the_references_words_for_a_hash(tmp_path: Path) -> None:
    assert model_file_facts(tmp_path).legacy_hash == "IsADirectory"
    assert model_file_facts(tmp_path / "gone.safetensors") == ModelFileFacts("gone.safetensors", "NOFILE")


def test_no_metadata_leaves_what_a_loader_needs() -> None:
    ours = metadata_of(replace(FACTS, network_args={"verbose": "True"}), no_metadata=True)
    assert {key for key in ours if key.startswith("ss_")} == {
        "ss_v2",
        "ss_base_model_version",
        "ss_network_module",
        "ss_network_dim",
        "ss_network_alpha",
        "ss_network_args",
    }
    assert ours["modelspec.architecture"] == "flux-1-dev/lora"


def test_every_value_is_text() -> None:
    for no_metadata in (False, True):
        for value in metadata_of(FACTS, no_metadata=no_metadata).values():
            assert isinstance(value, str)


def test_what_the_user_writes_about_the_model_is_kept(tmp_path: Path) -> None:
    picture = tmp_path / "cat.png"
    picture.write_bytes(b"\x89PNG")
    spec = ModelSpecFacts(title="My cat", author="me", trigger_phrase="mycat", thumbnail=str(picture))
    ours = metadata_of(replace(FACTS, modelspec=spec, is_schnell=True, min_timestep=100))
    assert {key: value for key, value in ours.items() if key.startswith("modelspec.")} == {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "flux-1-schnell/lora",
        "modelspec.implementation": "https://github.com/black-forest-labs/flux",
        "modelspec.implementation_version": "fluxgui/1.2.3",
        "modelspec.title": "My cat",
        "modelspec.author": "me",
        "modelspec.trigger_phrase": "mycat",
        "modelspec.thumbnail": "data:image/png;base64,iVBORw==",
        "modelspec.resolution": "256x256",
        "modelspec.date": time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(FINISHED_AT)),
        "modelspec.timestep_range": "100,1000",
    }
    assert metadata_of(replace(FACTS, output_name=None))["modelspec.title"] == "LoRA@1795462603"


def test_a_thumbnail_may_be_a_data_url_and_must_exist_otherwise(tmp_path: Path) -> None:
    assert thumbnail_data_url("data:image/png;base64,AAAA") == "data:image/png;base64,AAAA"
    with pytest.raises(UserError, match="thumbnail cannot be read") as caught:
        thumbnail_data_url(str(tmp_path / "missing.png"))
    assert caught.value.problems[0].field == "metadata_thumbnail"


def test_the_model_hash_does_not_depend_on_metadata_and_the_legacy_hash_on_a_window() -> None:
    tensors = {"a": torch.arange(400_000, dtype=torch.float32)}
    plain, described = save(tensors), save(tensors, {"ss_steps": "1" * 100})
    assert tensor_hashes(plain)["sshs_model_hash"] == tensor_hashes(described)["sshs_model_hash"]
    expected = hashlib.sha256(described[0x100000:0x110000]).hexdigest()[:8]
    assert tensor_hashes(described)["sshs_legacy_hash"] == expected
    assert tensor_hashes(save({"a": torch.zeros(4)}))["sshs_legacy_hash"] == "e3b0c442"


def test_the_base_models_hashes_are_the_references(golden: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    content = bytes(range(256)) * 5000
    path.write_bytes(content)
    seen: list[tuple[int, int]] = []
    assert file_sha256(path, lambda done, total: seen.append((done, total))) == hashlib.sha256(content).hexdigest()
    assert seen == [(1_280_000, 1_280_000)]
    assert legacy_file_hash(path) == hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]
    assert len(legacy_file_hash(golden / "model_dev.safetensors")) == 8
