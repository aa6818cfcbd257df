"""The models against recorded reference numbers; tests/golden holds them, fp32 on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from trainer.model.prompt_tokenizers import load_clip_tokenizer, load_t5_tokenizer
from trainer.model.text_encoders import encode_clip, encode_t5
from trainer.model.weights import load_autoencoder, load_clip_l, load_flux, load_t5xxl

FORWARD_LIMIT = 5e-6
AUTOENCODER_LIMIT = 1e-5


def assert_near(ours: Tensor, recorded: Tensor, limit: float) -> None:
    torch.testing.assert_close(ours, recorded, atol=limit, rtol=0)


@pytest.mark.parametrize(
    ("model", "case"),
    [
        ("model_dev", "dev_forward_a"),
        ("model_dev", "dev_forward_b"),
        ("model_dev", "dev_forward_wide"),
        ("model_schnell", "schnell_forward_a"),
    ],
)
def test_the_transformer_gives_the_recorded_velocity(golden: Path, model: str, case: str) -> None:
    flux = load_flux(golden / f"{model}.safetensors", torch.float32, "cpu")
    data = load_file(golden / f"{case}.safetensors")
    names = ("img", "img_ids", "txt", "txt_ids", "timesteps", "y", "guidance")
    given = {name: data[name] for name in names if name in data}
    with torch.no_grad():
        plain = flux(**given)
        masked = flux(**given, txt_attention_mask=data["txt_attention_mask"])
    assert_near(plain, data["out_bfl"], FORWARD_LIMIT)
    assert_near(plain, data["out_sdscripts"], FORWARD_LIMIT)
    assert_near(masked, data["out_sdscripts_masked"], FORWARD_LIMIT)


def test_masked_text_is_as_good_as_text_cut_off(golden: Path) -> None:
    flux = load_flux(golden / "model_dev.safetensors", torch.float32, "cpu")
    data = load_file(golden / "dev_forward_a.safetensors")
    mask = data["txt_attention_mask"]
    for row in range(mask.shape[0]):
        num_real = int(mask[row].sum())
        assert mask[row, :num_real].all()
        given = {
            name: data[name][row : row + 1]
            for name in ("img", "img_ids", "txt", "txt_ids", "timesteps", "y", "guidance")
        }
        cut = given | {"txt": given["txt"][:, :num_real], "txt_ids": given["txt_ids"][:, :num_real]}
        with torch.no_grad():
            assert_near(flux(**given, txt_attention_mask=mask[row : row + 1]), flux(**cut), FORWARD_LIMIT)


@pytest.mark.parametrize("case", ["ae_a", "ae_b"])
def test_the_autoencoder_gives_the_recorded_latents_and_images(golden: Path, case: str) -> None:
    autoencoder = load_autoencoder(golden / "model_ae.safetensors", torch.float32, "cpu")
    data = load_file(golden / f"{case}.safetensors")
    with torch.no_grad():
        moments = autoencoder.encode_moments(data["image"])
        assert_near(moments, data["moments"], AUTOENCODER_LIMIT)
        assert_near(autoencoder.encode(data["image"], sample=False), data["latent_mean_scaled"], AUTOENCODER_LIMIT)
        sampled = autoencoder.latents_from_moments(moments, data["eps"])
        assert_near(sampled, data["latent_sampled_scaled_sdscripts"], AUTOENCODER_LIMIT)
        assert_near(autoencoder.decode(data["z"]), data["decoded_bfl"], AUTOENCODER_LIMIT)


def test_the_tokenizers_give_the_recorded_ids(golden: Path) -> None:
    prompts = json.loads((golden / "prompts.json").read_text())
    data = load_file(golden / "te.safetensors")
    clip_ids, _ = load_clip_tokenizer(golden / "tokenizer_clip.json").encode(prompts, 77)
    t5_ids, t5_mask = load_t5_tokenizer(golden / "tokenizer_t5.json").encode(prompts, 64)
    assert torch.equal(clip_ids, data["clip_input_ids"])
    assert torch.equal(t5_ids, data["t5_input_ids"])
    assert torch.equal(t5_mask, data["t5_attention_mask"])


@pytest.mark.parametrize(
    ("activation", "case"), [("quick_gelu", "clip_pooled.quick_gelu"), ("gelu", "clip_pooled.sdscripts_gelu")]
)
def test_clip_gives_the_recorded_vector_with_each_activation(golden: Path, activation: str, case: str) -> None:
    clip = load_clip_l(golden / "model_clip_l.safetensors", torch.float32, "cpu", activation)
    data = load_file(golden / "te.safetensors")
    with torch.no_grad():
        assert_near(encode_clip(clip, data["clip_input_ids"]), data[case], FORWARD_LIMIT)


@pytest.mark.parametrize(("apply_mask", "case"), [(False, "t5_hidden.nomask"), (True, "t5_hidden.masked")])
def test_t5_gives_the_recorded_states_with_and_without_mask(golden: Path, apply_mask: bool, case: str) -> None:
    t5 = load_t5xxl(golden / "model_t5xxl.safetensors", torch.float32, "cpu")
    data = load_file(golden / "te.safetensors")
    with torch.no_grad():
        states = encode_t5(t5, data["t5_input_ids"], data["t5_attention_mask"], apply_mask=apply_mask)
    assert_near(states, data[case], 1e-5)
