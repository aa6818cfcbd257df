"""The demo's text encoders: CLIP-L and T5 in their real structures, with weights that are arranged rather than trained.

Each word has a random vector. T5's heads look at the words next to a word, so that the "red" before "circle" is encoded
differently from the "red" before "background"; CLIP's end token gathers all words. The transformer learns to read that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from trainer.model.prompt_tokenizers import load_clip_tokenizer, load_t5_tokenizer
from trainer.model.weights import load_clip_l, load_t5xxl
from trainer.tools.tiny_networks import make_clip_l, make_t5xxl
from trainer.tools.tiny_tokenizers import clip_vocab_size, make_tokenizers, t5_vocab_size
from trainer.tools.world import WORDS
from trainer.train.conditioning import ClipEncoder, T5Encoder, TextInputs

TEXT_WIDTH: Final = 128
POOLED_WIDTH: Final = 64
MAX_TOKENS: Final = 16
"""T5 tokens of a caption, padding included: the demo's `t5xxl_max_token_length`."""

CLIP_FILE: Final = "clip_l.safetensors"
T5_FILE: Final = "t5xxl.safetensors"


def make_demo_encoders(folder: Path, *, seed: int) -> None:
    """Write both encoders and their tokenizers into `folder`."""
    make_tokenizers(folder, WORDS)
    make_clip_l(
        folder / CLIP_FILE,
        hidden=POOLED_WIDTH,
        vocab_size=clip_vocab_size(WORDS),
        position_std=0.05,
        query_gain=0.2,
        # A mean of a dozen words is small; this brings it to the size of the end token's own vector.
        attention_gain=3.0,
        mlp_gain=0.3,
        seed=seed,
    )
    make_t5xxl(
        folder / T5_FILE,
        d_model=TEXT_WIDTH,
        d_kv=32,
        vocab_size=t5_vocab_size(WORDS),
        neighbours=(1, -1, 2, -2),
        mlp_gain=0.3,
        seed=seed + 1,
    )


@dataclass(frozen=True)
class CaptionEncoder:
    """The encoders as a training uses them, without the text mask."""

    clip: ClipEncoder
    t5: T5Encoder

    @classmethod
    def load(cls, folder: Path) -> CaptionEncoder:
        device = torch.device("cpu")
        clip_tokenizer = load_clip_tokenizer(folder / "clip_l_tokenizer")
        t5_tokenizer = load_t5_tokenizer(folder / "t5xxl_tokenizer")
        return cls(
            ClipEncoder(load_clip_l(folder / CLIP_FILE, torch.float32, device), clip_tokenizer, device),
            T5Encoder(
                load_t5xxl(folder / T5_FILE, torch.float32, device),
                t5_tokenizer,
                device,
                max_length=MAX_TOKENS,
                apply_mask=False,
            ),
        )

    def __call__(self, captions: Sequence[str]) -> TextInputs:
        """txt (B, 16, 128), vec (B, 64)."""
        with torch.no_grad():
            return TextInputs(self.t5(captions)[0], self.clip(captions), None)
