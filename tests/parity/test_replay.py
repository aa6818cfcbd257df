"""Recorded training steps, replayed: losses, gradients and weights, number by number."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.func import functional_call  # pyright: ignore[reportUnknownVariableType]

from trainer.lora.network import LoraNetwork
from trainer.model.flux import Flux
from trainer.model.packing import image_ids, pack_latents, text_ids, unpack_latents
from trainer.model.weights import load_chroma, load_flux
from trainer.schema.base import UserError
from trainer.schema.cli import parse_command_line
from trainer.schema.lora_spec import spec_from_network_args
from trainer.tools.tiny_models import make_chroma, make_flux
from trainer.train.recording import read_recording
from trainer.train.replay import replay
from trainer.train.replay_options import replay_advice
from trainer.train.reporting import Reporter

RAW = ("--model_prediction_type=raw",)
GOLDEN_OPTIONS = ("--network_dim=4", "--network_alpha=1", "--learning_rate=1e-3", "--max_grad_norm=0")


def replayed(source: Path, folder: Path, *words: str, num_steps: int = 5) -> dict[str, Tensor]:
    output = folder / "replayed.safetensors"
    command = parse_command_line(["--device=cpu", "--seed=3", *words])
    replay(command, Reporter(is_main=False), source=source, output=output, num_steps=num_steps)
    return load_file(output)


@pytest.mark.parametrize("more", [(), ("--gradient_checkpointing",), ("--blocks_to_swap=1",)])
def test_five_steps_follow_the_reference(golden: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    source = golden / "replay" / "t2_default_nonzero.safetensors"
    recorded = load_file(source)
    facts = json.loads(source.with_suffix(".json").read_text(encoding="utf-8"))
    model = f"--pretrained_model_name_or_path={golden / 'replay' / 'model_dev.safetensors'}"
    ours = replayed(source, tmp_path, model, *facts["options"], *GOLDEN_OPTIONS, *more)
    assert ours["losses"].tolist() == pytest.approx(facts["losses"], rel=1e-6)
    torch.testing.assert_close(ours["out.model_pred"], recorded["out.model_pred"], atol=5e-6, rtol=0)
    assert torch.equal(ours["out.target"], recorded["out.target"])
    keys = [key.removeprefix("init.") for key in recorded if key.startswith("init.")]
    assert {key for key in ours if key.startswith(("grad.", "after."))} == {
        f"{kind}.{key}" for key in keys for kind in ("grad", "after")
    }
    assert max(float((ours[f"grad.{key}"] - recorded[f"grad.{key}"]).abs().max()) for key in keys) <= 5e-8
    differences = torch.cat([(ours[f"after.{key}"] - recorded[f"after5.{key}"]).abs().flatten() for key in keys])
    assert differences.max() <= 2e-5
    assert differences.quantile(0.999) <= 1e-6


# ------------------------------------------------------------------------------- against a computation of its own


@dataclass(frozen=True)
class Case:
    """Options of one replay, and what they mean, for `closed_form`."""

    words: tuple[str, ...] = ()
    network_args: tuple[str, ...] = ()
    prediction: str = "raw"
    weighting: str = "uniform"
    loss: str = "l2"
    schedule: str = "constant"
    max_grad_norm: float = 0.0
    guidance: float = 1.0
    masks_text: bool = False
    network: str = "lora_flux"
    up_ratio: float = 1.0
    optimizer: dict[str, float] = field(default_factory=dict[str, float])

    def options(self) -> list[str]:
        return [
            f"--model_prediction_type={self.prediction}",
            f"--weighting_scheme={self.weighting}",
            f"--loss_type={self.loss}",
            f"--huber_schedule={self.schedule}",
            f"--max_grad_norm={self.max_grad_norm}",
            f"--guidance_scale={self.guidance}",
            f"--network_module=networks.{self.network}",
            *(["--apply_t5_attn_mask"] if self.masks_text else []),
            *(["--network_args", *self.network_args] if self.network_args else []),
            *(["--optimizer_args", *(f"{key}={value}" for key, value in self.optimizer.items())]),
        ]


CASES = {
    "plain": Case(),
    "guidance": Case(guidance=3.5),
    "double blocks": Case(network_args=("train_blocks=double",)),
    "some blocks": Case(network_args=("train_double_block_indices=1", "train_single_block_indices=0,2-3")),
    "type dims": Case(network_args=("img_attn_dim=2", "txt_mlp_dim=0", "single_mod_dim=6")),
    "layers before the blocks": Case(network_args=("in_dims=2,2,2,2,2",)),
    "split qkv": Case(network_args=("split_qkv=True",)),
    "text mask": Case(masks_text=True),
    "cosmap": Case(prediction="sigma_scaled", weighting="cosmap"),
    "sigma_sqrt": Case(prediction="sigma_scaled", weighting="sigma_sqrt"),
    "additive": Case(prediction="additive"),
    "clipping": Case(max_grad_norm=0.01),
    "huber, constant": Case(loss="huber"),
    "huber, exponential": Case(loss="huber", schedule="exponential"),
    "smooth_l1, exponential": Case(loss="smooth_l1", schedule="exponential"),
    "l1": Case(loss="l1"),
    "LoRA+": Case(network_args=("loraplus_unet_lr_ratio=2",), up_ratio=2.0),
    "DoRA": Case(network_args=("dora=True",)),
    "DoRA in parts, clipped": Case(network_args=("dora=True", "split_qkv=True"), max_grad_norm=0.02),
    "OFT": Case(network="oft_flux", network_args=("enable_all_linear=True",)),
    "OFT, attention alone, huber": Case(network="oft_flux", loss="huber", masks_text=True),
    "split qkv, mask, cosmap, clipping": Case(
        network_args=("split_qkv=True", "train_double_block_indices=0"),
        prediction="sigma_scaled",
        weighting="cosmap",
        masks_text=True,
        max_grad_norm=0.05,
    ),
    "weight decay": Case(optimizer={"weight_decay": 0.1, "eps": 1e-6}),
}
CLOSED_FORM_STEPS = 3
RATE, RANK, ALPHA, HUBER_C = 1e-3, 4, 2.0, 0.1
TIMESTEPS, LOSS_WEIGHTS, TOKENS, LENGTHS = (712.5, 431.25), (1.0, 0.3), 7, (4, 6)


def make_recording(path: Path, model: Path, keys: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(5)
    with safe_open(str(model), framework="pt") as file:
        pooled = json.loads(file.metadata()["config"]).get("vec_in_dim", 8)  # Chroma reads none
        context = file.get_slice("txt_in.weight").get_shape()[1]
    mask = torch.zeros(2, TOKENS, dtype=torch.int64)
    for row, length in enumerate(LENGTHS):
        mask[row, :length] = 1
    recording = {
        "in.latents": torch.randn(2, 16, 6, 4, generator=draw),
        "in.noise": torch.randn(2, 16, 6, 4, generator=draw),
        "in.timesteps": torch.tensor(TIMESTEPS),
        "in.clip_pooled": torch.randn(2, pooled, generator=draw),
        "in.t5_out": torch.randn(2, TOKENS, context, generator=draw),
        "in.t5_attn_mask": mask,
        "in.loss_weights": torch.tensor(LOSS_WEIGHTS),
        **{f"init.{key}": 0.1 * torch.randn(shape, generator=draw) for key, shape in keys.items()},
    }
    save_file(recording, path)
    return recording


def dense_weights(model: Flux, trained: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model's parameters with what the trained tensors make of each adapted weight."""
    weights: dict[str, Tensor] = dict(model.named_parameters())
    paths = {f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}": name for name in weights}
    for name in sorted({key.partition(".")[0] for key in trained}):
        path = paths[name.replace("oft_unet_", "lora_unet_")]
        own = {key.partition(".")[2]: tensor for key, tensor in trained.items() if key.startswith(f"{name}.")}
        weights[path] = _turned(weights[path], own) if name.startswith("oft_") else _with_lora(weights[path], own)
    return weights


def _with_lora(weight: Tensor, own: dict[str, Tensor]) -> Tensor:
    """W + alpha / rank up down, part below part; for DoRA with columns of the trained length."""
    parts = sorted(key.removeprefix("lora_down.") for key in own if key.startswith("lora_down."))
    deltas = [
        ALPHA / own[f"lora_down.{part}"].shape[0] * (own[f"lora_up.{part}"] @ own[f"lora_down.{part}"])
        for part in parts
    ]
    changed = weight + torch.cat(deltas)
    if "dora_scale" not in own:
        return changed
    # The paper's section 4.3: the length counts as constant in backward.
    return changed * (own["dora_scale"] / changed.detach().norm(dim=0))


def _turned(weight: Tensor, own: dict[str, Tensor]) -> Tensor:
    """Each block of rows turned: by R = (I + Q) (I - Q)^-1 with Q = P - P' no longer than alpha times the part's size."""
    rows: list[Tensor] = []
    start = 0
    for index in range(len(own)):
        blocks = own[f"oft_blocks.{index}"]
        num_blocks, side, _ = blocks.shape
        q = blocks - blocks.transpose(1, 2)
        limit = ALPHA * num_blocks * side
        q = q * (q.norm().clamp(max=limit) / q.norm())
        identity = torch.eye(side, dtype=q.dtype)
        for block in q:
            turn = (identity + block) @ torch.linalg.inv(identity - block)
            rows.append(turn.t() @ weight[start : start + side])
            start += side
    return torch.cat(rows)


def closed_form_loss(case: Case, model: Flux, lora: dict[str, Tensor], given: dict[str, Tensor]) -> Tensor:
    """Formulas written out once more, in float64 on dense weights."""
    latents, noise = given["in.latents"].double(), given["in.noise"].double()
    sigma = (given["in.timesteps"].double() / 1000)[:, None, None, None]
    noisy = (1 - sigma) * latents + sigma * noise
    packed = functional_call(
        model,
        dense_weights(model, lora),
        kwargs={
            "img": pack_latents(noisy),
            "img_ids": image_ids(3, 2, torch.device("cpu")),
            "txt": given["in.t5_out"].double(),
            "txt_ids": text_ids(TOKENS, torch.device("cpu")),
            "timesteps": given["in.timesteps"].double() / 1000,
            "y": given["in.clip_pooled"].double(),
            "guidance": torch.full((2,), case.guidance),
            "txt_attention_mask": given["in.t5_attn_mask"] if case.masks_text else None,
        },
    )
    velocity = unpack_latents(packed, 6, 4)
    prediction = {"raw": velocity, "additive": velocity + noisy, "sigma_scaled": noisy - sigma * velocity}
    difference = prediction[case.prediction] - (noise - latents)
    c = HUBER_C if case.schedule == "constant" else HUBER_C**sigma
    pseudo = torch.sqrt(difference**2 + c**2) - c
    error = {"l2": difference**2, "l1": difference.abs(), "huber": 2 * c * pseudo, "smooth_l1": 2 * pseudo}[case.loss]
    if case.prediction == "sigma_scaled":
        error = error * {"cosmap": 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2)), "sigma_sqrt": 1 / sigma**2}.get(
            case.weighting, torch.ones_like(sigma)
        )
    return (error.mean((1, 2, 3)) * given["in.loss_weights"].double()).mean()


def adamw_by_hand(
    case: Case, model: Flux, start: dict[str, Tensor], given: dict[str, Tensor]
) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
    """Losses, first gradients before clipping, and weights after the steps of AdamW as published."""
    lora = {key: tensor.double().requires_grad_() for key, tensor in start.items()}
    first = {key: torch.zeros_like(tensor) for key, tensor in lora.items()}
    second = {key: torch.zeros_like(tensor) for key, tensor in lora.items()}
    decay, eps = case.optimizer.get("weight_decay", 0.01), case.optimizer.get("eps", 1e-8)
    losses: list[float] = []
    recorded: dict[str, Tensor] = {}
    for step in range(1, CLOSED_FORM_STEPS + 1):
        loss = closed_form_loss(case, model, lora, given)
        losses.append(loss.item())
        gradients = dict(zip(lora, torch.autograd.grad(loss, list(lora.values())), strict=True))
        recorded = recorded or gradients
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients.values()))
        factor = min(1.0, case.max_grad_norm / (norm + 1e-6)) if case.max_grad_norm else 1.0
        with torch.no_grad():
            for key, tensor in lora.items():
                gradient = factor * gradients[key]
                first[key] = 0.9 * first[key] + 0.1 * gradient
                second[key] = 0.999 * second[key] + 0.001 * gradient**2
                rate = RATE * (case.up_ratio if "lora_up" in key else 1.0)
                tensor.mul_(1 - rate * decay)
                deviation = (second[key] / (1 - 0.999**step)).sqrt() + eps
                tensor.sub_(rate * first[key] / (1 - 0.9**step) / deviation)
    return losses, recorded, {key: tensor.detach() for key, tensor in lora.items()}


@pytest.fixture(scope="module")
def small_flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_flux(tmp_path_factory.mktemp("replay") / "flux.safetensors", hidden=32, heads=2, seed=0)


@pytest.mark.parametrize("name", CASES)
def test_a_replay_is_the_closed_form(name: str, small_flux: Path, tmp_path: Path) -> None:
    case = CASES[name]
    words = [
        f"--pretrained_model_name_or_path={small_flux}",
        f"--network_dim={RANK}",
        f"--network_alpha={ALPHA}",
        f"--learning_rate={RATE}",
        *case.options(),
    ]
    module = f"networks.{case.network}"
    spec = spec_from_network_args(case.network_args, network_dim=RANK, network_alpha=ALPHA, network_module=module)
    network = LoraNetwork.attach(load_flux(small_flux, torch.float32, "cpu"), None, spec, torch.Generator())
    shapes = {key: tuple(parameter.shape) for key, parameter in network.training_state().items()}
    source = tmp_path / "recording.safetensors"
    given = make_recording(source, small_flux, shapes)
    start = {key: given[f"init.{key}"] for key in shapes}
    ours = replayed(source, tmp_path, *words, num_steps=CLOSED_FORM_STEPS)
    model = load_flux(small_flux, torch.float64, "cpu")
    losses, gradients, after = adamw_by_hand(case, model, start, given)
    assert ours["losses"].tolist() == pytest.approx(losses, rel=1e-6)
    assert max(float((ours[f"grad.{key}"] - gradients[key]).abs().max()) for key in shapes) <= 5e-8
    differences = torch.cat([(ours[f"after.{key}"] - after[key]).abs().flatten() for key in shapes])
    # A weight whose gradient is next to nothing goes by the rate times its sign, which is rounding.
    assert differences.max() <= 2e-5 * case.up_ratio
    assert differences.quantile(0.999) <= 1e-6
    if "split_qkv=True" in case.network_args:
        layer = "lora_unet_double_blocks_0_img_attn_qkv"
        for part in range(3):
            assert ours[f"grad.{layer}.lora_down.{part}.weight"].shape == (RANK, 32)
            assert ours[f"after.{layer}.lora_up.{part}.weight"].shape == (32, RANK)


def test_a_replay_of_chroma_shows_one_padding_token(tmp_path: Path) -> None:
    path = make_chroma(tmp_path / "chroma.safetensors", hidden=48, heads=2, depth=2)
    model = load_chroma(path, torch.float64, "cpu")
    source = tmp_path / "recording.safetensors"
    given = make_recording(source, path, {})
    ours = replayed(
        source, tmp_path, f"--pretrained_model_name_or_path={path}", "--model_type=chroma", "--network_dim=2", *RAW
    )

    def loss(num_padding: int) -> float:
        latents, noise = given["in.latents"].double(), given["in.noise"].double()
        times = given["in.timesteps"].double() / 1000
        sigma = times[:, None, None, None]
        velocity = model(
            img=pack_latents((1 - sigma) * latents + sigma * noise),
            img_ids=image_ids(3, 2),
            txt=given["in.t5_out"].double(),
            txt_ids=text_ids(TOKENS),
            timesteps=times,
            guidance=torch.zeros(2),
            txt_attention_mask=torch.arange(TOKENS)[None] < torch.tensor(LENGTHS)[:, None] + num_padding,
        )
        errors = (unpack_latents(velocity, 6, 4) - (noise - latents)).square().mean((1, 2, 3))
        return float((errors * given["in.loss_weights"].double()).mean())

    assert ours["losses"][0].item() == pytest.approx(loss(1), rel=1e-6)
    assert ours["losses"][0].item() != pytest.approx(loss(0), rel=1e-4)
    assert not any("modulation" in key or "_mod_" in key for key in ours)


# ------------------------------------------------------------------------------------------------- what may be wrong


def test_a_recording_of_another_lora_is_refused(small_flux: Path, tmp_path: Path) -> None:
    source = tmp_path / "recording.safetensors"
    make_recording(source, small_flux, {"lora_unet_single_blocks_0_linear1.lora_down.weight": (4, 32)})
    with pytest.raises(UserError, match="are trained and not recorded") as error:
        replayed(source, tmp_path, f"--pretrained_model_name_or_path={small_flux}")
    assert error.value.exit_code == 3


def test_everything_wrong_with_a_recording_is_named(small_flux: Path, tmp_path: Path) -> None:
    source = tmp_path / "recording.safetensors"
    given = make_recording(source, small_flux, {})
    save_file({**given, "in.noise": torch.zeros(2, 16, 6, 2), "in.loss_weights": torch.ones(3)}, source)
    with pytest.raises(UserError) as error:
        replayed(source, tmp_path, f"--pretrained_model_name_or_path={small_flux}")
    assert [problem.what for problem in error.value.problems] == [
        "in.noise is [2, 16, 6, 2]; it must be [2, 16, 6, 4]",
        "in.loss_weights is [3]; it must be [2]",
    ]
    save_file({"in.latents": given["in.latents"]}, source)
    with pytest.raises(UserError, match=re.escape("in.noise, in.timesteps, in.clip_pooled, in.t5_out are missing")):
        replayed(source, tmp_path, f"--pretrained_model_name_or_path={small_flux}")


def test_a_loss_that_is_no_number_is_replayed_and_reported(small_flux: Path, tmp_path: Path) -> None:
    source = tmp_path / "recording.safetensors"
    given = make_recording(source, small_flux, {})
    given["in.t5_out"][0, 0, 0] = math.inf
    save_file(given, source)
    with pytest.raises(UserError, match="the loss became nan at step 1"):
        replayed(source, tmp_path, f"--pretrained_model_name_or_path={small_flux}", num_steps=3)
    written = load_file(tmp_path / "replayed.safetensors")
    assert torch.isnan(written["losses"]).tolist() == [True, True, True]
    assert torch.isnan(written["out.model_pred"]).any()


def test_options_that_a_replay_has_no_use_for_get_one_line(small_flux: Path, tmp_path: Path) -> None:
    source = tmp_path / "recording.safetensors"
    given = make_recording(source, small_flux, {})
    model = f"--pretrained_model_name_or_path={small_flux}"
    words = ["--gradient_accumulation_steps=4", "--sigmoid_scale=2", "--guidance_scale=2"]
    save_file(given, source, metadata={"options": json.dumps(words[1:])})
    recording = read_recording(source)

    def lines(*more: str) -> list[str]:
        return list(replay_advice(parse_command_line([model, *more]), recording))

    assert lines(*words, "--learning_rate=1", "--noise_offset=0.1", "--save_every_n_steps=1") == [
        "gradient_accumulation_steps, save_every_n_steps have no effect on a replay: it makes --steps steps on one batch "
        "that is recorded"
    ]
    assert [line.split(" has no")[0] for line in lines("--sigmoid_scale=3")] == ["sigmoid_scale"], "not as recorded"
    assert lines(*words[1:], "--device=cpu", "--network_dim=2") == []


def test_a_replay_refuses_what_it_cannot_train_and_files_that_are_not_there(small_flux: Path, tmp_path: Path) -> None:
    source = tmp_path / "recording.safetensors"
    make_recording(source, small_flux, {})
    model = f"--pretrained_model_name_or_path={small_flux}"
    with pytest.raises(UserError) as error:
        replayed(source, tmp_path, model, "--network_train_text_encoder_only", f"--network_weights={tmp_path / 'a'}")
    assert [(problem.field, problem.what) for problem in error.value.problems] == [
        (
            "network_train_text_encoder_only",
            "a replay trains the transformer alone, which network_train_text_encoder_only rules out",
        ),
        ("network_weights", "this file does not exist"),
    ]


def test_a_replay_takes_layers_and_ranks_from_the_file_that_is_named(small_flux: Path, tmp_path: Path) -> None:
    source, lora = tmp_path / "recording.safetensors", tmp_path / "lora.safetensors"
    make_recording(source, small_flux, {})
    name = "lora_unet_single_blocks_0_linear2"
    down, up = torch.ones(3, 160), torch.ones(32, 3)
    save_file(
        {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(3.0)}, lora
    )
    words = [f"--pretrained_model_name_or_path={small_flux}", f"--network_weights={lora}", "--dim_from_weights"]
    ours = replayed(source, tmp_path, *words, *RAW, num_steps=1)
    assert {key: tuple(tensor.shape) for key, tensor in ours.items() if key.startswith("after.")} == {
        f"after.{name}.lora_down.weight": (3, 160),
        f"after.{name}.lora_up.weight": (32, 3),
    }
