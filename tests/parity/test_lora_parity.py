"""The LoRA network against the reference's: which keys it saves, in what shape and type, and what it does to the output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from trainer.lora.network import LoraNetwork
from trainer.model.flux import Flux
from trainer.model.weights import load_clip_l, load_flux
from trainer.schema.checkpoint_header import FluxParams
from trainer.schema.lora_spec import LoraSpec, spec_from_network_args

FORWARD_LIMIT = 5e-6
NETWORKS = (
    "default",
    "split_qkv",
    "reg_dims",
    "train_blocks_single",
    "train_blocks_double",
    "block_indices_d0_s1-2",
    "block_indices_dnone_s0,3",
    "type_dims",
    "in_dims",
    "clip_l",
)


def saved_keys(network: LoraNetwork) -> dict[str, list[Any]]:
    """Key -> shape and type of every tensor in the file, as the recorded lists have it."""
    state = network.published_state_dict(None)
    return {key: [list(tensor.shape), str(tensor.dtype).removeprefix("torch.")] for key, tensor in state.items()}


def recorded_network(golden: Path, case: str) -> dict[str, Any]:
    return json.loads((golden / "lora_keys_tiny.json").read_text(encoding="utf-8"))["variants"][case]


@pytest.mark.parametrize("case", NETWORKS)
def test_the_saved_keys_shapes_types_and_their_order_are_the_recorded_ones(golden: Path, case: str) -> None:
    recorded = recorded_network(golden, case)
    spec = spec_from_network_args(recorded["network_args"], network_dim=recorded["network_dim"], network_alpha=1)
    flux = load_flux(golden / "model_dev.safetensors", torch.float32, "cpu")
    has_clip = any(key.startswith("lora_te1_") for key in recorded["keys"])
    clip_l = load_clip_l(golden / "model_clip_l.safetensors", torch.float32, "cpu") if has_clip else None
    network = LoraNetwork.attach(flux, clip_l, spec, torch.Generator().manual_seed(0))
    assert network.num_modules == recorded["n_modules"]
    ours = saved_keys(network)
    assert ours == recorded["keys"]
    assert modules_in_order(ours) == modules_in_order(recorded["keys"])


def modules_in_order(keys: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(key.split(".")[0] for key in keys))


def test_at_full_size_304_transformer_and_72_clip_layers_have_the_recorded_keys(golden: Path) -> None:
    recorded = json.loads((golden / "lora_keys_full_dev.json").read_text(encoding="utf-8"))
    with torch.device("meta"):
        flux = Flux(full_size_dev())
        clip_l = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12))
    network = LoraNetwork.attach(flux, clip_l, LoraSpec(rank=4, alpha=1), torch.Generator().manual_seed(0))
    assert sum(name.startswith("lora_unet_") for name in network.names) == recorded["n_unet_modules"] == 304
    assert sum(name.startswith("lora_te1_") for name in network.names) == recorded["n_clip_modules"] == 72
    shapes = {f"{name}_{part}": shape for name, (part, shape) in parameter_shapes(network)}
    expected = {
        f"{key.split('.')[0]}_{key.split('.')[1].removeprefix('lora_')}": shape
        for key, (shape, _) in recorded["keys"].items()
        if not key.endswith(".alpha")
    }
    assert shapes == expected


def parameter_shapes(network: LoraNetwork) -> list[tuple[str, tuple[str, list[int]]]]:
    """Name, part and shape of every trained tensor. On the meta device there are no values that could be saved."""
    split = ((name.rpartition("_"), list(parameter.shape)) for name, parameter in network.named_parameters())
    return [(name, (part, shape)) for (name, _, part), shape in split]


def full_size_dev() -> FluxParams:
    return FluxParams(
        in_channels=64,
        out_channels=64,
        vec_in_dim=768,
        context_in_dim=4096,
        hidden_size=3072,
        mlp_ratio=4.0,
        num_heads=24,
        depth=19,
        depth_single_blocks=38,
        axes_dim=(16, 56, 56),
        theta=10_000,
        qkv_bias=True,
        guidance_embed=True,
    )


def test_the_full_size_model_has_11_9_billion_parameters() -> None:
    with torch.device("meta"):
        flux = Flux(full_size_dev())
    assert sum(parameter.numel() for parameter in flux.parameters()) == 11_901_408_320


@pytest.mark.parametrize(("case", "multiplier"), [("default_d4_a1", 1.0), ("default_d4_a1_mult0.5", 0.5)])
def test_a_recorded_lora_changes_the_output_as_recorded(golden: Path, case: str, multiplier: float) -> None:
    recorded = load_file(golden / "lora_forward.safetensors")
    flux = load_flux(golden / "model_dev.safetensors", torch.float32, "cpu")
    network = LoraNetwork.attach(flux, None, LoraSpec(rank=4, alpha=1), torch.Generator().manual_seed(0))
    given = forward_inputs(golden)
    with torch.no_grad():
        torch.testing.assert_close(flux(**given), recorded["base_out"], atol=FORWARD_LIMIT, rtol=0)
        report = network.load_published(
            {
                key.removeprefix("default_d4_a1.file."): tensor
                for key, tensor in recorded.items()
                if key.startswith("default_d4_a1.file.")
            }
        )
        assert report.missing == report.unexpected == ()
        network.set_multiplier(multiplier)
        output = flux(**given)
        network.set_multiplier(0)
        without = flux(**given)
    torch.testing.assert_close(output, recorded[f"{case}.out_training_forward"], atol=FORWARD_LIMIT, rtol=0)
    torch.testing.assert_close(without, recorded["base_out"], atol=FORWARD_LIMIT, rtol=0)


def forward_inputs(golden: Path) -> dict[str, Tensor]:
    data = load_file(golden / "dev_forward_a.safetensors")
    return {name: data[name] for name in ("img", "img_ids", "txt", "txt_ids", "timesteps", "y", "guidance")}
