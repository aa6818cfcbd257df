"""Cache files for sd-scripts: what its readers demand, what of them is proof enough to be read, what is never changed."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from tests.data.specs import picture
from tests.tiny import TinyModels
from tests.train.test_cache_counts import Project
from trainer.data.cache_files import CACHE_FOLDER, read_entry
from trainer.data.reference_store import packed
from trainer.schema.cli import parse_command_line
from trainer.train.check import CheckedRun, check_run
from trainer.train.engine import Engine
from trainer.train.latents_phase import prepare_latents
from trainer.train.reporting import Reporter
from trainer.train.text_phase import prepare_text
from trainer.train.text_plan import plan_texts

Arrays = dict[str, NDArray[Any]]


class Listener(Reporter):
    def __init__(self, warnings: list[str] | None) -> None:
        super().__init__(is_main=False)
        self.lines: list[str] = []
        self._warnings = warnings

    def note(self, text: str) -> None:
        self.lines.append(text)

    def warning(self, text: str) -> None:
        if self._warnings is None:
            pytest.fail(text)
        self._warnings.append(text)


def phases(project: Project, warnings: list[str] | None = None) -> list[str]:
    """The lines about caches of the phases before a training, whose `warnings` fail when no list takes them."""
    listener = Listener(warnings)
    checked: CheckedRun = check_run(parse_command_line(project.words()), Reporter(is_main=False))
    engine = Engine.start(checked.options)
    prepare_text(checked, plan_texts(checked, seed=5), engine, listener)
    prepare_latents(checked, engine, listener)
    return [line for line in listener.lines if "sd-scripts" in line or "cached" in line]


def load(path: Path) -> Arrays:
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def save(path: Path, arrays: Arrays) -> None:
    path.write_bytes(packed(arrays))


def entries(project: Project) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (project.folder / "images" / CACHE_FOLDER).iterdir()}


def latent_file(project: Project, number: int) -> Path:
    path = project.images[number]
    return path.with_name(f"{path.stem}_0096x0096_flux.npz")


def text_file(project: Project, number: int) -> Path:
    path = project.images[number]
    return path.with_name(f"{path.stem}_flux_te.npz")


@pytest.fixture
def project(tiny_models: TinyModels, tmp_path: Path) -> Project:
    made = Project(tiny_models, tmp_path)
    made.options["write_reference_caches"] = None
    return made


def accepts_latents(arrays: Arrays, height: int, width: int, *, flip_aug: bool, alpha_mask: bool) -> bool:
    """sd-scripts' check of a file for a bucket of latents (`is_disk_cached_latents_expected`)."""
    names = [f"latents_{height}x{width}"]
    names += [f"latents_flipped_{height}x{width}"] * flip_aug
    names += [f"alpha_mask_{height}x{width}"] * alpha_mask
    return all(name in arrays for name in names)


def accepts_text(arrays: Arrays, *, apply_mask: bool) -> bool:
    """sd-scripts' check of a text file (`is_disk_cached_outputs_expected`)."""
    names = ("l_pooled", "t5_out", "txt_ids", "t5_attn_mask", "apply_t5_attn_mask")
    return all(name in arrays for name in names) and bool(arrays["apply_t5_attn_mask"]) == apply_mask


def test_latents_are_what_sd_scripts_reads(project: Project) -> None:
    project.options |= {"flip_aug": None, "alpha_mask": None}
    with Image.open(project.images[0]) as image:
        image.putalpha(Image.linear_gradient("L").resize(image.size))
        image.save(project.images[0])
    assert "3 of 3 cache files for sd-scripts (_flux.npz) were written" in phases(project)
    for number in range(3):
        arrays = load(latent_file(project, number))
        assert accepts_latents(arrays, 8, 8, flip_aug=True, alpha_mask=True)
        assert not accepts_latents(arrays, 8, 16, flip_aug=False, alpha_mask=False)
        for name in ("latents_8x8", "latents_flipped_8x8"):
            assert (arrays[name].shape, arrays[name].dtype) == ((16, 8, 8), np.float32)
            key = str(arrays[f"fluxgui_seal_{name}"]).split()[0]
            entry = read_entry(project.images[0].parent / CACHE_FOLDER / f"latents-{key}.safetensors", key)
            assert entry is not None
            assert torch.equal(entry["latents"], torch.from_numpy(arrays[name]))
        assert not np.array_equal(arrays["latents_8x8"], arrays["latents_flipped_8x8"])
        assert arrays["original_size_8x8"].tolist() == [96, 96]
        assert arrays["crop_ltrb_8x8"].tolist() == [0, 0, 64, 64]
        mask = arrays["alpha_mask_8x8"]
        assert (mask.shape, mask.dtype) == ((64, 64), np.float32)
        if number == 0:
            assert mask[0].max() < 0.02 < 0.98 < mask[-1].min()
            assert np.all(np.diff(mask.mean(axis=1)) > 0)
        else:
            assert mask.min() == 1.0


@pytest.mark.parametrize("apply_mask", [False, True])
def test_text_is_what_sd_scripts_reads(project: Project, *, apply_mask: bool) -> None:
    """The plain caption, in 32 bit and padded, though ours is shuffled, in bf16 and without its padding."""
    project.options |= {"shuffle_caption": None, "caption_variants": "2", "mixed_precision": "bf16"}
    project.options["t5xxl_max_token_length"] = "40"
    if apply_mask:
        project.options["apply_t5_attn_mask"] = None
    assert "3 of 3 cache files for sd-scripts (_flux_te.npz) were written" in phases(project)
    checked = check_run(parse_command_line(project.words()), Reporter(is_main=False))
    t5, length = checked.tokenizers.t5xxl, 40
    for number in range(3):
        arrays = load(text_file(project, number))
        assert accepts_text(arrays, apply_mask=apply_mask)
        assert not accepts_text(arrays, apply_mask=not apply_mask)
        assert {name: arrays[name].dtype.name for name in arrays if "fluxgui" not in name} == {
            "l_pooled": "float32",
            "t5_out": "float32",
            "txt_ids": "float32",
            "t5_attn_mask": "int64",
            "apply_t5_attn_mask": "bool",
        }
        width = checked.models.t5.d_model
        assert arrays["t5_out"].shape == (length, width)
        assert not arrays["txt_ids"].any()
        assert arrays["txt_ids"].shape == (length, 3)
        _, mask = t5.encode([f"thing {number}, red, round"], length)
        assert arrays["t5_attn_mask"].tolist() == mask[0].tolist()
        num_tokens = int(mask.sum())
        assert 1 < num_tokens < length, "else padding is not tried"
        key = str(arrays["fluxgui_seal_t5_out"]).split()[0]
        entry = read_entry(project.images[0].parent / CACHE_FOLDER / f"text-{key}.safetensors", key)
        assert entry is not None
        assert np.array_equal(arrays["l_pooled"], entry["vec"].float().numpy())
        kept = num_tokens if apply_mask else length
        assert entry["txt"].shape == (kept, width)
        assert np.array_equal(arrays["t5_out"][:kept], entry["txt"].float().numpy())
        assert not arrays["t5_out"][kept:].any()
        assert np.abs(arrays["t5_out"][:kept]).min(axis=0).max() > 0


def test_what_is_provably_valid_is_read_in_place_of_computing(project: Project) -> None:
    project.options |= {"flip_aug": None, "apply_t5_attn_mask": None, "mixed_precision": "bf16"}
    phases(project)
    before = entries(project)
    assert len(before) == 3 * 2 + 3, "latents both ways round, and captions"
    shutil.rmtree(project.folder / "images" / CACHE_FOLDER)
    del project.options["write_reference_caches"]
    lines = phases(project)
    assert "6 of 6 were read from cache files for sd-scripts (_flux.npz)" in lines
    assert "3 of 3 were read from cache files for sd-scripts (_flux_te.npz)" in lines
    assert "all pictures are cached: the autoencoder is not needed for them" in lines
    assert "all captions and prompts are cached: the text encoders are not needed" in lines
    assert not any("not used" in line for line in lines)
    assert entries(project) == before
    # With entries of our own nothing is read.
    assert not any("were read" in line for line in phases(project))


def test_what_is_out_of_date_or_damaged_is_computed_and_written_anew(project: Project) -> None:
    phases(project)
    right = load(latent_file(project, 2))
    picture(project.images[0], 96, 96, seed=50)
    project.images[1].with_suffix(".txt").write_text("something else", encoding="utf-8")
    wrong = {**right, "latents_8x8": right["latents_8x8"] + 1}
    save(latent_file(project, 2), wrong)
    text = load(text_file(project, 2))
    save(text_file(project, 2), {**text, "l_pooled": text["l_pooled"] * 2})
    shutil.rmtree(project.folder / "images" / CACHE_FOLDER)
    lines = phases(project)
    assert "1 of 3 were read from cache files for sd-scripts (_flux.npz)" in lines
    assert "1 of 3 were read from cache files for sd-scripts (_flux_te.npz)" in lines
    assert "2 of 3 cache files for sd-scripts (_flux.npz) were written" in lines
    assert "2 of 3 cache files for sd-scripts (_flux_te.npz) were written" in lines
    again = load(latent_file(project, 2))
    assert again.keys() == right.keys()
    assert all(np.array_equal(again[name], right[name]) for name in right)
    assert "0 of 3 cache files for sd-scripts (_flux.npz) were written" in phases(project)
    # Trusted files are not read to see whether they are whole.
    save(latent_file(project, 2), wrong)
    project.options["skip_cache_check"] = None
    assert "0 of 3 cache files for sd-scripts (_flux.npz) were written" in phases(project)


def test_files_of_sd_scripts_itself_are_never_changed(project: Project) -> None:
    phases(project)
    own = load(latent_file(project, 0))
    save(latent_file(project, 0), {name: array for name, array in own.items() if not name.startswith("fluxgui")})
    latent_file(project, 1).write_bytes(b"broken")
    text_file(project, 0).write_bytes(b"")
    kept = {
        path: path.read_bytes() for path in (latent_file(project, 0), latent_file(project, 1), text_file(project, 0))
    }
    shutil.rmtree(project.folder / "images" / CACHE_FOLDER)
    lines = phases(project)
    assert {path: path.read_bytes() for path in kept} == kept
    for start in (
        "2 cache files of sd-scripts (_flux.npz) are not used: nothing in them says which picture",
        "1 cache files of sd-scripts (_flux_te.npz) are not used: nothing in them says which caption",
        "1 of 3 were read from cache files for sd-scripts (_flux.npz)",
        "2 of 3 were read from cache files for sd-scripts (_flux_te.npz)",
        "0 of 3 cache files for sd-scripts (_flux.npz) were written; 2 that are not of this program stay as they are",
        "0 of 3 cache files for sd-scripts (_flux_te.npz) were written; 1 that are not of this program stay",
    ):
        assert any(line.startswith(start) for line in lines), (start, lines)


def test_a_file_keeps_what_is_made_from_the_same_picture(project: Project) -> None:
    """Other training sizes, and arrays that sd-scripts added; both go when the picture is another one."""
    phases(project)
    file = latent_file(project, 0)
    first = load(file)
    save(file, {**first, "latents_4x4": np.ones((16, 4, 4), np.float32)})
    text = project.dataset.read_text(encoding="utf-8")
    project.dataset.write_text(text.replace("resolution = 64", "resolution = 128"), encoding="utf-8")
    assert "3 of 3 cache files for sd-scripts (_flux.npz) were written" in phases(project)
    both = load(file)
    assert both["latents_16x16"].shape == (16, 16, 16)
    assert both["latents_4x4"].shape == (16, 4, 4)
    assert all(np.array_equal(both[name], first[name]) for name in first)
    picture(project.images[0], 96, 96, seed=51)
    assert "1 of 3 cache files for sd-scripts (_flux.npz) were written" in phases(project)
    assert not [name for name in load(file) if name.endswith(("_8x8", "_4x4"))]


def test_pictures_that_share_a_name_are_counted(project: Project) -> None:
    with Image.open(project.images[0]) as image:
        image.transpose(Image.Transpose.ROTATE_90).save(project.images[0].with_suffix(".bmp"))
    lines = phases(project)
    assert (
        "3 of 3 cache files for sd-scripts (_flux.npz) were written; 1 pictures have none, since another one's has the "
        "same name" in lines
    )
    assert "3 of 3 cache files for sd-scripts (_flux_te.npz) were written" in lines, "their caption is one"
    assert "0 of 3 cache files for sd-scripts (_flux.npz) were written; 1 pictures" in "\n".join(phases(project))


def test_a_full_disk_costs_the_files_and_not_the_run(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line comes once for a folder, and no part of a file is left behind."""
    rename = Path.replace

    def full(self: Path, target: Path) -> Path:
        if target.suffix == ".npz":
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(self, target)

    warnings: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        lines = phases(project, warnings)
    folder = project.folder / "images"
    line = f"{folder} cannot be written (no space left on device); cache files for sd-scripts are left out there"
    assert warnings == [line, line], "one for pictures, one for captions"
    assert "0 of 3 cache files for sd-scripts (_flux.npz) were written" in lines
    assert not [path for path in folder.rglob("*") if path.suffix in (".npz", ".part")]


def test_without_caches_on_disk_the_option_has_a_line_and_no_files(project: Project) -> None:
    for name in ("cache_latents", "cache_text_encoder_outputs"):
        del project.options[f"{name}_to_disk"]
        project.options[name] = None
    command = parse_command_line(project.words())
    assert [note for note in command.notes if "write_reference_caches" in note] == [
        "write_reference_caches has no effect: nothing is kept on disk (cache_latents_to_disk, ...)"
    ]
    phases(project)
    assert not list(project.folder.rglob("*.npz"))
