"""Everything that can be found wrong before a model is loaded, found at once.

Options have been checked by themselves; here they meet the files, the device and the pictures.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from trainer.data.captions import caption_notes
from trainer.data.index import DatasetIndex, index_dataset
from trainer.lora import lycoris
from trainer.lora.forms import to_published
from trainer.lora.from_file import spec_from_file
from trainer.lora.lora_file import read_lora_file
from trainer.model.hub import fetch_model
from trainer.model.text_encoders import PromptTokenizer, load_clip_tokenizer, load_t5_tokenizer
from trainer.schema.base import Problem, UserError
from trainer.schema.checkpoint_header import (
    Header,
    autoencoder_params,
    clip_params,
    format_bytes,
    t5_params,
)
from trainer.schema.chroma_header import ChromaParams, TransformerParams, read_transformer
from trainer.schema.cli import check_files
from trainer.schema.file_checks import MODEL_KINDS, needed_models
from trainer.schema.lora_spec import LoraSpec, spec_from_network_args
from trainer.schema.memory import OtherModels, estimate, max_blocks_to_swap, usable_bytes
from trainer.schema.options import Options
from trainer.schema.toml_io import DatasetConfig, dataset_config
from trainer.schema.weight_files import read_weights
from trainer.train.lora_form import form_problems
from trainer.train.reporting import Reporter
from trainer.train.sampling import SamplePrompt, read_sample_prompts

T5_TOKENS_DEV, T5_TOKENS_SCHNELL = 512, 256
EXIT_OPTIONS, EXIT_FIXABLE = 2, 3
_T = TypeVar("_T")


@dataclass(frozen=True)
class Schedule:
    """How many steps there are. A micro-step is one batch; steps are optimizer steps."""

    micro_steps_per_epoch: int
    steps_per_epoch: int
    num_epochs: int
    num_steps: int


@dataclass(frozen=True)
class Tokenizers:
    """`clip_l` is None for Chroma."""

    clip_l: PromptTokenizer | None
    t5xxl: PromptTokenizer
    t5xxl_tokens: int


@dataclass(frozen=True)
class CheckedRun:
    """What the checks have read, so that nothing is read twice."""

    options: Options
    dataset: DatasetConfig
    index: DatasetIndex
    prompts: tuple[SamplePrompt, ...]
    flux: TransformerParams
    models: OtherModels
    spec: LoraSpec
    tokenizers: Tokenizers
    schedule: Schedule


class _Findings:
    """Collects problems; options outrank files in the exit code."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self._exit_code = EXIT_FIXABLE

    def add(self, problem: Problem, exit_code: int = EXIT_FIXABLE) -> None:
        if exit_code == EXIT_OPTIONS:
            self._exit_code = EXIT_OPTIONS
        if problem not in self.problems:
            self.problems.append(problem)

    def attempt(self, work: Callable[[], _T]) -> _T | None:
        """The value of `work`, or None with its problems noted."""
        try:
            return work()
        except UserError as error:
            for problem in error.problems:
                self.add(problem, error.exit_code)
            return None

    def raise_if_any(self) -> None:
        if self.problems:
            raise UserError.many(self.problems, exit_code=self._exit_code)


def check_run(options: Options, reporter: Reporter, *, num_processes: int = 1) -> CheckedRun:
    """Checks options, model files, tokenizers, prompts and every picture. Raises one `UserError` with all problems."""
    reporter.phase("check")
    findings = _Findings()
    _fetch_models(options, findings, reporter)
    for problem in check_files(options):
        findings.add(problem)
    flux = None if _has_problem(findings, "pretrained_model_name_or_path") else _read_flux(options, findings)
    models = None if flux is None else _check_models(options, flux, findings)
    _check_device(options, findings)
    spec = findings.attempt(lambda: _spec(options))
    if spec is not None and options.dim_from_weights and not _has_problem(findings, "network_weights"):
        spec = _spec_from_weights(options, spec, findings)
    if flux is not None:
        _check_against_model(options, spec, flux, findings)
    if flux is not None and spec is not None:
        for problem in form_problems(options, spec, flux):
            findings.add(problem, EXIT_OPTIONS)
    if options.network_weights is not None and not _has_problem(findings, "network_weights"):
        weights: Path = options.network_weights
        findings.attempt(lambda: to_published(*read_lora_file(weights), where=str(weights)))
    tokenizers = _check_tokenizers(options, flux, findings)
    prompts: tuple[SamplePrompt, ...] | None = ()
    if options.sample_prompts is not None and not _has_problem(findings, "sample_prompts"):
        path: Path = options.sample_prompts
        prompts = findings.attempt(lambda: tuple(read_sample_prompts(path)))
    index: DatasetIndex | None = None
    dataset: DatasetConfig | None = None
    if not _has_problem(findings, "dataset_config"):
        dataset = findings.attempt(lambda: dataset_config(options))
    if dataset is not None:
        found: DatasetConfig = dataset
        index = findings.attempt(lambda: index_dataset(found, progress=reporter.progress))
    findings.raise_if_any()
    if (
        dataset is None
        or index is None
        or flux is None
        or models is None
        or spec is None
        or tokenizers is None
        or prompts is None
    ):
        raise AssertionError("a check failed without saying why")
    for number, prompt in enumerate(prompts, 1):
        if prompt.unused_flags:
            reporter.note(f"sample prompt {number}: {', '.join(prompt.unused_flags)} have no effect for FLUX")
        if options.model_type == "chroma" and not prompt.uses_negative_prompt:
            reporter.note(f"sample prompt {number}: Chroma needs two-pass guidance for good pictures; --l 4 is usual")
    for subset in dict.fromkeys(item.subset for item in index.items):
        for note in caption_notes(subset):
            reporter.note(f"{subset.image_dir}: {note}")
    for warning in index.warnings:
        reporter.warning(warning)
    return CheckedRun(
        options=options,
        dataset=dataset,
        index=index,
        prompts=prompts,
        flux=flux,
        models=models,
        spec=spec,
        tokenizers=tokenizers,
        schedule=make_schedule(options, index.num_batches_per_epoch, num_processes),
    )


@dataclass(frozen=True)
class CheckedReplay:
    """What the checks of a replay have read."""

    flux: TransformerParams
    spec: LoraSpec


def check_replay(options: Options) -> CheckedReplay:
    """The checks that a replay needs: the transformer alone, the network and the device."""
    findings = _Findings()
    if options.pretrained_model_name_or_path is None:
        what, hint = "the FLUX.1 model is not given", "Give its .safetensors file."
        field = "pretrained_model_name_or_path"
        findings.add(Problem(what, f"--{field}", hint, field), EXIT_OPTIONS)
    flux = _read_flux(options, findings)
    _check_device(options, findings)
    spec = findings.attempt(lambda: _spec(options))
    if flux is not None:
        _check_against_model(options, spec, flux, findings)
    findings.raise_if_any()
    if flux is None or spec is None:
        raise AssertionError("a check failed without saying why")
    return CheckedReplay(flux, spec)


def _spec(options: Options) -> LoraSpec:
    return spec_from_network_args(
        options.network_args or (),
        network_dim=options.network_dim,
        network_alpha=options.network_alpha,
        network_dropout=options.network_dropout,
        network_module=options.network_module,
    )


def warn_of_memory(checked: CheckedRun, total_bytes: int | None, reporter: Reporter) -> None:
    """Says before anything loads that the card is probably too small, and what helps."""
    if total_bytes is None:
        return
    largest = max(
        ((dataset.spec, size) for dataset in checked.index.datasets for size in dataset.bucket_counts),
        key=lambda entry: entry[0].batch_size * entry[1][0] * entry[1][1],
    )
    spec, (width, height) = largest
    result = estimate(
        checked.flux,
        checked.options,
        width=width,
        height=height,
        batch_size=spec.batch_size,
        models=checked.models,
        vram_bytes=total_bytes,
    )
    if result.fits is False:
        reporter.warning(
            f"this will probably not fit: about {format_bytes(result.peak_bytes)} are needed, the card leaves "
            f"{format_bytes(usable_bytes(total_bytes))} of its {format_bytes(total_bytes)}. {result.reason}"
        )


def make_schedule(options: Options, num_batches_per_epoch: int, num_processes: int) -> Schedule:
    """Epochs and steps by the reference trainer's arithmetic: epochs win over steps, a rest of an epoch's batches
    makes a smaller last accumulation."""
    micro_steps = math.ceil(num_batches_per_epoch / num_processes)
    steps_per_epoch = math.ceil(micro_steps / options.gradient_accumulation_steps)
    if options.max_train_epochs is not None:
        return Schedule(
            micro_steps, steps_per_epoch, options.max_train_epochs, options.max_train_epochs * steps_per_epoch
        )
    num_steps = options.max_train_steps
    return Schedule(micro_steps, steps_per_epoch, math.ceil(num_steps / steps_per_epoch), num_steps)


def _has_problem(findings: _Findings, field: str) -> bool:
    return any(problem.field == field for problem in findings.problems)


def _fetch_models(options: Options, findings: _Findings, reporter: Reporter) -> None:
    """Downloads the models that are given as hub ids and are not on this machine yet."""
    for name, kind, _ in needed_models(options):
        path: Path | None = getattr(options, name)
        if path is not None:
            findings.attempt(partial(fetch_model, path, kind, name, reporter.note))


def _read_flux(options: Options, findings: _Findings) -> TransformerParams | None:
    """The transformer's dimensions."""
    if options.pretrained_model_name_or_path is None:
        return None
    path = options.pretrained_model_name_or_path
    return findings.attempt(lambda: read_transformer(path, options.model_type))


def _check_models(options: Options, flux: TransformerParams, findings: _Findings) -> OtherModels | None:
    """The other three models' dimensions; notes where they don't belong to this transformer."""
    clip = _read_params(options.clip_l, "clip_l", clip_params, findings)
    t5 = _read_params(options.t5xxl, "t5xxl", t5_params, findings)
    ae = _read_params(options.ae, "ae", autoencoder_params, findings)
    has_clip = not isinstance(flux, ChromaParams)
    if has_clip and clip is not None and clip.hidden_size != flux.vec_in_dim:
        findings.add(_mismatch("CLIP-L", clip.hidden_size, flux.vec_in_dim, options.clip_l, "clip_l"))
    if t5 is not None and t5.d_model != flux.context_in_dim:
        findings.add(_mismatch("T5", t5.d_model, flux.context_in_dim, options.t5xxl, "t5xxl"))
    if ae is not None and ae.z_channels * 4 != flux.in_channels:
        findings.add(_mismatch("autoencoder", ae.z_channels * 4, flux.in_channels, options.ae, "ae"))
    return None if (has_clip and clip is None) or t5 is None or ae is None else OtherModels(t5, clip, ae)


def _read_params(path: Path | None, name: str, read: Callable[[Header], _T], findings: _Findings) -> _T | None:
    if path is None or _has_problem(findings, name):
        return None
    return findings.attempt(lambda: read(read_weights(path, MODEL_KINDS[name])))


def _mismatch(noun: str, given: int, wanted: int, path: Path | None, field: str) -> Problem:
    return Problem(
        f"this {noun} does not fit the transformer: its outputs are {given} wide, the model takes {wanted}",
        str(path),
        "Use the files that were published together.",
        field,
    )


def _check_device(options: Options, findings: _Findings) -> None:
    where = f"--device={options.device}"
    if options.device == "cuda" and not torch.cuda.is_available():
        findings.add(
            Problem(
                "no NVIDIA GPU can be used", where, "Check the driver and torch's CUDA build, or use auto.", "device"
            ),
            EXIT_OPTIONS,
        )
    if options.device == "mps" and not torch.backends.mps.is_available():
        findings.add(Problem("no Apple GPU can be used", where, "Use auto or cpu.", "device"), EXIT_OPTIONS)
    if options.optimizer_type == "AdamW8bit" and importlib.util.find_spec("bitsandbytes") is None:
        findings.add(
            Problem(
                "AdamW8bit needs the package bitsandbytes, which is not installed",
                "--optimizer_type",
                "Run python run.py setup, or use AdamW.",
                "optimizer_type",
            ),
            EXIT_OPTIONS,
        )


def _spec_from_weights(options: Options, spec: LoraSpec, findings: _Findings) -> LoraSpec | None:
    """The spec with the ranks of the file to start from."""
    if options.network_weights is None:
        return spec
    path = options.network_weights

    def from_file() -> LoraSpec:
        published = to_published(*read_lora_file(path), where=str(path))
        return spec_from_file(spec, published.state, published.metadata, str(path))

    found = findings.attempt(from_file)
    if found is not None and found.train_t5xxl and options.cache_text_encoder_outputs:
        findings.add(
            Problem(
                "this LoRA has layers of T5, whose outputs cache_text_encoder_outputs keeps from before",
                str(path),
                "Turn cache_text_encoder_outputs off, or leave dim_from_weights out.",
                "cache_text_encoder_outputs",
            ),
            EXIT_OPTIONS,
        )
    return found


def _check_network_kind(options: Options, spec: LoraSpec, flux: TransformerParams, findings: _Findings) -> None:
    """What other networks than LoRA ask for."""
    if spec.kind == "oft":
        mlp = round(flux.hidden_size * flux.mlp_ratio)
        sizes = (flux.hidden_size, mlp) if spec.enable_all_linear else (flux.hidden_size,)
        for size in sizes:
            if size % spec.rank:
                findings.add(
                    Problem(
                        f"network_dim is the number of OFT's blocks, but {size} cannot be divided by {spec.rank}",
                        "--network_dim",
                        "Use a power of two, such as 4.",
                        "network_dim",
                    ),
                    EXIT_OPTIONS,
                )
    if spec.kind == "lycoris":
        if not lycoris.is_installed():
            findings.add(lycoris.not_installed().problems[0], EXIT_OPTIONS)
        if options.blocks_to_swap:
            findings.add(
                Problem(
                    "lycoris.kohya keeps weights for backward, which blocks_to_swap moves away",
                    "--blocks_to_swap",
                    "Leave it out, or use networks.lora_flux.",
                    "blocks_to_swap",
                ),
                EXIT_OPTIONS,
            )


def _check_against_model(options: Options, spec: LoraSpec | None, flux: TransformerParams, findings: _Findings) -> None:
    wanted = options.blocks_to_swap or 0
    largest = max_blocks_to_swap(flux.depth, flux.depth_single_blocks)
    if wanted > largest:
        findings.add(
            Problem(
                f"blocks_to_swap is {wanted}, but this model has {flux.depth} double and {flux.depth_single_blocks} "
                f"single blocks",
                "--blocks_to_swap",
                f"The largest allowed is {largest}.",
                "blocks_to_swap",
            ),
            EXIT_OPTIONS,
        )
    if spec is None:
        return
    _check_network_kind(options, spec, flux, findings)
    for kind, indices, count in (
        ("double", spec.double_indices, flux.depth),
        ("single", spec.single_indices, flux.depth_single_blocks),
    ):
        beyond = sorted(index for index in indices or () if index >= count)
        if beyond:
            findings.add(
                Problem(
                    f"train_{kind}_block_indices names block {beyond[0]}, but this model has {kind} blocks 0 to {count - 1}",
                    "--network_args",
                    field="network_args",
                ),
                EXIT_OPTIONS,
            )


def _first_file(path: Path | None, name: str) -> Path | None:
    """A file of the encoder, beside which its tokenizer may lie."""
    if path is None:
        return None
    try:
        return read_weights(path, MODEL_KINDS[name]).files[0]
    except UserError:
        return path  # what is wrong with it has been noted


def _check_tokenizers(options: Options, flux: TransformerParams | None, findings: _Findings) -> Tokenizers | None:
    """Loads the tokenizers: small, and the one thing that may have to be downloaded."""
    has_clip = options.model_type != "chroma"
    clip = None
    if has_clip:
        clip = findings.attempt(
            lambda: load_clip_tokenizer(
                options.clip_l_tokenizer,
                options.tokenizer_cache_dir,
                encoder_file=_first_file(options.clip_l, "clip_l"),
            )
        )
    t5 = findings.attempt(
        lambda: load_t5_tokenizer(
            options.t5xxl_tokenizer, options.tokenizer_cache_dir, encoder_file=_first_file(options.t5xxl, "t5xxl")
        )
    )
    if (has_clip and clip is None) or t5 is None:
        return None
    for name, tokenizer, path, reader in (
        ("clip_l", clip, options.clip_l, clip_params),
        ("t5xxl", t5, options.t5xxl, t5_params),
    ):
        if path is None or tokenizer is None or _has_problem(findings, name):
            continue
        file = path
        read = reader
        params = findings.attempt(lambda file=file, read=read, name=name: read(read_weights(file, MODEL_KINDS[name])))
        if params is not None and tokenizer.vocab_size > params.vocab_size:
            findings.add(
                Problem(
                    f"the tokenizer has {tokenizer.vocab_size} tokens, but this encoder knows {params.vocab_size}",
                    str(path),
                    f"Give --{name}_tokenizer the encoder's own tokenizer.",
                    f"{name}_tokenizer",
                )
            )
    default = T5_TOKENS_SCHNELL if flux is not None and flux.is_schnell else T5_TOKENS_DEV
    return Tokenizers(clip, t5, options.t5xxl_max_token_length or default)
