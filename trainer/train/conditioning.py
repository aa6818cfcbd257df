"""Captions to what the transformer takes: the T5 sequence, the CLIP vector and the text mask; cached or live.

B batch, L text tokens, D T5 width, C CLIP width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from trainer.model.prompt_tokenizers import PromptTokenizer
from trainer.model.text_encoders import encode_clip, encode_t5

if TYPE_CHECKING:
    # Seconds to import, which the checks before a run do without.
    from transformers import CLIPTextModel, T5EncoderModel

CLIP_MAX_TOKENS = 77


@dataclass(frozen=True)
class TextInputs:
    """What the transformer takes for one batch of captions.

    `txt` (B, L, D), `vec` (B, C) with C = 0 where there is no CLIP-L, `mask` (B, L) int64 with 1 = visible token, or None
    when nothing is hidden.
    """

    txt: Tensor
    vec: Tensor
    mask: Tensor | None


class TextSource(Protocol):
    """Gives the text inputs for captions, wherever they come from."""

    def __call__(self, captions: Sequence[str]) -> TextInputs: ...


class ClipEncoder:
    """CLIP-L with its tokenizer: captions to pooled vectors (B, C)."""

    def __init__(self, model: CLIPTextModel, tokenizer: PromptTokenizer, device: torch.device) -> None:
        self.model = model
        self._tokenizer = tokenizer
        self._device = device

    def __call__(self, captions: Sequence[str]) -> Tensor:
        ids, _ = self._tokenizer.encode(list(captions), CLIP_MAX_TOKENS)
        return encode_clip(self.model, ids.to(self._device))


class NoClip:
    """Stands in the place of CLIP-L for Chroma, which reads no pooled vector: captions to (B, 0)."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self, captions: Sequence[str]) -> Tensor:
        return torch.zeros(len(captions), 0, device=self._device)


ClipSource = ClipEncoder | NoClip


class T5Encoder:
    """T5-XXL with its tokenizer: captions to (B, L, D) and their mask (B, L), always padded to `max_length`.

    Inside T5 all padding is hidden with `apply_mask`. Of what the mask given hides from the transformer, the first
    `visible_padding` tokens are spared: Chroma was trained with one.
    """

    def __init__(
        self,
        model: T5EncoderModel,
        tokenizer: PromptTokenizer,
        device: torch.device,
        *,
        max_length: int,
        apply_mask: bool,
        visible_padding: int = 0,
    ) -> None:
        self.model = model
        self._tokenizer = tokenizer
        self._device = device
        self._max_length = max_length
        self._apply_mask = apply_mask
        self._visible_padding = visible_padding

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        ids, mask = self._tokenizer.encode(list(captions), self._max_length)
        mask = mask.to(self._device)
        txt = encode_t5(self.model, ids.to(self._device), mask, apply_mask=self._apply_mask)
        return txt, show_padding(mask, self._visible_padding)


def show_padding(mask: Tensor, num_tokens: int) -> Tensor:
    """`mask` (B, L) with the first `num_tokens` padding tokens of each row set to 1, too, as far as there are any.

    With a negative number the last visible tokens are hidden.
    """
    lengths = mask.sum(dim=1, keepdim=True) + num_tokens
    return (torch.arange(mask.shape[1], device=mask.device)[None] < lengths).to(mask.dtype)


def text_inputs(txt: Tensor, vec: Tensor, mask: Tensor, *, apply_mask: bool) -> TextInputs:
    """The inputs of one batch from `txt` (B, L, D), `vec` (B, C), `mask` (B, L).

    With the text mask, tokens that are padding in every caption are cut off, and the mask goes when nothing is left
    to hide: masked keys never reach the image and text has no positions, so the result is the same while attention
    gets shorter and keeps its fast kernel. (The reference trainer always computes the full length.)
    """
    if not apply_mask:
        return TextInputs(txt, vec, None)
    lengths = mask.sum(dim=1)
    longest = max(int(lengths.max()), 1)
    is_hidden = bool((lengths < longest).any())
    return TextInputs(txt[:, :longest], vec, mask[:, :longest] if is_hidden else None)


class LiveText:
    """Encodes at every call. CLIP-L and T5 keep their gradients when their LoRA trains."""

    def __init__(
        self,
        clip: ClipSource,
        t5: T5Encoder,
        *,
        trains_clip: bool,
        apply_mask: bool,
        autocast: Callable[[], AbstractContextManager[object]],
        trains_t5: bool = False,
    ) -> None:
        self._clip = clip
        self._t5 = t5
        self._trains_clip = trains_clip
        self._trains_t5 = trains_t5
        self._apply_mask = apply_mask
        self._autocast = autocast

    def __call__(self, captions: Sequence[str]) -> TextInputs:
        with self._autocast():
            with torch.set_grad_enabled(self._trains_clip and torch.is_grad_enabled()):
                vec = self._clip(captions)
            with torch.set_grad_enabled(self._trains_t5 and torch.is_grad_enabled()):
                txt, mask = self._t5(captions)
        return text_inputs(txt, vec, mask, apply_mask=self._apply_mask)


@dataclass(frozen=True)
class StoredText:
    """One caption's encodings on the host: `vec` (C,) and `txt` (L_kept, D).

    With the text mask only the visible tokens are kept; without it the padding is part of the model's input and all L
    are kept.
    """

    txt: Tensor
    vec: Tensor


class CachedText:
    """Looks encodings up; a CLIP-L that trains is run live on top of the cached T5 sequence."""

    def __init__(
        self,
        look_up: Callable[[str], StoredText],
        device: torch.device,
        *,
        apply_mask: bool,
        live_clip: ClipEncoder | None,
        autocast: Callable[[], AbstractContextManager[object]],
    ) -> None:
        self._look_up = look_up
        self._device = device
        self._apply_mask = apply_mask
        self._live_clip = live_clip
        self._autocast = autocast

    def __call__(self, captions: Sequence[str]) -> TextInputs:
        entries = [self._look_up(caption) for caption in captions]
        length = max(entry.txt.shape[0] for entry in entries)
        txt = torch.zeros(len(entries), length, entries[0].txt.shape[-1], dtype=entries[0].txt.dtype)
        mask = torch.zeros(len(entries), length, dtype=torch.int64)
        for row, entry in enumerate(entries):
            txt[row, : entry.txt.shape[0]] = entry.txt
            mask[row, : entry.txt.shape[0]] = 1
        if self._live_clip is None:
            vec = torch.stack([entry.vec for entry in entries]).to(self._device)
        else:
            with self._autocast():
                vec = self._live_clip(captions)
        return text_inputs(txt.to(self._device), vec, mask.to(self._device), apply_mask=self._apply_mask)
