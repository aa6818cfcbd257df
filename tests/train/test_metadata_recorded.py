"""The metadata of the four recorded runs of the reference, key by key, from their own command lines.

Options, data, schedule and facts go through the code that a run takes; only nothing is trained. Every key that is
missing, new or different has its reason here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from PIL import Image

from tests.tiny import TinyModels
from tests.train.test_metadata import CAPTIONS
from trainer.schema.cli import parse_command_line
from trainer.train.check import check_run
from trainer.train.checkpoint import save_lora
from trainer.train.metadata import lora_metadata
from trainer.train.model_hashes import model_file_facts
from trainer.train.optim import create_optimizer, optimizer_description
from trainer.train.reporting import Reporter
from trainer.train.training_facts import training_facts, with_hashes

SIZES = ((240, 320), (240, 320), (218, 320), (256, 256), (256, 256), (320, 192))
"""Three pictures for the recorded bucket 192 x 320, two and one for the others, with the recorded error together."""

OURS: dict[str, str] = {
    "modelspec.date": "the time of saving",
    "modelspec.implementation_version": "names the program that trained, which is this one",
    "modelspec.resolution": "that of the dataset file; the reference knows --resolution only and writes 1024x1024",
    "ss_session_id": "a random number",
    "ss_training_started_at": "a time",
    "ss_training_finished_at": "a time",
    "ss_sd_model_name": "the test's own model file",
    "ss_sd_model_hash": "the test's own model file",
    "ss_new_sd_model_hash": "the test's own model file",
    "sshs_model_hash": "of the tensors, which are not the reference's",
    "sshs_legacy_hash": "of the file, 64 KiB from its first MiB on",
}
"""Keys whose values differ, and why."""

NEW: dict[str, str] = {
    **{
        f"ss_{name}": "the autoencoder, as readers of the key expect; the reference records --vae only, which FLUX ignores"
        for name in ("vae_name", "vae_hash", "new_vae_hash")
    },
    **{
        f"ss_fluxgui_{name}": "decides about the result, and the reference does not record it"
        for name in (
            *(
                f"{prefix}{model}_{end}"
                for model in ("ae", "clip_l", "t5xxl")
                for prefix, end in (("", "name"), ("", "hash"))
            ),
            *(f"new_{model}_hash" for model in ("ae", "clip_l", "t5xxl")),
            "base_storage",
            "full_bf16",
            "blocks_to_swap",
            "weight_dtype",
            "save_precision",
            "lora_form",
            "t5xxl_max_token_length",
            "clip_l_activation",
            "network_train_unet_only",
        )
    },
}
"""Keys that the reference has not, and why they are there."""


def recorded_runs() -> dict[str, Any]:
    return json.loads((Path(__file__).parents[1] / "golden" / "e2e_reference_runs.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recorded")
    (folder / "images").mkdir()
    for index, (size, caption) in enumerate(zip(SIZES, CAPTIONS, strict=True)):
        Image.new("RGB", size, (40 * index, 90, 120)).save(folder / "images" / f"{index}.png")
        (folder / "images" / f"{index}.txt").write_text(caption, encoding="utf-8")
    path = folder / "ds.toml"
    path.write_text(
        "[[datasets]]\nresolution = 256\nbatch_size = 1\nenable_bucket = true\nmin_bucket_reso = 64\n"
        "max_bucket_reso = 512\n[[datasets.subsets]]\n"
        f"image_dir = '{(folder / 'images').as_posix()}'\nnum_repeats = 2\ncaption_extension = '.txt'\n",
        encoding="utf-8",
    )
    return path


def words(recorded: dict[str, Any], models: TinyModels, dataset: Path, tmp_path: Path) -> list[str]:
    """The recorded command line, its files replaced."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red square\n", encoding="utf-8")
    own = {
        "pretrained_model_name_or_path": models.flux_dev,
        "clip_l": models.clip_l,
        "t5xxl": models.t5xxl,
        "ae": models.ae,
        "dataset_config": dataset,
        "output_dir": tmp_path / "out",
        "sample_prompts": prompts,
        "clip_l_tokenizer": models.clip_l_tokenizer,
        "t5xxl_tokenizer": models.t5xxl_tokenizer,
    }
    given = {**cast("dict[str, Any]", recorded["options"]), **own}
    del given["tokenizer_cache_dir"]
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()]


@pytest.mark.parametrize("run", ["tiny_bf16", "tiny_no", "mid_bf16", "mid_no"])
def test_every_key_of_a_recorded_run_is_written_as_recorded_or_differs_for_a_reason(
    run: str, tiny_models: TinyModels, dataset: Path, tmp_path: Path
) -> None:
    recorded = recorded_runs()[run]
    command = parse_command_line(words(recorded, tiny_models, dataset, tmp_path))
    options, checked = command.options, check_run(command, Reporter())
    optimizer = create_optimizer(
        options.optimizer_type,
        [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 1e-3}],
        learning_rate=1e-3,
        arguments={},
    )
    facts = training_facts(
        checked,
        seed=options.seed or 0,
        session_id=1,
        started_at=1.0,
        optimizer=optimizer_description(optimizer, {}),
        num_processes=1,
        weight_dtype="bfloat16",
    )
    facts = with_hashes(facts, dict.fromkeys(("flux", "ae", "clip_l", "t5xxl"), "ab" * 32))
    written = lora_metadata(facts, step=20, epoch=2, finished_at=2.0)
    file = tmp_path / "lora.safetensors"
    save_lora(file, {"a": torch.zeros(2)}, written)
    ours = _metadata_of(file)
    theirs = cast("dict[str, str]", recorded["metadata"])
    assert theirs.keys() - ours.keys() == set(), "keys that are missing"
    assert ours.keys() - theirs.keys() == NEW.keys()
    assert {key for key in theirs if not _is_same(ours[key], theirs[key])} <= OURS.keys()
    assert all(ours[key] != theirs[key] for key in ("modelspec.resolution", "modelspec.implementation_version"))
    assert ours["ss_sd_model_hash"] == model_file_facts(tiny_models.flux_dev).legacy_hash


def _metadata_of(file: Path) -> dict[str, str]:
    data = file.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]


def _is_same(ours: str, theirs: str) -> bool:
    """As text; for `ss_datasets` as JSON, whose one mean may be added up in another order."""
    if ours == theirs or not theirs.startswith("[{"):
        return ours == theirs
    a, b = (cast("list[dict[str, Any]]", json.loads(text)) for text in (ours, theirs))
    means = [info["bucket_info"].pop("mean_img_ar_error") for info in (*a, *b)]
    return json.dumps(a) == json.dumps(b) and means[0] == pytest.approx(means[1], rel=1e-12)
