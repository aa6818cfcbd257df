"""A loss that is no number: what the run keeps, what it says, and the replay of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import TinyModels, make_tiny_dataset
from trainer.__main__ import replay_recording
from trainer.schema.base import UserError
from trainer.schema.cli import parse_command_line
from trainer.train.conditioning import TextInputs, show_padding, text_inputs
from trainer.train.lost_numbers import likely_cause
from trainer.train.objective import FlowBatch
from trainer.train.recipe import train
from trainer.train.recording import read_recording, write_recording
from trainer.train.replay import replay
from trainer.train.reporting import Reporter


def words(models: TinyModels, folder: Path, *more: str) -> list[str]:
    dataset = make_tiny_dataset(folder, count=3)
    return [
        *models.arguments(),
        f"--dataset_config={dataset}",
        f"--output_dir={folder / 'out'}",
        "--output_name=x",
        "--device=cpu",
        "--seed=5",
        "--network_dim=4",
        "--network_train_unet_only",
        "--cache_latents",
        "--cache_text_encoder_outputs",
        "--t5xxl_max_token_length=16",
        "--max_train_steps=6",
        *more,
    ]


@pytest.mark.parametrize("more", [(), ("--apply_t5_attn_mask", "--ip_noise_gamma=0.1", "--mixed_precision=bf16")])
def test_the_step_is_recorded_the_lora_kept_and_the_replay_shows_the_same(
    tiny_models: TinyModels, tmp_path: Path, more: tuple[str, ...]
) -> None:
    # So high a rate makes numbers that are still finite, and products that are not.
    with pytest.raises(UserError, match="the loss became nan at step 2") as error:
        train(parse_command_line(words(tiny_models, tmp_path, "--learning_rate=1e30", *more)), Reporter(is_main=False))
    assert error.value.exit_code == 3
    path = tmp_path / "out" / "replay" / "step00000002.safetensors"
    kept = tmp_path / "out" / "x-step00000001.safetensors"
    assert all(text in str(error.value) for text in (str(path), str(kept), "python -m trainer replay", "learning rate"))
    recording = read_recording(path)
    for name, tensor in load_file(kept).items():
        assert torch.isfinite(tensor).all()
        if not name.endswith(".alpha"):
            assert torch.equal(recording.initial[name], tensor), "the LoRA is recorded as it was"
    # The model and every option come from the recording.
    output = tmp_path / "replayed.safetensors"
    command = parse_command_line(list(recording.options))
    with pytest.raises(UserError, match="the loss became nan at step 1"):
        replay(command, Reporter(is_main=False), source=path, output=output, num_steps=1)
    assert torch.isnan(load_file(output)["losses"]).all()


def test_a_recorded_step_gives_the_loss_of_the_run(
    tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recorded batch is the trained one: with sound weights in it, the replay's loss is the run's own."""
    losses: list[float] = []
    report = Reporter.step

    def listen(self: Reporter, *, step: int, scalars: dict[str, float], **fields: object) -> None:
        losses.append(scalars["loss/current"])
        report(self, step=step, scalars=scalars, **fields)

    monkeypatch.setattr(Reporter, "step", listen)
    path = tmp_path / "out" / "replay" / "step00000002.safetensors"
    with pytest.raises(UserError):
        train(parse_command_line(words(tiny_models, tmp_path, "--learning_rate=1e30")), Reporter(is_main=False))
    recorded = load_file(path)
    losses.clear()
    train(parse_command_line(words(tiny_models, tmp_path, "--learning_rate=1e-30")), Reporter(is_main=False))
    trained = load_file(tmp_path / "out" / "x.safetensors")
    sound = {key: trained[key.removeprefix("init.")] if key.startswith("init.") else t for key, t in recorded.items()}
    source = tmp_path / "sound.safetensors"
    save_file(sound, source)
    output = tmp_path / "replayed.safetensors"
    command = parse_command_line(words(tiny_models, tmp_path, "--learning_rate=1e-30"))
    replay(command, Reporter(is_main=False), source=source, output=output, num_steps=1)
    assert load_file(output)["losses"].item() == pytest.approx(losses[1], rel=1e-6)


def test_the_lora_of_a_text_encoder_does_not_keep_a_step_from_being_replayed(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    given = [word for word in words(tiny_models, tmp_path, "--learning_rate=1e30") if "unet_only" not in word]
    with pytest.raises(UserError, match="at step 2"):
        train(parse_command_line(given), Reporter(is_main=False))
    path = tmp_path / "out" / "replay" / "step00000002.safetensors"
    recording = read_recording(path)
    assert any(key.startswith("lora_te1_") for key in recording.initial)
    output = tmp_path / "replayed.safetensors"
    with pytest.raises(UserError, match="at step 1"):
        replay(
            parse_command_line(list(recording.options)),
            Reporter(is_main=False),
            source=path,
            output=output,
            num_steps=1,
        )
    after = [key for key in load_file(output) if key.startswith("after.")]
    assert after
    assert all(key.startswith("after.lora_unet_") for key in after)


@pytest.mark.parametrize("lengths", [(4, 7), (7, 7), (3, 9)])
def test_chromas_text_mask_comes_back_from_a_recording(tmp_path: Path, lengths: tuple[int, int]) -> None:
    """The batch shows one padding token that the recorded mask, which counts real tokens, does not."""
    txt = torch.randn(2, 9, 8)
    real = (torch.arange(9)[None] < torch.tensor(lengths)[:, None]).long()
    text = text_inputs(txt, torch.zeros(2, 0), show_padding(real, 1), apply_mask=True)
    latents = torch.zeros(2, 16, 4, 4)
    made = FlowBatch(latents, latents, torch.ones(2), torch.ones(2), latents, text, torch.ones(2))
    options = parse_command_line(["--model_type=chroma"]).options
    write_recording(tmp_path / "step.safetensors", made, {}, options)
    recording = read_recording(tmp_path / "step.safetensors")
    shown = text_inputs(
        recording.t5_out, recording.clip_pooled, show_padding(recording.t5_attn_mask, 1), apply_mask=True
    )
    assert torch.equal(shown.txt, text.txt)
    assert (shown.mask is None) == (text.mask is None)
    assert text.mask is None or (shown.mask is not None and torch.equal(shown.mask, text.mask))


def batch(**changes: torch.Tensor) -> FlowBatch:
    latents = changes.get("latents", torch.zeros(2, 16, 4, 4))
    text = TextInputs(changes.get("txt", torch.zeros(2, 3, 8)), torch.zeros(2, 4), None)
    return FlowBatch(latents, latents, torch.ones(2), torch.ones(2), latents, text, torch.ones(2))


def test_the_first_cause_on_the_way_is_named() -> None:
    options = parse_command_line(["--mixed_precision=fp16"]).options
    lost = torch.zeros(2, 16, 4, 4)
    lost[1, 0, 0, 0] = torch.nan
    pictures, weights = ["a.png", "b.png"], {"lora_up": torch.zeros(3)}
    assert "The latents of b.png are no numbers" in likely_cause(batch(latents=lost), pictures, weights, options)
    txt = torch.full((2, 3, 8), torch.inf)
    assert "text encoding of a.png, b.png" in likely_cause(batch(txt=txt), pictures, weights, options)
    broken = {"lora_up": torch.full((3,), torch.nan)}
    assert "LoRA's own weights are no numbers (lora_up)" in likely_cause(batch(), pictures, broken, options)
    assert "beyond fp16's range" in likely_cause(batch(), pictures, weights, options)


def test_the_command_replays_with_the_options_of_the_recording(tiny_models: TinyModels, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="steps is 0"):
        replay_recording([f"--input={tmp_path / 'x'}", f"--output={tmp_path / 'y'}", "--steps=0"])
    with pytest.raises(UserError, match="the replay file cannot be read"):
        replay_recording([f"--input={tmp_path / 'x'}", f"--output={tmp_path / 'y'}", "--steps=1"])
