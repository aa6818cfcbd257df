"""The LoRA tools, each by the property that defines it, on the tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from tests.lora.random_lora import deltas, random_lora
from tests.runs.in_process import answer
from tests.tiny import TinyModels
from trainer.lora.forms import converted
from trainer.lora.low_rank import decompose_product, kept_rank
from trainer.lora.runtime import RuntimeLoras, read_layers
from trainer.model.weights import load_flux
from trainer.train.checkpoint import save_lora

NAMES = ("lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_single_blocks_1_linear2", "lora_unet_time_in_in_layer")


def hidden_of(path: Path) -> int:
    with safe_open(path, "pt") as file:
        return int(file.get_slice("img_in.weight").get_shape()[0])


def state_of(tiny_models: TinyModels, *, seed: int = 0, rank: int = 4) -> dict[str, Tensor]:
    hidden = hidden_of(tiny_models.flux_dev)
    return random_lora(hidden=hidden, names=NAMES[:2], seed=seed, rank=rank)


@pytest.fixture
def lora(tmp_path: Path, tiny_models: TinyModels) -> Path:
    path = tmp_path / "lora.safetensors"
    save_lora(path, state_of(tiny_models), {"ss_output_name": "mine", "ss_network_dim": "4"})
    return path


@pytest.fixture
def second(tmp_path: Path, tiny_models: TinyModels) -> Path:
    path = tmp_path / "second.safetensors"
    state, metadata, _ = converted(state_of(tiny_models, seed=3, rank=2), {}, "diffusers")
    save_lora(path, state, metadata)
    return path


def run(*words: object) -> str:
    done = answer(*map(str, words))
    assert done.code == 0, done.output
    return done.output


def assert_same_change(left: dict[str, Tensor], right: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    assert left.keys() == right.keys()
    for name, change in left.items():
        torch.testing.assert_close(right[name], change, rtol=tolerance, atol=tolerance * float(change.abs().max()))


def test_a_merged_model_computes_what_the_applied_loras_do_and_extract_gives_the_lora_back(
    tiny_models: TinyModels, lora: Path, second: Path, tmp_path: Path
) -> None:
    merged = tmp_path / "merged.safetensors"
    run(
        "merge", "--flux_model", tiny_models.flux_dev, "--models", lora, second, "--ratios", 0.7, -0.5,
        "--save_precision=float", "--save_to", merged,
    )  # fmt: skip
    applied = load_flux(tiny_models.flux_dev, torch.float32, "cpu")
    runtime = RuntimeLoras(applied, "unet", [read_layers(lora), read_layers(second)], torch.device("cpu"))
    runtime.use({0: 0.7, 1: -0.5})
    whole = load_flux(merged, torch.float32, "cpu")
    x = torch.randn(3, hidden_of(tiny_models.flux_dev))
    with torch.no_grad():
        for path in ("double_blocks.0.img_attn.qkv", "double_blocks.0.img_mod.lin"):
            torch.testing.assert_close(
                whole.get_submodule(path)(x), applied.get_submodule(path)(x), rtol=1e-4, atol=1e-4
            )

    alone, back = tmp_path / "alone.safetensors", tmp_path / "back.safetensors"
    run("merge", "--flux_model", tiny_models.flux_dev, "--models", lora, "--save_precision=float", "--save_to", alone)
    run("extract", "--model_org", tiny_models.flux_dev, "--model_tuned", alone, "--dim=4", "--save_to", back)
    assert_same_change(deltas(load_file(lora)), deltas(load_file(back)), 1e-3)


def test_loras_become_one_exactly_or_at_a_rank(lora: Path, second: Path, tmp_path: Path) -> None:
    sum_of_ranks, limited = tmp_path / "sum.safetensors", tmp_path / "limited.safetensors"
    run("merge-loras", "--models", lora, second, "--ratios", 1, 0.5, "--save_to", sum_of_ranks)
    other, _, _ = converted(load_file(second), {}, "sd-scripts")
    expected = {
        name: change + 0.5 * deltas(other)[name].to(change.dtype) for name, change in deltas(load_file(lora)).items()
    }
    assert_same_change(expected, deltas(load_file(sum_of_ranks)))
    run("merge-loras", "--models", lora, second, "--ratios", 1, 0.5, "--rank=6", "--save_to", limited)
    assert_same_change(expected, deltas(load_file(limited)))


def test_resize_to_the_full_rank_changes_nothing_and_less_is_the_best_of_that_rank(lora: Path, tmp_path: Path) -> None:
    full, half = tmp_path / "full.safetensors", tmp_path / "half.safetensors"
    run("resize", "--model", lora, "--new_rank=4", "--save_to", full)
    assert_same_change(deltas(load_file(lora)), deltas(load_file(full)))
    output = run("resize", "--model", lora, "--new_rank=2", "--save_to", half)
    assert "rank 2 to 2" in output
    small = load_file(half)
    assert small[f"{NAMES[0]}.lora_down.weight"].shape[0] == 2
    # alpha / rank stays, so that a strength means the same as before.
    assert float(small[f"{NAMES[0]}.alpha"]) / 2 == pytest.approx(1 / 4)
    for name, change in deltas(load_file(lora)).items():
        left = (change - deltas(small)[name]).float()
        best = torch.linalg.svdvals(change.float())[2:].norm()
        assert float(left.norm()) == pytest.approx(float(best), rel=1e-3)


def test_rules_keep_what_they_say() -> None:
    values = torch.tensor([8.0, 4.0, 1.0, 0.5])
    assert kept_rank(values, "sv_ratio", 3) == 2
    assert kept_rank(values, "sv_cumulative", 0.9) == 3
    assert kept_rank(values, "sv_fro", 0.99) == 2
    assert kept_rank(values, "sv_fro", 1.0) == 4
    assert kept_rank(torch.zeros(3), "sv_ratio", 3) == 1
    up, down = torch.randn(12, 3), torch.randn(3, 7)
    u, s, vh = decompose_product(up, down)
    torch.testing.assert_close(u * s @ vh, up @ down, rtol=1e-4, atol=1e-4)


def test_inspect_says_rank_alpha_form_and_metadata(lora: Path, second: Path) -> None:
    facts = json.loads(run("inspect", lora, "--json"))
    assert (facts["form"], facts["ranks"], facts["alphas"]) == ("sd-scripts", {"4": 2}, {"1": 2})
    assert facts["layers"] == {"flux": 2, "clip_l": 0, "t5xxl": 0}
    assert facts["metadata"]["ss_output_name"] == "mine"
    assert facts["not_finite"] == []
    assert "diffusers" in run("inspect", second)


def test_bad_requests_are_refused_with_what_to_do(tiny_models: TinyModels, lora: Path, tmp_path: Path) -> None:
    there = tmp_path / "there.safetensors"
    there.write_bytes(b"mine")
    assert "--overwrite" in answer("resize", f"--model={lora}", "--new_rank=2", f"--save_to={there}").output
    assert there.read_bytes() == b"mine"
    assert "not a LoRA" in answer("inspect", str(tiny_models.flux_dev)).output
    assert answer("resize", f"--model={lora}", f"--save_to={tmp_path / 'x.safetensors'}").code == 2
    wrong = answer("merge", f"--flux_model={lora}", "--models", str(lora), f"--save_to={tmp_path / 'y.safetensors'}")
    assert wrong.code == 3
    same = answer(
        "extract", f"--model_org={tiny_models.flux_dev}", f"--model_tuned={tiny_models.flux_dev}",
        f"--save_to={tmp_path / 'z.safetensors'}",
    )  # fmt: skip
    assert "the same" in same.output
    assert not list(tmp_path.glob("[xyz].safetensors"))


def test_a_flag_that_means_nothing_here_is_named_with_the_reason(
    lora: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = ["--model", lora, "--new_rank", 2, "--save_to", tmp_path / "small.safetensors"]
    with caplog.at_level("WARNING"):
        run("resize", *words, "--device=cuda", "--verbose")
    told = [record.message for record in caplog.records]
    assert "--device has no effect: it is computed on the CPU" in told
    assert sum("has no effect" in line for line in told) == 2
