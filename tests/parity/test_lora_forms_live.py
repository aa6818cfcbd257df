"""LoRAs of every form that we write, loaded by diffusers' own pipeline: the same output as ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from tests.diffusers_flux import chroma_in_diffusers, in_diffusers
from tests.lora.random_lora import assert_same_tensors
from tests.tiny import TinyModels
from trainer.lora.form_names import Form
from trainer.lora.form_writer import BaseLayers
from trainer.lora.forms import converted, from_published, to_published
from trainer.lora.from_file import spec_from_file
from trainer.lora.layer_names import is_flux_path, is_norm_path
from trainer.lora.lora_file import read_lora_file
from trainer.lora.network import LoraNetwork
from trainer.model.chroma import Chroma
from trainer.model.flux import Flux
from trainer.model.packing import image_ids, text_ids
from trainer.model.weights import load_chroma, load_clip_l, load_flux
from trainer.schema.lora_spec import LoraSpec
from trainer.tools.tiny_models import make_chroma
from trainer.train.checkpoint import save_lora

pytest.importorskip("diffusers")
pytest.importorskip("peft")
from diffusers.loaders import lora_pipeline
from diffusers.pipelines.chroma.pipeline_chroma import ChromaPipeline
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from peft import LoraConfig
from peft.utils.save_and_load import get_peft_model_state_dict

Transformer = Flux | Chroma

PUBLISHED_HIDDEN, PUBLISHED_MLP, PUBLISHED_DEPTHS = 3072, 12288, (19, 38)
ATTENTION_ONLY = {
    "img_mlp_dim": 0,
    "txt_mlp_dim": 0,
    "img_mod_dim": 0,
    "txt_mod_dim": 0,
    "single_dim": 0,
    "single_mod_dim": 0,
}
EVERYWHERE = (4, 4, 4, 4, 4)


def with_other_sizes(function: Any, sizes: dict[int, int]) -> Callable[..., object]:
    """The same function for a model of other sizes: diffusers has written the published ones into its converters."""

    def constant(value: object) -> object:
        if isinstance(value, CodeType):
            return value.replace(co_consts=tuple(constant(own) for own in value.co_consts))
        if isinstance(value, tuple):
            return tuple(constant(own) for own in cast("tuple[object, ...]", value))
        return sizes.get(value, value) if type(value) is int else value

    return FunctionType(cast("CodeType", constant(function.__code__)), function.__globals__)


@pytest.fixture
def at_tiny_size(monkeypatch: pytest.MonkeyPatch, tiny_models: TinyModels) -> None:
    params = load_flux(tiny_models.flux_dev, torch.float32, "cpu").params
    sizes = {
        PUBLISHED_HIDDEN: params.hidden_size,
        PUBLISHED_MLP: 4 * params.hidden_size,
        PUBLISHED_DEPTHS[0]: params.depth,
        PUBLISHED_DEPTHS[1]: params.depth_single_blocks,
    }
    for name in ("_convert_kohya_flux_lora_to_diffusers", "_convert_bfl_flux_control_lora_to_diffusers"):
        monkeypatch.setattr(lora_pipeline, name, with_other_sizes(getattr(lora_pipeline, name), sizes))


def trained(flux: Transformer, clip: nn.Module | None, spec: LoraSpec) -> tuple[LoraNetwork, dict[str, Tensor]]:
    """A network whose every weight is random, and its published tensors."""
    generator = torch.Generator().manual_seed(8)
    network = LoraNetwork.attach(flux, clip, spec, generator)
    for name, parameter in network.named_parameters():
        if name.endswith("_magnitude"):
            parameter.data.mul_(0.7 + 0.6 * torch.rand(parameter.shape, generator=generator))
        elif parameter.requires_grad:
            parameter.data.normal_(0, 0.1, generator=generator)
    network.eval()
    return network, network.published_state_dict(torch.float32)


def forward(flux: Transformer) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(11)
    params = flux.params
    given = {
        "img": torch.randn(1, 12, params.in_channels, generator=generator),
        "txt": torch.randn(1, 5, params.context_in_dim, generator=generator),
        "timesteps": torch.tensor([0.4]),
        "guidance": torch.tensor([0.0]),
    }
    if isinstance(flux, Flux):
        given |= {"y": torch.randn(1, flux.params.vec_in_dim, generator=generator), "guidance": torch.tensor([2.5])}
    with torch.no_grad():
        return flux(**given, img_ids=image_ids(3, 4), txt_ids=text_ids(5)), given


def their_output(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    flux_only = {"pooled_projections": given["y"], "guidance": given["guidance"]} if "y" in given else {}
    with torch.no_grad():
        return model(
            hidden_states=given["img"],
            encoder_hidden_states=given["txt"],
            timestep=given["timesteps"],
            img_ids=image_ids(3, 4)[0],
            txt_ids=text_ids(5)[0],
            return_dict=False,
            **flux_only,
        )[0]


def pipeline(transformer: nn.Module, text_encoder: nn.Module | None = None) -> Any:
    parts: dict[str, Any] = dict.fromkeys(("scheduler", "vae", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return FluxPipeline(**parts, text_encoder=cast("Any", text_encoder), transformer=cast("Any", transformer))


def base_of(flux: Flux) -> BaseLayers:
    state = flux.state_dict()
    linears = {
        name.removesuffix(".weight"): (tensor.shape[0], tensor.shape[1])
        for name, tensor in state.items()
        if name.endswith(".weight") and is_flux_path(name.removesuffix(".weight"))
    }
    norms = {name.removesuffix(".scale"): t for name, t in state.items() if is_norm_path(name.removesuffix(".scale"))}
    return BaseLayers(linears, norms)


@pytest.mark.usefixtures("at_tiny_size")
@pytest.mark.parametrize(
    ("form", "alpha", "spec"),
    [
        ("sd-scripts", 2, LoraSpec(rank=4, alpha=2)),
        # Not with in_dims: diffusers 0.42 forgets its prefix for those layers of this form and leaves them out.
        ("sd-scripts", 3, LoraSpec(rank=4, alpha=3, train_blocks="single")),
        ("diffusers", 1, LoraSpec(rank=4, alpha=1, in_dims=EVERYWHERE)),
        ("diffusers", 3, LoraSpec(rank=4, alpha=3, type_dims={"img_attn_dim": 6, "single_dim": 2})),
        ("bfl", 3, LoraSpec(rank=4, alpha=3, in_dims=EVERYWHERE)),
        ("bfl", 1, LoraSpec(rank=4, alpha=1, train_blocks="single", single_indices=frozenset({1}))),
        ("xlabs", 3, LoraSpec(rank=4, alpha=3, type_dims=ATTENTION_ONLY)),
        ("diffusers", 2, LoraSpec(rank=4, alpha=2, dora=True, dora_axis="out", in_dims=EVERYWHERE)),
        ("diffusers", 3, LoraSpec(rank=4, alpha=3, dora=True, dora_axis="out", split_qkv=True)),
    ],
)
def test_diffusers_gives_our_output_with_a_lora_of_each_form(
    tiny_models: TinyModels, tmp_path: Path, form: Form, alpha: float, spec: LoraSpec
) -> None:
    flux = load_flux(tiny_models.flux_dev, torch.float32, "cpu")
    theirs = in_diffusers(flux)
    base = base_of(flux)
    plain, given = forward(flux)
    _, state = trained(flux, None, spec)
    ours, _ = forward(flux)
    written, metadata, _ = converted(state, {}, form, base=base)
    save_lora(tmp_path / "lora.safetensors", written, metadata)
    pipe = pipeline(theirs)
    pipe.load_lora_weights(str(tmp_path), weight_name="lora.safetensors", adapter_name="ours")
    output = their_output(theirs, given)
    assert float((ours - plain).abs().max()) > 0.05, "the LoRA does something"
    torch.testing.assert_close(output, ours, atol=1e-4, rtol=0)


@pytest.mark.usefixtures("at_tiny_size")
@pytest.mark.parametrize(
    ("form", "alpha", "is_dora"),
    [("sd-scripts", 3, False), ("diffusers", 2, False), ("diffusers", 3, False), ("diffusers", 2, True)],
)
def test_diffusers_gives_our_clip_output_with_the_text_encoders_part(
    tiny_models: TinyModels, tmp_path: Path, form: Form, alpha: float, is_dora: bool
) -> None:
    flux = load_flux(tiny_models.flux_dev, torch.float32, "cpu")
    theirs = in_diffusers(flux)
    clip, their_clip = (load_clip_l(tiny_models.clip_l, torch.float32, "cpu") for _ in range(2))
    tokens = torch.tensor([[3, 5, 7, 2]])
    plain = clip(tokens).pooler_output.detach()
    _, state = trained(flux, clip, LoraSpec(rank=4, alpha=alpha, dora=is_dora, dora_axis="out"))
    ours = clip(tokens).pooler_output.detach()
    written, metadata, _ = converted(state, {}, form)
    save_lora(tmp_path / "lora.safetensors", written, metadata)
    pipe = pipeline(theirs, their_clip)
    pipe.load_lora_weights(str(tmp_path), weight_name="lora.safetensors", adapter_name="ours")
    assert float((ours - plain).abs().max()) > 0.01
    torch.testing.assert_close(their_clip(tokens).pooler_output, ours, atol=1e-4, rtol=0)
    ours_image, given = forward(flux)
    torch.testing.assert_close(their_output(theirs, given), ours_image, atol=1e-4, rtol=0)


def test_at_the_published_sizes_diffusers_own_conversion_gives_what_we_write_for_it() -> None:
    """Untouched converters: a LoRA of rank 2 on a double and a single block of FLUX.1 dev."""
    generator = torch.Generator().manual_seed(2)
    widths = {
        "double_blocks_18_img_attn_qkv": (9216, 3072),
        "double_blocks_18_txt_mlp_2": (3072, 12288),
        "single_blocks_37_linear1": (21504, 3072),
        "single_blocks_37_linear2": (3072, 15360),
    }
    state: dict[str, Tensor] = {}
    for name, (out_features, in_features) in widths.items():
        state[f"lora_unet_{name}.alpha"] = torch.tensor(1.0)
        state[f"lora_unet_{name}.lora_down.weight"] = torch.randn(2, in_features, generator=generator)
        state[f"lora_unet_{name}.lora_up.weight"] = torch.randn(out_features, 2, generator=generator)
    ours, _, _ = converted(state, {}, "diffusers")
    theirs = cast("dict[str, Tensor]", FluxPipeline.lora_state_dict(dict(state)))
    assert set(ours) == set(theirs)
    for key, tensor in theirs.items():
        if key.endswith("lora_A.weight"):
            partner = key.replace("lora_A", "lora_B")
            torch.testing.assert_close(ours[partner] @ ours[key][:, :8], theirs[partner] @ tensor[:, :8])


@pytest.mark.usefixtures("at_tiny_size")
@pytest.mark.parametrize(
    ("form", "spec"),
    [
        ("sd-scripts", LoraSpec(rank=4, alpha=3)),
        ("diffusers", LoraSpec(rank=4, alpha=3, in_dims=EVERYWHERE)),
        ("diffusers", LoraSpec(rank=4, alpha=3, dora=True, dora_axis="out")),
        ("xlabs", LoraSpec(rank=4, alpha=3, type_dims=ATTENTION_ONLY)),
    ],
)
def test_diffusers_gives_our_output_with_a_chroma_lora(tmp_path: Path, form: Form, spec: LoraSpec) -> None:
    chroma = load_chroma(make_chroma(tmp_path / "chroma.safetensors"), torch.float32, "cpu")
    theirs = chroma_in_diffusers(chroma)
    plain, given = forward(chroma)
    _, state = trained(chroma, None, spec)
    ours, _ = forward(chroma)
    written, metadata, _ = converted(state, {"ss_base_model_version": "chroma"}, form)
    save_lora(tmp_path / "lora.safetensors", written, metadata)
    parts: dict[str, Any] = dict.fromkeys(("scheduler", "vae", "tokenizer", "text_encoder"))
    pipe: Any = ChromaPipeline(**parts, transformer=cast("Any", theirs))
    pipe.load_lora_weights(str(tmp_path), weight_name="lora.safetensors", adapter_name="ours")
    output = their_output(theirs, given)
    assert float((ours - plain).abs().max()) > 0.05, "the LoRA does something"
    torch.testing.assert_close(output, ours, atol=1e-4, rtol=0)


def test_a_lora_that_diffusers_saved_keeps_the_alpha_that_only_its_metadata_hold(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    """PEFT trains with an alpha beside the rank, which `save_lora_weights` puts into the metadata as JSON."""
    flux = load_flux(tiny_models.flux_dev, torch.float32, "cpu")
    theirs = in_diffusers(flux)
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["to_k", "to_q", "to_v", "proj_mlp"],
        alpha_pattern={"transformer_blocks.1.attn.to_q": 3},
        use_rslora=True,
        init_lora_weights=False,
    )
    cast("Any", theirs).add_adapter(config)
    _, given = forward(flux)
    expected = their_output(theirs, given)
    layers = cast("dict[str, nn.Module | Tensor]", get_peft_model_state_dict(theirs))
    FluxPipeline.save_lora_weights(tmp_path, layers, transformer_lora_adapter_metadata=config.to_dict())
    file = tmp_path / "pytorch_lora_weights.safetensors"
    state, metadata = read_lora_file(file)
    published = to_published(state, metadata)
    network = LoraNetwork.attach(
        flux, None, spec_from_file(LoraSpec(), published.state, published.metadata, "file"), torch.Generator()
    )
    network.load_published(published.state, metadata=published.metadata)
    ours, _ = forward(flux)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)
    written, added = from_published(network.published_state_dict(None), "diffusers", origin=published.origin)
    assert_same_tensors(written, state)
    save_lora(tmp_path / "again.safetensors", written, added)
    again = in_diffusers(load_flux(tiny_models.flux_dev, torch.float32, "cpu"))
    pipeline(again).load_lora_weights(str(tmp_path), weight_name="again.safetensors", adapter_name="ours")
    torch.testing.assert_close(their_output(again, given), expected, atol=1e-5, rtol=0)
