"""The text phase: encoders loaded, captions and prompts encoded when they are to be cached, encoders freed or kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import CLIPTextModel

from trainer.data.cache import CacheRequest, TensorCache, files_identity, text_key, text_requests
from trainer.model.weights import load_clip_l, load_t5xxl
from trainer.schema.memory import text_encoders_fit
from trainer.schema.options import Options
from trainer.schema.weight_files import read_weights
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
        clip = _load_clip(options, engine, engine.device)
        return PreparedText(
            LiveText(
                ClipEncoder(clip, checked.tokenizers.clip_l, engine.device),
                _load_t5(checked, engine, engine.device),
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
    clip = _load_clip(options, engine, engine.device) if trains_clip(options) else None
    if missing := cache.missing(requests):
        _encode(missing, cache, checked, engine, reporter)
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
        live_clip=None if clip is None else ClipEncoder(clip, checked.tokenizers.clip_l, engine.device),
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
    checked: CheckedRun,
    engine: Engine,
    reporter: Reporter,
) -> None:
    """Fills the cache. The encoders live no longer than this call."""
    options = checked.options
    device = _encoding_device(checked, engine, reporter)
    encode_clip = ClipEncoder(_load_clip(options, engine, device), checked.tokenizers.clip_l, device)
    encode_t5 = _load_t5(checked, engine, device)

    def encode(_keys: list[str], captions: list[str]) -> list[dict[str, Tensor]]:
        with torch.no_grad(), engine.autocast(device):
            vec = encode_clip(captions)
            txt, mask = encode_t5(captions)
        if not options.apply_t5_attn_mask:
            return [{"vec": vec[row], "txt": txt[row]} for row in range(len(captions))]
        lengths = mask.sum(dim=1).tolist()
        return [{"vec": vec[row], "txt": txt[row, : int(lengths[row])]} for row in range(len(captions))]

    cache.fill(
        missing,
        encode,
        batch_size=_batch_size(options),
        progress=reporter.progress,
        check_commands=reporter.check_stop,
    )


def _encoding_device(checked: CheckedRun, engine: Engine, reporter: Reporter) -> torch.device:
    """Where captions are encoded beforehand: the CPU when the encoders are too large for the card."""
    total_bytes = engine.total_bytes()
    if total_bytes is None or text_encoders_fit(
        checked.flux,
        checked.options,
        vram_bytes=total_bytes,
        batch_size=_batch_size(checked.options),
        models=checked.models,
    ):
        return engine.device
    reporter.note("the text encoders are too large for this card: captions are encoded on the CPU")
    return torch.device("cpu")


def _batch_size(options: Options) -> int:
    return options.text_encoder_batch_size or options.train_batch_size


def _load_clip(options: Options, engine: Engine, device: torch.device) -> CLIPTextModel:
    if options.clip_l is None:
        raise AssertionError("the checks demand CLIP-L")
    return load_clip_l(options.clip_l, engine.dtype, device, options.clip_l_activation)


def _load_t5(checked: CheckedRun, engine: Engine, device: torch.device) -> T5Encoder:
    options = checked.options
    if options.t5xxl is None:
        raise AssertionError("the checks demand T5")
    return T5Encoder(
        load_t5xxl(options.t5xxl, engine.dtype, device),
        checked.tokenizers.t5xxl,
        device,
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
            files_identity(read_weights(options.clip_l, "clip_l").files),
            files_identity(read_weights(options.t5xxl, "t5xxl").files),
            tokenizers.clip_l.identity,
            tokenizers.t5xxl.identity,
            options.clip_l_activation,
            str(engine.dtype),
        )
    )
