"""`python -m trainer replay`: its numbers, its file and its errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.runs.in_process import answer


def test_the_command_makes_the_steps_and_writes_what_it_found(golden: Path, tmp_path: Path) -> None:
    source = golden / "replay" / "t2_default_nonzero.safetensors"
    facts = json.loads(source.with_suffix(".json").read_text(encoding="utf-8"))
    output = tmp_path / "out.safetensors"
    done = answer(
        "replay",
        *(f"--input={source}", f"--output={output}", "--steps", "2", "--device=cpu"),
        f"--pretrained_model_name_or_path={golden / 'replay' / 'model_dev.safetensors'}",
        *facts["options"],
        *("--network_dim=4", "--learning_rate=1e-3", "--max_grad_norm=0"),
    )
    assert done.code == 0, done.output
    assert load_file(output)["losses"].tolist() == pytest.approx(facts["losses"][:2], rel=1e-6)
    for words, code, piece in (
        ([f"--input={source}", f"--output={output}", "--steps=1"], 2, "the FLUX.1 model is not given"),
        ([f"--input={source}", "--steps=1"], 2, "--output"),
    ):
        failed = answer("replay", *words)
        assert (failed.code, piece in failed.output) == (code, True), failed.output
