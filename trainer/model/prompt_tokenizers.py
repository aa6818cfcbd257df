"""The tokenizers of CLIP-L and T5-XXL: where they are found, and prompts to token ids."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol, cast

from tokenizers import Encoding, Tokenizer

from trainer.model.hub import first_line, unreachable_reason
from trainer.schema.base import UserError

if TYPE_CHECKING:
    # Seconds to import, which the checks before a run do without.
    from torch import Tensor


@dataclass(frozen=True)
class _TokenizerKind:
    """What sets the two tokenizers apart."""

    name: str
    option: str
    hub_id: str
    pad_token: str
    vocabulary_files: tuple[str, ...]
    # Where to look from the folder of the encoder file: beside it, and in a diffusers folder.
    places: tuple[str, ...]


_CLIP: Final = _TokenizerKind(
    name="CLIP-L",
    option="clip_l_tokenizer",
    hub_id="openai/clip-vit-large-patch14",
    pad_token="<|endoftext|>",
    vocabulary_files=("vocab.json", "merges.txt"),
    places=("clip_l_tokenizer", "tokenizer_clip.json", "tokenizer", "../tokenizer", "tokenizer.json"),
)


_T5: Final = _TokenizerKind(
    name="T5-XXL",
    option="t5xxl_tokenizer",
    hub_id="google/t5-v1_1-xxl",
    pad_token="<pad>",
    vocabulary_files=("spiece.model",),
    # Chroma's repositories have one tokenizer, which is T5's.
    places=(
        "t5xxl_tokenizer",
        "tokenizer_t5.json",
        "tokenizer_2",
        "../tokenizer_2",
        "tokenizer",
        "../tokenizer",
        "tokenizer.json",
    ),
)


class PromptTokenizer:
    """Turns prompts into token ids of one length, cut or padded. CLIP is padded with its end token, as published."""

    def __init__(self, backend: Tokenizer, pad_token: str) -> None:
        pad_id = backend.token_to_id(pad_token)
        if pad_id is None:
            raise ValueError(f"the tokenizer has no token {pad_token}")
        self._backend = backend
        self._pad_token = pad_token
        self._pad_id = pad_id
        self.identity = hashlib.sha256(backend.to_str().encode()).hexdigest()[:32]
        """Tells this tokenizer from others, wherever it came from."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return self._backend.get_vocab_size()

    def encode(self, texts: Sequence[str], max_length: int) -> tuple[Tensor, Tensor]:
        """Token ids and mask (1 = real token, the end token included), both int64 (B, max_length)."""
        import torch  # noqa: PLC0415 - seconds to import, which counting tokens does without

        if not texts:
            return torch.zeros(0, max_length, dtype=torch.int64), torch.zeros(0, max_length, dtype=torch.int64)
        encodings = self._encodings(texts, max_length)
        ids = torch.tensor([encoding.ids for encoding in encodings], dtype=torch.int64)
        mask = torch.tensor([encoding.attention_mask for encoding in encodings], dtype=torch.int64)
        return ids, mask

    def lengths(self, texts: Sequence[str], max_length: int) -> list[int]:
        """The number of real tokens of each text, cut at `max_length`."""
        return [sum(encoding.attention_mask) for encoding in self._encodings(texts, max_length)]

    def is_cut(self, texts: Sequence[str], max_length: int) -> list[bool]:
        """Whether each text has more tokens than `max_length`."""
        return [bool(encoding.overflowing) for encoding in self._encodings(texts, max_length)]

    def _encodings(self, texts: Sequence[str], max_length: int) -> list[Encoding]:
        self._backend.enable_truncation(max_length)
        self._backend.enable_padding(length=max_length, pad_id=self._pad_id, pad_token=self._pad_token)
        return self._backend.encode_batch(list(texts))


def load_clip_tokenizer(
    spec: str | Path | None, cache_dir: Path | None = None, *, encoder_file: Path | None = None
) -> PromptTokenizer:
    """The CLIP-L tokenizer.

    `spec` is a folder, a tokenizer.json file or a hub id. None means the published one: from `cache_dir` when it was kept
    there, else from beside `encoder_file`, else from the hub (and then kept in `cache_dir`). Raises `UserError`
    when there is none, naming the options that help.
    """
    return _load_tokenizer(_CLIP, spec, cache_dir, encoder_file)


def load_t5_tokenizer(
    spec: str | Path | None, cache_dir: Path | None = None, *, encoder_file: Path | None = None
) -> PromptTokenizer:
    """The T5-XXL tokenizer; see `load_clip_tokenizer`."""
    return _load_tokenizer(_T5, spec, cache_dir, encoder_file)


def _load_tokenizer(
    kind: _TokenizerKind, spec: str | Path | None, cache_dir: Path | None, encoder_file: Path | None
) -> PromptTokenizer:
    if spec is not None:
        path = Path(spec).expanduser()
        if path.exists():
            return _from_path(kind, path)
        if not _looks_like_hub_id(str(spec)):
            raise UserError(
                f"the {kind.name} tokenizer does not exist",
                str(spec),
                "Give a tokenizer.json, a folder that holds one, or a hub id.",
                field=kind.option,
            )
        hub_id = str(spec)
    else:
        hub_id = kind.hub_id
    kept = None if cache_dir is None else cache_dir / hub_id.replace("/", "_")
    if kept is not None and kept.is_dir():
        return _from_path(kind, kept)
    if spec is None and encoder_file is not None:
        beside = _find_beside(kind, encoder_file)
        if beside is not None:
            return beside
    return _from_hub(kind, hub_id, kept)


def _looks_like_hub_id(spec: str) -> bool:
    owner, slash, name = spec.partition("/")
    return (
        bool(owner and slash and name)
        and "/" not in name
        and not spec.endswith(".json")
        and owner not in (".", "..", "~")
    )


def _from_path(kind: _TokenizerKind, path: Path) -> PromptTokenizer:
    """A tokenizer from a tokenizer.json or a folder."""
    try:
        backend = _read_folder(kind, path) if path.is_dir() else _parse_tokenizer(path.read_text(encoding="utf-8"))
        return PromptTokenizer(backend, kind.pad_token)
    except (OSError, ValueError, TypeError, ImportError) as error:
        raise UserError(
            f"this is not a {kind.name} tokenizer ({first_line(error)})",
            str(path),
            f"Give --{kind.option} a tokenizer.json, a folder that holds one, or the hub id {kind.hub_id}.",
            field=kind.option,
        ) from error


def _read_folder(kind: _TokenizerKind, folder: Path) -> Tokenizer:
    """The folder's tokenizer.json, else its vocabulary files, converted by transformers.

    The files are looked for first: transformers 5 makes a tokenizer without words, silently, where they are missing.
    """
    if (folder / "tokenizer.json").is_file():
        return _parse_tokenizer((folder / "tokenizer.json").read_text(encoding="utf-8"))
    if not all((folder / name).is_file() for name in kind.vocabulary_files):
        raise ValueError(f"the folder holds neither tokenizer.json nor {' and '.join(kind.vocabulary_files)}")
    from transformers import CLIPTokenizer, T5Tokenizer  # noqa: PLC0415 - seconds that few tokenizers need

    tokenizer_class = CLIPTokenizer if kind is _CLIP else T5Tokenizer
    tokenizer = cast("_FastTokenizer", tokenizer_class.from_pretrained(str(folder), local_files_only=True))
    return tokenizer.backend_tokenizer


def _parse_tokenizer(text: str) -> Tokenizer:
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # the library raises exactly this class, nothing narrower
        raise ValueError(first_line(error)) from error


def _find_beside(kind: _TokenizerKind, encoder_file: Path) -> PromptTokenizer | None:
    for place in kind.places:
        candidate = encoder_file.parent / place
        if not candidate.exists():
            continue
        try:
            tokenizer = _from_path(kind, candidate)
        except UserError:
            continue  # the other encoder's tokenizer under the common name
        _log.info("%s tokenizer: %s", kind.name, candidate)
        return tokenizer
    return None


def _from_hub(kind: _TokenizerKind, hub_id: str, kept: Path | None) -> PromptTokenizer:
    """From the hub's local cache, else downloaded; kept in `kept`, when given, for the next time."""
    try:
        backend = _download(kind, hub_id, local_files_only=True)
    except (OSError, ValueError):
        # The hub's client tries for minutes when there is no network; one short request tells.
        reason = unreachable_reason()
        if reason is not None:
            raise _no_tokenizer(kind, hub_id, reason) from None
        try:
            backend = _download(kind, hub_id, local_files_only=False)
        except (OSError, ValueError, TypeError, ImportError) as error:
            raise _no_tokenizer(kind, hub_id, first_line(error)) from error
    tokenizer = PromptTokenizer(backend, kind.pad_token)
    if kept is not None:
        _keep(backend, kept)
    return tokenizer


def _download(kind: _TokenizerKind, hub_id: str, *, local_files_only: bool) -> Tokenizer:
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - slow to import, for few runs

    patterns = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", *kind.vocabulary_files]
    folder = snapshot_download(hub_id, allow_patterns=patterns, local_files_only=local_files_only)
    return _read_folder(kind, Path(folder))


def _keep(backend: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json into `folder`, whole or not at all."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"tokenizer.json.{os.getpid()}.tmp"
        temporary.write_text(backend.to_str(), encoding="utf-8")
        temporary.replace(folder / "tokenizer.json")
    except OSError as error:
        raise UserError(
            f"the tokenizer cannot be kept here ({error.strerror or error})",
            str(folder),
            "Set --tokenizer_cache_dir to a folder that can be written to.",
            field="tokenizer_cache_dir",
        ) from error


def _no_tokenizer(kind: _TokenizerKind, hub_id: str, reason: str) -> UserError:
    return UserError(
        f"the {kind.name} tokenizer {hub_id} is not on this machine and cannot be downloaded ({reason})",
        f"--{kind.option}",
        f"Set --{kind.option} to a tokenizer.json or a folder that holds one, or put such a folder at "
        f"<tokenizer_cache_dir>/{hub_id.replace('/', '_')} and set --tokenizer_cache_dir.",
        field=kind.option,
    )


class _FastTokenizer(Protocol):
    backend_tokenizer: Tokenizer


_log = logging.getLogger(__name__)
