"""`python -m trainer caption`: writes captions for a folder of pictures with a vision-language model of transformers.

The model is a folder or an id on the Hugging Face hub, in any form that transformers itself knows as image-text-to-text:
Florence-2 in its native form (florence-community/Florence-2-base and its like), BLIP, GIT, LLaVA, Qwen-VL and others. Code
that comes with a model is never run.
"""

from __future__ import annotations

import argparse
import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, cast

from PIL import Image

from trainer.data.decoding import DECODE_ERRORS, load_image
from trainer.data.listing import IMAGE_SUFFIXES
from trainer.schema.base import UserError
from trainer.schema.job_folder import JobReporter, run_job
from trainer.schema.run_folder import write_atomic

Mode = Literal["missing", "overwrite", "append"]
MODES: Final = ("missing", "overwrite", "append")
DEFAULT_MODEL: Final = "florence-community/Florence-2-base"
FLORENCE_TASK: Final = "<MORE_DETAILED_CAPTION>"
CHAT_PROMPT: Final = "Describe this image in one or two sentences, as a caption."
MAX_TOKENS: Final = 200
CAPTION_SUFFIX: Final = ".txt"
BEAMS: Final = 3

Describe = Callable[[Image.Image], str]


@dataclass(frozen=True)
class Request:
    """What to caption, and how."""

    model: str
    image_dir: Path
    mode: Mode
    prompt: str
    max_tokens: int
    device: str
    suffix: str
    only: frozenset[str] | None = None
    """Names of the pictures that it is about; None for all of the folder."""


def main(arguments: Sequence[str]) -> int:
    request, job_dir = _read_arguments(arguments)
    return run_job(job_dir, lambda reporter: caption_folder(request, reporter))


def _read_arguments(arguments: Sequence[str]) -> tuple[Request, Path | None]:
    parser = argparse.ArgumentParser(
        prog="python -m trainer caption",
        description="Writes a caption beside each picture of a folder.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", default=DEFAULT_MODEL, help="folder or hub id of an image-text-to-text model")
    parser.add_argument("--image_dir", type=Path, required=True, help="folder of pictures; folders in it are left out")
    parser.add_argument(
        "--mode", choices=MODES, default="missing", help="where a picture has a caption: leave, overwrite or append"
    )
    parser.add_argument(
        "--pictures", type=Path, help="text file with the names of the pictures to look at, one a line; without, all"
    )
    parser.add_argument("--prompt", default="", help="what to ask the model; for Florence-2 a task such as <CAPTION>")
    parser.add_argument("--max_tokens", type=int, default=MAX_TOKENS, help="length of a caption, in tokens at most")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument("--caption_extension", default=CAPTION_SUFFIX, help="ending of caption files")
    parser.add_argument(
        "--job_dir", type=Path, help="folder for progress events; a file called cancel in it ends the work"
    )
    known = parser.parse_args(arguments)
    if known.max_tokens < 1:
        raise UserError(f"max_tokens is {known.max_tokens}; it must be 1 or more", "--max_tokens", exit_code=2)
    request = Request(
        known.model, known.image_dir, known.mode, known.prompt.strip(), known.max_tokens, known.device,
        known.caption_extension, None if known.pictures is None else _read_names(known.pictures),
    )  # fmt: skip
    return request, known.job_dir


def _read_names(path: Path) -> frozenset[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("this list of pictures cannot be read", str(path), str(error), exit_code=2) from None
    return frozenset(line for line in text.splitlines() if line.strip())


def caption_folder(request: Request, reporter: JobReporter) -> None:
    """Caption the pictures of a folder. Each caption is written as soon as it is there, whole or not at all.

    Raises `UserError` when the folder or the model is none, and `JobCancelled` between two pictures.
    """
    images = pictures_to_caption(request)
    if not images:
        reporter.note("Every picture has a caption already." if request.mode == "missing" else "There are no pictures.")
        reporter.progress(0, 0)
        return
    reporter.progress(0, len(images), "Loading the model")
    describe = load_model(request)
    for number, image in enumerate(images, 1):
        reporter.check_cancelled()
        try:
            picture = load_image(image)
        except DECODE_ERRORS as error:
            reporter.warning(f"{image.name}: cannot be decoded ({error}); left out")
        else:
            _write(image, describe(picture), request, reporter)
        reporter.progress(number, len(images), image.name)


def pictures_to_caption(request: Request) -> list[Path]:
    """By name; with mode "missing" only those without a caption, or with an empty one. Raises `UserError`, also when
    pictures are named that are not there."""
    try:
        files = [
            path for path in request.image_dir.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
        ]
    except OSError as error:
        what = f"this folder cannot be read ({error.strerror})"
        raise UserError(what, str(request.image_dir), "Give the folder of pictures.") from None
    if request.only is not None:
        gone = sorted(request.only - {path.name for path in files})
        if gone:
            what = f"these pictures are not in the folder: {', '.join(gone[:5])}"
            raise UserError(what, str(request.image_dir), "Check the list given as --pictures.")
        files = [path for path in files if path.name in request.only]
    chosen: list[Path] = []
    captions: set[Path] = set()
    for path in sorted(files):
        caption = path.with_suffix(request.suffix)
        # Pictures of one stem share a caption file; the first one gives it.
        if caption not in captions and (request.mode != "missing" or not (_read(caption) or b"").strip()):
            chosen.append(path)
        captions.add(caption)
    return chosen


def _write(image: Path, text: str, request: Request, reporter: JobReporter) -> None:
    """Write the caption and say what it was before, so that the page can undo it."""
    file = image.with_suffix(request.suffix)
    before = _read(file)
    old = (before or b"").decode("utf-8", errors="replace").strip()
    if not text:
        reporter.warning(f"{image.name}: the model said nothing; left as it was")
        return
    after = f"{old}, {text}" if request.mode == "append" and old else text
    write_atomic(file, after, durable=False)
    print(f"{image.name}: {after}", flush=True)
    kept = None if before is None else base64.b64encode(before).decode()
    reporter.result(image=image.name, file=file.name, before=kept, after=after)


def _read(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return None


def load_model(request: Request) -> Describe:
    """The model as a function from a picture to its caption. Raises `UserError` when it cannot be used."""
    import torch  # noqa: PLC0415 - seconds to load, and of no use when nothing is to be done
    from transformers import AutoConfig, AutoModelForImageTextToText  # noqa: PLC0415

    device = request.device if request.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device.startswith("cuda") and torch.cuda.is_bf16_supported() else torch.float32
    try:
        config = AutoConfig.from_pretrained(request.model, trust_remote_code=False)
        model: Any = AutoModelForImageTextToText.from_pretrained(
            request.model, config=config, dtype=dtype, trust_remote_code=False, use_safetensors=True
        )
        processor: Any = _load_processor(request.model, config.model_type)
        model = model.to(device).eval()
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError, ImportError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        hint = (
            f"Give a folder or an id such as {DEFAULT_MODEL}: image-text-to-text, safetensors, in the form of transformers. "
            "Models that need their own code cannot be used; of Florence-2 take those of florence-community."
        )
        raise UserError(f"the captioning model cannot be loaded: {lines[0]}", request.model, hint) from error
    model.requires_grad_(False)
    if getattr(processor, "chat_template", None):
        ask = _chat_inputs(processor, request.prompt or CHAT_PROMPT)
    else:
        default = FLORENCE_TASK if config.model_type == "florence2" else ""
        ask = _plain_inputs(
            processor, request.prompt or default, takes_text=config.model_type != "vision-encoder-decoder"
        )
    answers_only = bool(getattr(processor, "chat_template", None))

    def describe(picture: Image.Image) -> str:
        inputs: Any = ask(picture).to(device)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
        with torch.inference_mode():
            tokens = model.generate(**inputs, max_new_tokens=request.max_tokens, do_sample=False, num_beams=BEAMS)
        if answers_only and not config.is_encoder_decoder:
            tokens = tokens[:, inputs["input_ids"].shape[1] :]
        return one_line(cast("list[str]", processor.batch_decode(tokens, skip_special_tokens=True))[0])

    return describe


@dataclass(frozen=True)
class _Pair:
    """Picture processor and tokenizer of a model that has them apart."""

    pictures: Any
    tokenizer: Any

    def __call__(self, *, images: Image.Image, return_tensors: str) -> Any:
        return self.pictures(images=images, return_tensors=return_tensors)

    def batch_decode(self, tokens: object, *, skip_special_tokens: bool) -> list[str]:
        return self.tokenizer.batch_decode(tokens, skip_special_tokens=skip_special_tokens)


def _load_processor(model: str, model_type: str) -> Any:
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer  # noqa: PLC0415

    if model_type == "vision-encoder-decoder":
        pictures = AutoImageProcessor.from_pretrained(model, trust_remote_code=False)
        return _Pair(pictures, AutoTokenizer.from_pretrained(model, trust_remote_code=False))
    return AutoProcessor.from_pretrained(model, trust_remote_code=False)


def _plain_inputs(processor: Any, prompt: str, *, takes_text: bool) -> Callable[[Image.Image], Any]:
    if takes_text and prompt:
        return lambda picture: processor(images=picture, text=prompt, return_tensors="pt")
    return lambda picture: processor(images=picture, return_tensors="pt")


def _chat_inputs(processor: Any, prompt: str) -> Callable[[Image.Image], Any]:
    def ask(picture: Image.Image) -> Any:
        content = [{"type": "image", "image": picture}, {"type": "text", "text": prompt}]
        return processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )

    return ask


def one_line(text: str) -> str:
    """The model's answer as a caption: one line, no space at the ends."""
    return " ".join(text.split())
