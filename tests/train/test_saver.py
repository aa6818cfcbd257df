"""What the saver writes, and when the models' hashes are in it."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.tiny import TinyModels
from tests.train.test_metadata import FACTS
from trainer.lora.form_names import Form
from trainer.lora.network import LoraNetwork
from trainer.model.weights import load_flux
from trainer.schema.checkpoint_header import read_header
from trainer.schema.lora_spec import LoraSpec
from trainer.schema.options import Options
from trainer.train.file_hashes import FileHashes
from trainer.train.reporting import Reporter
from trainer.train.saver import LoraSaver
from trainer.train.step_position import StepPosition

LARGE_BYTES = 400 << 20


@pytest.fixture
def network(tiny_models: TinyModels) -> LoraNetwork:
    flux = load_flux(tiny_models.flux_dev, torch.float32, "cpu")
    return LoraNetwork.attach(flux, None, LoraSpec(rank=2, alpha=1), torch.Generator().manual_seed(0))


@pytest.mark.parametrize("form", ["sd-scripts", "diffusers"])
def test_the_final_file_has_the_hash_that_a_periodic_one_did_not_wait_for(
    network: LoraNetwork, tmp_path: Path, form: Form
) -> None:
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(LARGE_BYTES)
    hashes = FileHashes({"flux": large}, None)
    facts = replace(FACTS, base_model_sha256=None)
    options = Options(output_name="x", lora_form=form)
    save = LoraSaver(network, tmp_path, options, facts, Reporter(), True, hashes=hashes)
    hashes.start()
    position = StepPosition(step=1, epoch=1)
    save(position, "step")
    assert not hashes.is_done, "the file is too small for this machine: the step did not have to wait"
    save(position, "final")
    periodic, final = (read_header(tmp_path / f"{name}.safetensors") for name in ("x-step00000001", "x"))
    assert "ss_new_sd_model_hash" not in periodic.metadata
    digest = hashlib.sha256()
    for _ in range(LARGE_BYTES >> 20):
        digest.update(bytes(1 << 20))
    assert final.metadata["ss_new_sd_model_hash"] == digest.hexdigest()
    assert ("fluxgui_alpha" in final.metadata) == (form == "diffusers")
    assert set(final.tensors) == set(periodic.tensors)
    hashes.close()


def test_a_network_that_the_form_cannot_hold_is_known_before_anything_is_saved(
    network: LoraNetwork, tmp_path: Path
) -> None:
    save = LoraSaver(network, tmp_path, Options(lora_form="xlabs"), FACTS, Reporter(), True)
    with pytest.raises(Exception, match="XLabs' form has no place for"):
        save.tensors()
