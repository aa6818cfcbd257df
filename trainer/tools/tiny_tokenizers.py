"""Small tokenizers for CLIP-L and T5 in the tokenizer.json format, written directly: no library is needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_WORDS = (
    "a an the of on in at and with above below beside over under from to is by for no it this that "
    "photo picture image painting drawing sketch portrait style person man woman cat dog fox house tree "
    "red green blue yellow orange purple pink brown black white gray grey cyan magenta teal light dark bright "
    "circle square triangle star ring cross diamond heart stripe stripes shape pattern background small large big "
    "left right top bottom center middle one two three wearing hat sitting standing lazy quick jumps "
    "studio lighting soft flat simple colourful colorful abstract detailed high quality sks demo fluxdemo tok "
)

_CLIP_START = "<|startoftext|>"
_CLIP_END = "<|endoftext|>"
_WORD_END = "</w>"


def make_tokenizers(folder: Path, words: str = _WORDS) -> tuple[Path, Path]:
    """Write tokenizers for CLIP-L and T5 below `folder`; returns their two folders, each with a tokenizer.json.

    Each of `words`, which are parted by spaces, is one token; other text is cut into characters or bytes.

    CLIP: byte-level BPE in lower case, wrapped in start and end tokens, the end token with the highest id.
    T5: unigram, with the end token appended, ``<pad>`` = 0, ``</s>`` = 1, ``<unk>`` = 2 and the 100 sentinel tokens.
    """
    clip, t5 = folder / "clip_l_tokenizer", folder / "t5xxl_tokenizer"
    _write_json(clip / "tokenizer.json", _clip_tokenizer(words))
    _write_json(
        clip / "tokenizer_config.json",
        {
            "tokenizer_class": "CLIPTokenizer",
            "bos_token": _CLIP_START,
            "eos_token": _CLIP_END,
            "pad_token": _CLIP_END,
            "unk_token": _CLIP_END,
            "model_max_length": 77,
        },
    )
    _write_json(t5 / "tokenizer.json", _t5_tokenizer(words))
    _write_json(
        t5 / "tokenizer_config.json",
        {
            "tokenizer_class": "T5Tokenizer",
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "extra_ids": 100,
            "model_max_length": 512,
        },
    )
    return clip, t5


def clip_vocab_size(words: str = _WORDS) -> int:
    """Number of tokens of the CLIP tokenizer which `make_tokenizers` writes."""
    return len(_clip_vocabulary(words)[0])


def t5_vocab_size(words: str = _WORDS) -> int:
    """Number of tokens of the T5 tokenizer which `make_tokenizers` writes."""
    return len(_t5_pieces(words))


def _byte_alphabet() -> list[str]:
    """One printable character for each byte, in the order of GPT-2's byte-level BPE."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]


def _clip_vocabulary(words: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    alphabet = _byte_alphabet()
    tokens = [*alphabet, *(character + _WORD_END for character in alphabet)]
    merges: dict[tuple[str, str], None] = {}
    for word in words.split():
        # Joined from the left, as far as the joins of earlier words already do not decide otherwise.
        pieces = [*word[:-1], word[-1] + _WORD_END]
        for pair in merges:
            pieces = _merge(pieces, pair)
        while len(pieces) > 1:
            pair = (pieces[0], pieces[1])
            merges[pair] = None
            pieces = _merge(pieces, pair)
    tokens += [left + right for left, right in merges]
    tokens = [*dict.fromkeys(tokens), _CLIP_START, _CLIP_END]
    return {token: index for index, token in enumerate(tokens)}, list(merges)


def _merge(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    index = 0
    while index < len(pieces):
        if tuple(pieces[index : index + 2]) == pair:
            merged.append(pieces[index] + pieces[index + 1])
            index += 2
        else:
            merged.append(pieces[index])
            index += 1
    return merged


def _clip_tokenizer(words: str) -> dict[str, Any]:
    vocabulary, merges = _clip_vocabulary(words)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(vocabulary[token], token) for token in (_CLIP_START, _CLIP_END)],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "NFC"},
                {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
                {"type": "Lowercase"},
            ],
        },
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"},
                    "behavior": "Removed",
                    "invert": True,
                },
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            ],
        },
        "post_processor": {
            "type": "RobertaProcessing",
            "sep": [_CLIP_END, vocabulary[_CLIP_END]],
            "cls": [_CLIP_START, vocabulary[_CLIP_START]],
            "trim_offsets": False,
            "add_prefix_space": False,
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": _CLIP_END,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": _WORD_END,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [list(pair) for pair in merges],
        },
    }


def _t5_pieces(words: str) -> list[tuple[str, float]]:
    """(piece, log probability) in the order of their ids."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    whole = [(f"▁{word}", -5.0 - 0.01 * index) for index, word in enumerate(words.split())]
    # Single characters are so unlikely that a known word always wins.
    characters = [("▁", -9.0)] + [(chr(code), -10.0) for code in range(ord("!"), ord("~") + 1)]
    return special + whole + characters + [(f"<extra_id_{index}>", 0.0) for index in reversed(range(100))]


def _t5_tokenizer(words: str) -> dict[str, Any]:
    pieces = _t5_pieces(words)
    special = [(index, piece) for index, (piece, _) in enumerate(pieces) if piece[0] == "<" and piece[-1] == ">"]
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    end: dict[str, Any] = {"SpecialToken": {"id": "</s>", "type_id": 0}}
    first: dict[str, Any] = {"Sequence": {"id": "A", "type_id": 0}}
    second: dict[str, Any] = {"Sequence": {"id": "B", "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(index, piece) for index, piece in special],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "NFKC"},
                {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
                {"type": "Strip", "strip_left": True, "strip_right": True},
            ],
        },
        "pre_tokenizer": space,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [first, end],
            "pair": [first, end, second, end],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
        },
        "decoder": space,
        "model": {"type": "Unigram", "unk_id": 2, "vocab": [list(piece) for piece in pieces], "byte_fallback": False},
    }


def _added_token(index: int, content: str) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": index, "content": content, **flags}


def _write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")
