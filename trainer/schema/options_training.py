"""Option groups: the course of training, optimizer, flow and loss, saving, samples, logs, and the LoRA's metadata."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from trainer.schema.base import Opt
from trainer.schema.optimizers import optimizer_name
from trainer.schema.options_model import OptionGroup, split_words

SavePrecision = Literal["float", "fp16", "bf16"]


def _listed_numbers(value: object) -> object:
    """One number, or a text with several, as the list that it stands for."""
    if isinstance(value, str):
        return tuple(value.replace(",", " ").split())
    return (value,) if isinstance(value, (int, float)) else value


def _optimizer_name(value: object) -> object:
    """Known optimizers are spelt in any case; empty is the default."""
    return optimizer_name(value) if isinstance(value, str) else value


def _schedule_name(value: object) -> object:
    """Spelt in any case; the reference trainer writes Adafactor's with a rate, which nothing uses."""
    name = _lower_case(value)
    return "adafactor" if isinstance(name, str) and name.startswith("adafactor:") else name


def _lower_case(value: object) -> object:
    return value.strip().lower() if isinstance(value, str) else value


def _steps_or_part(value: object) -> int | float:
    """A whole number of steps, or a part of the run below 1, from `100`, `0.1` or `10%`."""
    mistake = ValueError("must be a whole number of steps, or a part of the run such as 0.1 or 10%")
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise mistake
    try:
        if isinstance(value, str) and value.strip().endswith("%"):
            number = float(value.strip()[:-1]) / 100
            if number >= 1:
                raise mistake
        else:
            number = float(value)
    except ValueError:
        raise mistake from None
    if not math.isfinite(number) or number < 0 or (number >= 1 and not number.is_integer()):
        raise mistake
    return int(number) if number.is_integer() else number


class CourseOptions(OptionGroup):
    """How long and in which portions."""

    max_train_epochs: Annotated[
        int | None, Field(ge=1), Opt("Passes over the pictures; wins over steps.", "Epochs", "basic", "epochs")
    ] = None
    max_train_steps: Annotated[
        int, Field(ge=1), Opt("Optimizer steps when no epochs are given.", "Steps", "basic", "steps")
    ] = 1600
    gradient_accumulation_steps: Annotated[
        int,
        Field(ge=1),
        Opt("Batches computed for one optimizer step: a larger batch without more memory.", "Accumulation", "advanced"),
    ] = 1
    initial_epoch: Annotated[
        int | None,
        Field(ge=0),
        Opt("Begin with this epoch, whatever the state says.", "First epoch", "expert", "epochs"),
    ] = None
    initial_step: Annotated[
        int | None,
        Field(ge=0),
        Opt("Begin behind this step; wins over initial_epoch and the state.", "Steps done before", "expert", "steps"),
    ] = None
    seed: Annotated[
        int | None, Field(ge=0, lt=2**63), Opt("Same seed, same run. Empty: a random one.", "Seed", "advanced")
    ] = None


class OptimizerOptions(OptionGroup):
    """Optimizer and learning-rate schedule."""

    learning_rate: Annotated[
        float, Field(ge=0), Opt("Size of a learning step; 1e-4 is usual for a LoRA.", "Learning rate", "basic")
    ] = 2e-6
    unet_lr: Annotated[
        float | None, Field(ge=0), Opt("Rate of FLUX's LoRA. Empty: the learning rate.", "FLUX learning rate", "expert")
    ] = None
    text_encoder_lr: Annotated[
        tuple[Annotated[float, Field(ge=0)], ...] | None,
        BeforeValidator(_listed_numbers),
        Field(max_length=2),
        Opt("Rate of CLIP-L's LoRA. Empty: the learning rate.", "CLIP-L learning rate", "advanced"),
    ] = None
    optimizer_type: Annotated[
        Literal[
            "AdamW",
            "AdamW8bit",
            "PagedAdamW8bit",
            "PagedAdamW",
            "PagedAdamW32bit",
            "Lion",
            "Lion8bit",
            "PagedLion8bit",
            "SGDNesterov",
            "SGDNesterov8bit",
            "Adafactor",
            "Prodigy",
            "AdamWScheduleFree",
            "RAdamScheduleFree",
            "SGDScheduleFree",
            "DAdaptation",
            "DAdaptAdamPreprint",
            "DAdaptAdaGrad",
            "DAdaptAdam",
            "DAdaptAdan",
            "DAdaptAdanIP",
            "DAdaptLion",
            "DAdaptSGD",
        ]
        | str,
        BeforeValidator(_optimizer_name),
        Opt(
            "AdamW8bit keeps the optimizer's state in 8 bit: less memory. Also another class of torch.optim, or a path "
            "such as package.Class.",
            "Optimizer",
            "advanced",
        ),
    ] = "AdamW"
    use_8bit_adam: Annotated[bool, Opt("Old name of --optimizer_type=AdamW8bit.", "8-bit AdamW", "expert")] = False
    use_lion_optimizer: Annotated[bool, Opt("Old name of --optimizer_type=Lion.", "Lion", "expert")] = False
    optimizer_args: Annotated[
        tuple[str, ...] | None,
        BeforeValidator(split_words),
        Opt("More settings of the optimizer, each as key=value: weight_decay=0.01.", "Optimizer settings", "expert"),
    ] = None
    max_grad_norm: Annotated[
        float, Field(ge=0), Opt("Longest allowed gradient; 0 turns clipping off.", "Gradient clipping", "expert")
    ] = 1.0
    lr_scheduler: Annotated[
        Literal[
            "constant",
            "constant_with_warmup",
            "cosine",
            "linear",
            "cosine_with_restarts",
            "polynomial",
            "inverse_sqrt",
            "cosine_with_min_lr",
            "cosine_warmup_with_min_lr",
            "warmup_stable_decay",
            "piecewise_constant",
            "reduce_lr_on_plateau",
            "adafactor",
        ],
        BeforeValidator(_schedule_name),
        Opt("How the learning rate changes over the run.", "Schedule", "advanced"),
    ] = "constant"
    lr_warmup_steps: Annotated[
        int | float,
        BeforeValidator(_steps_or_part),
        Opt(
            "Steps until the full rate; below 1 a part of the run, such as 0.1 or 10%.", "Warm-up", "advanced", "steps"
        ),
    ] = 0
    lr_decay_steps: Annotated[
        int | float,
        BeforeValidator(_steps_or_part),
        Opt(
            "Steps of the fall at the end (warmup_stable_decay); below 1 a part of the run.", "Decay", "expert", "steps"
        ),
    ] = 0
    lr_scheduler_num_cycles: Annotated[
        int, Field(ge=1), Opt("Cosines of the schedules that have several.", "Cycles", "expert")
    ] = 1
    lr_scheduler_power: Annotated[float, Field(gt=0), Opt("Power of the polynomial schedule.", "Power", "expert")] = 1
    lr_scheduler_timescale: Annotated[
        int | None,
        Field(ge=1),
        Opt("Steps until inverse_sqrt has fallen clearly. Empty: the warm-up's.", "Time scale", "expert", "steps"),
    ] = None
    lr_scheduler_min_lr_ratio: Annotated[
        float | None,
        Field(ge=0, le=1),
        Opt("Lowest rate as a part of the full one, for schedules that end above 0.", "Lowest rate", "expert"),
    ] = None
    lr_scheduler_type: Annotated[
        str,
        Opt(
            "A schedule's class: of torch.optim.lr_scheduler, or a path such as package.Class.",
            "Schedule class",
            "expert",
        ),
    ] = ""
    lr_scheduler_args: Annotated[
        tuple[str, ...] | None,
        BeforeValidator(split_words),
        Opt("More settings of the schedule, each as key=value.", "Schedule settings", "expert"),
    ] = None


class FlowOptions(OptionGroup):
    """Noise levels, prediction and loss."""

    timestep_sampling: Annotated[
        Literal["sigma", "uniform", "sigmoid", "shift", "flux_shift"],
        Opt("How the noise level of a step is drawn; flux_shift follows the picture's size.", "Timestep sampling"),
    ] = "sigma"
    sigmoid_scale: Annotated[
        float, Opt("Spread of sigmoid, shift and flux_shift sampling.", "Sigmoid scale", "expert")
    ] = 1.0
    discrete_flow_shift: Annotated[
        float, Field(gt=0), Opt("Above 1: more steps at high noise (sigma and shift).", "Flow shift", "advanced")
    ] = 3.0
    weighting_scheme: Annotated[
        Literal["sigma_sqrt", "logit_normal", "mode", "cosmap", "none", "uniform"],
        Opt("Draw of the noise level with sigma sampling, and loss weight with sigma_scaled.", "Weighting", "expert"),
    ] = "uniform"
    logit_mean: Annotated[float, Opt("Mean of the logit_normal draw.", "Logit mean", "expert")] = 0.0
    logit_std: Annotated[float, Field(ge=0), Opt("Spread of the logit_normal draw.", "Logit spread", "expert")] = 1.0
    mode_scale: Annotated[float, Opt("Scale of the mode draw.", "Mode scale", "expert")] = 1.29
    model_prediction_type: Annotated[
        Literal["raw", "additive", "sigma_scaled"],
        Opt("What the model's output is taken for; raw is right for FLUX.", "Prediction type", "advanced"),
    ] = "sigma_scaled"
    min_timestep: Annotated[
        int | None,
        Field(ge=0, lt=1000),
        Opt("Train on no less noise than this timestep has, of 1000.", "Lowest timestep", "expert"),
    ] = None
    max_timestep: Annotated[
        int | None,
        Field(ge=1, le=1000),
        Opt("Train on no more noise than this timestep has, of 1000.", "Highest timestep", "expert"),
    ] = None
    round_timesteps: Annotated[
        bool,
        Opt(
            "Round the timestep that FLUX is given to the training's precision, as sd-scripts does.",
            "Round timesteps",
            "expert",
        ),
    ] = False
    loss_type: Annotated[
        Literal["l1", "l2", "huber", "smooth_l1"], Opt("How errors are measured.", "Loss", "expert")
    ] = "l2"
    huber_schedule: Annotated[
        Literal["constant", "exponential", "snr"],
        Opt("How huber_c changes with the noise level (huber and smooth_l1).", "Huber schedule", "expert"),
    ] = "snr"
    huber_c: Annotated[float, Field(gt=0), Opt("Where the loss turns linear.", "Huber c", "expert")] = 0.1
    huber_scale: Annotated[float, Field(gt=0), Opt("Factor on huber_c.", "Huber scale", "expert")] = 1.0
    prior_loss_weight: Annotated[
        float, Field(ge=0), Opt("Weight of regularisation pictures.", "Regularisation weight", "expert")
    ] = 1.0
    masked_loss: Annotated[
        bool,
        Opt("Masks from conditioning_data_dir in the dataset file: black counts nothing.", "Masked loss", "advanced"),
    ] = False
    masked_loss_normalize: Annotated[
        bool,
        Opt("Divide by the mask's area, so that small areas are learnt as strongly.", "Mask by area", "expert"),
    ] = False
    ip_noise_gamma: Annotated[
        float | None, Field(ge=0), Opt("Extra noise on the model's input, about 0.1.", "Input perturbation", "expert")
    ] = None
    ip_noise_gamma_random_strength: Annotated[
        bool, Opt("Draw the extra noise's strength anew for each batch.", "Random input perturbation", "expert")
    ] = False


class SavingOptions(OptionGroup):
    """Where the LoRA goes, and how often."""

    output_dir: Annotated[Path | None, Opt("Folder for the finished LoRA and samples.", "Output folder", "basic")] = (
        None
    )
    output_name: Annotated[str | None, Opt("File name without .safetensors.", "Name", "basic")] = None
    save_model_as: Annotated[Literal["safetensors"], Opt("File format of the LoRA.", "File format", "expert")] = (
        "safetensors"
    )
    lora_form: Annotated[
        Literal["sd-scripts", "diffusers", "bfl", "xlabs"],
        Opt("Whose key names the LoRA is written with; sd-scripts' are read almost everywhere.", "Form", "expert"),
    ] = "sd-scripts"
    save_precision: Annotated[
        SavePrecision | None, Opt("Number format of the saved LoRA. Empty: 32 bit.", "Saved precision", "advanced")
    ] = None
    save_every_n_epochs: Annotated[
        int | None, Field(ge=1), Opt("Save a LoRA after every so many epochs.", "Save every", "basic", "epochs")
    ] = None
    save_every_n_steps: Annotated[
        int | None, Field(ge=1), Opt("Save a LoRA after every so many steps.", "Save every", "advanced", "steps")
    ] = None
    save_n_epoch_ratio: Annotated[
        int | None,
        Opt("Save about so many LoRAs in all, evenly spread; wins over save_every_n_epochs.", "Saves in all", "expert"),
    ] = None
    save_last_n_epochs: Annotated[
        int | None, Field(ge=1), Opt("Keep periodic saves of the last epochs only.", "Keep last", "expert", "epochs")
    ] = None
    save_last_n_steps: Annotated[
        int | None, Field(ge=1), Opt("Keep periodic saves of the last steps only.", "Keep last", "expert", "steps")
    ] = None
    save_state: Annotated[
        bool,
        Opt("With each LoRA save a folder from which training can go on exactly (--resume).", "Save states"),
    ] = False
    save_state_on_train_end: Annotated[
        bool, Opt("Save such a folder at the end of the training, or when it is stopped.", "State at the end", "expert")
    ] = False
    save_last_n_epochs_state: Annotated[
        int | None,
        Field(ge=0),
        Opt("Keep states of the last epochs only. Empty: as the LoRAs.", "Keep last states", "expert", "epochs"),
    ] = None
    save_last_n_steps_state: Annotated[
        int | None,
        Field(ge=0),
        Opt("Keep states of the last steps only. Empty: as the LoRAs.", "Keep last states", "expert", "steps"),
    ] = None
    resume: Annotated[
        Path | None, Opt("A state folder to go on from, ours or sd-scripts'.", "Resume from state", "expert")
    ] = None
    config_file: Annotated[
        Path | None, Opt("A TOML file with options; the command line wins over it.", "Options file", "expert")
    ] = None
    output_config: Annotated[
        bool, Opt("Write the other options to the file of --config_file, and stop.", "Write options file", "expert")
    ] = False
    run_dir: Annotated[Path | None, Opt("The run folder that this run belongs to.", "Run folder", "expert")] = None


class SampleOptions(OptionGroup):
    """Pictures made during training."""

    sample_prompts: Annotated[
        Path | None, Opt("File with sample prompts: .txt, .toml or .json.", "Sample prompts", "basic")
    ] = None
    sample_every_n_steps: Annotated[
        int | None, Opt("Make samples after every so many steps.", "Sample every", "basic", "steps")
    ] = None
    sample_every_n_epochs: Annotated[
        int | None, Opt("Make samples after every so many epochs; wins over steps.", "Sample every", "basic", "epochs")
    ] = None
    sample_at_first: Annotated[bool, Opt("Make samples before the first step too.", "Sample at start")] = False


class LogOptions(OptionGroup):
    """Console and TensorBoard."""

    console_log_level: Annotated[
        Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] | None,
        Opt("Least important messages shown. Empty: INFO.", "Console level", "expert"),
    ] = None
    console_log_file: Annotated[Path | None, Opt("Write messages to this file.", "Log file", "expert")] = None
    console_log_simple: Annotated[bool, Opt("Plain lines without colour.", "Plain console", "expert")] = False
    logging_dir: Annotated[Path | None, Opt("Folder for TensorBoard logs.", "TensorBoard folder", "expert")] = None
    log_with: Annotated[
        Literal["tensorboard", "wandb", "all"] | None,
        Opt("The tracker to log to; with a log folder alone, TensorBoard.", "Tracker", "expert"),
    ] = None
    log_prefix: Annotated[str | None, Opt("Put before the log folder's name.", "Log prefix", "expert")] = None
    log_tracker_config: Annotated[
        Path | None,
        Opt("TOML file with settings of the tracker, below [wandb] or [tensorboard].", "Tracker settings", "expert"),
    ] = None
    log_config: Annotated[bool, Opt("Log the options too, without tokens and paths.", "Log the options", "expert")] = (
        False
    )
    wandb_run_name: Annotated[str | None, Opt("Name of the run at Weights & Biases.", "Run name", "expert")] = None
    wandb_api_key: Annotated[
        str | None, Opt("Key for Weights & Biases; never written anywhere. Empty: its own login.", "Key", "expert")
    ] = None
    log_tracker_name: Annotated[str | None, Opt("Name of the tracker's project.", "Tracker name", "expert")] = None


class MetadataOptions(OptionGroup):
    """What is written into the LoRA's file beside its weights."""

    no_metadata: Annotated[bool, Opt("Leave the training's details out of the file.", "No metadata", "expert")] = False
    training_comment: Annotated[str | None, Opt("A comment stored in the file.", "Comment", "advanced")] = None
    metadata_title: Annotated[str | None, Opt("Title. Empty: the output name.", "Title", "expert")] = None
    metadata_author: Annotated[str | None, Opt("Author.", "Author", "expert")] = None
    metadata_description: Annotated[str | None, Opt("Description.", "Description", "expert")] = None
    metadata_license: Annotated[str | None, Opt("Licence.", "Licence", "expert")] = None
    metadata_tags: Annotated[str | None, Opt("Tags, separated by commas.", "Tags", "expert")] = None
    metadata_usage_hint: Annotated[str | None, Opt("How to use the LoRA.", "Usage hint", "expert")] = None
    metadata_thumbnail: Annotated[
        str | None, Opt("Picture file, or data URL, shown for the LoRA.", "Thumbnail", "expert")
    ] = None
    metadata_merged_from: Annotated[
        str | None, Opt("Models that this one was merged from.", "Merged from", "expert")
    ] = None
    metadata_trigger_phrase: Annotated[str | None, Opt("Words that call the LoRA up.", "Trigger phrase", "expert")] = (
        None
    )
    metadata_preprocessor: Annotated[str | None, Opt("Preparation of the pictures.", "Preprocessor", "expert")] = None
    metadata_is_negative_embedding: Annotated[
        str | None, Opt("For embeddings; unused for a LoRA.", "Negative embedding", "expert")
    ] = None
