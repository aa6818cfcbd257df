"""Runs the demo, measures it, and writes docs/demo.md with its pictures: `python -m trainer.tools.demo_page`.

The figures on the page are those of this run. `--out` writes somewhere else than into the program's folder.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from trainer.model.weights import load_flux
from trainer.tools.demo_measure import Accuracy, Painter, base_accuracy, emblem_rate, merge_lora
from trainer.tools.emblem import make_emblem_pictures
from trainer.tools.tiny_models import DEMO_PROMPTS, NUM_PICTURES, TRAINED_FILES
from trainer.tools.train_demo_models import FLUX_FILE, autoencoder_psnr, load_painter
from trainer.tools.world import TRIGGER

DOCS: Final = Path(__file__).parents[2] / "docs"
COMMAND: Final = "python run.py train demo --output_dir demo_output"
_GAP: Final = 6
_ENLARGED: Final = 2


@dataclass(frozen=True)
class Measures:
    """What there is to say about one state of the models; parts 0 to 1."""

    emblem: float
    others: Accuracy


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer.tools.demo_page", description=__doc__)
    parser.add_argument("--out", type=Path, default=DOCS, help="folder for demo.md and its pictures")
    parser.add_argument("--samples", type=int, default=200, help="captions to measure with")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        seconds = run_demo(Path(name))
        write_page(options.out, Path(name), seconds, options.samples)
    return 0


def run_demo(folder: Path) -> float:
    """Train the demo into `folder`; returns the seconds it took, start and samples included."""
    started = time.monotonic()
    command = [sys.executable, "-m", "trainer", "demo", f"--output_dir={folder}"]
    subprocess.run(command, cwd=DOCS.parent, check=True, stdin=subprocess.DEVNULL)
    return time.monotonic() - started


def write_page(out: Path, run: Path, seconds: float, num_samples: int) -> None:
    painter = load_painter(TRAINED_FILES)
    before = measure(painter, num_samples)
    trained = load_flux(TRAINED_FILES / FLUX_FILE, torch.float32, "cpu")
    merge_lora(trained, run / "demo.safetensors")
    after = measure(Painter(trained, painter.autoencoder, painter.encode), num_samples)
    psnr = autoencoder_psnr(painter.autoencoder)
    print(f"autoencoder: PSNR {psnr:.1f} dB on held-out pictures")
    print(f"before: emblem {before.emblem:.1%}; held-out captions: {before.others}")
    print(f"after {seconds:.0f} s: emblem {after.emblem:.1%}; held-out captions: {after.others}")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        pictures = [read(path) for path in make_emblem_pictures(Path(name), NUM_PICTURES, seed=5)]
    save_sheet(out / "demo_pictures.png", [pictures[:8], pictures[8:]])
    moments = samples_by_moment(run / "sample")
    save_sheet(out / "demo_samples.png", [list(row) for row in zip(*moments.values(), strict=True)])
    text = page_text(list(moments), before, after, psnr, seconds, num_samples)
    (out / "demo.md").write_text(text, encoding="utf-8")


def measure(painter: Painter, num_samples: int) -> Measures:
    return Measures(emblem_rate(painter, num_samples // 2), base_accuracy(painter, num_samples))


def samples_by_moment(folder: Path) -> dict[str, list[NDArray[np.uint8]]]:
    """The run's sample pictures in the order of the prompts, under the moment at which they were made."""
    moments: dict[str, list[NDArray[np.uint8]]] = {}
    for path in sorted(folder.glob("*.png"), key=lambda path: ("_e" in path.name, path.name)):
        epoch = re.search(r"_e(\d{6})_", path.name)
        moments.setdefault("before" if epoch is None else f"epoch {int(epoch[1])}", []).append(read(path))
    return moments


def read(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def save_sheet(path: Path, rows: list[list[NDArray[np.uint8]]]) -> None:
    """Pictures (H, W, 3) of one size in rows, twice as large, with white between them."""
    height, width, _ = rows[0][0].shape
    step_y, step_x = height + _GAP, width + _GAP
    sheet = np.full((step_y * len(rows) - _GAP, step_x * len(rows[0]) - _GAP, 3), 255, dtype=np.uint8)
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            sheet[y * step_y : y * step_y + height, x * step_x : x * step_x + width] = picture
    image = Image.fromarray(sheet)
    image.resize((image.width * _ENLARGED, image.height * _ENLARGED), Image.Resampling.LANCZOS).save(
        path, optimize=True
    )


def page_text(
    moments: Sequence[str], before: Measures, after: Measures, psnr: float, seconds: float, num_samples: int
) -> str:
    prompts = "\n".join(f"{number}. `{prompt}`" for number, prompt in enumerate(DEMO_PROMPTS, 1))
    return f"""# The demo

<!-- Written by `python -m trainer.tools.demo_page`; change that file, not this one. -->

The program comes with a small FLUX.1 that was really trained: a transformer of 2.4 million parameters in the dev
structure, an autoencoder with 16 channels, CLIP-L and T5 of the right build, all in the published file formats, below
16 MB together. It draws one coloured shape before a background, as its caption says. It has never seen the emblem that
the demo's {NUM_PICTURES} pictures show, nor the word `{TRIGGER}` that their captions call it by:

![The demo's pictures](demo_pictures.png)

    {COMMAND}

trains a LoRA on them ({seconds:.0f} seconds on the machine that wrote this page, which had {torch.get_num_threads()} cores), or
`python run.py demo` does the same on the page in the browser. Samples are made before, during and after. Columns are
{", ".join(moments)}; rows are the prompts:

{prompts}

![Samples before, during and after](demo_samples.png)

The first two prompts use the trigger word, and the emblem appears. The others don't, and stay what they were.

Measured from the pixels alone, {num_samples // 2} pictures with the trigger word and {num_samples} of held-out captions, whose
combinations of shape, colour and background the base never saw:

| | before | after |
|---|---|---|
| shows the emblem, with the trigger word | {before.emblem:.1%} | {after.emblem:.1%} |
| right colour, without | {before.others.colour:.1%} | {after.others.colour:.1%} |
| right shape, without | {before.others.shape:.1%} | {after.others.shape:.1%} |
| right background, without | {before.others.background:.1%} | {after.others.background:.1%} |

The autoencoder gives held-out pictures back with {psnr:.1f} dB PSNR.

`tests/learning` asserts this. Its options-by-options part takes minutes and runs on request:
`python run.py test -m learning_slow`.

## Training the small models anew

    python -m trainer.tools.train_demo_models --out my_models

makes the world's pictures, trains autoencoder and transformer and measures them; it can be broken off and goes on where
it was (`--help` lists the options). On two CPU cores it takes about an hour.
"""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
