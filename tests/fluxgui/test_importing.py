"""Imported projects in the form and out of the program again."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tomlkit

from fluxgui.exporting import FORMATS, Project, export_project
from fluxgui.form import read_form
from fluxgui.importing import KEPT_FOR_EXPORT, as_job, dataset_text, fill_form, read_only_allowed, read_pasted
from tests.runs.test_existing_projects import FLUXGYM_DATASET, FLUXGYM_SCRIPT, KOHYA_SS_CONFIG, SECTIONED_CONFIG
from tests.schema.test_import_project import COMMAND, MASKED, NAMES
from tests.tiny import TinyModels
from trainer.schema.base import UserError
from trainer.schema.cli import parse_command_line
from trainer.schema.import_project import import_project
from trainer.tools.tiny_models import make_images

# The example command of the reference trainer's documentation, by its options and values.
EXAMPLE = """\
accelerate launch --num_cpu_threads_per_process 1 flux_train_network.py
  --pretrained_model_name_or_path="/models/flux1-dev.safetensors"
  --clip_l="/models/clip_l.safetensors"
  --t5xxl="/models/t5xxl_fp16.safetensors"
  --ae="/models/ae.safetensors"
  --dataset_config="my_flux_dataset_config.toml"
  --output_dir="/data/output dir"
  --output_name="my_flux_lora"
  --save_model_as=safetensors
  --network_module=networks.lora_flux
  --network_dim=16
  --network_alpha=1
  --learning_rate=1e-4
  --optimizer_type="AdamW8bit"
  --lr_scheduler="constant"
  --sdpa
  --max_train_epochs=10
  --save_every_n_epochs=1
  --mixed_precision="fp16"
  --gradient_checkpointing
  --guidance_scale=1.0
  --timestep_sampling="flux_shift"
  --model_prediction_type="raw"
  --blocks_to_swap=18
  --cache_text_encoder_outputs
  --cache_latents
"""


@pytest.mark.parametrize("form", ["bash", "windows", "toml"])
@pytest.mark.parametrize("text", [EXAMPLE, FLUXGYM_SCRIPT.format(**NAMES), SECTIONED_CONFIG.format(**NAMES)])
def test_what_is_exported_imports_as_the_same_options(text: str, form: str) -> None:
    project = import_project(text)
    written = export_project(Project(project.options), form)
    again = import_project(written)
    assert again.options == project.options
    assert again.not_understood == ()


def test_an_exported_command_is_the_same_for_a_real_shell() -> None:
    options = import_project('--output_name "it\'s $HOME; `x`" --training_comment "a=b c" --metadata_title ""').options
    command = export_project(Project(options), "bash").replace("python flux_train_network.py", "printf '%s\\0'")
    words = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout.split("\0")[:-1]
    assert parse_command_line(words).options == options


def test_the_form_shows_an_imported_command_and_means_the_same(tmp_path: Path) -> None:
    make_images(tmp_path / "images", 2)
    dataset = FLUXGYM_DATASET.format(images=tmp_path / "images").replace("num_repeats = 2", "num_repeats = 7")
    project = read_pasted(EXAMPLE, dataset)
    filling = fill_form(project)
    values = filling.values
    assert (values["network_dim"], values["image_dir"], values["num_repeats"]) == (16, str(tmp_path / "images"), 7)
    reading = read_form(values)
    assert reading.options is not None
    expected = project.options
    from_dataset = {"resolution", "train_batch_size", "keep_tokens"}
    for name in type(expected).model_fields:
        if name not in (*KEPT_FOR_EXPORT, *from_dataset, "caption_extension"):
            assert getattr(reading.options, name) == getattr(expected, name), name
    assert reading.options.keep_tokens == 1
    assert tomlkit.parse(reading.dataset_toml)["datasets"][0]["subsets"][0]["num_repeats"] == 7  # pyright: ignore
    told = "\n".join(filling.left_out)
    assert "/data/output dir" in told
    assert "a cat" in told, "there are captions, so the class tokens are no trigger word"


@pytest.mark.parametrize("text", [FLUXGYM_SCRIPT, KOHYA_SS_CONFIG, SECTIONED_CONFIG, COMMAND, MASKED])
def test_the_form_means_what_each_project_means(text: str, tmp_path: Path) -> None:
    make_images(tmp_path / "images", 1)
    dataset = f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{tmp_path / 'images'}'\n"
    project = import_project(text.format(**NAMES), dataset)
    reading = read_form(fill_form(project).values)
    assert reading.options is not None, reading.problems
    # The pictures are the dataset's business, and the steps are left out where epochs win.
    aside = {*KEPT_FOR_EXPORT, "train_data_dir", "resolution", "max_train_steps"}
    for name in type(project.options).model_fields:
        if name not in aside:
            # An empty list says the same as none.
            shown, expected = (getattr(options, name) for options in (reading.options, project.options))
            assert (None if shown == () else shown) == (None if expected == () else expected), name


def test_folders_named_by_repeats_fill_the_form(tmp_path: Path) -> None:
    make_images(tmp_path / "img" / "10_ohwx cat", 2)
    for caption in (tmp_path / "img").glob("*/*.txt"):
        caption.unlink()
    make_images(tmp_path / "img" / "2_other", 2)
    filling = fill_form(read_pasted(f"--train_data_dir='{tmp_path / 'img'}' --resolution=512 --enable_bucket", ""))
    assert filling.values["image_dir"] == str(tmp_path / "img" / "10_ohwx cat")
    assert (filling.values["num_repeats"], filling.values["trigger_word"]) == (10, "ohwx cat")
    assert filling.left_out == ("1 more folders of pictures: the form has one; Start training exactly this takes all",)


def test_a_job_of_an_import_names_everything_that_keeps_it_from_starting() -> None:
    with pytest.raises(UserError) as raised:
        as_job(read_pasted(EXAMPLE, ""))
    fields = [problem.field for problem in raised.value.problems]
    assert fields == ["pretrained_model_name_or_path", "clip_l", "t5xxl", "ae", "dataset_config"]


def test_a_pasted_dataset_is_checked_as_the_trainer_does() -> None:
    wrong = "[[datasets]]\nresolution = 64\nbatch = 2\n[[datasets.subsets]]\nimage_dir = '/gone'\n"
    with pytest.raises(UserError) as raised:
        as_job(read_pasted("--output_name=a", wrong))
    told = [problem for problem in raised.value.problems if "the dataset file" in (problem.where or "")]
    assert [problem.what for problem in told] == ["batch is not a known key"]
    with pytest.raises(UserError) as raised:
        as_job(read_pasted("--output_name=a", wrong.replace("batch = 2", "")))
    assert [problem.where for problem in raised.value.problems if problem.field == "image_dir"] == ["/gone"]


def test_relative_folders_of_a_pasted_dataset_become_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_models: TinyModels
) -> None:
    make_images(tmp_path / "images", 1)
    monkeypatch.chdir(tmp_path)
    command = " ".join([*tiny_models.arguments(), "--output_name=cat --output_dir=elsewhere --max_train_steps=3"])
    job = as_job(read_pasted(command, "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = 'images'\n"))
    assert f'image_dir = "{tmp_path / "images"}"' in job.dataset_toml
    assert "output_dir" not in job.config_toml
    assert job.name == "cat"


def test_a_page_for_other_machines_reads_allowed_folders_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fluxgui.importing._limits", [])
    monkeypatch.setenv("FLUXGUI_HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    for folder in (tmp_path, tmp_path / "home"):
        (folder / "prompts.txt").write_text("a cat", encoding="utf-8")
    outside, inside = (f"--sample_prompts={folder / 'prompts.txt'}" for folder in (tmp_path, tmp_path / "home"))
    assert read_pasted(outside, "").prompts == "a cat"
    read_only_allowed()
    found = read_pasted(outside, "")
    assert found.prompts is None
    assert "outside of the allowed folders" in found.not_understood[0]
    assert read_pasted(inside, "").prompts == "a cat"


@pytest.mark.parametrize("form", FORMATS)
def test_no_export_holds_a_secret(form: str) -> None:
    options = import_project(EXAMPLE).options.model_copy(
        update={"huggingface_token": "hf_secret", "wandb_api_key": "k3y"}
    )
    written = export_project(Project(options), form)
    assert "hf_secret" not in written
    assert "k3y" not in written


def test_the_script_and_the_cell_bring_their_files_and_start_the_training(tmp_path: Path) -> None:
    project = import_project(EXAMPLE, FLUXGYM_DATASET.format(**NAMES))
    whole = Project(project.options, dataset_text(project), 'a "cat" --w 64\nEND_OF_FILE')
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@" > words.txt\n', encoding="utf-8")
    python.chmod(0o755)
    (tmp_path / "train.sh").write_text(export_project(whole, "script"), encoding="utf-8")
    subprocess.run(
        [shutil.which("bash") or "bash", "train.sh"],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        check=True,
    )
    words = (tmp_path / "words.txt").read_text(encoding="utf-8").splitlines()
    options = parse_command_line(words[1:]).options
    assert words[0] == "flux_train_network.py"
    assert (tmp_path / str(options.dataset_config)).read_text(encoding="utf-8").strip() == whole.dataset_toml.strip()
    assert (tmp_path / str(options.sample_prompts)).read_text(encoding="utf-8") == whole.prompts + "\n"

    program = tmp_path / "FluxGUI"
    program.mkdir()
    (program / "run.py").write_text(
        'import sys, pathlib; pathlib.Path("words.txt").write_text("\\n".join(sys.argv[1:])); print("started")',
        encoding="utf-8",
    )
    cell = subprocess.run(
        [sys.executable, "-c", export_project(whole, "notebook")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert cell.stdout == "started\n"
    words = (program / "words.txt").read_text(encoding="utf-8").splitlines()
    assert words[0] == "train"
    assert parse_command_line(words[1:]).options == options
    assert (program / "sample_prompts.txt").read_text(encoding="utf-8") == whole.prompts + "\n"
