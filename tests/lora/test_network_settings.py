"""Random network settings: rank, alpha and keys of the file, and its effect, against a dense computation.

The expectations are formed here, from the settings alone and from the tensors of the file alone.
"""

from __future__ import annotations

import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.lora.dense import dense_weights
from trainer.lora.network import LoraNetwork
from trainer.lora.targets import settings_without_layers
from trainer.model.chroma import Chroma
from trainer.model.flux import Flux
from trainer.model.weights import load_flux
from trainer.schema.checkpoint_header import FluxParams
from trainer.schema.chroma_header import ChromaParams
from trainer.schema.lora_spec import spec_from_network_args

LIMIT = 2e-5
TYPES = {
    "img_attn_dim": r"img_attn",
    "txt_attn_dim": r"txt_attn",
    "img_mlp_dim": r"img_mlp",
    "txt_mlp_dim": r"txt_mlp",
    "img_mod_dim": r"img_mod",
    "txt_mod_dim": r"txt_mod",
    "single_dim": r"single_blocks_\d+_linear",
    "single_mod_dim": r"single_blocks_\d+_modulation",
}
EXPRESSIONS = ("single_blocks_0_.*linear1", "img_attn_proj", "double_blocks_1_txt", "linear2$", "_in")
TRUE = ("true", "True", "1")


def draw_settings(rng: random.Random) -> dict[str, str]:
    chosen: dict[str, str] = {}
    for key in TYPES:
        if rng.random() < 0.3:
            chosen[key] = str(rng.choice((0, 1, 2, 5)))
    if rng.random() < 0.3:
        chosen["train_blocks"] = rng.choice(("all", "single", "double"))
    if rng.random() < 0.4:
        chosen["train_double_block_indices"] = rng.choice(("0", "1", "all", "none", "0-1"))
    if rng.random() < 0.4:
        chosen["train_single_block_indices"] = rng.choice(("0,3", "1-2", "all", "2"))
    if rng.random() < 0.4:
        chosen["in_dims"] = rng.choice(("[1,2,0,3,2]", "2,0,2,0,2"))
    if rng.random() < 0.4:
        pairs = rng.sample(EXPRESSIONS, 2)
        chosen["network_reg_dims"] = ",".join(f"{pair}={rng.choice((0, 3, 4))}" for pair in pairs)
    for key in ("split_qkv", "dora", "rslora", "pissa"):
        if rng.random() < 0.4:
            chosen[key] = rng.choice(TRUE)
    if "dora" in chosen:
        chosen["dora_axis"] = rng.choice(("in", "out"))
    return chosen


def expected_rank(name: str, settings: dict[str, str], rank: int) -> int:
    """The rank of one part of a layer, after the rules in words: expression, then block, then type, then default."""
    is_in = re.search(r"_(img_in|time_in|vector_in|guidance_in|txt_in)", name)
    if is_in:
        if "in_dims" not in settings:
            return 0
        order = ("img_in", "time_in", "vector_in", "guidance_in", "txt_in")
        rank = int(settings["in_dims"].strip("[]").split(",")[order.index(is_in[1])])
    elif settings.get("train_blocks", "all") not in ("all", name.split("_")[2]):
        return 0
    for pair in filter(None, settings.get("network_reg_dims", "").split(",")):
        expression, _, value = pair.partition("=")
        if re.search(expression, name):
            return int(value)
    for key, expression in TYPES.items():
        if key in settings and re.search(expression, name):
            rank = int(settings[key])
    if not is_in:
        kind, number = name.split("_")[2], int(name.split("_")[4])
        indices = settings.get(f"train_{kind}_block_indices", "all")
        numbers = {"all": range(99), "none": (), "0-1": (0, 1), "1-2": (1, 2), "0,3": (0, 3)}
        if number not in (numbers[indices] if indices in numbers else (int(indices),)):
            return 0
    return rank


def count_parts(name: str) -> int:
    return 3 if name.endswith("attn_qkv") else 4 if name.endswith("linear1") else 1


def fill(network: LoraNetwork, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if not parameter.requires_grad:
                continue
            if name.endswith("magnitude"):
                parameter.mul_(1 + 0.2 * torch.rand(parameter.shape, generator=generator))
            else:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def forward_inputs(golden: Path) -> dict[str, Tensor]:
    data = load_file(golden / "dev_forward_a.safetensors")
    return {name: data[name] for name in ("img", "img_ids", "txt", "txt_ids", "timesteps", "y", "guidance")}


def linear_names(flux: Flux) -> list[str]:
    names = [n for n, m in flux.named_modules() if isinstance(m, torch.nn.Linear) and not n.startswith("final_layer")]
    return [f"lora_unet_{name.replace('.', '_')}" for name in names]


@pytest.mark.parametrize("seed", range(14))
def test_file_and_output_are_those_of_the_dense_weights(golden: Path, seed: int) -> None:
    rng = random.Random(seed)
    settings = draw_settings(rng)
    rank, alpha = rng.choice((1, 3, 4)), rng.choice((0, 1, 2.5))
    flux = load_flux(golden / "model_dev.safetensors", torch.float32, "cpu")
    untouched = load_flux(golden / "model_dev.safetensors", torch.float32, "cpu")
    spec = spec_from_network_args([f"{k}={v}" for k, v in settings.items()], network_dim=rank, network_alpha=alpha)
    ranks = {n: r for n in linear_names(untouched) if (r := expected_rank(n, settings, rank)) > 0}
    network = LoraNetwork.attach(flux, None, spec, torch.Generator().manual_seed(seed))
    network.eval()
    given = forward_inputs(golden)
    with torch.no_grad():
        before, base = flux(**given), untouched(**given)
        torch.testing.assert_close(before, base, atol=LIMIT, rtol=0, msg="training does not begin at the base")
        fill(network, seed)
        state = network.published_state_dict(None)
        assert {key.split(".")[0] for key in state} == ranks.keys()
        for name, one_rank in ranks.items():
            factor = (count_parts(name) if "split_qkv" in settings else 1) * (2 if "pissa" in settings else 1)
            assert state[f"{name}.lora_down.weight"].shape[0] == one_rank * factor, settings
            one_alpha = (alpha or one_rank) * (one_rank**0.5 if "rslora" in settings else 1)
            assert float(state[f"{name}.alpha"]) == pytest.approx(one_alpha * factor)
        multiplier = rng.choice((1.0, 0.6))
        network.set_multiplier(multiplier)
        output = flux(**given)
        assert dense_weights(untouched, state, multiplier) == len(ranks)
        expected = untouched(**given)
    assert (expected - base).abs().max() > 1e-3, "the LoRA has no effect to be seen"
    torch.testing.assert_close(output, expected, atol=LIMIT, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_save_precision_that_cannot_hold_alpha_leaves_it_exact(golden: Path, dtype: torch.dtype) -> None:
    """Rounded, alpha would change the strength of the whole LoRA: by 0.2 % for rsLoRA's 2 * sqrt(3) in bf16."""
    for pairs, alpha in (([], 4.0), (["rslora=1"], 2.0), ([], 0.1)):
        flux = load_flux(golden / "model_dev.safetensors", torch.float32, "cpu")
        spec = spec_from_network_args([*pairs, "train_blocks=single"], network_dim=3, network_alpha=alpha)
        network = LoraNetwork.attach(flux, None, spec, torch.Generator().manual_seed(1))
        state = network.published_state_dict(dtype)
        saved = state["lora_unet_single_blocks_0_linear2.alpha"]
        assert float(saved) == pytest.approx(alpha * (3**0.5 if pairs else 1), rel=1e-7)
        assert saved.dtype == (dtype if alpha == 4.0 else torch.float32)
        assert state["lora_unet_single_blocks_0_linear2.lora_up.weight"].dtype == dtype


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["split_qkv=1"],
        ["dora=1"],
        ["dora=1", "dora_axis=out", "split_qkv=1"],
        ["pissa=1", "split_qkv=1"],
        ["dora=1", "pissa=1"],
    ],
)
def test_a_file_read_back_writes_the_same_tensors(golden: Path, settings: list[str]) -> None:
    networks: list[LoraNetwork] = []
    for seed in (1, 2):
        flux = load_flux(golden / "model_dev.safetensors", torch.float32, "cpu")
        spec = spec_from_network_args(settings, network_dim=3, network_alpha=2)
        networks.append(LoraNetwork.attach(flux, None, spec, torch.Generator().manual_seed(seed)))
        fill(networks[-1], seed)
    saved = networks[0].published_state_dict(None)
    report = networks[1].load_published(saved, metadata=networks[0].file_metadata)
    assert report.missing == report.unexpected == ()
    for key, tensor in networks[1].published_state_dict(None).items():
        torch.testing.assert_close(tensor, saved[key], atol=1e-6 if "pissa=1" in settings else 0, rtol=0)


@pytest.mark.parametrize(
    "settings",
    [
        ["split_qkv=1"],
        ["dora=1"],
        ["dora=1", "dora_axis=out"],
        ["pissa=1"],
        ["split_qkv=1", "rslora=1", "dora=1"],
        ["split_qkv=1", "pissa=1", "dora=1", "dora_axis=out"],
    ],
)
def test_gradients_are_those_of_the_dense_weight(golden: Path, settings: list[str]) -> None:
    """DoRA's norm is a constant in backward, as in its paper."""
    spec = spec_from_network_args([*settings, "train_blocks=single"], network_dim=3, network_alpha=2)
    flux = load_flux(golden / "model_dev.safetensors", torch.float32, "cpu")
    network = LoraNetwork.attach(flux, None, spec, torch.Generator().manual_seed(3))
    fill(network, 3)
    adapter = flux.get_submodule("single_blocks.1.linear1")
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(2, 5, adapter.base.in_features, generator=generator, requires_grad=True)  # type: ignore[union-attr]
    weighting = torch.randn(2, 5, adapter.base.out_features, generator=generator)  # type: ignore[union-attr]
    wanted = [x, *(entry.parameter for entry in adapter.trained())]  # type: ignore[union-attr,operator]
    ours = torch.autograd.grad((adapter(x) * weighting).sum(), wanted)
    expected = torch.autograd.grad((_by_formula(adapter, x) * weighting).sum(), wanted)
    for found, correct in zip(ours, expected, strict=True):
        torch.testing.assert_close(found, correct, atol=1e-4, rtol=1e-4)


def _by_formula(adapter: torch.nn.Module, x: Tensor) -> Tensor:
    up, down = adapter.lora_up, adapter.lora_down
    rank, pieces = up.shape[1], []  # type: ignore[union-attr]
    for index, part in enumerate(adapter.parts):  # type: ignore[arg-type]
        block = slice(index * rank, (index + 1) * rank)
        change = up[part] @ down[block]  # type: ignore[index]
        if adapter.begins_at_principal:
            change = change - adapter.first_up[part] @ adapter.first_down[block]  # type: ignore[index]
        pieces.append(change)
    weight = adapter.base.weight + adapter.alpha / rank * torch.cat(pieces)  # type: ignore[union-attr,operator]
    if hasattr(adapter, "magnitude"):
        dim = 0 if adapter.axis == "in" else 1
        magnitude = adapter.magnitude.unsqueeze(dim)  # type: ignore[operator,union-attr]
        weight = weight * magnitude / weight.norm(dim=dim, keepdim=True).detach()  # type: ignore[operator]
    return torch.nn.functional.linear(x, weight, adapter.base.bias)  # type: ignore[union-attr]


def test_settings_for_layers_that_the_model_has_not_are_told() -> None:
    words = ("in_dims=[2,2,0,2,2]", "img_mod_dim=4", "txt_mod_dim=0", "single_dim=8")
    spec = spec_from_network_args(words, network_dim=4)
    sizes: dict[str, Any] = {
        "in_channels": 64,
        "out_channels": 64,
        "context_in_dim": 16,
        "hidden_size": 32,
        "mlp_ratio": 4.0,
    }
    sizes |= {"num_heads": 2, "depth": 1, "depth_single_blocks": 1, "axes_dim": (4, 6, 6), "theta": 10_000}
    dev = FluxParams(**sizes, qkv_bias=True, vec_in_dim=8, guidance_embed=True)
    chroma = ChromaParams(
        **sizes, qkv_bias=True, approximator_in_dim=16, approximator_hidden_size=16, approximator_depth=1
    )
    with torch.device("meta"):
        models = Flux(dev), Flux(replace(dev, guidance_embed=False)), Chroma(chroma)
    assert [settings_without_layers(model, spec) for model in models] == [
        [],
        ["in_dims has no effect on guidance_in: this model has no such layer"],
        [
            "in_dims has no effect on time_in, guidance_in: this model has no such layer",
            "img_mod_dim has no effect: this model has no such layers",
        ],
    ]
    words = (
        "network_reg_dims=single=2,te1_=2,double_blocks_9=0",
        "network_reg_lrs=img_in=1e-4,proj=1e-4",
        "img_mod_dim=0",
    )
    assert settings_without_layers(models[0], spec_from_network_args(words, network_dim=4)) == [
        f"{key} has no effect with {expressions}: no layer that is trained here has such a name"
        for key, expressions in (("network_reg_dims", "te1_, double_blocks_9"), ("network_reg_lrs", "img_in"))
    ]
