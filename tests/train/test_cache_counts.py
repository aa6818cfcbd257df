"""Which entries of the caches a change costs: exactly those that it concerns, counted."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.data.specs import picture
from tests.tiny import TinyModels, make_tiny_dataset
from trainer.data.cache_files import CACHE_FOLDER
from trainer.schema.checkpoint_header import read_header
from trainer.schema.cli import parse_command_line
from trainer.schema.events import EventReader, EventWriter
from trainer.train.check import check_run
from trainer.train.engine import Engine
from trainer.train.latents_phase import prepare_latents
from trainer.train.recipe import train
from trainer.train.reporting import Reporter
from trainer.train.text_phase import prepare_text
from trainer.train.text_plan import plan_texts


class Project:
    """Three captioned pictures and a command line that keeps everything on disk."""

    def __init__(self, models: TinyModels, folder: Path) -> None:
        self.folder = folder
        self.dataset = make_tiny_dataset(folder, count=3)
        self.images = sorted((folder / "images").glob("*.png"))
        # Of one shape, so that each has the same bucket.
        for number, path in enumerate(self.images):
            picture(path, 96, 96, seed=number)
            path.with_suffix(".txt").write_text(f"thing {number}, red, round", encoding="utf-8")
        self.options: dict[str, str | None] = {
            "dataset_config": str(self.dataset),
            "output_dir": str(folder / "out"),
            "device": "cpu",
            "seed": "5",
            "network_dim": "4",
            "network_train_unet_only": None,
            "cache_latents_to_disk": None,
            "cache_text_encoder_outputs_to_disk": None,
            "t5xxl_max_token_length": "16",
            "max_train_steps": "3",
        }
        for argument in models.arguments():
            name, _, value = argument.removeprefix("--").partition("=")
            self.options[name] = value

    def words(self) -> list[str]:
        return [f"--{name}" if value is None else f"--{name}={value}" for name, value in self.options.items()]

    def num_encoded(self) -> tuple[int, int]:
        """How many pictures and texts the phases before a training encode now."""
        before = self._files()
        checked = check_run(parse_command_line(self.words()), Reporter(is_main=False))
        engine, reporter = Engine.start(checked.options), Reporter(is_main=False)
        prepare_text(checked, plan_texts(checked, seed=5), engine, reporter)
        prepare_latents(checked, engine, reporter)
        new = self._files() - before
        return tuple(sum(name.startswith(kind) for name, _ in new) for kind in ("latents", "text"))  # pyright: ignore[reportReturnType]

    def _files(self) -> set[tuple[str, int]]:
        """A file that is written anew is another one."""
        return {(path.name, path.stat().st_ino) for path in self.folder.rglob(f"{CACHE_FOLDER}/*")}


@pytest.fixture
def project(tiny_models: TinyModels, tmp_path: Path) -> Project:
    made = Project(tiny_models, tmp_path)
    assert made.num_encoded() == (3, 3)
    assert made.num_encoded() == (0, 0)
    return made


def other_model(path: Path, folder: Path, name: str) -> Path:
    """A copy of a model with one number of one tensor changed; the file's size stays."""
    tensors = load_file(path)
    chosen = max((key for key in tensors if name in key), key=lambda key: tensors[key].numel())
    tensors[chosen].view(-1)[-1] += 1
    changed = folder / f"other_{path.name}"
    save_file(tensors, changed, dict(read_header(path).metadata))
    assert changed.stat().st_size == path.stat().st_size
    return changed


def test_edits_of_the_pictures_cost_what_they_concern(project: Project) -> None:
    captions = [path.with_suffix(".txt") for path in project.images]
    captions[1].write_text("thing 1, blue, round", encoding="utf-8")
    assert project.num_encoded() == (0, 1), "one caption"
    captions[1].write_text("thing 1, red, round", encoding="utf-8")
    assert project.num_encoded() == (0, 0), "the old caption again"
    captions[2].write_text("thing 0, red, round", encoding="utf-8")
    assert project.num_encoded() == (0, 0), "a caption that another picture has"

    picture(project.images[0], 96, 96, seed=77)
    os.utime(project.images[0], (1, 1))
    assert project.num_encoded() == (1, 0), "one picture, of the same size and with an older date"
    with Image.open(project.images[1]) as image:
        image.crop((8, 0, 96, 96)).save(project.images[1])
    assert project.num_encoded() == (1, 0), "one picture, cropped"

    for path in (project.images[2], captions[2]):
        path.rename(path.with_stem("renamed"))
    assert project.num_encoded() == (0, 0), "a renamed picture"
    shutil.copy(project.folder / "images" / "renamed.png", project.folder / "images" / "copy.png")
    captions[2].with_name("copy.txt").write_text("thing 0, red, round", encoding="utf-8")
    assert project.num_encoded() == (0, 0), "a copy"


def test_an_option_costs_what_it_concerns(project: Project) -> None:
    """Each from the same start: what the others added is found again at the end."""
    for option, value, expected in (
        ("flip_aug", None, (3, 0)),
        ("no_half_vae", None, (0, 0)),
        ("t5xxl_max_token_length", "24", (0, 3)),
        ("apply_t5_attn_mask", None, (0, 3)),
        ("clip_l_activation", "gelu", (0, 3)),
        ("mixed_precision", "bf16", (3, 3)),
        # Latents in 32 bit as without mixed precision, text in bf16 as with it: both are there.
        ("mixed_precision", "fp16", (0, 0)),
        ("caption_prefix", "new", (0, 3)),
        ("caption_dropout_rate", "0.1", (0, 1)),
        ("network_dim", "8", (0, 0)),
        ("seed", "6", (0, 0)),
    ):
        usual = dict(project.options)
        project.options[option] = value
        assert project.num_encoded() == expected, f"{option} {value}"
        project.options = usual
    assert project.num_encoded() == (0, 0), "the first entries are still there"
    project.options |= {"shuffle_caption": None, "caption_variants": "2"}
    latents, texts = project.num_encoded()
    assert latents == 0
    assert 1 <= texts <= 6, "2 of 6 orders of three captions, of which one order was there"
    project.options["seed"] = "7"
    assert project.num_encoded() == (0, 0), "variants do not depend on the seed"


def test_another_resolution_costs_the_pictures_alone(project: Project) -> None:
    text = project.dataset.read_text(encoding="utf-8")
    project.dataset.write_text(text.replace("resolution = 64", "resolution = 128"), encoding="utf-8")
    assert project.dataset.read_text(encoding="utf-8") != text
    assert project.num_encoded() == (3, 0)
    project.dataset.write_text(text, encoding="utf-8")
    assert project.num_encoded() == (0, 0)


def test_another_model_file_costs_what_it_encodes(project: Project, tiny_models: TinyModels) -> None:
    for option, path, layer, expected in (
        ("ae", tiny_models.ae, "encoder", (3, 0)),
        ("t5xxl", tiny_models.t5xxl, "wo.weight", (0, 3)),
        ("clip_l", tiny_models.clip_l, "mlp", (0, 3)),
    ):
        project.options[option] = str(other_model(path, project.folder, layer))
        assert project.num_encoded() == expected, option
        project.options[option] = str(path)
    copy = project.folder / "copy_of_ae.safetensors"
    shutil.copy(tiny_models.ae, copy)
    project.options["ae"] = str(copy)
    assert project.num_encoded() == (0, 0), "a copy is the same autoencoder"


def test_damaged_entries_are_computed_again_and_no_others(project: Project) -> None:
    folder = project.folder / "images" / CACHE_FOLDER
    latents, text = (sorted(folder.glob(f"{kind}-*")) for kind in ("latents", "text"))
    latents[0].write_bytes(latents[0].read_bytes()[:-3])
    text[1].write_bytes(b"")
    assert project.num_encoded() == (1, 1)


def test_what_is_deleted_during_a_training_is_computed_again(project: Project) -> None:
    """The steps are those of a training whose files stayed, bit by bit."""
    folder = project.folder / "images" / CACHE_FOLDER
    losses: list[list[float]] = []

    class Clumsy(Reporter):
        def __init__(self, events: Path, *, deletes: bool) -> None:
            super().__init__(events=EventWriter(events, 1))
            self.deletes = deletes

        def start_training(self, num_steps: int, first_step: int) -> None:
            super().start_training(num_steps, first_step)
            if self.deletes:
                shutil.rmtree(folder)

    for name, deletes in (("a", False), ("b", True)):
        events = project.folder / f"{name}.jsonl"
        reporter = Clumsy(events, deletes=deletes)
        train(parse_command_line(project.words()), reporter)
        reporter.close()
        found = EventReader(events).read_new()
        losses.append([loss for event in found if isinstance(loss := event.get("loss"), float)])
        warnings = [str(event["message"]) for event in found if event["kind"] == "warning"]
        assert any("vanished or were damaged" in warning for warning in warnings) == deletes
    assert len(losses[0]) == 3
    assert losses[0] == losses[1]
    assert len(list(folder.iterdir())) >= 3


def test_cache_files_that_prove_nothing_are_named_and_not_used(project: Project) -> None:
    for number, path in enumerate(project.images):
        path.with_name(f"{path.stem}_0096x0096_flux.npz").write_bytes(b"old")
        if number:
            path.with_name(f"{path.stem}_flux_te.npz").write_bytes(b"old")
    lines: list[str] = []

    class Listener(Reporter):
        def note(self, text: str) -> None:
            lines.append(text)

    checked = check_run(parse_command_line(project.words()), Listener(is_main=False))
    engine = Engine.start(checked.options)
    prepare_text(checked, plan_texts(checked, seed=5), engine, Listener(is_main=False))
    prepare_latents(checked, engine, Listener(is_main=False))
    assert [line.split(":")[0] for line in lines if "sd-scripts (" in line] == [
        "2 cache files of sd-scripts (_flux_te.npz) are not used",
        "3 cache files of sd-scripts (_flux.npz) are not used",
    ]
