"""LoRA files of every form: what is written, what is read back, and what is refused by name."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from tests.lora.random_lora import LAYERS, assert_same_tensors, deltas, published, random_lora
from trainer.lora.form_names import Form, form_of
from trainer.lora.form_writer import BaseLayers
from trainer.lora.forms import converted, from_published, to_published
from trainer.lora.layer_names import layer_of
from trainer.schema.base import UserError

QKV = "lora_unet_double_blocks_0_img_attn_qkv"
LINEAR1 = "lora_unet_single_blocks_1_linear1"
FLUX_ONLY = tuple(LAYERS)
ATTENTION = tuple(name for name in LAYERS if "_attn_" in name or name.endswith("linear2"))
Q, K, V = (f"transformer.transformer_blocks.0.attn.to_{part}" for part in "qkv")


def names_for(form: Form) -> tuple[str, ...] | None:
    return {"bfl": FLUX_ONLY, "xlabs": ATTENTION}.get(form)


def adapter(module: str, rank: int, *, out: int = 32, seed: int = 0, down: Tensor | None = None) -> dict[str, Tensor]:
    """One adapter on 32 inputs as diffusers writes it."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.randn(rank, 32, generator=generator)
    up = torch.randn(out, rank, generator=generator)
    return {f"{module}.lora_A.weight": own if down is None else down, f"{module}.lora_B.weight": up}


@pytest.mark.parametrize("form", ["diffusers", "bfl", "xlabs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("alpha", [1.0, 4.0, 16.0])
def test_a_lora_comes_back_bit_equal_from_every_form(form: Form, dtype: torch.dtype, alpha: float) -> None:
    state = random_lora(alpha=alpha, dtype=dtype, names=names_for(form))
    written, added, _ = converted(state, {"ss_steps": "5"}, form)
    assert form_of(written) == form
    assert {tensor.dtype for tensor in written.values()} == {dtype}
    back, metadata, _ = converted(written, added, "sd-scripts")
    assert_same_tensors(back, state)
    assert metadata == {"ss_steps": "5"}


@pytest.mark.parametrize("alpha", [3.0, 0.1, 10.0])
def test_an_alpha_that_cannot_be_folded_without_rounding_stays_beside_the_weights_for_diffusers(alpha: float) -> None:
    state = random_lora(alpha=alpha)
    written, added, _ = converted(state, {}, "diffusers")
    assert written[f"{Q}.alpha"] == torch.tensor(alpha)
    assert torch.equal(written[f"{Q}.lora_A.weight"], state[f"{QKV}.lora_down.weight"])
    num_adapters = sum(key.endswith(".lora_A.weight") for key in written)
    assert sum(key.endswith(".alpha") for key in written) == num_adapters, "diffusers needs all of them or none"
    assert_same_tensors(converted(written, added, "sd-scripts")[0], state)


def test_a_whole_alpha_keeps_its_number_type_over_another_form() -> None:
    state = random_lora(alpha=1.0)
    state |= {key: torch.tensor(1) for key in state if key.endswith(".alpha")}
    state[f"{QKV}.alpha"] = torch.tensor(3)
    written, added, _ = converted(state, {}, "diffusers")
    assert written[f"{QKV}".replace(QKV, Q) + ".alpha"].dtype == torch.float32
    assert_same_tensors(converted(written, added, "sd-scripts")[0], state)


def test_the_other_forms_fold_alpha_and_have_the_trained_strength() -> None:
    for form in ("bfl", "xlabs"):
        state = random_lora(alpha=3.0, names=names_for(form))
        written, _, _ = converted(state, {}, form)
        assert not any(key.endswith(".alpha") for key in written)
        # Without the metadata: what any other program sees.
        seen = to_published(written, {}).state
        for name, expected in deltas(state).items():
            torch.testing.assert_close(deltas(seen)[name], expected, rtol=1e-6, atol=1e-6)


def test_a_fused_layer_shares_its_lora_a_and_its_lora_b_is_cut() -> None:
    state = random_lora(rank=4, alpha=4.0)
    written, _ = from_published(state, "diffusers")
    for index, module in enumerate((Q, K, V)):
        assert torch.equal(written[f"{module}.lora_A.weight"], state[f"{QKV}.lora_down.weight"])
        rows = state[f"{QKV}.lora_up.weight"][32 * index : 32 * (index + 1)]
        assert torch.equal(written[f"{module}.lora_B.weight"], rows)
    mlp = written["transformer.single_transformer_blocks.1.proj_mlp.lora_B.weight"]
    assert torch.equal(mlp, state[f"{LINEAR1}.lora_up.weight"][96:])


def test_a_fused_layer_trained_in_parts_becomes_parts_of_their_own_rank_and_strength() -> None:
    """split_qkv: three LoRAs of rank 2 and alpha 1, stored as one of rank 6 and alpha 3."""
    downs = [torch.randn(2, 32, generator=torch.Generator().manual_seed(part)) for part in range(3)]
    ups = [torch.randn(32, 2, generator=torch.Generator().manual_seed(9 + part)) for part in range(3)]
    state = published(QKV, torch.cat(downs), torch.block_diag(*ups), torch.tensor(3.0))
    written, added = from_published(state, "diffusers")
    for module, down, up in zip((Q, K, V), downs, ups, strict=True):
        assert written[f"{module}.lora_A.weight"].shape == (2, 32)
        effect = written[f"{module}.lora_B.weight"] @ written[f"{module}.lora_A.weight"]
        torch.testing.assert_close(effect, 0.5 * up @ down)
    back, _, _ = converted(written, added, "sd-scripts")
    assert_same_tensors(back, state)


def test_old_split_files_are_converted_at_the_strength_they_were_trained_with() -> None:
    downs = [torch.randn(2, 32, generator=torch.Generator().manual_seed(part)) for part in range(3)]
    ups = [torch.randn(32, 2, generator=torch.Generator().manual_seed(9 + part)) for part in range(3)]
    state = published(QKV, torch.cat(downs), torch.block_diag(*ups), torch.tensor(1.0))
    metadata = {"ss_network_args": json.dumps({"split_qkv": "True", "verbose": "True"})}
    written, _, _ = converted(state, metadata, "diffusers")
    effect = written[f"{K}.lora_B.weight"] @ written[f"{K}.lora_A.weight"]
    torch.testing.assert_close(effect, 0.5 * ups[1] @ downs[1])
    again, kept, _ = converted(state, metadata, "sd-scripts")
    assert again[f"{QKV}.alpha"] == 3
    assert kept == metadata | {"ss_split_qkv_alpha": "merged"}
    third, _, _ = converted(again, kept, "sd-scripts")
    assert third[f"{QKV}.alpha"] == 3, "the correction is made once"


def test_q_k_and_v_of_one_lora_a_are_merged_at_their_rank_and_others_on_a_diagonal() -> None:
    shared = torch.randn(4, 32, generator=torch.Generator().manual_seed(3))
    state = adapter(Q, 4, down=shared) | adapter(K, 4, seed=1, down=shared) | adapter(V, 4, seed=2, down=shared)
    own = to_published(state, {}).state
    assert torch.equal(own[f"{QKV}.lora_down.weight"], shared)
    assert own[f"{QKV}.alpha"] == 4
    assert "ss_split_qkv_alpha" not in to_published(state, {}).metadata
    state = adapter(Q, 4) | adapter(K, 4, seed=1) | adapter(V, 4, seed=2)
    assert to_published(state, {}).metadata == {"ss_split_qkv_alpha": "merged"}, "not one of the old files"
    state = adapter(Q, 4) | adapter(K, 2, seed=1) | adapter(V, 4, seed=2)
    own = to_published(state, {}).state
    assert own[f"{QKV}.lora_down.weight"].shape == (10, 32)
    assert own[f"{QKV}.alpha"] == 10
    whole = own[f"{QKV}.lora_up.weight"] @ own[f"{QKV}.lora_down.weight"]
    parts = [state[f"{module}.lora_B.weight"] @ state[f"{module}.lora_A.weight"] for module in (Q, K, V)]
    torch.testing.assert_close(whole, torch.cat(parts))


def old_diffusers() -> dict[str, Tensor]:
    names = {".lora_A.weight": ".lora.down.weight", ".lora_B.weight": ".lora.up.weight"}
    state = {**adapter(Q, 4), **adapter(V, 4, seed=1)}
    renamed = {key.replace(old, new): t for key, t in state.items() for old, new in names.items() if old in key}
    clip = "text_encoder.text_model.encoder.layers.0.self_attn"
    weights = adapter("x", 4).values()
    ends = ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight")
    renamed |= {f"{clip}.q_proj.{end}": t for end, t in zip(ends, weights, strict=True)}
    return renamed | {f"{clip}.to_v_lora.{end}.weight": t for end, t in zip(("down", "up"), weights, strict=True)}


def with_alpha(state: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    modules = [key.removesuffix(".lora_A.weight") for key in state if key.endswith(".lora_A.weight")]
    return state | {f"{module}.alpha": torch.tensor(alpha) for module in modules}


def with_magnitudes(*, axis: str, names: tuple[str, ...] | None = None) -> dict[str, Tensor]:
    """A DoRA with a magnitude for each in or out feature, as published files have it."""
    state = random_lora(names=names)
    for name in [key.removesuffix(".alpha") for key in state if key.endswith(".alpha")]:
        num_in, num_out = state[f"{name}.lora_down.weight"].shape[1], state[f"{name}.lora_up.weight"].shape[0]
        generator = torch.Generator().manual_seed(num_in + num_out)
        size = (1, num_in) if axis == "in" else (num_out, 1)
        state[f"{name}.dora_scale"] = 1 + torch.rand(size, generator=generator)
    return state


def to_diffusers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return from_published(state, "diffusers")[0]


FILES: dict[str, dict[str, Tensor]] = {
    "unequal ranks": adapter(Q, 4) | adapter(K, 2, seed=1) | adapter(V, 3, seed=2),
    "only q and v": adapter(Q, 4) | adapter(V, 4, seed=1),
    "only q": adapter(Q, 3),
    "k without effect": adapter(Q, 4)
    | {f"{K}.lora_A.weight": torch.ones(4, 32), f"{K}.lora_B.weight": torch.zeros(32, 4)},
    "alpha keys": with_alpha(adapter(Q, 4) | adapter(K, 4, seed=1) | adapter(V, 4, seed=2), 1.0),
    "odd alpha keys": with_alpha(adapter(Q, 6) | adapter(K, 6, seed=1) | adapter(V, 6, seed=2), 1.7),
    "unequal alpha in one layer": with_alpha(adapter(Q, 4) | adapter(K, 4, seed=1), 2.0)
    | with_alpha(adapter(V, 4, seed=2), 8.0),
    "dora": {
        key: tensor
        for seed, module in enumerate((Q, K, V))
        for key, tensor in (
            adapter(module, 4, seed=seed) | {f"{module}.lora_magnitude_vector": torch.rand(32) + seed}
        ).items()
    },
    "chroma": adapter("transformer.distilled_guidance_layer.in_proj", 2)
    | adapter("transformer.distilled_guidance_layer.layers.2.linear_1", 2, seed=1)
    | adapter(Q, 2, seed=2),
    "chroma in comfyui": adapter("diffusion_model.distilled_guidance_layer.layers.2.out_layer", 2)
    | adapter("diffusion_model.double_blocks.0.img_attn.qkv", 2, out=96),
    "single block": adapter("transformer.single_transformer_blocks.3.attn.to_q", 2)
    | adapter("transformer.single_transformer_blocks.3.proj_mlp", 2, out=96, seed=1),
    "outer layers": adapter("transformer.norm_out.linear", 2, out=64) | adapter("transformer.x_embedder", 2),
    "text encoder without its root": adapter("text_encoder.encoder.layers.1.mlp.fc1", 2),
    "peft": adapter("base_model.model.transformer_blocks.0.attn.to_out.0", 2),
    "old diffusers": old_diffusers(),
    "onetrainer": published(
        "lora_transformer_transformer_blocks_0_attn_to_out_0", torch.ones(2, 32), torch.ones(32, 2), torch.tensor(1.0)
    ),
    "comfyui": published(
        "diffusion_model.double_blocks.0.img_attn.qkv", torch.ones(2, 32), torch.ones(96, 2), torch.tensor(1.0)
    ),
    "bfl": adapter("double_blocks.0.img_attn.qkv", 4, out=96) | adapter("single_blocks.1.modulation.lin", 2, out=96),
    "kontext": adapter("base_model.model.final_layer.linear", 4),
    "xlabs": {
        f"double_blocks.0.processor.{key.replace('lora_A', 'down').replace('lora_B', 'up')}": tensor
        for key, tensor in (adapter("qkv_lora1", 4, out=96) | adapter("proj_lora2", 4)).items()
    },
    "xlabs single": {
        f"single_blocks.0.processor.{key.replace('lora_A', 'down').replace('lora_B', 'up')}": tensor
        for key, tensor in (adapter("qkv_lora", 4, out=96)).items()
    },
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_read_for_training_and_written_again_is_bit_equal(kind: str) -> None:
    state = FILES[kind]
    file = to_published(state, {})
    own, origin = file.state, file.origin
    assert origin is not None
    assert all(layer_of(key.split(".")[0]) is not None for key in own)
    written, _ = from_published(own, origin.form, origin=origin)
    assert_same_tensors(written, state)


def test_a_dora_of_rows_is_cut_with_its_fused_layers_and_comes_back_for_training() -> None:
    state = with_magnitudes(axis="out")
    written = to_diffusers(state)
    assert torch.equal(written[f"{K}.lora_magnitude_vector.weight"], state[f"{QKV}.dora_scale"][32:64, 0])
    text = "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_magnitude_vector.weight"
    assert written[text].shape == (32,)
    file = to_published(written, {})
    for name in LAYERS:
        assert torch.equal(file.state[f"{name}.dora_scale"], state[f"{name}.dora_scale"]), name
    swapped = written["transformer.norm_out.linear.lora_magnitude_vector.weight"]
    assert torch.equal(swapped[:32], state["lora_unet_final_layer_adaLN_modulation_1.dora_scale"][32:, 0])


def test_a_dora_of_columns_stays_what_it_is_in_its_own_form() -> None:
    state = with_magnitudes(axis="in")
    assert_same_tensors(converted(state, {}, "sd-scripts")[0], state)


def test_what_only_chroma_has_goes_to_diffusers_and_back() -> None:
    names = (
        "lora_unet_distilled_guidance_layer_in_proj",
        "lora_unet_distilled_guidance_layer_layers_3_out_layer",
        QKV,
    )
    state = random_lora(names=names, alpha=4.0)
    written, added, _ = converted(state, {}, "diffusers")
    assert "transformer.distilled_guidance_layer.layers.3.linear_2.lora_A.weight" in written
    assert form_of(written) == "diffusers", "in_proj is called alike in both layouts"
    assert_same_tensors(converted(written, added, "sd-scripts")[0], state)


@pytest.mark.parametrize(
    ("names", "metadata"),
    [
        (("lora_unet_distilled_guidance_layer_out_proj",), {}),
        ((QKV,), {"ss_base_model_version": "chroma"}),
        ((QKV,), {"modelspec.architecture": "chroma/lora"}),
    ],
)
def test_a_lora_for_chroma_is_not_written_in_the_form_of_flux_loaders(
    names: tuple[str, ...], metadata: dict[str, str]
) -> None:
    with pytest.raises(UserError, match="a LoRA for Chroma"):
        converted(random_lora(names=names), metadata, "bfl")
    converted(random_lora(names=(QKV,)), {"modelspec.architecture": "flux-1-dev/lora"}, "bfl")


def test_an_old_split_file_without_its_metadata_is_converted_at_the_trained_strength() -> None:
    """By the alpha that it shares with the other layers, as it is recognised when it is trained on."""
    ups = [torch.randn(32, 2, generator=torch.Generator().manual_seed(9 + part)) for part in range(3)]
    down = torch.randn(6, 32, generator=torch.Generator().manual_seed(3))
    state = published(QKV, down, torch.block_diag(*ups), torch.tensor(1.0))
    state |= random_lora(names=("lora_unet_double_blocks_0_img_attn_proj",), rank=2, alpha=1.0)
    assert converted(state, {}, "sd-scripts")[0][f"{QKV}.alpha"] == 3


def test_zero_weights_keep_their_form_on_the_way_through_training() -> None:
    state = {
        key: torch.zeros_like(tensor) if "lora_B" in key else tensor
        for key, tensor in (adapter(Q, 4) | adapter(K, 4, seed=1) | adapter(V, 4, seed=2)).items()
    }
    file = to_published(state, {})
    own, origin = file.state, file.origin
    assert origin is not None
    assert_same_tensors(from_published(own, "diffusers", origin=origin)[0], state)


def test_weights_that_no_longer_have_the_files_form_are_written_with_their_whole_effect() -> None:
    file = to_published(adapter(Q, 4) | adapter(V, 4, seed=1), {})
    own, origin = file.state, file.origin
    own[f"{QKV}.lora_up.weight"] = torch.randn(96, 8, generator=torch.Generator().manual_seed(5))
    written, _ = from_published(own, "diffusers", origin=origin)
    assert sorted(written) == sorted(f"{module}.lora_{half}.weight" for module in (Q, K, V) for half in "AB")
    again = to_published(written, {}).state
    torch.testing.assert_close(deltas(again)[QKV], deltas(own)[QKV])


def control_lora() -> dict[str, Tensor]:
    state = adapter("double_blocks.0.img_attn.qkv", 4, out=96) | adapter("img_in", 4, seed=1)
    biases = {"double_blocks.0.img_attn.qkv.lora_B.bias": torch.randn(96), "img_in.lora_B.bias": torch.randn(32)}
    return state | biases | {"double_blocks.0.img_attn.norm.query_norm.scale": torch.randn(8)}


def test_a_control_lora_keeps_its_norms_and_biases_between_bfl_and_diffusers() -> None:
    state = control_lora()
    written, _, source = converted(state, {}, "diffusers")
    assert source == "bfl"
    bias = state["double_blocks.0.img_attn.qkv.lora_B.bias"]
    assert torch.equal(written[f"{K}.lora_B.bias"], bias[32:64])
    norm = written["transformer.transformer_blocks.0.attn.norm_q.weight"]
    assert torch.equal(norm, state["double_blocks.0.img_attn.norm.query_norm.scale"])
    assert_same_tensors(converted(written, {}, "bfl")[0], state)


@pytest.mark.parametrize(
    ("state", "form", "message"),
    [
        (control_lora(), "sd-scripts", "double_blocks.0.img_attn.norm.query_norm"),
        (random_lora(), "bfl", "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"),
        (random_lora(names=FLUX_ONLY), "xlabs", "lora_unet_double_blocks_0_img_mlp_0"),
        (random_lora(names=(LINEAR1,)), "xlabs", LINEAR1),
        ({"lora_unet_double_blocks_0_img_attn_qkv.lokr_w1": torch.ones(2, 2)}, "diffusers", "no LoRA for FLUX"),
        (with_magnitudes(axis="in"), "diffusers", rf"one for each in feature: .*{QKV}"),
        (with_magnitudes(axis="in", names=FLUX_ONLY), "bfl", "no place for magnitudes"),
        (with_magnitudes(axis="in", names=ATTENTION), "xlabs", "no place for magnitudes"),
        (to_diffusers(with_magnitudes(axis="out")), "sd-scripts", "one for each out"),
        (with_magnitudes(axis="in") | {f"{QKV}.dora_scale": torch.ones(95, 1)}, "diffusers", "is no magnitude"),
        (
            adapter(Q, 4) | adapter(K, 4) | {f"{Q}.lora_magnitude_vector": torch.ones(32)},
            "diffusers",
            "only some parts",
        ),
        ({f"{QKV}.hada_w1_a": torch.ones(2, 2)}, "diffusers", "a LyCORIS file"),
        ({f"{Q}.lora_A.weight": torch.ones(2, 32)}, "sd-scripts", f"{Q}.lora_A.weight has no counterpart"),
        (adapter(Q, 4) | {f"{Q}.lora_A.weight": torch.ones(3, 32)}, "sd-scripts", r"\[3, 32\]"),
        ({"down_blocks.0.attn.to_q.lora_A.weight": torch.ones(2, 2)}, "sd-scripts", "no LoRA for FLUX"),
    ],
)
def test_what_a_form_cannot_hold_is_refused_by_name(state: dict[str, Tensor], form: Form, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        converted(state, {}, form)
    assert caught.value.exit_code == 3


def test_a_bfl_file_made_whole_holds_every_layer_and_reads_as_what_was_trained() -> None:
    state = random_lora(alpha=1.0, names=(QKV,))
    base = BaseLayers(
        {"double_blocks.0.img_attn.qkv": (96, 32), "img_in": (32, 16)},
        {"double_blocks.0.img_attn.norm.query_norm": torch.ones(8)},
    )
    written, added, _ = converted(state, {}, "bfl", base=base)
    assert set(written) == {
        *(f"{path}.lora_{half}.weight" for path in base.linears for half in "AB"),
        "double_blocks.0.img_attn.norm.query_norm.scale",
    }
    assert not written["img_in.lora_B.weight"].any()
    assert_same_tensors(converted(written, added, "sd-scripts")[0], state)


def test_published_files_are_given_back_untouched_for_training() -> None:
    for state in (random_lora(), {f"{QKV}.lokr_w1": torch.ones(2, 2)}):
        file = to_published(state, {})
        assert file.origin is None
        assert_same_tensors(file.state, state)
