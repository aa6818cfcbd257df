"""Captions to text inputs: the mask, trimming, and cached against live."""

from __future__ import annotations

import contextlib

import pytest
import torch

from tests.tiny import TinyModels
from trainer.model.packing import image_ids, text_ids
from trainer.model.prompt_tokenizers import load_clip_tokenizer, load_t5_tokenizer
from trainer.model.weights import load_clip_l, load_flux, load_t5xxl
from trainer.train.conditioning import (
    CachedText,
    ClipEncoder,
    LiveText,
    NoClip,
    StoredText,
    T5Encoder,
    show_padding,
    text_inputs,
)

CPU = torch.device("cpu")
LENGTH = 24
CAPTIONS = ["a red circle", "a large blue square on a green ground"]


def encoders(models: TinyModels, *, apply_mask: bool) -> tuple[ClipEncoder, T5Encoder]:
    clip = ClipEncoder(
        load_clip_l(models.clip_l, torch.float32, CPU), load_clip_tokenizer(str(models.clip_l_tokenizer)), CPU
    )
    t5 = T5Encoder(
        load_t5xxl(models.t5xxl, torch.float32, CPU),
        load_t5_tokenizer(str(models.t5xxl_tokenizer)),
        CPU,
        max_length=LENGTH,
        apply_mask=apply_mask,
    )
    return clip, t5


@pytest.mark.parametrize("apply_mask", [False, True])
def test_cached_text_equals_live_text(tiny_models: TinyModels, apply_mask: bool) -> None:
    clip, t5 = encoders(tiny_models, apply_mask=apply_mask)
    live = LiveText(clip, t5, trains_clip=False, apply_mask=apply_mask, autocast=contextlib.nullcontext)
    stored: dict[str, StoredText] = {}
    with torch.no_grad():
        for caption in CAPTIONS:
            txt, mask = t5([caption])
            length = int(mask.sum()) if apply_mask else LENGTH
            stored[caption] = StoredText(txt[0, :length], clip([caption])[0])
    cached = CachedText(stored.__getitem__, CPU, apply_mask=apply_mask, live_clip=None, autocast=contextlib.nullcontext)
    ours, theirs = cached(CAPTIONS), live(CAPTIONS)
    torch.testing.assert_close(ours.vec, theirs.vec, atol=1e-5, rtol=0)
    assert ours.txt.shape == theirs.txt.shape
    if apply_mask:
        assert ours.mask is not None
        assert theirs.mask is not None
        assert torch.equal(ours.mask, theirs.mask)
        torch.testing.assert_close(ours.txt[ours.mask.bool()], theirs.txt[theirs.mask.bool()], atol=1e-5, rtol=0)
    else:
        assert ours.mask is None
        torch.testing.assert_close(ours.txt, theirs.txt, atol=1e-5, rtol=0)


def test_trimmed_text_gives_the_same_image_as_masked_padding(tiny_models: TinyModels) -> None:
    flux = load_flux(tiny_models.flux_dev, torch.float32, CPU)
    generator = torch.Generator().manual_seed(0)
    txt = torch.randn(2, 20, flux.params.context_in_dim, generator=generator)
    vec = torch.randn(2, flux.params.vec_in_dim, generator=generator)
    img = torch.randn(2, 16, flux.params.in_channels, generator=generator)
    mask = torch.zeros(2, 20, dtype=torch.int64)
    mask[0, :5] = 1
    mask[1, :9] = 1
    trimmed = text_inputs(txt, vec, mask, apply_mask=True)
    assert trimmed.txt.shape[1] == 9
    timesteps, guidance = torch.tensor([0.3, 0.8]), torch.ones(2)
    with torch.no_grad():
        full = flux(img, image_ids(4, 4), txt, text_ids(20), timesteps, vec, guidance, mask)
        short = flux(img, image_ids(4, 4), trimmed.txt, text_ids(9), timesteps, vec, guidance, trimmed.mask)
    torch.testing.assert_close(short, full, atol=5e-6, rtol=0)


def test_a_batch_without_padding_needs_no_mask() -> None:
    txt, vec, mask = torch.zeros(2, 6, 4), torch.zeros(2, 3), torch.zeros(2, 6, dtype=torch.int64)
    mask[:, :4] = 1
    trimmed = text_inputs(txt, vec, mask, apply_mask=True)
    assert trimmed.txt.shape == (2, 4, 4)
    assert trimmed.mask is None


def test_clip_keeps_its_gradient_only_when_it_trains(tiny_models: TinyModels) -> None:
    clip, t5 = encoders(tiny_models, apply_mask=False)
    next(clip.model.parameters()).requires_grad_(True)
    for trains in (False, True):
        live = LiveText(clip, t5, trains_clip=trains, apply_mask=False, autocast=contextlib.nullcontext)
        assert live(CAPTIONS[:1]).vec.requires_grad is trains


def test_visible_padding_is_the_first_of_each_row_as_far_as_there_is_any() -> None:
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]])
    assert show_padding(mask, 1).tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert torch.equal(show_padding(mask, 0), mask)


def test_for_chroma_one_padding_token_is_kept_whether_cached_or_live(tiny_models: TinyModels) -> None:
    tokenizer = load_t5_tokenizer(str(tiny_models.t5xxl_tokenizer))
    model = load_t5xxl(tiny_models.t5xxl, torch.float32, CPU)
    t5 = T5Encoder(model, tokenizer, CPU, max_length=LENGTH, apply_mask=True, visible_padding=1)
    _, real = tokenizer.encode(CAPTIONS, LENGTH)
    live = LiveText(NoClip(CPU), t5, trains_clip=False, apply_mask=True, autocast=contextlib.nullcontext)(CAPTIONS)
    assert live.vec.shape == (2, 0)
    assert live.txt.shape[1] == int(real.sum(dim=1).max()) + 1
    assert live.mask is not None
    assert live.mask.sum(dim=1).tolist() == (real.sum(dim=1) + 1).tolist()
    # T5 itself sees the real tokens only: the kept padding token is computed from them.
    with torch.no_grad():
        expected = model(input_ids=tokenizer.encode(CAPTIONS, LENGTH)[0], attention_mask=real).last_hidden_state
    torch.testing.assert_close(live.txt, expected[:, : live.txt.shape[1]], atol=1e-6, rtol=0)

    stored: dict[str, StoredText] = {}
    for caption in CAPTIONS:
        txt, mask = t5([caption])
        stored[caption] = StoredText(txt[0, : int(mask.sum())].detach(), torch.zeros(0))
    cached = CachedText(stored.__getitem__, CPU, apply_mask=True, live_clip=None, autocast=contextlib.nullcontext)(
        CAPTIONS
    )
    assert cached.mask is not None
    assert torch.equal(cached.mask, live.mask)
    visible = live.mask.bool()
    torch.testing.assert_close(cached.txt[visible], live.txt[visible], atol=1e-5, rtol=0)
