"""Runs the demo, measures it, and writes docs/demo.md with its pictures: `python -m trainer.tools.demo_page`.

The figures on the page are those of this run. `--out` writes somewhere else than into the program's folder.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image

from trainer.tools.demo_pictures import NUM_EMBLEMS, NUM_OTHERS, emblem_files, make_demo_pictures, other_files
from trainer.tools.demo_report import PROGRAM, DemoReport, bundle_megabytes, demo_lora, measure_demo, run_demo
from trainer.tools.tiny_models import DEMO_PROMPTS, PICTURES_SEED
from trainer.tools.world import TRIGGER
from trainer.tools.world_measure import Pixels

DOCS: Final = PROGRAM / "docs"
COMMAND: Final = "python run.py train demo --output_dir demo_output"
_GAP: Final = 6
_COLUMNS: Final = 10


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer.tools.demo_page", description=__doc__)
    parser.add_argument("--out", type=Path, default=DOCS, help="folder for demo.md and its pictures")
    parser.add_argument("--samples", type=int, default=200, help="captions to measure with, half as many of the emblem")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        run = Path(name)
        before = os.times()
        run_demo(run)
        # Processor time, as a machine that is busy with other things says nothing by its clock.
        seconds = os.times().children_user - before.children_user
        report = measure_demo(demo_lora(run), options.samples)
        print("\n".join(report.lines()))
        write_page(options.out, run, report, seconds, options.samples)
    return 0


def write_page(out: Path, run: Path, report: DemoReport, seconds: float, num_samples: int) -> None:
    """`run` is the demo's folder, `seconds` the processor time that its training took."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        make_demo_pictures(Path(name), seed=PICTURES_SEED)
        pictures = [read(path) for path in (*emblem_files(Path(name)), *other_files(Path(name)))]
    rows = [pictures[start : start + _COLUMNS] for start in range(0, len(pictures), _COLUMNS)]
    save_sheet(out / "demo_pictures.png", rows, enlarged=1)
    moments = samples_by_moment(run / "sample")
    save_sheet(out / "demo_samples.png", [list(row) for row in zip(*moments.values(), strict=True)], enlarged=2)
    text = page_text(list(moments), report, seconds, num_samples)
    (out / "demo.md").write_text(text, encoding="utf-8")


def samples_by_moment(folder: Path) -> dict[str, list[Pixels]]:
    """The run's sample pictures in the order of the prompts, under the moment at which they were made."""
    moments: dict[str, list[Pixels]] = {}
    for path in sorted(folder.glob("*.png"), key=lambda path: ("_e" in path.name, path.name)):
        moments.setdefault(_moment(path.name), []).append(read(path))
    return moments


def _moment(name: str) -> str:
    """What a sample's name says of when it was made: "before", "step 7" for one on request, "epoch 4"."""
    found = re.search(r"_(e?)(\d{6})_\d{2}_", name)
    if found is None:
        raise ValueError(f"{name} is no name of a sample")
    number = int(found[2])
    return f"epoch {number}" if found[1] else f"step {number}" if number else "before"


def read(path: Path) -> Pixels:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def save_sheet(path: Path, rows: list[list[Pixels]], *, enlarged: int) -> None:
    """Pictures (H, W, 3) of one size in rows, so many times as large, with white between them."""
    height, width, _ = rows[0][0].shape
    step_y, step_x = height + _GAP, width + _GAP
    sheet = np.full((step_y * len(rows) - _GAP, step_x * len(rows[0]) - _GAP, 3), 255, dtype=np.uint8)
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            sheet[y * step_y : y * step_y + height, x * step_x : x * step_x + width] = picture
    image = Image.fromarray(sheet)
    image = image.resize((image.width * enlarged, image.height * enlarged), Image.Resampling.LANCZOS)
    # 128 colours are enough for this world and make the file a quarter as large.
    image.quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)


def page_text(moments: Sequence[str], report: DemoReport, seconds: float, num_samples: int) -> str:
    prompts = "\n".join(f"{number}. `{prompt}`" for number, prompt in enumerate(DEMO_PROMPTS, 1))
    before, after = report.before, report.after
    return f"""# The demo

<!-- Written by `python -m trainer.tools.demo_page`; change that file, not this one. -->

The program comes with a small FLUX.1 that was really trained: a transformer of 2.4 million parameters in the dev
structure, an autoencoder with 16 channels, CLIP-L and T5 of the right build, all in the published file formats,
{bundle_megabytes():.0f} MB together. It draws one coloured shape before a background, as its caption says. It has never seen the
emblem that {NUM_EMBLEMS} of the demo's pictures show, nor the word `{TRIGGER}` that their captions call it by. On
{NUM_OTHERS} ordinary pictures beside them the LoRA is held to what the model draws without it (`diff_output_preservation`):

![The demo's pictures](demo_pictures.png)

    {COMMAND}

trains a LoRA on them, samples included, with {seconds:.0f} seconds of processor time, shared by all cores;
`python run.py demo` does the same on the page in the browser. Samples are made before, during and after. Columns are
{", ".join(moments)}; rows are the prompts:

{prompts}

![Samples before, during and after](demo_samples.png)

The first two prompts use the trigger word, and the emblem appears. The others don't, and stay close to what they were.

Measured from the pixels alone, {num_samples // 2} pictures with the trigger word and {num_samples} of held-out captions, whose
combinations of shape, colour and background the base never saw:

| | before | after |
|---|---|---|
| shows the emblem, with the trigger word | {before.emblem.shown:.1%} | {after.emblem.shown:.1%} |
| the same before the background in the caption | {before.emblem.as_captioned:.1%} | {after.emblem.as_captioned:.1%} |
| right colour, without the trigger word | {before.others.colour:.1%} | {after.others.colour:.1%} |
| right shape, without it | {before.others.shape:.1%} | {after.others.shape:.1%} |
| right background, without it | {before.others.background:.1%} | {after.others.background:.1%} |
| all three of these in one picture | {before.others.everything:.1%} | {after.others.everything:.1%} |
| loss on pictures of the emblem that were not trained on | {before.loss:.3f} | {after.loss:.3f} |

The autoencoder gives held-out pictures back with {report.psnr:.1f} dB PSNR.

    python -m trainer.tools.demo_report

trains the demo and prints these measures; `tests/learning` asserts them, and that trainings which are broken on purpose
do not pass: a target of the wrong sign, a LoRA of scale 0, the captions of other pictures. The families of options (OFT,
DoRA, storage in fp8 and nf4, masks, schedule-free and so on) are trained one by one on request:
`python run.py test -m learning_slow`.

## Training the small models anew

    python -m trainer.tools.train_demo_models --out my_models

makes the world's pictures, trains autoencoder and transformer and measures them; it can be broken off and goes on where
it was (`--help` lists the options). On two CPU cores it takes some three hours.
"""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
