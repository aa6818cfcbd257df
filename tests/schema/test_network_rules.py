"""The rules between the network's options, and the lines about them."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.schema.lora_spec import LoraSpec, spec_from_network_args
from trainer.schema.network_args import KEYS
from trainer.schema.option_reading import Given, Reading, read_options


def read(**values: object) -> Reading:
    return read_options({name: Given(value, f"--{name}") for name, value in values.items()})


@pytest.mark.parametrize(
    ("values", "field", "what"),
    [
        ({"dim_from_weights": True}, "dim_from_weights", "needs a LoRA file"),
        (
            {"base_weights": ("a",), "base_weights_multiplier": (1.0, 2.0)},
            "base_weights_multiplier",
            "has 2 numbers for 1 files",
        ),
        (
            {"network_train_unet_only": True, "network_train_text_encoder_only": True},
            "network_train_text_encoder_only",
            "leave nothing to train",
        ),
        (
            {"network_args": ("train_t5xxl=1",), "cache_text_encoder_outputs_to_disk": True},
            "network_args",
            "train_t5xxl trains T5",
        ),
        ({"network_args": ("train_t5xxl=1",), "network_train_unet_only": True}, "network_args", "rules out"),
        (
            {"network_module": "networks.oft_flux", "scale_weight_norms": 1.0, "network_train_unet_only": True},
            "scale_weight_norms",
            "belongs to LoRAs",
        ),
        ({"network_module": "networks.oft_flux", "network_dropout": 0.1}, "network_dropout", "has no dropout"),
        ({"network_module": "networks.oft_flux", "network_alpha": 0}, "network_args", "no room to move"),
        ({"network_args": ("pissa=1",), "scale_weight_norms": 1.0}, "scale_weight_norms", "what pissa begins with"),
        ({"network_args": ("pissa=1", "ggpo_sigma=1", "ggpo_beta=1")}, "network_args", "do not go together"),
        ({"network_args": ("pissa_niter=3",)}, "network_args", "pissa_niter belongs to PiSSA"),
        ({"scale_weight_norms": 0}, "scale_weight_norms", "it must be"),
        (
            {"network_module": "networks.oft_flux", "network_args": ("train_blocks=single",)},
            "network_args",
            "train_blocks is a setting of networks.lora_flux",
        ),
        (
            {"network_module": "lycoris.kohya", "network_args": ("alog=lokr",)},
            "network_args",
            '"alog" is not a known key',
        ),
    ],
)
def test_what_does_not_go_together_is_told_at_the_option_to_change(
    values: dict[str, object], field: str, what: str
) -> None:
    problems = read(**values).problems
    assert len(problems) == 1, problems
    assert problems[0].field == field
    assert what in problems[0].what


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"text_encoder_lr": (1e-4, 1e-5)}, "the second text_encoder_lr has no effect: T5 is not trained"),
        ({"network_module": "networks.oft_flux"}, "network_alpha is 1, which does not hold OFT back at all"),
        ({"network_module": "networks.oft_flux"}, "trains FLUX only"),
        (
            {"dim_from_weights": True, "network_weights": "x", "network_args": ("in_dims=1,1,1,1,1",)},
            "in_dims has no effect",
        ),
        (
            {
                "network_train_unet_only": True,
                "text_encoder_lr": (1e-4, 1e-5),
                "network_args": ("loraplus_text_encoder_lr_ratio=4",),
            },
            "text_encoder_lr and loraplus_text_encoder_lr_ratio have no effect: only the transformer is trained",
        ),
        ({"model_type": "chroma", "text_encoder_lr": (1e-4,)}, "text_encoder_lr has no effect: only the transformer"),
        ({"network_train_text_encoder_only": True, "unet_lr": 1e-4}, "unet_lr has no effect: only the text encoders"),
        (
            {"network_args": ("train_blocks=single", "train_double_block_indices=0-1")},
            "train_double_block_indices has no effect: train_blocks is single",
        ),
        (
            {"network_args": ("split_qkv=True", "rank_dropout=0.1", "rank_dropout = 0.2")},
            "rank_dropout of network_args is given twice: 0.1 has no effect beside 0.2, which comes later",
        ),
    ],
)
def test_what_has_no_effect_or_trains_badly_gets_a_line(values: dict[str, object], line: str) -> None:
    assert any(line in note for note in read(**values).notes), read(**values).notes


def test_two_text_encoder_rates_are_right_when_t5_trains() -> None:
    reading = read(text_encoder_lr=(1e-4, 1e-5), network_args=("train_t5xxl=true",))
    assert not any("text_encoder_lr" in note for note in reading.notes)


def test_every_lora_key_is_read() -> None:
    spec = spec_from_network_args(
        [
            "split_qkv=1",
            "train_t5xxl=true",
            "ggpo_sigma=0.03",
            "ggpo_beta=0.01",
            "network_reg_dims=linear1=6,txt=0",
            "network_reg_lrs=linear2=1e-4",
            "loraplus_lr_ratio=16",
            "loraplus_unet_lr_ratio=4",
            "dora=True",
            "rslora=True",
        ]
    )
    assert (spec.split_qkv, spec.train_t5xxl, spec.dora, spec.rslora) == (True, True, True, True)
    assert (spec.ggpo_sigma, spec.ggpo_beta) == (0.03, 0.01)
    assert spec.reg_dims == (("linear1", 6), ("txt", 0))
    assert spec.reg_lrs == (("linear2", 1e-4),)
    assert (spec.loraplus_unet_ratio, spec.loraplus_text_encoder_ratio) == (4, 16), "the special ratio wins"


def test_an_expression_wins_over_type_and_block_and_also_holds_for_text_encoders() -> None:
    spec = spec_from_network_args(
        ["network_reg_dims=single_blocks_7_linear=6,te1_.*fc1=2", "train_single_block_indices=0-3", "single_dim=3"]
    )
    assert spec.rank_of("lora_unet_single_blocks_7_linear1") == 6
    assert spec.rank_of("lora_unet_single_blocks_8_linear1") == 0
    assert spec.rank_of("lora_unet_single_blocks_2_linear1") == 3
    assert spec.rank_of("lora_te1_text_model_encoder_layers_0_mlp_fc1") == 2
    assert spec.rank_of("lora_te1_text_model_encoder_layers_0_mlp_fc2") == 4
    assert LoraSpec(file_ranks={"a": 5}, reg_dims=(("a", 1),)).rank_of("a") == 5


def test_every_key_is_described() -> None:
    text = (Path(__file__).parents[2] / "docs" / "network_settings.md").read_text(encoding="utf-8")
    for kind in ("lora", "oft"):
        assert not [key for key in KEYS[kind] if f"`{key}`" not in text]
