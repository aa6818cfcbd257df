"""The trained demo of this test session: the browser test leaves its run here, and the learning tests measure it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class DemoFiles:
    """What a training of the demo has made: its LoRA and the folder of its sample pictures."""

    lora: Path
    samples: Path


@dataclass(frozen=True)
class SharedDemo:
    """A folder that is there, whole, once a run of this session was left in it. Nobody waits for it."""

    folder: Path

    def leave(self, made: DemoFiles) -> None:
        """Put copies of a completed run's files in the folder."""
        if self.find() is not None:
            return
        half_made = self.folder.with_name(f".{self.folder.name}")
        half_made.mkdir()
        shutil.copy2(made.lora, half_made / "demo.safetensors")
        shutil.copytree(made.samples, half_made / "samples")
        half_made.rename(self.folder)

    def find(self) -> DemoFiles | None:
        """None where no run was left (yet)."""
        if not self.folder.is_dir():
            return None
        return DemoFiles(self.folder / "demo.safetensors", self.folder / "samples")
