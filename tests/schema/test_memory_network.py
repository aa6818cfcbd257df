"""What the estimate counts for what trains: exactly the tensors of the real network, and more where more is kept."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from tests.schema.test_memory import DEV, dev_estimate, part, phase, usual_options
from tests.tiny import TinyModels
from trainer.lora.network import LoraNetwork
from trainer.model.flux import Flux
from trainer.model.weights import load_clip_l, load_t5xxl
from trainer.schema.checkpoint_header import clip_params, flux_params, read_header, t5_params
from trainer.schema.lora_spec import spec_from_network_args
from trainer.schema.memory import estimate
from trainer.schema.options import Options
from trainer.schema.parameter_counts import PUBLISHED_AUTOENCODER, OtherModels
from trainer.schema.trained_counts import trained_by, trained_sizes
from trainer.train.checkpoint import save_lora


@pytest.mark.parametrize(
    "settings",
    [
        ["train_t5xxl=True", "network_reg_dims=te1_.*fc1=2,te3_.*wo=0,single_blocks_1=3"],
        ["split_qkv=1", "in_dims=1,2,3,4,0", "train_t5xxl=1"],
        ["dora=1", "train_single_block_indices=0-1"],
        ["dora=1", "dora_axis=out", "split_qkv=1", "train_t5xxl=1"],
        ["pissa=1", "img_mod_dim=0"],
    ],
)
def test_what_trains_is_counted_tensor_by_tensor(tiny_models: TinyModels, settings: list[str]) -> None:
    network, spec_sizes = _network(tiny_models, settings)
    trained = [parameter.numel() for parameter in network.parameters() if parameter.requires_grad]
    assert sorted(spec_sizes) == sorted(trained)


def _network(models: TinyModels, settings: list[str]) -> tuple[LoraNetwork, list[int]]:
    spec = spec_from_network_args(settings, network_dim=4)
    flux = without_memory(models)
    clip = load_clip_l(models.clip_l, torch.float32, "cpu")
    t5 = load_t5xxl(models.t5xxl, torch.float32, "cpu") if spec.train_t5xxl else None
    network = LoraNetwork.attach(flux, clip, spec, torch.Generator().manual_seed(0), t5)
    sizes = trained_sizes(
        flux.params,
        spec,
        clip_params(read_header(models.clip_l)),
        t5_params(read_header(models.t5xxl)) if spec.train_t5xxl else None,
    )
    return network, list(sizes)


def without_memory(models: TinyModels) -> Flux:
    with torch.device("meta"):
        return Flux(flux_params(read_header(models.flux_dev)))


def test_oft_is_counted_too(tiny_models: TinyModels) -> None:
    for everywhere in (False, True):
        flux = without_memory(tiny_models)
        spec = spec_from_network_args(
            [f"enable_all_linear={everywhere}"], network_dim=4, network_alpha=1e-3, network_module="networks.oft_flux"
        )
        network = LoraNetwork.attach(flux, None, spec, torch.Generator())
        assert sorted(trained_sizes(flux.params, spec, None)) == sorted(p.numel() for p in network.parameters())


def _matrices(network: LoraNetwork) -> list[tuple[str, str, torch.Size]]:
    return [
        (key.rpartition(".lora_")[0], f"lora_{key.rpartition('.lora_')[2]}", parameter.shape)
        for key, (parameter, _) in network.training_tensors().items()
    ]


def test_with_ranks_from_a_file_the_file_decides(tiny_models: TinyModels, tmp_path: Path) -> None:
    network, sizes = _network(tiny_models, ["single_dim=9", "in_dims=2,2,2,2,2"])
    file = tmp_path / "lora.safetensors"
    # The transformer's have no values; only their sizes matter here.
    state = {f"{name}.{end}": torch.zeros(size) for name, end, size in _matrices(network)}
    save_lora(file, state, {})
    models = OtherModels(
        t5_params(read_header(tiny_models.t5xxl)), clip_params(read_header(tiny_models.clip_l)), PUBLISHED_AUTOENCODER
    )
    flux = flux_params(read_header(tiny_models.flux_dev))

    def total(**settings: object) -> int:
        options = Options.model_validate({"network_weights": file, "dim_from_weights": True, **settings})
        return trained_by(flux, options, models).total

    assert total() == sum(sizes)
    assert 0 < total(network_train_unet_only=True) < total()
    assert total(network_weights=tmp_path / "gone.safetensors", network_dim=4) > 0, "told elsewhere, counted by options"


@pytest.mark.parametrize("precision", ["bf16", "fp16", "no"])
def test_each_addition_costs_memory(precision: str) -> None:
    def peak(*pairs: str, **changes: bool) -> int:
        options = usual_options(mixed_precision=precision, network_args=pairs, **changes)
        return phase(estimate(DEV, options, width=512, height=512, batch_size=1), "training").peak_bytes

    plain = peak()
    for pairs in (("dora=1",), ("dora=1", "dora_axis=out"), ("pissa=1",), ("split_qkv=1",), ("in_dims=4,4,4,4,4",)):
        assert peak(*pairs) > plain, pairs
        assert peak(*pairs, gradient_checkpointing=False) > peak(gradient_checkpointing=False), pairs
    text = {"cache_text_encoder_outputs": False, "network_train_unet_only": False}
    assert peak("train_t5xxl=1", **text) > peak(**text)
    assert peak("train_t5xxl=1", **text, gradient_checkpointing=False) > peak("train_t5xxl=1", **text)


@pytest.mark.parametrize("pairs", [(), ("dora=1",), ("pissa=1",), ("dora=1", "dora_axis=out", "pissa=1")])
def test_rank_batch_and_size_only_ever_add(pairs: tuple[str, ...]) -> None:
    by_rank = [dev_estimate(network_dim=rank, network_args=pairs).peak_bytes for rank in (1, 4, 16, 64, 256)]
    by_batch = [dev_estimate(batch_size=size, network_args=pairs).peak_bytes for size in (1, 2, 4)]
    by_side = [dev_estimate(side=side, network_args=pairs).peak_bytes for side in (256, 512, 1024, 1536)]
    for peaks in (by_rank, by_batch, by_side):
        assert all(earlier <= later for earlier, later in itertools.pairwise(peaks))
        assert peaks[0] < peaks[-1]


def test_fp16_keeps_the_streams_in_fp32_and_the_autoencoder_out_of_half_precision() -> None:
    half, wide = dev_estimate(), dev_estimate(mixed_precision="fp16")
    # Beside the block inputs there is the last norm's output, of 4096 image tokens.
    inputs = 2 * part(half, "saved block inputs") + 4 * 4096 * 3072
    assert part(wide, "saved block inputs") == pytest.approx(inputs, rel=1e-4)
    assert part(wide, "FLUX.1 weights") == part(half, "FLUX.1 weights")
    assert part(wide, "one block's activations and gradients") > part(half, "one block's activations and gradients")
    full = dev_estimate(no_half_vae=True)
    for result in (wide, full):
        assert part(result, "autoencoder weights", "latents") == 2 * part(half, "autoencoder weights", "latents")
        # What a strip needs beside the tensors is in float32 in every type.
        strip = 24 * 2**24
        activations = part(result, "autoencoder activations", "latents") - strip
        assert activations == 2 * (part(half, "autoencoder activations", "latents") - strip)


def test_pissa_keeps_its_beginning_and_puts_a_blocks_factors_together() -> None:
    plain, principal = dev_estimate(), dev_estimate(network_args=["pissa=1"])
    copies = 2 * 76_578_816
    assert part(principal, "LoRA weights") - part(plain, "LoRA weights") == 4 * 76_578_816 + copies
    rank, c, m = 16, 3072, 12288
    one_double = 2 * ((c + 6 * c) + (c + 3 * c) + 2 * c + 2 * (c + m))
    assert part(principal, "factors of the principal part") == 4 * 2 * rank * one_double


def test_doras_magnitudes_are_trained_values_with_norms_beside_them() -> None:
    plain = dev_estimate()
    num_in = 19 * 2 * (4 * 3072 + 12288) + 38 * (2 * 3072 + 3072 + 12288)
    for axis, num in (("in", num_in), ("out", 19 * 2 * (11 * 3072 + 12288) + 38 * (3 * 3072 + 12288 + 4 * 3072))):
        result = dev_estimate(network_args=["dora=1", f"dora_axis={axis}"])
        assert part(result, "LoRA gradients") - part(plain, "LoRA gradients") == 4 * num
        copies = 2 * 76_578_816
        assert part(result, "LoRA weights") - part(plain, "LoRA weights") == (4 + 2) * num + 4 * num + copies
