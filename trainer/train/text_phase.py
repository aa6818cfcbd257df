"""The text phase: encoders loaded, captions and prompts encoded when they are to be cached, encoders freed or kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import CLIPTextModel

from trainer.data.cache import CacheRequest, TensorCache, file_identity, text_key, text_requests
from trainer.model.weights import load_clip_l, load_t5xxl
from trainer.schema.options import Options
from trainer.train.check import CheckedRun
from trainer.train.conditioning import CachedText, ClipEncoder, LiveText, StoredText, T5Encoder, TextSource
from trainer.train.engine import Engine
from trainer.train.reporting import Reporter


@dataclass(frozen=True)
class PreparedText:
    """Where text inputs come from, and CLIP-L when it stays in memory (for its LoRA, or because nothing is cached)."""

    source: TextSource
    clip: CLIPTextModel | None


def trains_clip(options: Options) -> bool:
    """CLIP-L gets a LoRA unless the options leave it out."""
    return not options.network_train_unet_only


def prepare_text(checked: CheckedRun, engine: Engine, reporter: Reporter) -> PreparedText:
    """Loads the encoders and, with `cache_text_encoder_outputs`, encodes every caption and prompt and frees them."""
    options = checked.options
    if options.clip_l is None or options.t5xxl is None:
        raise AssertionError("the checks demand both text encoders")
    reporter.phase("text")
    if not options.cache_text_encoder_outputs:
        clip = _load_clip(options, engine)
        return PreparedText(
            LiveText(
                _clip_encoder(clip, checked, engine),
                _t5_encoder(checked, engine),
                trains_clip=trains_clip(options),
                apply_mask=options.apply_t5_attn_mask,
                autocast=engine.autocast,
            ),
            clip,
        )

    max_length = checked.tokenizers.t5xxl_tokens
    on_disk = options.cache_text_encoder_outputs_to_disk
    identity = _identity(checked, engine)
    cache = TensorCache("text", on_disk=on_disk, warn=reporter.warning)
    requests = text_requests(
        checked.index,
        encoder=identity,
        max_length=max_length,
        apply_mask=options.apply_t5_attn_mask,
        more=prompt_texts(checked),
    )
    if on_disk:
        # Prompts go beside the pictures, too: else the encoders would be loaded again for them alone.
        folder = checked.index.items[0].path.parent
        requests = [request if request.folder else replace(request, folder=folder) for request in requests]
    clip = _load_clip(options, engine) if trains_clip(options) else None
    if missing := cache.missing(requests):
        _encode(missing, cache, clip, checked, engine, reporter)
    else:
        reporter.note("all captions and prompts are cached: the text encoders are not needed")
    engine.free_cached_memory()

    def look_up(caption: str) -> StoredText:
        key = text_key(caption, encoder=identity, max_length=max_length, apply_mask=options.apply_t5_attn_mask)
        entry = cache[key]
        return StoredText(entry["txt"], entry["vec"])

    source = CachedText(
        look_up,
        engine.device,
        apply_mask=options.apply_t5_attn_mask,
        live_clip=None if clip is None else _clip_encoder(clip, checked, engine),
        autocast=engine.autocast,
    )
    return PreparedText(source, clip)


def prompt_texts(checked: CheckedRun) -> list[str]:
    """Everything that sampling has encoded."""
    texts: list[str] = []
    for prompt in checked.prompts:
        texts.append(prompt.prompt)
        if prompt.uses_negative_prompt:
            texts.append(prompt.negative_prompt)
    return texts


def _encode(
    missing: Sequence[CacheRequest[str]],
    cache: TensorCache,
    clip: CLIPTextModel | None,
    checked: CheckedRun,
    engine: Engine,
    reporter: Reporter,
) -> None:
    """Fills the cache. The encoders live no longer than this call, except a CLIP-L that was handed in."""
    options = checked.options
    encode_clip = _clip_encoder(clip or _load_clip(options, engine), checked, engine)
    encode_t5 = _t5_encoder(checked, engine)

    def encode(_keys: list[str], captions: list[str]) -> list[dict[str, Tensor]]:
        with torch.no_grad(), engine.autocast():
            vec = encode_clip(captions)
            txt, mask = encode_t5(captions)
        if not options.apply_t5_attn_mask:
            return [{"vec": vec[row], "txt": txt[row]} for row in range(len(captions))]
        lengths = mask.sum(dim=1).tolist()
        return [{"vec": vec[row], "txt": txt[row, : int(lengths[row])]} for row in range(len(captions))]

    cache.fill(
        missing,
        encode,
        batch_size=options.text_encoder_batch_size or options.train_batch_size,
        progress=reporter.progress,
        check_commands=reporter.check_stop,
    )


def _load_clip(options: Options, engine: Engine) -> CLIPTextModel:
    if options.clip_l is None:
        raise AssertionError("the checks demand CLIP-L")
    return load_clip_l(options.clip_l, engine.dtype, engine.device, options.clip_l_activation)


def _clip_encoder(clip: CLIPTextModel, checked: CheckedRun, engine: Engine) -> ClipEncoder:
    return ClipEncoder(clip, checked.tokenizers.clip_l, engine.device)


def _t5_encoder(checked: CheckedRun, engine: Engine) -> T5Encoder:
    options = checked.options
    if options.t5xxl is None:
        raise AssertionError("the checks demand T5")
    return T5Encoder(
        load_t5xxl(options.t5xxl, engine.dtype, engine.device),
        checked.tokenizers.t5xxl,
        engine.device,
        max_length=checked.tokenizers.t5xxl_tokens,
        apply_mask=options.apply_t5_attn_mask,
    )


def _identity(checked: CheckedRun, engine: Engine) -> str:
    """Everything that decides an encoding besides the caption."""
    options, tokenizers = checked.options, checked.tokenizers
    if options.clip_l is None or options.t5xxl is None:
        raise AssertionError("the checks demand both text encoders")
    return "|".join(
        (
            file_identity(options.clip_l),
            file_identity(options.t5xxl),
            tokenizers.clip_l.identity,
            tokenizers.t5xxl.identity,
            options.clip_l_activation,
            str(engine.dtype),
        )
    )
