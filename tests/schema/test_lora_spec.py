"""`network_args`: what is understood, and how mistakes are told."""

from __future__ import annotations

import pytest

from trainer.schema.base import Problem, UserError
from trainer.schema.lora_spec import LoraSpec, parse_indices, spec_from_network_args


def problem(*network_args: str, **options: float) -> Problem:
    with pytest.raises(UserError) as caught:
        spec_from_network_args(network_args, **options)  # type: ignore[arg-type]
    assert caught.value.exit_code == 2
    (found,) = caught.value.problems
    return found


def test_nothing_given_is_rank_4_and_alpha_1() -> None:
    assert spec_from_network_args(()) == LoraSpec(rank=4, alpha=1)
    assert type(spec_from_network_args(()).alpha) is int


def test_every_supported_key_is_read() -> None:
    spec = spec_from_network_args(
        [
            "verbose=True",
            "rank_dropout=0.1",
            "module_dropout=0.2",
            "train_blocks=double",
            "train_double_block_indices=0,2,5-7",
            "train_single_block_indices=none",
            "img_attn_dim=8",
            "txt_attn_dim=0",
            "single_mod_dim=2",
            "in_dims=[1,2,3,4,0]",
        ],
        network_dim=16,
        network_alpha=8.0,
        network_dropout=0.3,
    )
    assert (spec.rank, spec.alpha, spec.dropout, spec.rank_dropout, spec.module_dropout) == (16, 8.0, 0.3, 0.1, 0.2)
    assert (spec.train_blocks, spec.verbose) == ("double", True)
    assert spec.double_indices == {0, 2, 5, 6, 7}
    assert spec.single_indices == frozenset()
    assert dict(spec.type_dims) == {"img_attn_dim": 8, "txt_attn_dim": 0, "single_mod_dim": 2}
    assert spec.in_dims == (1, 2, 3, 4, 0)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lora_unet_double_blocks_0_img_attn_qkv", 8),
        ("lora_unet_double_blocks_0_txt_attn_qkv", None),
        ("lora_unet_single_blocks_3_linear1", 2),
        ("lora_unet_single_blocks_3_modulation_lin", 1),
        ("lora_unet_double_blocks_0_img_mod_lin", None),
    ],
)
def test_a_type_dim_applies_to_its_layers_only(name: str, expected: int | None) -> None:
    spec = spec_from_network_args(["img_attn_dim=8", "single_dim=2", "single_mod_dim=1"])
    assert spec.type_dim(name) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, None),
        ("all", None),
        ("none", frozenset()),
        ("", frozenset()),
        ("3", {3}),
        ("0, 2 ,5-7", {0, 2, 5, 6, 7}),
    ],
)
def test_block_indices(text: str | None, expected: frozenset[int] | None) -> None:
    assert parse_indices(text) == expected


@pytest.mark.parametrize("text", ["a", "1,,2", "-1", "5-3", "1.5"])
def test_malformed_block_indices_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="holds"):
        parse_indices(text)


@pytest.mark.parametrize(
    ("argument", "what", "hint"),
    [
        ("train_block=all", '"train_block" is not a known key', "Did you mean train_blocks?"),
        ("verbose", '"verbose" is not of the form key=value', None),
        ("verbose=perhaps", "verbose is perhaps; it must be True or False", None),
        ("train_blocks=triple", "train_blocks is triple; it must be all, single or double", None),
        ("rank_dropout=1", "rank_dropout is 1; it must be at least 0 and below 1", None),
        ("rank_dropout=x", "rank_dropout is x; it must be at least 0 and below 1", None),
        ("in_dims=1,2", "in_dims has 2 numbers; it needs 5", None),
        ("img_attn_dim=-1", "img_attn_dim is -1; it must be a whole number", None),
        ("split_qvk=True", '"split_qvk" is not a known key', "Did you mean split_qkv?"),
        ("loraplus_lr_ratio=-4", "loraplus_lr_ratio is -4; it must be a number, 0 or more", None),
        ("ggpo_sigma=0.03", "ggpo_sigma and ggpo_beta need each other", "Give both"),
        ("network_reg_dims=(=4", 'network_reg_dims holds "(", which is no regular expression', None),
        ("network_reg_dims=linear1", 'network_reg_dims holds "linear1"; give regex=number', None),
        ("network_reg_lrs=linear1=x", "network_reg_lrs is x; it must be a number", None),
        ("enable_all_linear=1", "enable_all_linear is not supported", "networks.oft_flux"),
        ("conv_dim=4", "conv_dim is not supported", "no convolutions"),
        ("dropout=0.1", "dropout is not supported", "network_dropout"),
    ],
)
def test_a_wrong_argument_is_told(argument: str, what: str, hint: str | None) -> None:
    found = problem(argument)
    assert found.what.startswith(what)
    assert (found.field, found.where) == ("network_args", "--network_args")
    if hint is not None:
        assert hint in str(found.hint)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"network_dim": 0}, "network_dim"),
        ({"network_alpha": -1}, "network_alpha"),
        ({"network_dropout": 1.0}, "network_dropout"),
    ],
)
def test_a_wrong_number_is_told_at_its_option(options: dict[str, float], field: str) -> None:
    assert problem(**options).field == field


def test_all_wrong_arguments_are_told_at_once() -> None:
    with pytest.raises(UserError) as caught:
        spec_from_network_args(["a=1", "train_blocks=x", "verbose"], network_dim=0)
    assert len(caught.value.problems) == 4


@pytest.mark.parametrize("text", ["true", "True", "1"])
def test_switches_are_understood_in_every_spelling(text: str) -> None:
    assert spec_from_network_args([f"verbose={text}", "split_qkv=False", "train_t5xxl=0"]).verbose


def test_a_spec_made_by_hand_is_checked() -> None:
    for rank, alpha in ((0, 1.0), (4, -1.0), (4, float("nan"))):
        with pytest.raises(ValueError, match="must be"):
            LoraSpec(rank=rank, alpha=alpha)
