"""Pictures from prompts with LoRA files at several strengths: each model is loaded once, one after the other.

The text encoders come first and are freed, then the transformer, then the autoencoder for each picture.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import psutil
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from trainer.lora.runtime import LoraLayers, RuntimeLoras, read_layers
from trainer.model.autoencoder import AutoEncoder
from trainer.model.chroma import Chroma
from trainer.model.transformer import Transformer, load_transformer
from trainer.model.weights import load_clip_l, load_t5xxl
from trainer.offload.block_swap import BlockSwap, swapped_prefixes
from trainer.offload.mover import make_mover
from trainer.schema.base import Problem
from trainer.schema.chroma_header import VISIBLE_PADDING, TransformerParams
from trainer.schema.cli import ParsedCommand
from trainer.schema.file_checks import check_files
from trainer.schema.folders import data_home
from trainer.schema.job_folder import JobReporter
from trainer.schema.memory_phases import CUDA_CONTEXT_BYTES
from trainer.schema.memory_plan import plan_for
from trainer.schema.options import Options
from trainer.schema.parameter_counts import OtherModels, t5_count
from trainer.schema.swap_counts import chosen_swap
from trainer.train.conditioning import ClipEncoder, LiveText, NoClip, T5Encoder, TextInputs
from trainer.train.device_checks import check_device
from trainer.train.engine import Engine
from trainer.train.findings import Findings
from trainer.train.latents_phase import autoencoder_dtype, load_ae
from trainer.train.model_checks import Tokenizers, check_models, check_tokenizers, fetch_models, read_flux
from trainer.train.network_setup import asked_storage
from trainer.train.objective import predict_velocity
from trainer.train.prompt_file import texts_of
from trainer.train.reporting import Reporter
from trainer.train.sample_maker import CHROMA_GUIDANCE
from trainer.train.sample_prompts import SamplePrompt
from trainer.train.sampling import draw_sample, save_picture

_LOCK_POLL_SECONDS = 0.5
_ROOM_FACTOR = 1.3
"""T5 with what it computes, as a multiple of its weights."""
_TRAINING_ONLY = ("output_dir", "dataset_config", "train_data_dir", "in_json", "sample_prompts", "network_weights")

Strengths: TypeAlias = "tuple[tuple[int, float], ...]"
"""Which files are in use, by index, and how strongly; none for the base model."""


@dataclass(frozen=True)
class Picture:
    """One picture to make. `cells` are the places of the grid that it fills, as facts for whoever shows it."""

    prompt: SamplePrompt
    prompt_index: int
    seed: int
    strengths: Strengths
    cells: tuple[dict[str, object], ...]


def plan_pictures(
    prompts: Sequence[SamplePrompt],
    seeds: Sequence[int],
    loras: Sequence[tuple[int, float]],
    checkpoints: Sequence[int],
    grid: Sequence[float],
) -> list[Picture]:
    """Every prompt with every seed, checkpoint and strength, in the order in which a grid is read.

    `loras` are used together in every picture, multiplied with the grid's strength; `checkpoints` take turns in being
    added to them. The same picture is made once: at strength 0 all checkpoints are the base model.
    """
    pictures: dict[tuple[int, int, Strengths], Picture] = {}
    for index, prompt in enumerate(prompts):
        for seed in (prompt.seed,) if prompt.seed is not None else seeds:
            for checkpoint in checkpoints or (None,):
                for strength in grid:
                    used = [(number, own * strength) for number, own in loras]
                    used += [] if checkpoint is None else [(checkpoint, strength)]
                    strengths = tuple((number, value) for number, value in used if value != 0)
                    cell: dict[str, object] = {"prompt": index, "seed": seed, "strength": strength}
                    cell["checkpoint"] = checkpoint
                    key = (index, seed, strengths)
                    known = pictures.get(key) or Picture(prompt, index, seed, strengths, ())
                    pictures[key] = replace(known, cells=(*known.cells, cell))
    return list(pictures.values())


def generate(
    command: ParsedCommand, files: Sequence[Path], pictures: Sequence[Picture], folder: Path, reporter: JobReporter
) -> list[Path]:
    """Makes the pictures in `folder` and gives their paths. `command` names models, precision, swap and device.

    Raises `UserError` with every problem of models and LoRAs before anything is loaded.
    """
    options, findings = command.options, Findings(_relevant(command.problems))
    quiet = Reporter()
    for problem in _relevant(check_files(options)):
        findings.add(problem)
    check_device(options, findings)
    if not findings.problems:
        fetch_models(options, findings, quiet)
    flux = None if findings.has("pretrained_model_name_or_path") else read_flux(options, findings)
    models = None if flux is None else check_models(options, flux, findings)
    tokenizers = check_tokenizers(options, flux, findings)
    loras = [found for path in files if (found := findings.attempt(lambda path=path: read_layers(path))) is not None]
    findings.raise_if_any()
    if flux is None or models is None or tokenizers is None:
        raise AssertionError("a check failed without saying why")
    engine = Engine.start(options)
    with _turn_on_device(str(engine.device), reporter):
        texts = _encode(options, models, tokenizers, engine, loras, pictures, reporter)
        engine.free_cached_memory()
        options = _with_counted_swap(options, flux, models, engine, pictures, reporter)
        return _draw(options, flux, engine, loras, pictures, texts, folder, reporter)


def _with_counted_swap(
    options: Options,
    flux: TransformerParams,
    models: OtherModels,
    engine: Engine,
    pictures: Sequence[Picture],
    reporter: JobReporter,
) -> Options:
    """A number for `auto`: what a training at the largest picture would need, which is more than the picture itself."""
    if options.blocks_to_swap != "auto":
        return options
    free_bytes, total_bytes = engine.free_bytes(), engine.total_bytes()
    count = 0
    if free_bytes is not None and total_bytes is not None:
        plan = plan_for(
            options,
            min(total_bytes, free_bytes + CUDA_CONTEXT_BYTES),
            psutil.virtual_memory().total,
            flux=flux,
            models=models,
            size=max(((p.prompt.width, p.prompt.height) for p in pictures), key=lambda size: size[0] * size[1]),
            batch_size=1,
            num_pictures=1,
        )
        count = plan.choice.blocks_to_swap
    reporter.note(f"blocks_to_swap auto is {count}")
    return options.model_copy(update={"blocks_to_swap": count})


def _relevant(problems: Sequence[Problem]) -> list[Problem]:
    return [problem for problem in problems if problem.field not in _TRAINING_ONLY]


@contextlib.contextmanager
def _turn_on_device(device: str, reporter: JobReporter) -> Generator[None]:
    """Trainings of the page have the device one at a time; pictures wait for their turn like them."""
    folder = data_home() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(str(folder / f"device-{device.replace(':', '-')}.lock"))
    has_waited = False
    while True:
        try:
            lock.acquire(timeout=_LOCK_POLL_SECONDS)
            break
        except Timeout:
            if not has_waited:
                reporter.note("waiting: a training uses this device")
            has_waited = True
            reporter.check_cancelled()
    try:
        yield
    finally:
        lock.release()


# ---------------------------------------------------------------------------------------------------------------- texts

_Texts: TypeAlias = "dict[tuple[Strengths, str], TextInputs]"


def _encode(
    options: Options,
    models: OtherModels,
    tokenizers: Tokenizers,
    engine: Engine,
    loras: Sequence[LoraLayers],
    pictures: Sequence[Picture],
    reporter: JobReporter,
) -> _Texts:
    """The encoding of every text, on the host, once for each way in which LoRAs change the encoders."""
    reporter.note("reading the text encoders")
    reporter.check_cancelled()
    assert options.t5xxl is not None
    device = engine.device
    free_bytes = engine.free_bytes()
    if free_bytes is not None and free_bytes < t5_count(models.t5) * engine.text_dtype.itemsize * _ROOM_FACTOR:
        device = torch.device("cpu")
    t5_model = load_t5xxl(options.t5xxl, engine.text_dtype, device)
    runtimes = [RuntimeLoras(t5_model, "te3", loras, device)]
    clip: ClipEncoder | NoClip = NoClip(device)
    if options.model_type != "chroma":
        assert options.clip_l is not None
        assert tokenizers.clip_l is not None
        clip_model = load_clip_l(options.clip_l, engine.text_dtype, device, options.clip_l_activation)
        runtimes.append(RuntimeLoras(clip_model, "te1", loras, device))
        clip = ClipEncoder(clip_model, tokenizers.clip_l, device)
    t5 = T5Encoder(
        t5_model,
        tokenizers.t5xxl,
        device,
        max_length=tokenizers.t5xxl_tokens,
        apply_mask=options.apply_t5_attn_mask,
        visible_padding=VISIBLE_PADDING if options.model_type == "chroma" else 0,
    )
    source = LiveText(
        clip,
        t5,
        trains_clip=False,
        apply_mask=options.apply_t5_attn_mask,
        autocast=lambda: engine.text_autocast(device),
    )
    wanted = {
        (_on_text(picture.strengths, loras), text): None for picture in pictures for text in texts_of([picture.prompt])
    }
    texts: _Texts = {}
    for number, (strengths, text) in enumerate(wanted):
        reporter.progress(number, len(wanted), "texts")
        for runtime in runtimes:
            runtime.use(dict(strengths))
        with torch.no_grad():
            texts[strengths, text] = _moved(source([text]), torch.device("cpu"))
    return texts


def _on_text(strengths: Strengths, loras: Sequence[LoraLayers]) -> Strengths:
    """The part of `strengths` that a text encoder notices."""
    return tuple((index, value) for index, value in strengths if loras[index].has("te1") or loras[index].has("te3"))


def _moved(text: TextInputs, device: torch.device) -> TextInputs:
    return TextInputs(text.txt.to(device), text.vec.to(device), None if text.mask is None else text.mask.to(device))


# ------------------------------------------------------------------------------------------------------------- pictures


def _draw(
    options: Options,
    flux: TransformerParams,
    engine: Engine,
    loras: Sequence[LoraLayers],
    pictures: Sequence[Picture],
    texts: _Texts,
    folder: Path,
    reporter: JobReporter,
) -> list[Path]:
    reporter.note("reading the model")
    assert options.pretrained_model_name_or_path is not None
    num_swapped = chosen_swap(options.blocks_to_swap)
    on_host = swapped_prefixes(flux, num_swapped)
    model = load_transformer(
        options.pretrained_model_name_or_path,
        options.model_type,
        engine.dtype,
        engine.device,
        device_of=lambda name: "cpu" if name.startswith(on_host) else engine.device,
        storage=asked_storage(options, flux, engine.device),
    )
    runtime = RuntimeLoras(model, "unet", loras, engine.device)
    for path, unknown in runtime.unknown.items():
        if unknown:
            more = ", ..." if len(unknown) > 3 else ""
            reporter.warning(
                f"{path.name}: {len(unknown)} layers are not in this model: {', '.join(unknown[:3])}{more}"
            )
    swap: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    if num_swapped:
        blocks = list(model.double_blocks), list(model.single_blocks)
        swap = BlockSwap(*blocks, num_swapped, make_mover(engine.device, reporter.warning))
    autoencoder = load_ae(options, engine, torch.device("cpu"))
    total = sum(picture.prompt.num_steps for picture in pictures)
    done = 0
    made: list[Path] = []
    with swap:
        for number, picture in enumerate(pictures):
            runtime.use(dict(picture.strengths))
            on_text = _on_text(picture.strengths, loras)
            text, *negative = (_moved(texts[on_text, words], engine.device) for words in texts_of([picture.prompt]))
            path = folder / _file_name(number, picture, loras)
            image = draw_sample(
                _with_guidance(picture.prompt, model),
                seed=picture.seed,
                predict=_Predict(model, engine),
                decode=_Decode(autoencoder, engine),
                text=text,
                negative_text=negative[0] if negative else None,
                is_schnell=model.params.is_schnell,
                device=engine.device,
                progress=lambda step, _steps, before=done, at=number: reporter.progress(
                    before + step, total, f"picture {at + 1} of {len(pictures)}"
                ),
                check_commands=reporter.check_cancelled,
            )
            save_picture(path, image)
            made.append(path)
            reporter.result(path, text=picture.prompt.prompt, seed=picture.seed, cells=list(picture.cells))
            done += picture.prompt.num_steps
    return made


@dataclass(frozen=True)
class _Predict:
    model: Transformer
    engine: Engine

    def __call__(self, noisy: Tensor, timesteps: Tensor, text: TextInputs, guidance_scale: float, /) -> Tensor:
        with self.engine.autocast():
            return predict_velocity(self.model, noisy, timesteps, text, guidance_scale)


@dataclass(frozen=True)
class _Decode:
    """The autoencoder is on the device for just as long as it decodes."""

    autoencoder: AutoEncoder
    engine: Engine

    def __call__(self, latents: Tensor) -> Tensor:
        try:
            self.autoencoder.to(self.engine.device)
            with self.engine.autocast(autoencoder_dtype(self.autoencoder)):
                return self.autoencoder.decode(latents)
        finally:
            self.autoencoder.to("cpu")


def _with_guidance(prompt: SamplePrompt, model: Transformer) -> SamplePrompt:
    if prompt.guidance_scale is None and isinstance(model, Chroma):
        return replace(prompt, guidance_scale=CHROMA_GUIDANCE)
    return prompt


def _file_name(number: int, picture: Picture, loras: Sequence[LoraLayers]) -> str:
    used = "_".join(f"{loras[index].path.stem}-{value:g}" for index, value in picture.strengths) or "base"
    return f"{number:03d}_{picture.seed}_{re.sub(r'[^A-Za-z0-9._-]+', '-', used)[:80]}.png"
