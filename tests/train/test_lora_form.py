"""What is said before anything is loaded about a form that has no place for what is to be trained."""

from __future__ import annotations

import pytest

from trainer.schema.checkpoint_header import FluxParams
from trainer.schema.chroma_header import ChromaParams, TransformerParams
from trainer.schema.network_rules import options_spec
from trainer.schema.options import Options
from trainer.train.lora_form import form_problems

FLUX = FluxParams(16, 16, 32, 64, 48, 4.0, 2, 1, 1, (8, 8, 8), 10_000, True, True)
CHROMA = ChromaParams(16, 16, 64, 48, 4.0, 2, 1, 1, (8, 8, 8), 10_000, True, 16, 16, 1)
ATTENTION = ("train_blocks=double", "img_mlp_dim=0", "txt_mlp_dim=0", "img_mod_dim=0", "txt_mod_dim=0")


def problems(model: TransformerParams, form: str, *pairs: str, **settings: object) -> str:
    options = Options.model_validate({"lora_form": form, "network_args": pairs, **settings})
    spec = options_spec(options)
    assert spec is not None
    return " ".join(f"{problem.what} {problem.hint}" for problem in form_problems(options, spec, model))


@pytest.mark.parametrize(
    ("form", "pairs", "message"),
    [
        ("diffusers", ("dora=1",), "Add dora_axis=out"),
        ("sd-scripts", ("dora=1", "dora_axis=out"), "Add --lora_form=diffusers"),
        ("bfl", ("dora=1", "dora_axis=out"), "no place for magnitudes"),
        ("xlabs", ("dora=1",), "no place for magnitudes"),
        ("bfl", (), "text encoder's LoRA"),
        ("xlabs", ATTENTION, "text encoder's LoRA"),
        ("xlabs", (), "It holds attention only"),
    ],
)
def test_the_form_is_refused_with_what_helps(form: str, pairs: tuple[str, ...], message: str) -> None:
    assert message in problems(FLUX, form, *pairs)


def test_what_has_its_place_is_not_refused() -> None:
    assert problems(FLUX, "sd-scripts", "dora=1") == ""
    assert problems(FLUX, "diffusers", "dora=1", "dora_axis=out") == ""
    assert problems(FLUX, "xlabs", *ATTENTION, network_train_unet_only=True) == ""


def test_chroma_is_refused_by_name_where_the_form_is_for_flux_only() -> None:
    assert "not for Chroma" in problems(CHROMA, "bfl", network_train_unet_only=True)
    assert problems(CHROMA, "diffusers") == ""
    assert problems(CHROMA, "xlabs", *ATTENTION) == "", "it has no CLIP-L"
    assert "text encoder's LoRA" in problems(CHROMA, "xlabs", *ATTENTION, "train_t5xxl=True")


def test_other_kinds_are_written_as_sd_scripts_does_only() -> None:
    oft = {"network_module": "networks.oft_flux", "network_alpha": 1e-3}
    assert "no place for networks.oft_flux" in problems(FLUX, "diffusers", **oft)
    assert problems(FLUX, "sd-scripts", **oft) == ""
