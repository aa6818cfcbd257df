"""Networks of the package lycoris-lora, where it is installed."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import torch
from torch import nn

from trainer.lora.lycoris import LycorisNetwork
from trainer.model.weights import load_flux
from trainer.schema.base import UserError
from trainer.schema.lora_spec import LoraSpec, spec_from_network_args


@pytest.fixture
def tiny_dev(golden: Path) -> nn.Module:
    pytest.importorskip("lycoris", exc_type=ImportError)
    return load_flux(golden / "replay" / "model_dev.safetensors", torch.float32, "cpu")


def lycoris_spec(*network_args: str) -> LoraSpec:
    return spec_from_network_args(network_args, network_dim=4, network_alpha=4, network_module="lycoris.kohya")


def test_values_are_read_before_the_package_sees_them() -> None:
    spec = lycoris_spec("algo=LoKr", "factor=-1", "use_scalar=1", "decompose_both=false", "constraint=1e-3")
    assert spec.lycoris == {
        "algo": "lokr",
        "factor": -1,
        "use_scalar": True,
        "decompose_both": False,
        "constraint": 1e-3,
    }


def test_every_value_that_cannot_be_read_is_told_at_once() -> None:
    with pytest.raises(UserError) as error:
        lycoris_spec("algo=lokrr", "factor=four", "use_scalar=yes", "loraplus_lr_ratio=x", "preset=ful")
    assert sorted(problem.what for problem in error.value.problems) == [
        "algo is lokrr; it must be one of lora, locon, loha, lokr, dylora, glora, full, diag-oft, boft, ia3, tlora. "
        "Did you mean lokr?",
        "factor is four; it must be a whole number",
        "loraplus_lr_ratio is x; it must be a number, 0 or more",
        "preset is ful; it must be one of full, full-lin, attn-mlp, attn-only, unet-only, unet-transformer-only, "
        "unet-convblock-only, ia3, or a TOML file that exists. Did you mean full?",
        "use_scalar is yes; it must be True or False",
    ]
    assert error.value.exit_code == 2


def test_settings_that_the_package_refuses_are_told_with_what_to_do(tiny_dev: nn.Module) -> None:
    with pytest.raises(UserError, match=r"lora_dim must be a multiple of block_size.*Network-Args") as error:
        LycorisNetwork.attach(tiny_dev, None, lycoris_spec("algo=dylora", "block_size=3"), 1)
    assert error.value.exit_code == 2


@pytest.mark.parametrize("text", ["enable_conv == 1", "name_algo_map = 5"])
def test_a_preset_that_the_package_cannot_use_is_named(text: str, tiny_dev: nn.Module, tmp_path: Path) -> None:
    preset = tmp_path / "preset.toml"
    preset.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"cannot use this preset \(.+\).*preset.toml") as error:
        LycorisNetwork.attach(tiny_dev, None, lycoris_spec("algo=lokr", f"preset={preset}"), 1)
    assert error.value.exit_code == 2


@pytest.mark.parametrize("fault", [KeyError("some layer"), AssertionError("duplicated lora name"), AssertionError()])
def test_a_fault_inside_the_package_is_not_called_a_wrong_setting(
    tiny_dev: nn.Module, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    kohya = pytest.importorskip("lycoris.kohya", exc_type=ImportError)

    def broken(*_: object, **__: object) -> None:
        raise fault

    monkeypatch.setattr(kohya, "create_network", broken)
    with pytest.raises(type(fault)):
        LycorisNetwork.attach(tiny_dev, None, lycoris_spec("algo=lokr"), 1)


@pytest.mark.parametrize(
    ("network_args", "rates", "lacks_ups"),
    [
        (("algo=locon", "loraplus_lr_ratio=4", "loraplus_unet_lr_ratio=3"), {"unet": 1e-3, "unet plus": 3e-3}, False),
        (("algo=locon",), {"unet": 1e-3}, False),
        (("algo=lokr", "factor=4", "loraplus_lr_ratio=4"), {"unet": 1e-3}, True),
    ],
)
def test_loraplus_lets_the_packages_ups_learn_faster(
    network_args: tuple[str, ...], rates: dict[str, float], lacks_ups: bool, golden: Path
) -> None:
    pytest.importorskip("lycoris", exc_type=ImportError)
    model = load_flux(golden / "replay" / "model_dev.safetensors", torch.float32, "cpu")
    network = LycorisNetwork.attach(model, None, lycoris_spec(*network_args), 1)
    groups = network.parameter_groups(1e-3, 1e-4)
    assert {group["name"]: group["lr"] for group in groups} == pytest.approx(rates)
    assert network.lacks_ups is lacks_ups
    grouped = [id(p) for group in groups for p in cast("list[nn.Parameter]", group["params"])]
    assert sorted(grouped) == sorted(id(p) for p in network.parameters())
    if "unet plus" in rates:
        ups = {id(p) for key, p in network.named_parameters() if "lora_up" in key}
        assert {id(p) for p in cast("list[nn.Parameter]", groups[1]["params"])} == ups
