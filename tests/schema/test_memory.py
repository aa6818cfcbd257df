"""The memory estimate: exact counts where they can be exact, and the right order of everything else."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path

import pytest
import torch

from tests.tiny import TinyModels
from trainer.model.flux import Flux
from trainer.model.weights import load_autoencoder, load_clip_l, load_flux, load_t5xxl
from trainer.schema.activation_counts import saved_values_per_token
from trainer.schema.base import UserError
from trainer.schema.checkpoint_header import (
    FluxParams,
    autoencoder_params,
    clip_params,
    flux_params,
    read_header,
    t5_params,
)
from trainer.schema.lora_spec import LoraSpec
from trainer.schema.memory import (
    RESERVE_SHARE,
    Estimate,
    estimate,
    pick_blocks_to_swap,
    text_place,
    usable_bytes,
)
from trainer.schema.memory_phases import CUDA_CONTEXT_BYTES, GIB, Phase
from trainer.schema.options import Options
from trainer.schema.parameter_counts import (
    PUBLISHED_AUTOENCODER,
    PUBLISHED_CLIP,
    PUBLISHED_T5,
    OtherModels,
    autoencoder_count,
    clip_count,
    flux_counts,
    t5_count,
    usual_models,
)
from trainer.schema.storage import Storage, block_bytes, saved_bytes
from trainer.schema.swap_counts import max_blocks_to_swap, split_swap
from trainer.schema.trained_counts import optimizer_state_bytes, trained_sizes

DEV = FluxParams(64, 64, 768, 4096, 3072, 4.0, 24, 19, 38, (16, 56, 56), 10_000, True, True)
SCHNELL = dataclasses.replace(DEV, guidance_embed=False)


def usual_options(**changes: object) -> Options:
    values: dict[str, object] = {
        "mixed_precision": "bf16",
        "gradient_checkpointing": True,
        "network_dim": 16,
        "network_train_unet_only": True,
        "cache_latents": True,
        "cache_text_encoder_outputs": True,
        **changes,
    }
    return Options.model_validate(values)


def dev_estimate(blocks_to_swap: int = 0, side: int = 1024, batch_size: int = 1, **changes: object) -> Estimate:
    options = usual_options(blocks_to_swap=blocks_to_swap, **changes)
    return estimate(DEV, options, width=side, height=side, batch_size=batch_size)


def phase(result: Estimate, name: str) -> Phase:
    return next(entry for entry in result.phases if entry.name == name)


def part(result: Estimate, name: str, phase_name: str = "training") -> int:
    return sum(entry.bytes for entry in phase(result, phase_name).parts if entry.name == name)


# ---- counts ----


def test_published_models_have_their_known_numbers_of_parameters() -> None:
    assert flux_counts(DEV).total == 11_901_408_320
    assert flux_counts(SCHNELL).total == 11_891_178_560
    assert t5_count(PUBLISHED_T5) == 4_762_310_656
    assert clip_count(PUBLISHED_CLIP) == 123_060_480
    assert autoencoder_count(PUBLISHED_AUTOENCODER) == 83_819_683


def test_a_block_of_dev_has_339_7_and_141_6_million_linear_weights() -> None:
    counts = flux_counts(DEV)
    assert (counts.double_linear, counts.single_linear) == (339_738_624, 141_557_760)
    assert (counts.double_other, counts.single_other) == (92_672, 34_048)
    assert counts.outside == 64_124_992


def test_counts_are_those_of_the_modules(tiny_models: TinyModels) -> None:
    for path in (tiny_models.flux_dev, tiny_models.flux_schnell):
        flux = load_flux(path, torch.float32, "cpu")
        counts = flux_counts(flux_params(read_header(path)))
        assert counts.total == num_values(flux)
        weights = [m.weight.numel() for m in flux.double_blocks[0].modules() if isinstance(m, torch.nn.Linear)]
        assert counts.double_linear == sum(weights)
        assert counts.double_linear + counts.double_other == num_values(flux.double_blocks[0])
        weights = [m.weight.numel() for m in flux.single_blocks[0].modules() if isinstance(m, torch.nn.Linear)]
        assert counts.single_linear == sum(weights)
        assert counts.single_linear + counts.single_other == num_values(flux.single_blocks[0])
    clip = load_clip_l(tiny_models.clip_l, torch.float32, "cpu")
    assert clip_count(clip_params(read_header(tiny_models.clip_l))) == num_values(clip)
    t5 = load_t5xxl(tiny_models.t5xxl, torch.float32, "cpu")
    assert t5_count(t5_params(read_header(tiny_models.t5xxl))) == num_values(t5)
    autoencoder = load_autoencoder(tiny_models.ae, torch.float32, "cpu")
    assert autoencoder_count(autoencoder_params(read_header(tiny_models.ae))) == num_values(autoencoder)


def num_values(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_rank_16_on_every_linear_of_dev_is_304_loras_of_76_6_million_values() -> None:
    sizes = list(trained_sizes(DEV, LoraSpec(rank=16), None))
    assert len(sizes) == 2 * 304
    assert sum(sizes) == 76_578_816
    with_clip = list(trained_sizes(DEV, LoraSpec(rank=16), PUBLISHED_CLIP))
    assert len(with_clip) == 2 * (304 + 72)


@pytest.mark.parametrize(
    ("spec", "num_loras"),
    [
        (LoraSpec(train_blocks="single"), 114),
        (LoraSpec(train_blocks="double"), 190),
        (LoraSpec(double_indices=frozenset({0, 18}), single_indices=frozenset()), 20),
        (LoraSpec(type_dims={"img_mod_dim": 0, "txt_mod_dim": 0, "single_mod_dim": 0}), 304 - 38 - 38),
        (LoraSpec(type_dims={"single_dim": 0}), 190 + 38),
        (LoraSpec(in_dims=(2, 0, 2, 2, 0)), 304 + 1 + 2 + 2),
    ],
)
def test_the_network_arguments_decide_how_many_linears_get_a_lora(spec: LoraSpec, num_loras: int) -> None:
    assert len(list(trained_sizes(DEV, spec, None))) == 2 * num_loras


def test_a_type_dim_replaces_the_rank() -> None:
    spec = LoraSpec(rank=4, train_blocks="double", double_indices=frozenset({3}), type_dims={"img_attn_dim": 8})
    sizes = sum(trained_sizes(DEV, spec, None))
    c, m = 3072, 12288
    others = (c + 6 * c) * 2 + (c + 3 * c) + 2 * c + ((c + m) * 2) * 2
    assert sizes == 4 * others + 8 * (c + 3 * c + 2 * c)


def test_eight_bit_state_takes_a_quarter_and_its_scales() -> None:
    assert optimizer_state_bytes(256 * 100, is_8bit=False) == 8 * 25_600 + 4, "and the count of its steps"
    assert optimizer_state_bytes(256 * 100, is_8bit=True) == 2 * (25_600 + 4 * 100)
    assert optimizer_state_bytes(4095, is_8bit=True) == 8 * 4095 + 4


# ---- block swap ----


def test_a_count_stands_for_half_as_many_double_and_about_as_many_single_blocks() -> None:
    assert [split_swap(n) for n in (0, 1, 2, 3, 18, 35, 38)] == [
        (0, 0),
        (0, 2),
        (1, 2),
        (1, 4),
        (9, 18),
        (17, 36),
        (19, 38),
    ]


@pytest.mark.parametrize(
    ("depth", "single", "largest"), [(19, 38, 38), (2, 4, 4), (0, 0, 0), (0, 2, 1), (0, 8, 1), (3, 2, 2), (1, 100, 3)]
)
def test_the_largest_count_uses_the_blocks_that_there_are(depth: int, single: int, largest: int) -> None:
    assert max_blocks_to_swap(depth, single) == largest


def test_swapped_weights_leave_the_device_for_a_ring_of_two_blocks() -> None:
    full = dev_estimate(0)
    swapped = dev_estimate(18)
    num_bytes = 2 * (9 * 339_738_624 + 18 * 141_557_760)
    assert part(full, "FLUX.1 weights") == 2 * 11_901_408_320
    assert part(full, "FLUX.1 weights") - part(swapped, "FLUX.1 weights") == num_bytes
    assert part(full, "slots for swapped blocks") == 0
    assert part(swapped, "slots for swapped blocks") == 2 * 2 * 339_738_624
    assert part(dev_estimate(1), "slots for swapped blocks") == 2 * 2 * 141_557_760
    assert part(dev_estimate(2), "slots for swapped blocks") == 2 * (339_738_624 + 141_557_760), (
        "one slot has no double"
    )
    assert swapped.host_peak_bytes - full.host_peak_bytes == num_bytes


@pytest.mark.parametrize("storage", ["fp8", "int8", "nf4"])
def test_stored_weights_take_what_the_storage_says_and_a_scratch(storage: Storage) -> None:
    dense, stored = dev_estimate(), dev_estimate(base_storage=storage)
    saved = part(dense, "FLUX.1 weights") - part(stored, "FLUX.1 weights")
    assert saved == saved_bytes(DEV, storage, 2)
    assert part(stored, "scratch for stored weights") == 2 * 21504 * 3072
    swapped = dev_estimate(18, base_storage=storage)
    double, single = block_bytes(DEV, storage, 2)
    assert part(stored, "FLUX.1 weights") - part(swapped, "FLUX.1 weights") == 9 * double + 18 * single
    assert part(swapped, "slots for swapped blocks") == 2 * double
    assert swapped.host_peak_bytes - stored.host_peak_bytes == 9 * double + 18 * single


def test_from_one_block_on_each_further_block_saves_memory() -> None:
    peaks = [phase(dev_estimate(n), "training").peak_bytes for n in range(39)]
    assert peaks[1] == peaks[0], "two single blocks and their two slots are the same"
    assert all(earlier > later for earlier, later in itertools.pairwise(peaks[1:]))


def test_more_blocks_than_the_model_has_are_refused() -> None:
    with pytest.raises(UserError, match="blocks_to_swap is 39; this model allows 0 to 38") as caught:
        dev_estimate(39)
    assert caught.value.exit_code == 2
    assert caught.value.problems[0].field == "blocks_to_swap"


# ---- estimate ----


def test_dev_at_1024_in_bf16_needs_about_26_gib_and_swapping_brings_it_down() -> None:
    assert 24 < dev_estimate(0).peak_bytes / GIB < 28
    assert 16 < phase(dev_estimate(18), "training").peak_bytes / GIB < 18
    assert 6 < phase(dev_estimate(35), "training").peak_bytes / GIB < 9


def test_the_lora_takes_16_bytes_a_value() -> None:
    result, num_values = dev_estimate(), 76_578_816
    assert part(result, "LoRA weights") == 4 * num_values, "a layer's half precision copy is there for the moment only"
    assert part(result, "LoRA gradients") == 4 * num_values
    assert part(result, "optimizer state") == 8 * num_values + 4 * 608
    in_8bit = part(dev_estimate(optimizer_type="AdamW8bit"), "optimizer state")
    assert 2 * num_values < in_8bit < 2.05 * num_values
    assert part(dev_estimate(mixed_precision="no"), "LoRA weights") == 4 * num_values


def test_checkpointing_keeps_one_tensor_a_block_and_token() -> None:
    result = dev_estimate()
    tokens = 64 * 64 + 512
    last = 8 * 64 * 64 + 4 * 3072 * 2
    assert part(result, "saved block inputs") == 58 * tokens * 3072 * 2 + last, (
        "the last block's output is an input, too"
    )
    assert part(result, "one block's activations and gradients") == 30 * tokens * 3072 * 2
    without = dev_estimate(gradient_checkpointing=False)
    whole = (19 * 21 + 38 * 18 + 1) * tokens * 3072 * 2
    assert whole < part(without, "saved activations") < 1.02 * whole
    assert without.peak_bytes > result.peak_bytes + 20 * GIB


def test_text_tokens_size_and_batch_count() -> None:
    def inputs(num_image: int, num_text: int) -> int:
        return 58 * (num_image + num_text) * 3072 * 2 + 8 * num_image + 4 * 3072 * 2

    assert part(dev_estimate(t5xxl_max_token_length=64), "saved block inputs") == inputs(4096, 64)
    assert part(dev_estimate(side=512), "saved block inputs") == inputs(1024, 512)
    assert part(dev_estimate(batch_size=3), "saved block inputs") == 3 * inputs(4096, 512)
    schnell = estimate(SCHNELL, usual_options(), width=768, height=512, batch_size=1)
    assert part(schnell, "saved block inputs") == inputs(48 * 32, 256)


def test_full_precision_doubles_weights_and_activations() -> None:
    half, full = dev_estimate(), dev_estimate(mixed_precision="no")
    for name in ("FLUX.1 weights", "saved block inputs", "one block's activations and gradients"):
        assert part(full, name) == pytest.approx(2 * part(half, name), rel=1e-4), "statistics are in fp32 anyway"


def test_what_is_not_cached_stays_on_the_device_beside_the_transformer() -> None:
    cached = dev_estimate()
    assert not part(cached, "T5-XXL weights")
    assert not part(cached, "CLIP-L weights")
    assert not part(cached, "autoencoder weights")
    live = dev_estimate(cache_latents=False, cache_text_encoder_outputs=False)
    for name in ("training", "text encoders", "latents"):
        assert part(live, "T5-XXL weights", name) == 2 * 4_762_310_656
        assert part(live, "CLIP-L weights", name) == 2 * 123_060_480
        assert part(live, "autoencoder weights", name) == 2 * 83_819_683
        assert part(live, "FLUX.1 weights", name) == 2 * 11_901_408_320
    with_clip = dev_estimate(network_train_unet_only=False)
    assert part(with_clip, "CLIP-L weights") == 2 * 123_060_480
    assert part(with_clip, "CLIP-L activations") > 0
    assert part(with_clip, "LoRA gradients") > part(cached, "LoRA gradients")


def test_the_disk_caches_count_as_caches() -> None:
    disk = dev_estimate(
        cache_latents=False,
        cache_text_encoder_outputs=False,
        cache_latents_to_disk=True,
        cache_text_encoder_outputs_to_disk=True,
    )
    in_memory = dev_estimate()
    assert disk.phases == in_memory.phases
    kept = 50 * (4 * 4096 * 64 + 2 * 512 * 4096)
    assert in_memory.host_peak_bytes - disk.host_peak_bytes == kept, "only what is not on the disk waits in memory"


def test_samples_are_a_phase_of_their_own_and_need_the_autoencoder(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    assert [entry.name for entry in dev_estimate(sample_prompts=prompts).phases] == [
        "text encoders",
        "latents",
        "training",
    ]
    result = dev_estimate(sample_prompts=prompts, sample_every_n_epochs=1)
    assert [entry.name for entry in result.phases][-1] == "sampling"
    assert part(result, "autoencoder weights") == 0, "it waits in host memory between samples"
    assert part(result, "autoencoder weights", "sampling") == 2 * 83_819_683
    assert part(result, "LoRA gradients", "sampling") == 0
    decoding = (256 + 2 * 128) * 1024 * 1024 * 2 + 24 * 2**24
    assert part(result, "activations of sampling and decoding", "sampling") == decoding


def test_a_phase_is_the_sum_of_its_parts_and_the_peak_the_highest_phase() -> None:
    result = dev_estimate(cache_latents=False)
    for entry in result.phases:
        assert entry.peak_bytes == sum(item.bytes for item in entry.parts)
        assert part(result, "CUDA context", entry.name) == CUDA_CONTEXT_BYTES
        assert all(item.bytes > 0 for item in entry.parts)
    assert result.peak_bytes == max(entry.peak_bytes for entry in result.phases)


def test_on_a_cpu_everything_is_host_memory() -> None:
    result = dev_estimate(device="cpu", mixed_precision="no")
    assert part(result, "CUDA context") == 0
    data = 50 * 4 * (4096 * 64 + 512 * 4096)
    assert result.host_peak_bytes == result.peak_bytes + 2 * GIB + data
    assert result.host_peak_bytes == sum(part.bytes for part in result.host_parts)


def test_wrong_network_arguments_are_the_users_error() -> None:
    with pytest.raises(UserError, match="in_dims"):
        dev_estimate(network_args=["in_dims=[1,2]"])


def test_models_of_other_widths_are_taken_to_have_encoders_of_their_size(tiny_models: TinyModels) -> None:
    assert usual_models(DEV) == OtherModels(PUBLISHED_T5, PUBLISHED_CLIP, PUBLISHED_AUTOENCODER)
    tiny = flux_params(read_header(tiny_models.flux_dev))
    result = estimate(tiny, usual_options(device="cpu"), width=64, height=64, batch_size=1)
    assert part(result, "T5-XXL weights", "text encoders") < 10_000_000
    assert result.peak_bytes < GIB / 5, "the autoencoder is taken to be the published one"
    models = OtherModels(
        t5_params(read_header(tiny_models.t5xxl)),
        clip_params(read_header(tiny_models.clip_l)),
        autoencoder_params(read_header(tiny_models.ae)),
    )
    exact = estimate(tiny, usual_options(device="cpu"), width=64, height=64, batch_size=1, models=models)
    assert part(exact, "T5-XXL weights", "text encoders") == 2 * t5_count(models.t5)


# ---- activations, against what autograd really keeps ----


def test_saved_activations_are_what_autograd_keeps() -> None:
    params = FluxParams(16, 16, 32, 64, 256, 4.0, 4, 3, 4, (8, 28, 28), 10_000, True, True)
    num_image, num_text = 36, 12
    tokens, c = num_image + num_text, params.hidden_size
    torch.manual_seed(0)
    flux = Flux(params).requires_grad_(False)
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    alive: list[torch.Tensor] = []
    weights = {parameter.untyped_storage().data_ptr() for parameter in flux.parameters()}

    def num_kept(depth: int, depth_single: int) -> int:
        kept.clear()
        alive.clear()
        flux.double_blocks = torch.nn.ModuleList(list(all_double)[:depth])
        flux.single_blocks = torch.nn.ModuleList(list(all_single)[:depth_single])
        img = torch.randn(1, num_image, 16, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = flux(
                img,
                torch.zeros(1, num_image, 3),
                torch.randn(1, num_text, 64, requires_grad=True),
                torch.zeros(1, num_text, 3),
                torch.tensor([0.5]),
                torch.randn(1, 32, requires_grad=True),
                torch.tensor([1.0]),
            )
        assert output.requires_grad
        return sum(size for pointer, size in kept.items() if pointer not in weights)

    all_double, all_single = flux.double_blocks, flux.single_blocks
    per_tensor = tokens * c * 4
    double = (num_kept(3, 2) - num_kept(1, 2)) / 2 / per_tensor
    single = (num_kept(2, 4) - num_kept(2, 2)) / 2 / per_tensor
    # Beside the inputs that LoRA will keep (both normed inputs; attention and GELU's output are kept or counted anyway).
    expected_double, expected_single = saved_values_per_token(params)
    lora_inputs_double, lora_inputs_single = 2 + 4, 1 + 5
    assert double == pytest.approx(1 + expected_double - lora_inputs_double, rel=0.06)
    assert single == pytest.approx(1 + expected_single - lora_inputs_single, rel=0.06)


# ---- picking ----


def pick(gib: float, side: int = 1024, **changes: object) -> Estimate:
    options = usual_options(optimizer_type="AdamW8bit", **changes)
    return pick_blocks_to_swap(DEV, options, width=side, height=side, batch_size=1, vram_bytes=round(gib * GIB))


def test_the_smaller_the_card_the_more_blocks_are_swapped() -> None:
    picked = [pick(gib) for gib in (6, 8, 10, 12, 16, 20, 24, 28, 32, 80)]
    counts = [result.blocks_to_swap for result in picked]
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts[:8])) == 8
    assert counts[-2:] == [0, 0]
    assert all(result.fits for result in picked)


def test_the_pick_is_the_smallest_count_that_fits() -> None:
    picked = pick(16)
    assert picked.fits
    assert picked.peak_bytes <= 0.96 * 16 * GIB
    one_less = estimate(
        DEV,
        usual_options(optimizer_type="AdamW8bit"),
        width=1024,
        height=1024,
        batch_size=1,
        blocks_to_swap=picked.blocks_to_swap - 1,
        vram_bytes=16 * GIB,
    )
    assert one_less.fits is False
    assert one_less.peak_bytes > 0.96 * 16 * GIB


def test_what_fits_is_decided_by_the_usable_part_of_the_card_alone() -> None:
    def at(vram_bytes: int) -> bool | None:
        return estimate(DEV, usual_options(), width=512, height=512, batch_size=1, vram_bytes=vram_bytes).fits

    # A card large enough for the text encoders, so that the peak is the same for both sizes.
    peak = estimate(DEV, usual_options(), width=512, height=512, batch_size=1, vram_bytes=80 * GIB).peak_bytes
    smallest = math.ceil(peak / (1 - RESERVE_SHARE))
    assert (usable_bytes(smallest + 1) >= peak, at(smallest + 1)) == (True, True)
    assert (usable_bytes(smallest - 2) >= peak, at(smallest - 2)) == (False, False)


def test_larger_pictures_need_more_blocks() -> None:
    counts = [pick(12, side).blocks_to_swap for side in (512, 768, 1024)]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]


def test_what_cannot_fit_says_why_and_what_helps() -> None:
    result = pick(4)
    assert result.fits is False
    assert result.blocks_to_swap == 38
    assert result.reason.startswith("With blocks_to_swap 38, training needs 5.")
    assert "a card of 4.0 GiB leaves 3.8 GiB. Lower the resolution or the batch size." in result.reason
    careless = pick(8, mixed_precision="no", gradient_checkpointing=False, cache_text_encoder_outputs=False)
    assert "Set mixed_precision to bf16, turn on cache_text_encoder_outputs," in careless.reason


def test_text_encoders_that_are_too_large_for_the_card_come_in_layers_or_run_on_the_host() -> None:
    tiny, small, large = pick(2), pick(6, side=512), pick(24)
    assert tiny.text_on_host
    assert not tiny.text_streamed
    assert phase(tiny, "text encoders").peak_bytes == CUDA_CONTEXT_BYTES
    assert tiny.host_peak_bytes >= 2 * (4_762_310_656 + 123_060_480)
    assert small.fits
    assert small.text_streamed
    assert phase(small, "text encoders").peak_bytes < 5 * GIB
    layer = 4 * 4096 * 4096 + 3 * 4096 * 10_240
    assert part(small, "slots for layers", "text encoders") == 2 * 2 * layer
    assert part(small, "T5-XXL weights", "text encoders") == 2 * (4_762_310_656 - 24 * layer)
    assert small.host_peak_bytes >= 2 * 24 * layer
    assert not large.text_on_host
    assert not large.text_streamed
    assert part(large, "T5-XXL weights", "text encoders") == 2 * 4_762_310_656
    assert estimate(DEV, usual_options(), width=512, height=512, batch_size=1).fits is None
    places = [text_place(DEV, usual_options(), vram_bytes=n * GIB, batch_size=1) for n in (2, 4, 6, 10, 11, 24)]
    assert places == ["host", "streamed", "streamed", "streamed", "device", "device"]


def test_a_picked_estimate_is_that_of_its_count() -> None:
    picked = pick(10)
    again = estimate(
        DEV,
        usual_options(optimizer_type="AdamW8bit", blocks_to_swap=picked.blocks_to_swap),
        width=1024,
        height=1024,
        batch_size=1,
        vram_bytes=10 * GIB,
    )
    assert picked == again
    assert math.isclose(picked.peak_bytes / GIB, 9.4, abs_tol=0.2)
