"""The text phase: encoders loaded, captions and prompts encoded when they are to be cached, encoders freed or kept."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPTextModel, T5EncoderModel

from trainer.data.cache import Encode, TensorCache, text_key, text_requests
from trainer.data.reference_files import TEXT_ENDING, text_files
from trainer.model.t5_as_stored import load_t5xxl_as_stored
from trainer.model.weights import load_clip_l, load_t5xxl
from trainer.offload.layer_stream import LayerStream
from trainer.offload.mover import make_mover
from trainer.schema.chroma_header import VISIBLE_PADDING
from trainer.schema.folders import data_home
from trainer.schema.memory import TextPlace, text_place
from trainer.schema.memory_phases import text_batch_size
from trainer.schema.model_kinds import ModelKind
from trainer.schema.options import Options
from trainer.schema.parameter_counts import t5_count
from trainer.schema.weight_files import read_weights
from trainer.train.base_weights import base_weights_identity, merge_base_weights
from trainer.train.check import CheckedRun, trains_clip, trains_t5
from trainer.train.conditioning import (
    CachedText,
    ClipEncoder,
    ClipSource,
    LiveText,
    NoClip,
    StoredText,
    T5Encoder,
    TextSource,
)
from trainer.train.engine import Engine
from trainer.train.file_hashes import HASHES_FILE, files_identity
from trainer.train.memory_room import encode_in_room
from trainer.train.reference_caches import ReferenceCaches
from trainer.train.reporting import Reporter
from trainer.train.text_plan import TextPlan, keeps_full_text, writes_reference_text

_ROOM_FACTOR = 1.3
"""T5 itself, CLIP-L and what they compute, as a multiple of T5's weights."""


@dataclass(frozen=True)
class PreparedText:
    """Where text inputs come from, CLIP-L when it stays in memory (for its LoRA, or because nothing is cached), and T5
    when its LoRA trains."""

    source: TextSource
    clip: CLIPTextModel | None
    t5: T5EncoderModel | None = None
    add: Callable[[Sequence[str]], None] = lambda _texts: None
    """Makes sure that texts which were not known at the start can be asked for."""


def prepare_text(checked: CheckedRun, plan: TextPlan | None, engine: Engine, reporter: Reporter) -> PreparedText:
    """Loads the encoders; with a `plan` they encode all its texts and are freed."""
    options = checked.options
    reporter.phase("text")
    if plan is None:
        clip = _load_clip(checked, engine, engine.device)
        t5 = _load_t5(checked, engine, engine.device)
        if trains_t5(checked) and options.gradient_checkpointing:
            # It checkpoints in training mode only; it has no dropout that this would switch on.
            t5.model.gradient_checkpointing_enable({"use_reentrant": False})
            t5.model.train()
        return PreparedText(
            LiveText(
                clip,
                t5,
                trains_clip=trains_clip(checked),
                trains_t5=trains_t5(checked),
                apply_mask=options.apply_t5_attn_mask,
                autocast=engine.text_autocast,
            ),
            _clip_model(clip),
            t5.model if trains_t5(checked) else None,
        )

    max_length = checked.tokenizers.t5xxl_tokens
    on_disk = options.cache_text_encoder_outputs_to_disk
    # What is in memory belongs to this run alone; reading ten gigabytes to name it would be for nothing.
    identity = _identity(checked, engine, reporter) if on_disk else ""
    cache = TensorCache("text", on_disk=on_disk, warn=reporter.warning, skip_check=options.skip_cache_check)
    reference = _reference_caches(checked, identity, cache, reporter) if on_disk else None
    # Prompts go beside the pictures, too: else the encoders would be loaded again for them alone.
    spare = checked.index.items[0].path.parent
    requests = text_requests(
        {text: folder or spare for text, folder in plan.texts.items()},
        encoder=identity,
        max_length=max_length,
        apply_mask=options.apply_t5_attn_mask,
    )
    live_clip = _load_clip(checked, engine, engine.device) if trains_clip(checked) else None
    missing = cache.missing(requests)
    if missing and reference is not None:
        missing = reference.read(missing)
    if missing:
        place = _encoding_place(checked, engine, reporter)
        is_streamed = place == "streamed"
        device = torch.device("cpu") if place == "host" else engine.device
        encoder = _Encoder(checked, engine, device, reporter=reporter if is_streamed else None)

        def on_cpu() -> Encode[str]:
            encoder.close()
            return _Encoder(checked, engine, torch.device("cpu"))

        with contextlib.closing(encoder):
            cache.fill(
                missing,
                encode_in_room(encoder, None if device.type == "cpu" else on_cpu, "captions", engine, reporter),
                batch_size=text_batch_size(options, is_streamed=is_streamed),
                progress=reporter.progress,
                check_commands=reporter.check_stop,
                share=(engine.rank, engine.num_processes),
            )
    else:
        reporter.note("all captions and prompts are cached: the text encoders are not needed")
    # The device is full of the transformer by the time that one is found to be lost.
    cache.recover_with(requests, lambda: _Encoder(checked, engine, torch.device("cpu")))
    engine.free_cached_memory()
    if reference is not None and writes_reference_text(options) and engine.rank == 0:
        reference.write(options)

    def look_up(caption: str) -> StoredText:
        key = text_key(caption, encoder=identity, max_length=max_length, apply_mask=options.apply_t5_attn_mask)
        entry = cache[key]
        return StoredText(entry["txt"], entry["vec"])

    source = CachedText(
        look_up,
        engine.device,
        apply_mask=options.apply_t5_attn_mask,
        live_clip=live_clip if isinstance(live_clip, ClipEncoder) else None,
        autocast=engine.text_autocast,
    )

    def add(texts: Sequence[str]) -> None:
        new = text_requests(
            dict.fromkeys(texts, spare), encoder=identity, max_length=max_length, apply_mask=options.apply_t5_attn_mask
        )
        if missing := cache.missing(new):
            device = _device_beside_model(checked, engine)
            reporter.note(
                f"{len(missing)} new texts of sample prompts: the text encoders are loaded for this moment, on {device.type}"
            )
            with contextlib.closing(_Encoder(checked, engine, device)) as encoder:
                cache.fill(missing, encoder, batch_size=1, check_commands=reporter.check_stop)
            engine.free_cached_memory()

    return PreparedText(source, _clip_model(live_clip), add=add)


class _Encoder:
    """What fills the cache, with encoders of its own on `device`. With a `reporter`, which is told of memory that could not
    be page-locked, T5's layers lie in main memory and come to the device in turn. `close` lets go of everything.
    """

    def __init__(
        self, checked: CheckedRun, engine: Engine, device: torch.device, *, reporter: Reporter | None = None
    ) -> None:
        self._options, self._engine, self._device = checked.options, engine, device
        self._held = contextlib.ExitStack()
        self._clip: ClipSource | None = _load_clip(checked, engine, device)
        self._t5: T5Encoder | None = _load_t5(checked, engine, device, layers_on=None if reporter is None else "cpu")
        if reporter is not None:
            layers = list(self._t5.model.encoder.block)
            self._held.enter_context(LayerStream(layers, make_mover(device, reporter.warning)))

    def __call__(self, _keys: list[str], captions: list[str]) -> list[dict[str, Tensor]]:
        if self._clip is None or self._t5 is None:
            raise ValueError("the encoders are closed")
        dtype = _text_dtype(self._options)
        with torch.no_grad(), self._engine.text_autocast(self._device):
            vec = self._clip(captions)
            txt, mask = self._t5(captions)
        # What mixed precision makes of them as soon as the transformer reads them.
        vec, txt = vec.to(dtype), txt.to(dtype)
        if not self._options.apply_t5_attn_mask:
            return [{"vec": vec[row], "txt": txt[row]} for row in range(len(captions))]
        lengths = mask.sum(dim=1).tolist()
        return [{"vec": vec[row], "txt": txt[row, : int(lengths[row])]} for row in range(len(captions))]

    def close(self) -> None:
        self._held.close()
        self._clip = self._t5 = None


def _reference_caches(checked: CheckedRun, identity: str, cache: TensorCache, reporter: Reporter) -> ReferenceCaches:
    options, tokenizer, max_length = checked.options, checked.tokenizers.t5xxl, checked.tokenizers.t5xxl_tokens
    apply_mask = options.apply_t5_attn_mask
    # Chroma's text has no pooled vector, which sd-scripts' files of FLUX hold.
    items = () if options.model_type == "chroma" else (*checked.index.items, *checked.index.validation)
    files, num_without = text_files(
        items,
        key=lambda caption: text_key(caption, encoder=identity, max_length=max_length, apply_mask=apply_mask),
        max_length=max_length,
        apply_mask=apply_mask,
        dtype=_text_dtype(options),
        num_tokens=lambda caption: int(tokenizer.encode([caption], max_length)[1].sum()),
    )
    found = ReferenceCaches(
        files,
        num_without,
        cache,
        reporter,
        ending=TEXT_ENDING,
        made_from="which caption and which text encoders",
    )
    found.note_foreign(checked)
    return found


def _encoding_place(checked: CheckedRun, engine: Engine, reporter: Reporter) -> TextPlace:
    """Where captions are encoded beforehand, by what the card has room for."""
    total_bytes = engine.total_bytes()
    if total_bytes is None:
        return "device"
    place = text_place(
        checked.flux,
        checked.options,
        vram_bytes=total_bytes,
        batch_size=checked.options.train_batch_size,
        models=checked.models,
    )
    if place == "streamed":
        reporter.note("the text encoders are too large for this card: T5's layers come to it one after the other")
    elif place == "host":
        reporter.note("the text encoders are too large for this card: captions are encoded on the CPU")
    return place


def _device_beside_model(checked: CheckedRun, engine: Engine) -> torch.device:
    """Where texts are encoded in the middle of a training: on the card only if the encoders fit into what is free."""
    free_bytes = engine.free_bytes()
    wanted = t5_count(checked.models.t5) * engine.text_dtype.itemsize
    if free_bytes is None or free_bytes > wanted * _ROOM_FACTOR:
        return engine.device
    return torch.device("cpu")


def _load_clip(checked: CheckedRun, engine: Engine, device: torch.device) -> ClipSource:
    options, tokenizer = checked.options, checked.tokenizers.clip_l
    if options.model_type == "chroma":
        return NoClip(device)
    if options.clip_l is None or tokenizer is None:
        raise AssertionError("the checks demand CLIP-L")
    clip = load_clip_l(options.clip_l, engine.text_dtype, device, options.clip_l_activation)
    merge_base_weights({"te1": clip}, options)
    return ClipEncoder(clip, tokenizer, device)


def _clip_model(source: ClipSource | None) -> CLIPTextModel | None:
    return source.model if isinstance(source, ClipEncoder) else None


def _load_t5(checked: CheckedRun, engine: Engine, device: torch.device, *, layers_on: str | None = None) -> T5Encoder:
    options = checked.options
    if options.t5xxl is None:
        raise AssertionError("the checks demand T5")
    if layers_on is None and device.type == "cpu" and not trains_t5(checked) and not options.base_weights:
        t5 = load_t5xxl_as_stored(options.t5xxl, engine.text_dtype)
    else:
        t5 = load_t5xxl(options.t5xxl, engine.text_dtype, device, layers_on=layers_on)
        merge_base_weights({"te3": t5}, options)
    return T5Encoder(
        t5,
        checked.tokenizers.t5xxl,
        device,
        max_length=checked.tokenizers.t5xxl_tokens,
        apply_mask=options.apply_t5_attn_mask,
        visible_padding=VISIBLE_PADDING if options.model_type == "chroma" else 0,
    )


def _identity(checked: CheckedRun, engine: Engine, reporter: Reporter) -> str:
    """Everything that decides an encoding besides the caption."""
    options, tokenizers = checked.options, checked.tokenizers

    def of_files(path: Path, kind: ModelKind) -> str:
        return files_identity(read_weights(path, kind).files, data_home() / HASHES_FILE, reporter.check_stop)

    if options.t5xxl is None:
        raise AssertionError("the checks demand T5")
    if options.clip_l is None or tokenizers.clip_l is None:
        clip_file, clip_tokenizer = "no CLIP", f"visible padding {VISIBLE_PADDING}"
    else:
        clip_file = of_files(options.clip_l, "clip_l")
        clip_tokenizer = tokenizers.clip_l.identity
    return "|".join(
        (
            clip_file,
            of_files(options.t5xxl, "t5xxl"),
            clip_tokenizer,
            tokenizers.t5xxl.identity,
            options.clip_l_activation,
            str(engine.text_dtype),
            *base_weights_identity(options, ("te1", "te3")),
        )
    )


def _text_dtype(options: Options) -> torch.dtype:
    """The format of kept encodings."""
    return torch.float32 if keeps_full_text(options) else torch.bfloat16
