"""What a run is told at its start: where it differs from the reference trainer, and defaults that train badly."""

from __future__ import annotations

from collections.abc import Iterator, Set

from trainer.schema.network_rules import options_spec
from trainer.schema.options import Options


def deviations(options: Options, *, is_schnell: bool = False, num_processes: int = 1) -> Iterator[str]:
    """One line for each place where this run does otherwise than sd-scripts, with the option that does it its way.

    The reference's faults are described in the comparison of its parts; only those that this run would have met are
    named.
    """
    if options.clip_l_activation == "quick_gelu":
        yield "CLIP-L runs with quick_gelu, as published; sd-scripts computes gelu: --clip_l_activation=gelu"
    if options.gradient_checkpointing and not options.cache_text_encoder_outputs:
        yield "the frozen text encoders run without dropout; sd-scripts trains with T5's dropout of 0.1 here"
    if options.mixed_precision != "no":
        if not options.round_timesteps:
            yield (
                "FLUX is given the exact timestep; sd-scripts rounds it to the training's precision: --round_timesteps"
            )
        if not options.cache_latents_to_disk:
            yield "noise and target are float32; sd-scripts forms them in the precision of its latents, unless on disk"
    if options.mixed_precision == "fp16":
        yield (
            "fp16 covers FLUX alone, in a form that cannot overflow: text encoders run in bf16, the autoencoder in 32 bit"
        )
    if options.full_bf16 or options.full_fp16:
        name, kind = ("full_bf16", "bf16") if options.full_bf16 else ("full_fp16", "fp16")
        loss = (
            "changes of less than 0.4 % of a weight"
            if options.full_bf16
            else "gradients and moments below fp16's range"
        )
        yield (
            f"{name} keeps the LoRA and the optimizer's state in {kind}, so that {loss} are rounded away; "
            f"--mixed_precision={kind} alone trains better and takes little more memory"
        )
    if (options.min_timestep or 0, options.max_timestep or 1000) != (0, 1000):
        yield (
            f"only timesteps from {options.min_timestep or 0} to {options.max_timestep or 1000} are trained; "
            "sd-scripts takes min_timestep and max_timestep and trains all: leave them out"
        )
    if options.sample_prompts is not None:
        if _has_dropout(options):
            yield "samples are drawn without the LoRA's dropout; sd-scripts leaves it on"
        if is_schnell:
            yield "samples use schnell's own schedule; sd-scripts uses dev's"
    if options.resume is not None or options.initial_step or (options.initial_epoch or 1) > 1:
        yield (
            "steps are counted on, and schedule and data go on from there; sd-scripts counts from 0 again, which repeats "
            "file names, and begins the epoch anew"
        )
    if num_processes > 1:
        yield f"each of the {num_processes} processes draws its own noise; in sd-scripts all draw the same"
        if options.lr_warmup_steps >= 1:
            yield f"the warm-up is {options.lr_warmup_steps:g} steps; sd-scripts divides it by the processes"


def _has_dropout(options: Options) -> bool:
    return bool(options.network_dropout) or any("dropout" in pair for pair in options.network_args or ())


def weak_defaults(options: Options, explicit: Set[str], *, has_guidance: bool = True) -> str | None:
    """One loud line that names the settings in force that are known to train badly, and what to use; None for none.

    They are the reference's defaults. A value that was chosen is not commented on, but for the prediction type, whose
    output the target does not match whoever chose it. `has_guidance` is false for schnell, which takes none.
    """
    found: list[str] = []
    if options.model_prediction_type != "raw":
        found.append(
            f"model_prediction_type {options.model_prediction_type} (its output does not match the target; use raw)"
        )
    if "timestep_sampling" not in explicit:
        found.append(f"timestep_sampling {options.timestep_sampling} (use flux_shift)")
    if "guidance_scale" not in explicit and has_guidance:
        found.append(f"guidance_scale {options.guidance_scale:g} (use 1.0)")
    if "learning_rate" not in explicit and options.unet_lr is None:
        found.append(f"learning_rate {options.learning_rate:g} (use 1e-4)")
    spec = options_spec(options)
    is_lora = spec is not None and spec.kind == "lora" and not options.dim_from_weights
    if spec is not None and is_lora and "network_alpha" not in explicit and spec.rank > 1:
        share = f"1/{spec.rank**0.5:.3g}" if spec.rslora else f"1/{spec.rank}"
        found.append(f"network_alpha 1, which is {share} of the strength (use {spec.rank}, the rank)")
    if not found:
        return None
    return f"THESE SETTINGS TRAIN BADLY, as sd-scripts' defaults do: {'; '.join(found)}"
