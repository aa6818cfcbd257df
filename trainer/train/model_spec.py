"""The `modelspec.` keys of a LoRA file (sai_model_spec 1.0.1), which interfaces show."""

from __future__ import annotations

import base64
import mimetypes
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from trainer.schema.base import UserError
from trainer.train.metadata_facts import TrainingFacts

_IMPLEMENTATIONS: Final[Mapping[str, str]] = {
    "flux": "https://github.com/black-forest-labs/flux",
    "chroma": "https://huggingface.co/lodestones/Chroma",
}


def model_spec(facts: TrainingFacts, finished_at: float) -> dict[str, str]:
    spec = facts.modelspec
    width, height = facts.datasets[0].resolution
    timestep_range = None
    if facts.min_timestep is not None or facts.max_timestep is not None:
        lowest = facts.min_timestep if facts.min_timestep is not None else 0
        highest = facts.max_timestep if facts.max_timestep is not None else 1000
        timestep_range = f"{lowest},{highest}"
    values = {
        "sai_model_spec": "1.0.1",
        "architecture": _architecture(facts),
        "implementation": _IMPLEMENTATIONS[facts.model_type],
        "implementation_version": f"fluxgui/{facts.trainer_version}",
        "title": spec.title or facts.output_name or f"LoRA@{int(facts.started_at)}",
        "resolution": f"{width}x{height}",
        "date": time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(finished_at)),
        "author": spec.author,
        "description": spec.description,
        "license": spec.license,
        "tags": spec.tags,
        "usage_hint": spec.usage_hint,
        "thumbnail": None if spec.thumbnail is None else thumbnail_data_url(spec.thumbnail),
        "merged_from": spec.merged_from,
        "trigger_phrase": spec.trigger_phrase,
        "preprocessor": spec.preprocessor,
        "is_negative_embedding": spec.is_negative_embedding,
        "timestep_range": timestep_range,
    }
    return {f"modelspec.{key}": value for key, value in values.items() if value is not None}


def _architecture(facts: TrainingFacts) -> str:
    if facts.model_type == "chroma":
        return "chroma/lora"
    return f"flux-1-{'schnell' if facts.is_schnell else 'dev'}/lora"


def thumbnail_data_url(thumbnail: str) -> str:
    """A data URL of the picture file that `thumbnail` names, or `thumbnail` itself when it is one already."""
    if thumbnail.startswith("data:"):
        return thumbnail
    path = Path(thumbnail)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"the thumbnail cannot be read: {error.strerror or error}",
            str(path),
            "Give a picture file or a data URL.",
            field="metadata_thumbnail",
        ) from error
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
