"""Options that need another one to have any effect: a line for each that is given without it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from trainer.schema.options import Options


@dataclass(frozen=True)
class Need:
    """`names` have an effect only where `is_met`; `reason` says why not, after "has no effect: "."""

    names: tuple[str, ...]
    is_met: Callable[[Options], bool]
    reason: Callable[[Options], str]


def _need(names: str, is_met: Callable[[Options], bool], reason: str | Callable[[Options], str]) -> Need:
    return Need(tuple(names.split()), is_met, (lambda _options: reason) if isinstance(reason, str) else reason)


def _samples_by(*kinds: str) -> Callable[[Options], bool]:
    return lambda options: options.timestep_sampling in kinds


def _sampling(options: Options) -> str:
    return f"timestep_sampling {options.timestep_sampling} does not use it"


def _weighs(options: Options) -> bool:
    """Whether the weighting scheme chooses timesteps or weighs the loss."""
    if options.weighting_scheme in ("logit_normal", "mode"):
        return options.timestep_sampling == "sigma"
    if options.weighting_scheme in ("sigma_sqrt", "cosmap"):
        return options.model_prediction_type == "sigma_scaled"
    return True


def _weighting(options: Options) -> str:
    if options.weighting_scheme in ("logit_normal", "mode"):
        return f"weighting_scheme {options.weighting_scheme} chooses timesteps with timestep_sampling sigma only"
    return f"weighting_scheme {options.weighting_scheme} weighs the loss with model_prediction_type sigma_scaled only"


def _draws_by(scheme: str) -> Callable[[Options], bool]:
    return lambda options: options.timestep_sampling == "sigma" and options.weighting_scheme == scheme


def _saves_states(options: Options) -> bool:
    return options.save_state


_NEEDS: Final = (
    _need("sigmoid_scale", _samples_by("sigmoid", "shift", "flux_shift"), _sampling),
    _need("discrete_flow_shift", _samples_by("shift", "sigma"), _sampling),
    _need("weighting_scheme", _weighs, _weighting),
    _need(
        "logit_mean logit_std",
        _draws_by("logit_normal"),
        "it belongs to weighting_scheme logit_normal with timestep_sampling sigma",
    ),
    _need("mode_scale", _draws_by("mode"), "it belongs to weighting_scheme mode with timestep_sampling sigma"),
    _need(
        "huber_c huber_scale huber_schedule",
        lambda options: options.loss_type in ("huber", "smooth_l1"),
        lambda options: f"loss_type is {options.loss_type}",
    ),
    _need(
        "ip_noise_gamma_random_strength", lambda options: bool(options.ip_noise_gamma), "ip_noise_gamma is not given"
    ),
    _need("round_timesteps", lambda options: options.mixed_precision != "no", "nothing is rounded in 32 bit"),
    _need(
        "no_half_vae",
        lambda options: options.mixed_precision == "bf16",
        "the autoencoder runs in 32 bit anyway, as always but with mixed_precision bf16",
    ),
    _need(
        "text_encoder_batch_size",
        lambda options: options.cache_text_encoder_outputs or options.cache_text_encoder_outputs_to_disk,
        "no texts are encoded beforehand (cache_text_encoder_outputs)",
    ),
    _need(
        "skip_cache_check",
        lambda options: options.cache_latents_to_disk or options.cache_text_encoder_outputs_to_disk,
        "nothing is kept on disk (cache_latents_to_disk, ...)",
    ),
    _need(
        "save_last_n_epochs",
        lambda options: bool(options.save_every_n_epochs or options.save_n_epoch_ratio),
        "nothing is saved between epochs (save_every_n_epochs)",
    ),
    _need(
        "save_last_n_steps",
        lambda options: bool(options.save_every_n_steps),
        "nothing is saved between steps (save_every_n_steps)",
    ),
    _need(
        "save_last_n_epochs_state",
        lambda options: _saves_states(options) and bool(options.save_every_n_epochs or options.save_n_epoch_ratio),
        "no states are saved between epochs (save_state, save_every_n_epochs)",
    ),
    _need(
        "save_last_n_steps_state",
        lambda options: _saves_states(options) and bool(options.save_every_n_steps),
        "no states are saved between steps (save_state, save_every_n_steps)",
    ),
    _need("save_every_n_epochs", lambda options: not options.save_n_epoch_ratio, "save_n_epoch_ratio decides"),
    _need("initial_epoch", lambda options: options.initial_step is None, "initial_step decides"),
    _need(
        "log_prefix log_tracker_name",
        lambda options: options.logging_dir is not None or options.log_with is not None,
        "there is no tracker (log_with, logging_dir)",
    ),
    _need(
        "sample_prompts",
        lambda options: (
            options.run_dir is not None
            or options.sample_at_first
            or bool(options.sample_every_n_steps or options.sample_every_n_epochs)
        ),
        "no samples are asked for (sample_every_n_epochs, sample_every_n_steps, sample_at_first)",
    ),
    _need("training_comment", lambda options: not options.no_metadata, "no_metadata leaves it out"),
    _need(
        "tokenizer_cache_dir",
        lambda options: options.clip_l_tokenizer is None or options.t5xxl_tokenizer is None,
        "both tokenizers are given",
    ),
)

WITH_NEEDS: Final = frozenset(name for need in _NEEDS for name in need.names)


def idle_options(options: Options, explicit: frozenset[str]) -> Iterator[str]:
    """One line for each option that was given, is not at its default and has no effect beside the others."""
    for need in _NEEDS:
        for name in need.names:
            if name in explicit and not need.is_met(options):
                default: object = Options.model_fields[name].get_default()
                if getattr(options, name) != default:
                    yield f"{name} has no effect: {need.reason(options)}"
