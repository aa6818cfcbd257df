"""LoRAs of the parts of fused layers: the recorded reference file, the older alpha, and who recognises what."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.lora.dense import dense_weights
from tests.lora.test_network_settings import forward_inputs
from trainer.lora.from_file import spec_from_file
from trainer.lora.naming import layers_of
from trainer.lora.network import LoraNetwork
from trainer.lora.split import SPLIT_ALPHA_KEY, merge_up, part_slices, read_as_trained, unmerge_up
from trainer.model.flux import Flux
from trainer.model.weights import load_flux
from trainer.schema.base import UserError
from trainer.schema.lora_spec import LoraSpec

CASE = "split_qkv_d4_a1"
LIMIT = 5e-6
OLD_METADATA = {"ss_network_args": json.dumps({"dropout": None, "split_qkv": "True"})}
QKV = "lora_unet_double_blocks_0_img_attn_qkv"


def model(golden: Path) -> Flux:
    return load_flux(golden / "model_dev.safetensors", torch.float32, "cpu")


@pytest.fixture(scope="module")
def recorded() -> dict[str, Tensor]:
    return load_file(Path(__file__).parents[1] / "golden" / "lora_forward.safetensors")


@pytest.fixture
def old_file(recorded: dict[str, Tensor]) -> dict[str, Tensor]:
    """A file as sd-scripts wrote it: the alpha of one part beside the rank of all."""
    return {k.removeprefix(f"{CASE}.file."): t for k, t in recorded.items() if k.startswith(f"{CASE}.file.")}


@pytest.mark.parametrize("metadata", [None, {}, OLD_METADATA])
def test_an_old_file_has_the_effect_that_it_was_trained_with(
    golden: Path, recorded: dict[str, Tensor], old_file: dict[str, Tensor], metadata: dict[str, str] | None
) -> None:
    flux = model(golden)
    spec = LoraSpec(rank=4, alpha=1, split_qkv=True)
    network = LoraNetwork.attach(flux, None, spec, torch.Generator().manual_seed(0))
    report = network.load_published(old_file, metadata=metadata)
    assert report.num_corrected == 2 * 2 + 4
    assert report.missing == report.unexpected == ()
    with torch.no_grad():
        output = flux(**forward_inputs(golden))
    torch.testing.assert_close(output, recorded[f"{CASE}.out_training_forward"], atol=LIMIT, rtol=0)


def test_what_is_saved_from_it_is_right_for_every_loader(
    golden: Path, recorded: dict[str, Tensor], old_file: dict[str, Tensor]
) -> None:
    spec = LoraSpec(rank=4, alpha=1, split_qkv=True)
    network = LoraNetwork.attach(model(golden), None, spec, torch.Generator().manual_seed(0))
    network.load_published(old_file, metadata=OLD_METADATA)
    saved = network.published_state_dict(None)
    assert network.file_metadata == {SPLIT_ALPHA_KEY: "merged"}
    for key, tensor in saved.items():
        if not key.endswith(".alpha"):
            assert torch.equal(tensor, old_file[key]), key
    untouched = model(golden)
    dense_weights(untouched, saved)
    with torch.no_grad():
        output = untouched(**forward_inputs(golden))
    torch.testing.assert_close(output, recorded[f"{CASE}.out_training_forward"], atol=LIMIT, rtol=0)


def test_the_shapes_and_types_are_the_recorded_ones(golden: Path) -> None:
    variant = json.loads((golden / "lora_keys_tiny.json").read_text(encoding="utf-8"))["variants"]["split_qkv"]
    spec = LoraSpec(rank=4, alpha=1, split_qkv=True)
    network = LoraNetwork.attach(model(golden), None, spec, torch.Generator().manual_seed(0))
    ours = {
        key: [list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]
        for key, tensor in network.published_state_dict(None).items()
    }
    assert ours == variant["keys"]


def test_a_file_of_ours_is_left_as_it_is_with_and_without_its_metadata(
    golden: Path, old_file: dict[str, Tensor]
) -> None:
    spec = LoraSpec(rank=4, alpha=1, split_qkv=True)
    network = LoraNetwork.attach(model(golden), None, spec, torch.Generator().manual_seed(0))
    network.load_published(old_file)
    ours = layers_of(network.published_state_dict(None))
    for metadata in (None, {**OLD_METADATA, SPLIT_ALPHA_KEY: "merged"}):
        layers, num_corrected = read_as_trained(ours, metadata)
        assert num_corrected == 0
        assert float(layers[QKV]["alpha"]) == 3


def test_an_ordinary_or_untrained_file_is_never_taken_for_a_split_one(golden: Path) -> None:
    network = LoraNetwork.attach(model(golden), None, LoraSpec(rank=12, alpha=1), torch.Generator().manual_seed(0))
    untrained = network.published_state_dict(None)
    assert read_as_trained(layers_of(untrained), None)[1] == 0
    trained = {key: tensor + 0.1 if key.endswith("up.weight") else tensor for key, tensor in untrained.items()}
    assert read_as_trained(layers_of(trained), None)[1] == 0


def test_a_switch_that_the_other_program_did_not_understand_was_off(old_file: dict[str, Tensor]) -> None:
    only_fused = {name: tensors for name, tensors in layers_of(old_file).items() if name == QKV}
    for text, num_corrected in (("True", 1), ("true", 0)):
        metadata = {"ss_network_args": json.dumps({"split_qkv": text})}
        assert read_as_trained(only_fused, metadata)[1] == num_corrected


def test_ranks_alphas_and_parts_are_taken_from_the_file(golden: Path, old_file: dict[str, Tensor]) -> None:
    del old_file["lora_unet_single_blocks_0_linear2.alpha"]
    for key in [key for key in old_file if "double_blocks_1" in key]:
        del old_file[key]
    spec = spec_from_file(LoraSpec(rank=64, dropout=0.25, loraplus_unet_ratio=4), old_file, {}, "old.safetensors")
    assert (spec.split_qkv, spec.dropout, spec.loraplus_unet_ratio) == (True, 0.25, 4)
    network = LoraNetwork.attach(model(golden), None, spec, torch.Generator().manual_seed(0))
    assert set(network.ranks().values()) == {4}
    assert not any("double_blocks_1" in name for name in network.names)
    report = network.load_published(old_file)
    assert report.missing == report.unexpected == ()
    saved = network.published_state_dict(None)
    assert int(saved[f"{QKV}.alpha"]) == 3
    assert int(saved["lora_unet_single_blocks_0_linear2.alpha"]) == 4, "without an alpha, every loader takes the rank"


def test_a_file_that_was_trained_as_one_cannot_go_on_in_parts(golden: Path) -> None:
    one = LoraNetwork.attach(model(golden), None, LoraSpec(rank=12), torch.Generator().manual_seed(0))
    state = {key: tensor + 0.1 for key, tensor in one.published_state_dict(torch.float32).items()}
    only_qkv = {key: tensor for key, tensor in state.items() if key.startswith(QKV)}
    parts = LoraNetwork.attach(model(golden), None, LoraSpec(rank=4, split_qkv=True), torch.Generator().manual_seed(0))
    with pytest.raises(UserError, match=r"not trained in separate parts.*Leave split_qkv out"):
        parts.load_published(only_qkv)
    with pytest.raises(UserError, match=r"has rank 12 .* rank 4, saved as 16"):
        parts.load_published({k: t for k, t in state.items() if "single_blocks_0_linear1" in k})


def test_merging_and_taking_apart_are_inverse() -> None:
    parts = part_slices((3, 3, 5))
    up = torch.randn(11, 2, generator=torch.Generator().manual_seed(0))
    merged = merge_up(up, parts)
    assert merged.shape == (11, 6)
    assert torch.equal(merged[6:, 4:], up[6:])
    assert not merged[:3, 2:].any()
    unmerged = unmerge_up(merged, parts)
    assert unmerged is not None
    assert torch.equal(unmerged, up)
    merged[0, 5] = 1e-9
    assert unmerge_up(merged, parts) is None
