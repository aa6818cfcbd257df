"""The command that writes a LoRA in another form, as it is typed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.lora.random_lora import LAYERS, assert_same_tensors, random_lora
from tests.tiny import TinyModels
from trainer.__main__ import main
from trainer.lora.network import LoraNetwork
from trainer.model.weights import load_flux
from trainer.schema.lora_spec import LoraSpec
from trainer.train.checkpoint import save_lora

METADATA = {"ss_steps": "20", "modelspec.title": "My cat"}


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    path = tmp_path / "lora.safetensors"
    save_lora(path, random_lora(dtype=torch.bfloat16), METADATA)
    return path


def convert(source: Path, target: Path, form: str, *more: str) -> int:
    return main(["convert-lora", f"--input={source}", f"--output={target}", f"--form={form}", *more])


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


def test_a_lora_goes_to_diffusers_and_back_with_its_metadata_and_hash(lora: Path, tmp_path: Path) -> None:
    other, back = tmp_path / "diffusers.safetensors", tmp_path / "back.safetensors"
    assert convert(lora, other, "diffusers") == 0
    assert "transformer.transformer_blocks.0.attn.to_q.lora_A.weight" in load_file(other)
    assert {key: metadata_of(other)[key] for key in METADATA} == METADATA
    assert metadata_of(other)["sshs_model_hash"] != metadata_of(lora)["sshs_model_hash"]
    assert convert(other, back, "sd-scripts") == 0
    assert_same_tensors(load_file(back), load_file(lora))
    assert metadata_of(back) == metadata_of(lora)


def test_an_existing_file_is_replaced_only_when_asked(
    lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "there.safetensors"
    target.write_bytes(b"mine")
    assert convert(lora, target, "diffusers") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert target.read_bytes() == b"mine"
    assert convert(lora, target, "diffusers", "--overwrite") == 0
    assert len(load_file(target)) > 10
    assert convert(lora, lora, "diffusers", "--overwrite") == 2


def test_mistakes_have_exit_codes_2_and_3(
    lora: Path, tmp_path: Path, tiny_models: TinyModels, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out.safetensors"
    assert convert(tmp_path / "missing.safetensors", target, "diffusers") == 3
    assert convert(tiny_models.ae, target, "diffusers") == 3
    assert "this is a FLUX.1 autoencoder, given as --input" in capsys.readouterr().err
    assert convert(lora, target, "bfl") == 3
    assert "lora_te1_text_model_encoder_layers_0_self_attn_q_proj" in capsys.readouterr().err
    assert convert(lora, tmp_path / "out.pt", "diffusers") == 2
    assert convert(lora, target, "diffusers", f"--model={tiny_models.flux_dev}") == 2
    with pytest.raises(SystemExit) as caught:
        convert(lora, target, "lycoris")
    assert caught.value.code == 2
    assert not target.exists()


def test_a_bfl_file_is_made_whole_with_the_model(
    tmp_path: Path, tiny_models: TinyModels, capsys: pytest.CaptureFixture[str]
) -> None:
    flux = load_flux(tiny_models.flux_dev, torch.float32, "cpu")
    norms = {key: tensor for key, tensor in flux.state_dict().items() if key.endswith("_norm.scale")}
    num_linears = sum(isinstance(module, torch.nn.Linear) for module in flux.modules())
    network = LoraNetwork.attach(flux, None, LoraSpec(rank=4, alpha=4), torch.Generator().manual_seed(0))
    source, target, back = (tmp_path / f"{name}.safetensors" for name in ("lora", "bfl", "back"))
    save_lora(source, network.published_state_dict(torch.float32), {})
    assert convert(source, target, "bfl", f"--model={tiny_models.flux_dev}") == 0
    state = load_file(target)
    assert sum(key.endswith(".lora_A.weight") for key in state) == num_linears
    assert {key for key in state if key.endswith(".scale")} == set(norms)
    assert all(torch.equal(state[key].float(), tensor) for key, tensor in norms.items())
    assert convert(target, back, "sd-scripts") == 0
    assert_same_tensors(load_file(back), load_file(source))
    capsys.readouterr()
    assert convert(source, target, "bfl", "--overwrite") == 0
    assert "give --model" in capsys.readouterr().out
    save_lora(source, random_lora(names=tuple(LAYERS), hidden=8), {})
    assert convert(source, target, "bfl", "--overwrite", f"--model={tiny_models.flux_schnell}") == 3
    assert "belongs to another model" in capsys.readouterr().err


def test_a_list_that_goes_on_says_so(lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(lora, tmp_path / "out.safetensors", "xlabs") == 3
    assert ", ... (" in capsys.readouterr().err
