"""A LoRA file's tensors and metadata."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainer.schema.base import UserError
from trainer.schema.checkpoint_header import read_header


def read_lora_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors on the host, and the metadata. Raises `UserError` (exit code 3) for what is no whole safetensors file."""
    header = read_header(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in header.tensors}, dict(header.metadata)
    except (SafetensorError, OSError) as error:
        raise UserError(f"this file cannot be read ({error})", str(path), "Download it again.") from error
