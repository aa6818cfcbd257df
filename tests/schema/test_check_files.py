"""The quick checks of files and folders: what is missing, what is of another kind, what cannot be written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.tiny import TinyModels
from trainer.schema.base import Problem
from trainer.schema.cli import check_files, validate_options
from trainer.schema.options import Options


@pytest.fixture
def values(tmp_path: Path, tiny_models: TinyModels) -> dict[str, object]:
    """Options whose files are all right."""
    (tmp_path / "dataset.toml").write_text("", encoding="utf-8")
    (tmp_path / "prompts.txt").write_text("a cat\n", encoding="utf-8")
    return {
        "pretrained_model_name_or_path": tiny_models.flux_dev,
        "clip_l": tiny_models.clip_l,
        "t5xxl": tiny_models.t5xxl,
        "ae": tiny_models.ae,
        "dataset_config": tmp_path / "dataset.toml",
        "sample_prompts": tmp_path / "prompts.txt",
        "output_dir": tmp_path / "output",
    }


def found(values: dict[str, object]) -> list[Problem]:
    return check_files(validate_options(values, where="the test").options)


def only(values: dict[str, object], field: str) -> Problem:
    problems = found(values)
    assert [problem.field for problem in problems] == [field]
    return problems[0]


def test_right_files_have_no_problems(values: dict[str, object], tmp_path: Path, tiny_models: TinyModels) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert found(values) == []
    assert found({**values, "pretrained_model_name_or_path": tiny_models.flux_schnell}) == []
    assert found({**values, "output_dir": tmp_path / "a" / "b" / "c", "logging_dir": tmp_path / "logs"}) == []
    assert sorted(tmp_path.rglob("*")) == before, "nothing stays behind"


def test_everything_that_is_needed_and_not_given_is_named() -> None:
    problems = check_files(Options())
    assert [problem.field for problem in problems] == [
        "pretrained_model_name_or_path",
        "clip_l",
        "t5xxl",
        "ae",
        "dataset_config",
        "output_dir",
    ]
    assert str(problems[1]) == "the CLIP-L text encoder is not given (--clip_l). Add --clip_l=..."


@pytest.mark.parametrize("name", ["pretrained_model_name_or_path", "clip_l", "t5xxl", "ae", "network_weights"])
def test_a_missing_model_is_named_with_its_option(values: dict[str, object], tmp_path: Path, name: str) -> None:
    problem = only({**values, name: tmp_path / "nowhere.safetensors"}, name)
    assert problem.what == "this file does not exist"
    assert problem.where == str(tmp_path / "nowhere.safetensors")
    assert f"--{name}" in str(problem.hint)


@pytest.mark.parametrize(
    ("name", "given", "what"),
    [
        ("clip_l", "t5xxl", "this is a T5 encoder, given as --clip_l"),
        ("t5xxl", "clip_l", "this is a CLIP"),
        ("ae", "flux_dev", "this is a FLUX.1 dev model"),
        ("pretrained_model_name_or_path", "ae", "given as --pretrained_model_name_or_path"),
        ("network_weights", "ae", "given as --network_weights"),
    ],
)
def test_a_file_of_another_kind_is_told(
    values: dict[str, object], tiny_models: TinyModels, name: str, given: str, what: str
) -> None:
    problem = only({**values, name: getattr(tiny_models, given)}, name)
    assert what.replace("T5 encoder", "T5 text encoder") in problem.what


def test_a_cut_model_is_told(values: dict[str, object], tmp_path: Path, tiny_models: TinyModels) -> None:
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(tiny_models.ae.read_bytes()[:-1000])
    problem = only({**values, "ae": cut}, "ae")
    assert "bytes" in problem.what
    assert "--ae" in str(problem.hint)


@pytest.mark.parametrize("name", ["dataset_config", "sample_prompts"])
def test_a_folder_where_a_file_is_needed_is_told(values: dict[str, object], tmp_path: Path, name: str) -> None:
    assert "this is a folder" in only({**values, name: tmp_path}, name).what


@pytest.mark.parametrize("name", ["dataset_config", "sample_prompts"])
def test_a_missing_text_file_is_told(values: dict[str, object], tmp_path: Path, name: str) -> None:
    assert only({**values, name: tmp_path / "nowhere.toml"}, name).what == "this file does not exist"


def test_folders_of_pictures_are_looked_for(values: dict[str, object], tmp_path: Path) -> None:
    del values["dataset_config"]
    assert (
        only({**values, "train_data_dir": tmp_path / "nowhere"}, "train_data_dir").what == "this folder does not exist"
    )
    (tmp_path / "train").mkdir()
    assert found({**values, "train_data_dir": tmp_path / "train"}) == []
    reg = {"train_data_dir": tmp_path / "train", "reg_data_dir": tmp_path / "prompts.txt"}
    assert only({**values, **reg}, "reg_data_dir").what == "this is a file, not a folder"


def test_an_output_folder_inside_of_a_file_is_told(values: dict[str, object], tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("")
    problem = only({**values, "output_dir": taken / "out"}, "output_dir")
    assert problem.what == f"the folder cannot be made: {taken} is a file"
    assert "output_dir" in str(problem.where)
    assert only({**values, "output_dir": taken}, "output_dir").what == "this is a file"
    assert only({**values, "logging_dir": taken}, "logging_dir").what == "this is a file"


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_folder_without_permission_is_told(values: dict[str, object], tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    problem = only({**values, "output_dir": locked / "out"}, "output_dir")
    assert "cannot be written to (Permission denied)" in problem.what


@pytest.mark.parametrize(
    "name", ["clip_l", "network_weights", "dataset_config", "sample_prompts", "output_dir", "train_data_dir"]
)
@pytest.mark.parametrize("path", ["a\0b", "x" * 5000])
def test_a_path_that_no_system_allows_is_a_problem_and_no_crash(
    values: dict[str, object], name: str, path: str
) -> None:
    if name == "train_data_dir":
        del values["dataset_config"]
    assert only({**values, name: path}, name).field == name
