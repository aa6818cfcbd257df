"""What a command costs before there is anything to train: torch, which takes seconds to load, is not imported for it."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.tiny import TinyModels

ROOT = Path(__file__).parents[2]
NUM_PICTURES = 1000
HEAVY = ("torch", "transformers", "huggingface_hub", "accelerate")
PROGRAM = f"""
import json, sys
from trainer.__main__ import main
code = main(sys.argv[1:])
print(json.dumps([code, [name for name in {HEAVY} if name in sys.modules]]))
"""


@pytest.fixture(scope="module")
def many_pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many") / "1_cat"
    folder.mkdir()
    for number in range(NUM_PICTURES):
        Image.new("RGB", (64, 64), (number % 256, number // 256, 0)).save(folder / f"{number:04}.png")
        (folder / f"{number:04}.txt").write_text(f"cat {number}", encoding="utf-8")
    return folder.parent


def run(*words: str) -> tuple[int, list[str], str, float]:
    """Exit code, heavy modules that were imported, all that was written, and seconds of processor time."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", PROGRAM, *words], cwd=ROOT, capture_output=True, text=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    code, heavy = json.loads(done.stdout.splitlines()[-1])
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return code, heavy, done.stdout + done.stderr, seconds


def arguments(models: TinyModels, pictures: Path, output: Path) -> list[str]:
    return [
        *models.arguments(),
        f"--train_data_dir={pictures}",
        "--resolution=64",
        "--caption_extension=.txt",
        f"--output_dir={output}",
        "--cache_latents",
        "--cache_text_encoder_outputs",
        "--apply_t5_attn_mask",
        "--optimizer_type=AdamW8bit",
        "--lr_scheduler=cosine_with_restarts",
        "--lr_scheduler_num_cycles=2",
    ]


def test_a_check_of_a_thousand_pictures_loads_no_torch_and_takes_little_time(
    tiny_models: TinyModels, many_pictures: Path, tmp_path: Path
) -> None:
    code, heavy, text, seconds = run("check", *arguments(tiny_models, many_pictures, tmp_path / "out"))
    assert "1000 texts of 1000 captions" in text
    assert "No problems found." in text
    assert (code, heavy) == (0, [])
    # Seconds of the processor, whatever else runs; a third of it is what 1,000 files take.
    assert seconds < 3


def test_a_mistyped_option_of_a_whole_command_is_answered_before_torch_loads(
    tiny_models: TinyModels, many_pictures: Path, tmp_path: Path
) -> None:
    few = tmp_path / "few" / "1_cat"
    few.mkdir(parents=True)
    for source in sorted(many_pictures.glob("*/000?.*")):
        (few / source.name).write_bytes(source.read_bytes())
    words = arguments(tiny_models, few.parent, tmp_path / "out")
    code, heavy, text, seconds = run(*words, "--learning_rat=1", "--loss_type=l3")
    assert (code, heavy) == (2, [])
    assert "loss_type" in text
    assert seconds < 2


def test_a_missing_model_is_answered_before_torch_loads(tmp_path: Path) -> None:
    code, heavy, text, _ = run(
        f"--pretrained_model_name_or_path={tmp_path / 'none.safetensors'}", f"--output_dir={tmp_path}"
    )
    # The tokenizers, which are not given either, are looked for in the hub's cache.
    assert (code, heavy) == (3, ["huggingface_hub"])
    assert "none.safetensors" in text


@pytest.mark.parametrize("name", ["merge", "extract", "resize", "inspect", "generate", "replay"])
def test_a_wrong_command_line_of_a_tool_is_answered_at_once(name: str) -> None:
    with_program = PROGRAM.replace(
        "code = main(sys.argv[1:])", "try: code = main(sys.argv[1:])\nexcept SystemExit as end: code = end.code"
    )
    done = subprocess.run(
        [sys.executable, "-c", with_program, name], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert json.loads(done.stdout.splitlines()[-1]) == [2, []]
