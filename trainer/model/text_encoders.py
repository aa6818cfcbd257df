"""Token ids to what the transformer reads: the calls of the CLIP-L and T5-XXL encoders.

B prompts, L tokens, C width of CLIP, D width of T5.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, cast

from torch import Tensor

if TYPE_CHECKING:
    # Seconds to import, which the checks before a run do without.
    from transformers import CLIPTextModel, T5EncoderModel

CLIP_MAX_TOKENS: Final = 77


def encode_clip(model: CLIPTextModel, ids: Tensor) -> Tensor:
    """The pooled vector (B, C) of CLIP for `ids` (B, L): the last hidden state, after the final norm, at the end token.

    The end token is where the id is highest, and the first such place where prompts are padded with it. Gradients flow
    into the model.
    """
    pooled = model(input_ids=ids.to(model.device)).pooler_output
    return cast("Tensor", pooled)


def encode_t5(model: T5EncoderModel, ids: Tensor, mask: Tensor, *, apply_mask: bool) -> Tensor:
    """The hidden states (B, L, D) of T5 for `ids` (B, L); `apply_mask` hides padding inside the encoder."""
    attention_mask = mask.to(model.device) if apply_mask else None
    output = model(input_ids=ids.to(model.device), attention_mask=attention_mask)
    return cast("Tensor", output.last_hidden_state)
