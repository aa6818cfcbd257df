"""The model files of a run, by their headers, and the tokenizers: whether they belong together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from trainer.model.hub import fetch_model
from trainer.model.prompt_tokenizers import PromptTokenizer, load_clip_tokenizer, load_t5_tokenizer
from trainer.schema.base import Problem, UserError
from trainer.schema.checkpoint_header import Header, autoencoder_params, clip_params, t5_params
from trainer.schema.chroma_header import ChromaParams, TransformerParams, read_transformer
from trainer.schema.file_checks import MODEL_KINDS, needed_models
from trainer.schema.hub_cache import hub_id
from trainer.schema.model_kinds import ModelKind
from trainer.schema.options import Options
from trainer.schema.parameter_counts import OtherModels
from trainer.schema.weight_files import read_weights
from trainer.train.findings import Findings
from trainer.train.reporting import Reporter

T5_TOKENS_DEV, T5_TOKENS_SCHNELL = 512, 256
_T = TypeVar("_T")


@dataclass(frozen=True)
class Tokenizers:
    """`clip_l` is None for Chroma."""

    clip_l: PromptTokenizer | None
    t5xxl: PromptTokenizer
    t5xxl_tokens: int


def fetch_models(options: Options, findings: Findings, reporter: Reporter) -> None:
    """Downloads the models that are given as hub ids and are not on this machine yet."""
    for name, kind, _ in needed_models(options):
        path: Path | None = getattr(options, name)
        if path is not None:
            findings.attempt(partial(fetch_model, path, kind, name, reporter.note))


def read_flux(options: Options, findings: Findings) -> TransformerParams | None:
    """The transformer's dimensions."""
    if options.pretrained_model_name_or_path is None:
        return None
    path = options.pretrained_model_name_or_path
    if _is_waiting(path, "chroma" if options.model_type == "chroma" else "flux"):
        return None
    return findings.attempt(lambda: read_transformer(path, options.model_type))


def check_models(options: Options, flux: TransformerParams, findings: Findings) -> OtherModels | None:
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


def _is_waiting(path: Path, kind: ModelKind) -> bool:
    """Whether this is a hub id whose files are not on this machine: they are fetched once nothing else is wrong."""
    if hub_id(path) is None:
        return False
    try:
        read_weights(path, kind)
    except UserError:
        return True
    return False


def _read_params(path: Path | None, name: str, read: Callable[[Header], _T], findings: Findings) -> _T | None:
    if path is None or findings.has(name) or _is_waiting(path, MODEL_KINDS[name]):
        return None
    return findings.attempt(lambda: read(read_weights(path, MODEL_KINDS[name])))


def _mismatch(noun: str, given: int, wanted: int, path: Path | None, field: str) -> Problem:
    return Problem(
        f"this {noun} does not fit the transformer: its outputs are {given} wide, the model takes {wanted}",
        str(path),
        "Use the files that were published together.",
        field,
    )


def _first_file(path: Path | None, name: str) -> Path | None:
    """A file of the encoder, beside which its tokenizer may lie."""
    if path is None:
        return None
    try:
        return read_weights(path, MODEL_KINDS[name]).files[0]
    except UserError:
        return path  # what is wrong with it has been noted


def check_tokenizers(options: Options, flux: TransformerParams | None, findings: Findings) -> Tokenizers | None:
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
        if path is None or tokenizer is None or findings.has(name) or _is_waiting(path, MODEL_KINDS[name]):
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
