"""fp16 on a model whose activations leave its range, as FLUX.1's do: no NaN, and the course of fp32."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.tiny import TinyModels, make_tiny_dataset
from trainer.model.flux import Flux
from trainer.model.frozen_linear import FrozenLinear
from trainer.model.half import FP16_LARGEST, saturated, stream_update
from trainer.model.text_encoders import encode_t5
from trainer.model.weights import load_flux, load_t5xxl
from trainer.schema.cli import parse_command_line
from trainer.schema.options import Options
from trainer.tools.tiny_models import make_flux
from trainer.train.conditioning import TextInputs
from trainer.train.engine import Engine
from trainer.train.objective import predict_velocity
from trainer.train.recipe import train
from trainer.train.replay import replay
from trainer.train.reporting import Reporter

TOKENS, STEPS = 6, 50
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def outlier_flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformer with a few huge weights in what the blocks add to the streams, so that sums pass 65504."""
    folder = tmp_path_factory.mktemp("outliers")
    plain = make_flux(folder / "plain.safetensors", hidden=64, heads=2, depth=2, depth_single=2, seed=4)
    with safe_open(str(plain), framework="pt") as file:
        metadata = file.metadata()
    weights = load_file(plain)
    for stream, channel in (("txt", 3), ("img", 11)):
        # One channel of the stream grows beyond fp16 in the first block and stays there, as in the published model.
        weights[f"double_blocks.0.{stream}_mlp.2.weight"][channel] *= 3e5
        weights[f"double_blocks.1.{stream}_attn.proj.weight"][channel] *= 2e5
    weights["single_blocks.0.linear2.weight"][7] *= 1e5
    path = folder / "outliers.safetensors"
    save_file(weights, path, metadata=metadata)
    return path


def make_recording(path: Path) -> Path:
    draw = torch.Generator().manual_seed(9)
    save_file(
        {
            "in.latents": torch.randn(2, 16, 6, 4, generator=draw),
            "in.noise": torch.randn(2, 16, 6, 4, generator=draw),
            "in.timesteps": torch.tensor([800.0, 350.0]),
            "in.clip_pooled": torch.randn(2, 32, generator=draw),
            "in.t5_out": torch.randn(2, TOKENS, 64, generator=draw),
        },
        path,
    )
    return path


def losses_in(precision: str, model: Path, folder: Path) -> Tensor:
    output = folder / f"{precision}.safetensors"
    words = [f"--pretrained_model_name_or_path={model}", f"--mixed_precision={precision}", "--device=cpu", "--seed=5"]
    words += ["--model_prediction_type=raw", "--guidance_scale=1", "--network_dim=8", "--network_alpha=8"]
    replay(
        parse_command_line([*words, "--learning_rate=3e-3"]),
        Reporter(is_main=False),
        source=make_recording(folder / "recording.safetensors"),
        output=output,
        num_steps=STEPS,
    )
    written = load_file(output)
    assert all(torch.isfinite(tensor).all() for tensor in written.values()), "weights and gradients are numbers"
    return written["losses"]


class Largest:
    """The largest number that any Linear of the transformer puts out."""

    def __init__(self, model: nn.Module) -> None:
        self.value = 0.0
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(self._look)

    def _look(self, _module: nn.Module, _inputs: object, output: Tensor) -> None:
        self.value = max(self.value, float(output.abs().max()))


def velocity(model: Flux, dtype: torch.dtype) -> Tensor:
    draw = torch.Generator().manual_seed(9)
    noisy = torch.randn(2, 16, 6, 4, generator=draw)
    text = TextInputs(torch.randn(2, TOKENS, 64, generator=draw), torch.randn(2, 32, generator=draw), None)
    scope = contextlib.nullcontext() if dtype is torch.float32 else torch.autocast("cpu", dtype)
    with torch.no_grad(), scope:
        return predict_velocity(model, noisy.to(dtype), torch.tensor([0.8, 0.35]), text, 1.0).float()


def test_the_model_leaves_fp16s_range_and_a_naive_forward_is_lost(
    outlier_flux: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = load_flux(outlier_flux, torch.float32, CPU)
    largest = Largest(exact)
    expected = velocity(exact, torch.float32)
    assert largest.value > 2 * FP16_LARGEST
    half = load_flux(outlier_flux, torch.float16, CPU)
    error = (velocity(half, torch.float16) - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error < 0.01
    # The same model without what is done for fp16.
    for module, name, plain in (
        ("flux", "saturated", lambda x: x),
        ("layers", "saturated", lambda x: x),
        ("joint", "as_stream", lambda x: x),
        ("layers", "stream_update", lambda linear, x: linear(x)),
    ):
        monkeypatch.setattr(f"trainer.model.{module}.{name}", plain)
    assert torch.isnan(velocity(half, torch.float16)).any()


def test_fifty_steps_in_fp16_and_bf16_follow_fp32(outlier_flux: Path, tmp_path: Path) -> None:
    exact = losses_in("no", outlier_flux, tmp_path)
    assert exact[-1] < 0.85 * exact[0], "there is a trend to follow"
    for precision in ("fp16", "bf16"):
        losses = losses_in(precision, outlier_flux, tmp_path)
        assert (losses / exact - 1)[:5].abs().max() < 0.005, precision
        # Single steps later on depend on the last bit; the course of the curve does not.
        tens = losses.view(-1, 10).mean(dim=1) / exact.view(-1, 10).mean(dim=1) - 1
        assert tens.abs().max() < 0.05, f"{precision}: {tens.tolist()}"


def test_what_is_added_to_a_stream_may_leave_the_range() -> None:
    torch.manual_seed(0)
    linear = FrozenLinear(64, 8)
    linear.weight.data[3] *= 4e4
    linear.bias.data.mul_(10)
    linear.requires_grad_(False)
    x = 20 * torch.randn(2, 5, 64)
    expected = linear(x)
    assert expected.abs().max() > FP16_LARGEST
    half = FrozenLinear(64, 8).requires_grad_(False).half()
    half.load_state_dict(linear.state_dict())
    update = stream_update(half, x.half())
    assert update.dtype == torch.float32
    of_channel = expected.abs().amax((0, 1))
    assert ((update - expected).abs().amax((0, 1)) / of_channel).max() < 0.002
    assert torch.equal(stream_update(linear, x), expected), "nothing changes in fp32"


def test_the_largest_number_stands_for_infinity_in_fp16_alone() -> None:
    beyond = torch.tensor([1.0, torch.inf, -torch.inf, 70000.0])
    assert saturated(beyond) is beyond
    assert saturated(beyond.half()).tolist() == [1.0, FP16_LARGEST, -FP16_LARGEST, FP16_LARGEST]


# ------------------------------------------------------------------------------------------------ the other models


def options_in(precision: str, *words: str) -> Options:
    return parse_command_line([f"--mixed_precision={precision}", "--device=cpu", *words]).options


def test_each_model_has_a_format_that_it_cannot_leave() -> None:
    half, brain, full = (Engine.start(options_in(precision)) for precision in ("fp16", "bf16", "no"))
    assert (half.dtype, half.text_dtype) == (torch.float16, torch.bfloat16)
    assert half.autoencoder_dtype(no_half=False) == torch.float32
    assert (brain.dtype, brain.text_dtype) == (torch.bfloat16, torch.bfloat16)
    assert brain.autoencoder_dtype(no_half=False) == torch.bfloat16
    assert brain.autoencoder_dtype(no_half=True) == torch.float32
    assert (full.dtype, full.text_dtype, full.autoencoder_dtype(no_half=False)) == (torch.float32,) * 3


def test_t5_with_outlier_weights_is_lost_in_fp16_and_not_in_the_format_it_runs_in(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    with safe_open(str(tiny_models.t5xxl), framework="pt") as file:
        metadata = file.metadata()
    weights = load_file(tiny_models.t5xxl)
    weights["encoder.block.0.layer.1.DenseReluDense.wo.weight"][5] *= 1e6
    path = tmp_path / "t5.safetensors"
    save_file(weights, path, metadata=metadata)
    ids = torch.arange(1, 9)[None]

    def encoded(dtype: torch.dtype, scope: contextlib.AbstractContextManager[object]) -> Tensor:
        with torch.no_grad(), scope:
            return encode_t5(load_t5xxl(path, dtype, CPU), ids, torch.ones_like(ids), apply_mask=True).float()

    exact = encoded(torch.float32, contextlib.nullcontext())
    assert not torch.isfinite(encoded(torch.float16, torch.autocast("cpu", torch.float16))).all()
    engine = Engine.start(options_in("fp16"))
    ours = encoded(engine.text_dtype, engine.text_autocast())
    assert torch.isfinite(ours).all()
    assert (ours - exact).abs().max() < 0.05 * exact.abs().max()


def test_a_whole_fp16_run_on_the_outliers_draws_samples_and_ends_with_numbers(
    tiny_models: TinyModels, outlier_flux: Path, tmp_path: Path
) -> None:
    dataset = make_tiny_dataset(tmp_path, count=2)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle --w 64 --h 64 --s 2 --d 1\n", encoding="utf-8")
    words = [word for word in tiny_models.arguments() if not word.startswith("--pretrained")]
    words += [
        f"--pretrained_model_name_or_path={outlier_flux}",
        f"--dataset_config={dataset}",
        "--mixed_precision=fp16",
    ]
    words += [f"--sample_prompts={prompts}", "--sample_every_n_steps=2", f"--output_dir={tmp_path / 'out'}"]
    words += ["--output_name=x", "--max_train_steps=4", "--network_dim=4", "--device=cpu", "--seed=1"]
    words += ["--t5xxl_max_token_length=16", "--learning_rate=1e-3", "--network_dropout=0.2"]
    train(parse_command_line(words), Reporter(is_main=False))
    assert all(torch.isfinite(tensor).all() for tensor in load_file(tmp_path / "out" / "x.safetensors").values())
    assert len(list((tmp_path / "out" / "sample").glob("*.png"))) == 2
