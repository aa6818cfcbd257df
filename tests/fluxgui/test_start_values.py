"""What a new form holds: the chosen preset, and the model files that were used last."""

from __future__ import annotations

from pathlib import Path

import pytest

from fluxgui.models import list_models, remember_models
from fluxgui.presets import preset_form_values, save_own, start_values
from tests.tiny import TinyModels
from trainer.schema.folders import demo_dir, models_dir
from trainer.schema.presets import delete_preset
from trainer.schema.settings import change_settings


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # pyright: ignore[reportUnusedFunction]
    monkeypatch.setenv("FLUXGUI_HOME", str(tmp_path / "home"))


def test_a_new_form_starts_with_the_chosen_preset_and_without_it_when_it_is_gone() -> None:
    assert start_values() == preset_form_values("character")
    save_own("mine", {"network_dim": 7})
    change_settings(start_preset="mine")
    assert start_values() == {"network_dim": 7}
    delete_preset("mine")
    assert start_values() == preset_form_values("character")


def test_the_models_of_the_last_run_are_remembered_while_they_are_there(tmp_path: Path) -> None:
    (tmp_path / "ae.safetensors").touch()
    remember_models({"ae": tmp_path / "ae.safetensors", "t5xxl": tmp_path / "gone.safetensors", "clip_l": None})
    assert start_values() == {**preset_form_values("character"), "ae": str(tmp_path / "ae.safetensors")}
    remember_models({"ae": demo_dir() / "models" / "ae.safetensors"})
    assert start_values()["ae"] == str(tmp_path / "ae.safetensors"), "the demo's files are not kept"


def test_model_files_in_allowed_folders_are_listed_by_what_they_are(tiny_models: TinyModels, tmp_path: Path) -> None:
    models_dir().mkdir(parents=True)
    (models_dir() / "b.safetensors").write_bytes(tiny_models.ae.read_bytes())
    (models_dir() / "a.safetensors").write_bytes(tiny_models.t5xxl.read_bytes())
    (models_dir() / "broken.safetensors").write_bytes(b"no")
    (models_dir() / "link.safetensors").symlink_to(tiny_models.clip_l)
    assert [(model.field, model.path.name) for model in list_models()] == [
        ("t5xxl", "a.safetensors"),
        ("ae", "b.safetensors"),
    ]
    change_settings(allowed_dirs=(tiny_models.clip_l.parent,))
    assert "clip_l" in {model.field for model in list_models()}
