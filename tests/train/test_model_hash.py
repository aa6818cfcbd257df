"""The base model's SHA-256, found in the background."""

from __future__ import annotations

import hashlib
from pathlib import Path

from trainer.train.model_hash import ModelHash
from trainer.train.saver import base_model_name


def test_the_hash_is_that_of_the_whole_file(tmp_path: Path) -> None:
    content = bytes(range(256)) * 200_000  # several reads
    (tmp_path / "model.safetensors").write_bytes(content)
    model_hash = ModelHash(tmp_path / "model.safetensors")
    assert model_hash.value(60) == hashlib.sha256(content).hexdigest()
    model_hash.close()


def test_a_file_of_the_hub_cache_is_stored_under_its_hash(tmp_path: Path) -> None:
    """It is not read: the content here has another hash than the name."""
    (tmp_path / ("ab" * 32)).write_bytes(b"weights")
    (tmp_path / "model.safetensors").symlink_to(tmp_path / ("ab" * 32))
    assert ModelHash(tmp_path / "model.safetensors").value() == "ab" * 32


def test_a_model_without_a_single_file_has_no_hash(tmp_path: Path) -> None:
    assert ModelHash(None).value(60) is None
    assert ModelHash(tmp_path / "gone.safetensors").value(60) is None


def test_closing_ends_the_reading_of_a_large_file(tmp_path: Path) -> None:
    with (tmp_path / "large.safetensors").open("wb") as file:
        file.truncate(1 << 40)  # hours of reading, but no disk space
    model_hash = ModelHash(tmp_path / "large.safetensors")
    assert model_hash.value() is None
    model_hash.close()
    assert model_hash.value() is None


def test_the_base_models_name_tells_nothing_about_the_machine(tmp_path: Path) -> None:
    (tmp_path / "flux-repo").mkdir()
    (tmp_path / "flux1-dev.safetensors").touch()
    assert base_model_name(tmp_path / "flux-repo") == "flux-repo"
    assert base_model_name(tmp_path / "flux1-dev.safetensors") == "flux1-dev.safetensors"
    assert base_model_name(Path("black-forest-labs/FLUX.1-dev")) == "black-forest-labs/FLUX.1-dev"
