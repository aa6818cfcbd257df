"""Several processes of one training, started as torchrun and accelerate start them."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.runs.commands import run_command
from tests.tiny import TinyModels, make_tiny_dataset

pytestmark = [pytest.mark.timeout(400), pytest.mark.slow]


def arguments(models: TinyModels, dataset: Path, output_dir: Path) -> list[str]:
    return [
        *models.arguments(),
        f"--dataset_config={dataset}",
        f"--output_dir={output_dir}",
        "--output_name=lora",
        "--network_module=networks.lora_flux",
        "--network_dim=4",
        "--network_train_unet_only",
        "--cache_latents",
        "--cache_text_encoder_outputs",
        "--t5xxl_max_token_length=16",
        "--model_prediction_type=raw",
        "--learning_rate=1e-2",
        "--max_train_epochs=2",
    ]


def test_two_processes_without_a_gpu_share_one_training(tiny_models: TinyModels, tmp_path: Path) -> None:
    dataset = make_tiny_dataset(tmp_path / "dataset", count=4)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d"]
    launch += ["--rdzv_endpoint=127.0.0.1:0", "flux_train_network.py"]
    given = [*arguments(tiny_models, dataset, tmp_path / "output"), "--seed=3", "--network_dropout=0.1"]
    finished = run_command([*launch, *given, "--save_state", "--save_every_n_steps=3"])
    assert finished.code == 0, finished.output
    assert re.search(r"2 epochs of \d+ batches, 2 steps; 4 steps in total", finished.output)
    with safe_open(tmp_path / "output" / "lora.safetensors", framework="pt") as file:
        assert file.metadata()["ss_steps"] == "4"

    # The state was saved by rank 0 alone, holds the generators of both, and leads to the same bits.
    state = tmp_path / "output" / "lora-step00000003-state"
    assert len(json.loads((state / "state.json").read_text())["random"]["list"]) == 2
    again = [f"--output_dir={tmp_path / 'again'}" if word.startswith("--output_dir") else word for word in given]
    # Where weights and activations are kept changes no bit, on two processes either.
    levers = ["--blocks_to_swap=2", "--gradient_checkpointing", "--checkpoint_blocks=3", "--offload_modulation=host"]
    finished = run_command([*launch, *again, *levers, f"--resume={state}"])
    assert finished.code == 0, finished.output
    assert "3 steps are done, in epoch 2" in finished.output
    expected, final = (load_file(tmp_path / folder / "lora.safetensors") for folder in ("output", "again"))
    assert all(torch.equal(final[key], expected[key]) for key in expected)
