"""Networks of the lycoris-lora package (`lycoris.kohya`): LoHa, LoKr, IA3 and others, trained and saved by its own code.

The package is not required and is imported only for such a network. Its modules replace the `forward` of the Linears and
keep references to them.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from trainer.lora.adapter import wrong_part
from trainer.lora.lora_file import read_lora_file
from trainer.lora.max_norm import NormReport
from trainer.lora.network import LoadReport, LoraNetwork, take_tensors
from trainer.lora.rate_groups import rate_groups, require_any
from trainer.schema.base import UserError
from trainer.schema.lora_spec import LoraSpec
from trainer.schema.lycoris_args import PRESETS

PACKAGE: Final = "lycoris-lora"

_REFUSALS: Final = (ValueError, NotImplementedError)
"""What the package raises for settings that it cannot carry out. Anything else is a fault of the program."""
_REFUSING_ASSERTION: Final = "lora_dim must be"
"""How the one assertion of the package begins that is about a setting (of dylora); its others are about itself."""

_UP: Final = "lora_up"
_BARE_CLIP, _PUBLISHED_CLIP = "lora_te1_", "lora_te1_text_model_"


def is_installed() -> bool:
    return importlib.util.find_spec("lycoris") is not None


def not_installed() -> UserError:
    return UserError(
        f"lycoris.kohya needs the package {PACKAGE}, which is not installed",
        "--network_module",
        f"Run: pip install {PACKAGE}",
        field="network_module",
        exit_code=2,
    )


def _check_preset(preset: object) -> None:
    """Raises `UserError` for a preset file that the package cannot use, with the reason that it prints."""
    if preset is None or preset in PRESETS:
        return
    read = cast(Any, importlib.import_module("lycoris.utils.preset")).read_preset
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            is_usable = read(str(preset)) is not None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        is_usable = False
        printed.write(str(error))
    if not is_usable:
        reason = " ".join(printed.getvalue().split()).removeprefix("Error: ")
        raise UserError(
            f"{PACKAGE} cannot use this preset ({reason or 'no reason given'})",
            str(preset),
            f"Correct the file, or give one of {', '.join(PRESETS)}.",
            field="network_args",
            exit_code=2,
        )


class LycorisNetwork(nn.Module):
    """A network of the package, with the methods that training needs of a `LoraNetwork`."""

    def __init__(self, network: nn.Module, spec: LoraSpec) -> None:
        super().__init__()
        self._network = network
        self._spec = spec

    @classmethod
    def attach(cls, flux: nn.Module, clip_l: nn.Module | None, spec: LoraSpec, seed: int) -> LycorisNetwork:
        """Makes the network that `spec.lycoris` describes and puts it on the models.

        Raises `UserError` (exit code 2) without the package, for settings that it refuses, or when it finds no layer.
        """
        if not is_installed():
            raise not_installed()
        kohya = cast(Any, importlib.import_module("lycoris.kohya"))
        _check_preset(spec.lycoris.get("preset"))
        try:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                network = kohya.create_network(
                    1.0,
                    spec.rank,
                    spec.alpha or spec.rank,
                    None,
                    None if clip_l is None else [clip_l],
                    flux,
                    warn_on_unmatched=False,
                    **{"dropout": spec.dropout, **spec.lycoris},
                )
        except (AssertionError, *_REFUSALS) as error:
            if isinstance(error, AssertionError) and not str(error).startswith(_REFUSING_ASSERTION):
                raise
            raise UserError(
                f"{PACKAGE} refuses these settings: {str(error) or type(error).__name__}",
                "--network_args",
                "Change what it names; its page docs/Network-Args.md says what each algo takes.",
                field="network_args",
                exit_code=2,
            ) from error
        if not network.unet_loras and not network.text_encoder_loras:
            raise UserError("no layer is left to train", "--network_args", "Choose another preset.", exit_code=2)
        network.apply_to(None if clip_l is None else [clip_l], flux, clip_l is not None, True)
        network.requires_grad_(True)
        return cls(network, spec)

    def train_in(self, dtype: torch.dtype) -> None:
        """Keeps everything that trains in `dtype`, gradients and optimizer state with it."""
        self._network.to(dtype)

    @property
    def num_modules(self) -> int:
        return len(self._modules_of("text_encoder_loras")) + len(self._modules_of("unet_loras"))

    @property
    def names(self) -> tuple[str, ...]:
        """Published names of the adapted layers, in the order in which they are saved."""
        return tuple(dict.fromkeys(key.split(".")[0] for key in self.published_state_dict(None)))

    @property
    def file_metadata(self) -> dict[str, str]:
        return {}

    def set_multiplier(self, multiplier: float) -> None:
        for module in (*self._modules_of("text_encoder_loras"), *self._modules_of("unet_loras")):
            cast(Any, module).multiplier = multiplier

    def parameter_groups(
        self, unet_lr: float, text_encoder_lr: float, t5xxl_lr: float | None = None
    ) -> list[dict[str, object]]:
        """Groups for an optimizer, CLIP-L first. A group whose rate is 0 is left out. T5 is never trained.

        With LoRA+ the parameters named `lora_up`, of the algorithms that have such, get a group of their own.
        """
        groups: list[dict[str, object]] = []
        for attribute, rate, ratio, name in (
            ("text_encoder_loras", text_encoder_lr, self._spec.loraplus_text_encoder_ratio, "textencoder"),
            ("unet_loras", unet_lr, self._spec.loraplus_unet_ratio, "unet"),
        ):
            normal, ups = list[nn.Parameter](), list[nn.Parameter]()
            for module in self._modules_of(attribute):
                for key, parameter in module.named_parameters():
                    (ups if ratio is not None and _UP in key else normal).append(parameter)
            groups += rate_groups(normal, rate, name, plus=ups, ratio=ratio or 0.0)
        return require_any(groups)

    @property
    def lacks_ups(self) -> bool:
        """Whether LoRA+ is asked for and the algorithm has nothing that it applies to."""
        spec = self._spec
        has_ratio = spec.loraplus_unet_ratio is not None or spec.loraplus_text_encoder_ratio is not None
        return has_ratio and not any(_UP in key for key, _ in self._network.named_parameters())

    def before_step(self, *, measures: bool = False) -> dict[str, float]:
        """Nothing is to be done, and nothing is known of the package's weights."""
        return {}

    def hold_norms(self, limit: float) -> NormReport:
        raise ValueError("the options rule this out")

    def training_state(self) -> dict[str, Tensor]:
        """The values of everything that trains, by published key: the tensors themselves."""
        return {_published(key): parameter.data for key, parameter in self._network.named_parameters()}

    def training_gradients(self) -> dict[str, Tensor]:
        """The gradients of everything that trains, by published key; zeros where there is none."""
        return {
            _published(key): torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for key, parameter in self._network.named_parameters()
        }

    def state_to_resume(self) -> dict[str, dict[str, object]]:
        """Everything that a later attempt needs to go on exactly; the tensors themselves."""
        return {"tensors": dict(self._network.state_dict())}

    def resume_from(self, state: Mapping[str, Mapping[str, object]]) -> None:
        """Takes what `state_to_resume` gave. Raises `ValueError` when it is of another network; nothing is taken then."""
        take_tensors(self._network.state_dict(), state["tensors"])

    def published_state_dict(self, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """The package's own keys, with CLIP-L's names as published."""
        state: dict[str, Tensor] = {}
        for key, tensor in self._network.state_dict().items():
            host = tensor.detach().cpu()
            state[_published(key)] = host.clone() if dtype is None else host.to(dtype, copy=True)
        return state

    def load_file(self, path: Path) -> LoadReport:
        state, metadata = read_lora_file(path)
        return self.load_published(state, where=str(path), metadata=metadata)

    def load_published(
        self, state: Mapping[str, Tensor], *, where: str = "the file", metadata: Mapping[str, str] | None = None
    ) -> LoadReport:
        """Takes the tensors whose keys the network has. Raises `UserError` when shapes don't fit."""
        own = {_published(key): key for key in self._network.state_dict()}
        try:
            self._network.load_state_dict({own[key]: t for key, t in state.items() if key in own}, strict=False)
        except RuntimeError as error:
            raise wrong_part(f"this file does not fit the network: {error}", where) from error
        return LoadReport(
            missing=tuple(dict.fromkeys(key.split(".")[0] for key in own if key not in state)),
            unexpected=tuple(dict.fromkeys(key.split(".")[0] for key in state if key not in own)),
        )

    def _modules_of(self, attribute: str) -> list[nn.Module]:
        return cast("list[nn.Module]", getattr(self._network, attribute))


AnyNetwork = LoraNetwork | LycorisNetwork


def _published(key: str) -> str:
    """Newer transformers releases have dropped `text_model.` from CLIP's paths; published names keep it."""
    if key.startswith(_BARE_CLIP) and not key.startswith(_PUBLISHED_CLIP):
        return _PUBLISHED_CLIP + key.removeprefix(_BARE_CLIP)
    return key
