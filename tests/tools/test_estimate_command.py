"""`python -m trainer estimate`, as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.runs.commands import ROOT
from tests.runs.in_process import answer
from tests.tiny import TinyModels
from trainer.schema.cli import parse_command_line
from trainer.schema.memory_phases import GIB, KINDS

USUAL = (
    "--mixed_precision=bf16",
    "--gradient_checkpointing",
    "--cache_latents",
    "--cache_text_encoder_outputs",
    "--network_dim=16",
    "--network_train_unet_only",
    "--optimizer_type=AdamW8bit",
)


def estimated(*words: str) -> dict[str, Any]:
    found = answer("estimate", *USUAL, *words, "--json")
    assert found.code == 0, found.output
    return json.loads(found.output)


def test_without_a_card_the_answer_is_the_figures_of_the_options() -> None:
    found = estimated("--blocks_to_swap=18")
    assert "plan" not in found
    assert found["blocks_to_swap"] == 18
    assert found["peak_bytes"] == max(phase["peak_bytes"] for phase in found["phases"])
    for phase in found["phases"]:
        assert sum(phase[kind] for kind in KINDS) == phase["peak_bytes"]
        assert sum(part["bytes"] for part in phase["parts"]) == phase["peak_bytes"]
    assert sum(part["bytes"] for part in found["host_parts"]) == found["host_peak_bytes"]
    assert any("FLUX.1-dev" in line for line in found["assumptions"]), "no file is needed, and it is said"


def test_for_a_card_the_plan_says_the_smallest_count_and_the_figures_are_those_of_it() -> None:
    found = estimated("--vram_gb=12")
    plan = found["plan"]
    assert plan["fits"]
    assert found["peak_bytes"] == plan["peak_bytes"] <= plan["usable_vram_bytes"] < 12 * GIB
    again = estimated("--vram_gb=12", f"--blocks_to_swap={plan['blocks_to_swap'] - 1}")
    assert again["peak_bytes"] > plan["usable_vram_bytes"], "a count that was given is what the figures are for"
    assert again["plan"]["blocks_to_swap"] == plan["blocks_to_swap"]


def test_main_memory_is_planned_too() -> None:
    plan = estimated("--vram_gb=12", "--ram_gb=8")["plan"]
    assert not plan["fits"]
    assert "main memory" in plan["impossible"][0]
    assert plan["ram_bytes"] == 8 * GIB


def test_in_words() -> None:
    text = answer("estimate", *USUAL, "--vram_gb=80", "--ram_gb=64").output
    assert "fits with --blocks_to_swap=0: 26." in text
    assert "(without --gradient_checkpointing) --blocks_to_swap=0" in text
    assert "0.70 times the step time" in text
    assert "does not fit. With blocks_to_swap 38, training needs" in answer("estimate", *USUAL, "--vram_gb=4").output


def test_what_would_fit_is_shown_as_it_is_typed() -> None:
    text = answer("estimate", *USUAL, "--vram_gb=6", "--ram_gb=16").output
    lines = [line for line in text.splitlines() if line.startswith("    --")]
    assert any("--cpu_offload_checkpointing " in line for line in lines)
    for line in lines:
        words = line.partition(": ")[0].split()
        assert parse_command_line([*USUAL, *words]).problems == ()


def test_sizes_and_batch_come_from_the_dataset_file_and_the_headers(tiny_models: TinyModels, tmp_path: Path) -> None:
    dataset = tmp_path / "data.toml"
    dataset.write_text(
        "[general]\nbatch_size = 3\n[[datasets]]\nresolution = 128\n[[datasets.subsets]]\nimage_dir = 'x'\n"
        "[[datasets]]\nresolution = [64, 96]\n[[datasets.subsets]]\nimage_dir = 'x'\n"
    )
    found = estimated(f"--dataset_config={dataset}", f"--pretrained_model_name_or_path={tiny_models.flux_dev}")
    assert (found["width"], found["height"], found["batch_size"]) == (128, 128, 3)
    assert found["peak_bytes"] < 2 * GIB, "the tiny model, not FLUX.1"
    assert not any("FLUX.1-dev" in line for line in found["assumptions"])


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["--vram_gb=0"], 2, "vram_gb is 0; it must be above 0"),
        (["--ram_gb=-3"], 2, "ram_gb is -3"),
        (["--blocks_to_swap=39"], 2, "it must be 0 to 38"),
        (["--pretrained_model_name_or_path=gone.safetensors"], 3, "gone.safetensors"),
    ],
)
def test_what_is_wrong_is_said(words: list[str], code: int, text: str) -> None:
    found = answer("estimate", *words)
    assert text in found.output
    assert found.code == code


def test_the_estimate_loads_no_torch() -> None:
    code = "import sys; from trainer.__main__ import main; main(['estimate', '--vram_gb=12']); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "False"
