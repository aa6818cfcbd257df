"""Model files from a hub on this machine: whole, resumed, cancelled, and refused with what to do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from tests.tiny import TinyModels
from tests.tools.fake_hub import FakeHub
from trainer.schema.model_sources import Progress, needed_files, read_progress

ROOT = Path(__file__).parents[2]
DEV, TEXT = "black-forest-labs/FLUX.1-dev", "comfyanonymous/flux_text_encoders"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLUXGUI_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def published(models: TinyModels) -> dict[str, bytes]:
    return {
        f"{DEV}/ae.safetensors": models.ae.read_bytes(),
        f"{DEV}/flux1-dev.safetensors": models.flux_dev.read_bytes(),
        f"{TEXT}/clip_l.safetensors": models.clip_l.read_bytes(),
        f"{TEXT}/t5xxl_fp16.safetensors": models.t5xxl.read_bytes(),
    }


def start(url: str, **more: str) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    return subprocess.Popen(
        [sys.executable, "-m", "trainer", "get-models"],
        cwd=ROOT,
        env={**environment, "HF_ENDPOINT": url, "HF_TOKEN": "hf_right", **more},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(process: subprocess.Popen[str]) -> tuple[int, str, Progress]:
    output, _ = process.communicate(timeout=60)
    progress = read_progress()
    assert progress is not None, output
    return process.returncode, output, progress


def test_the_four_files_arrive_and_are_not_fetched_twice(tiny_models: TinyModels, home: Path) -> None:
    with FakeHub(published(tiny_models), frozenset({DEV})) as hub:
        code, output, progress = finished(start(hub.url))
        assert (code, progress.state) == (0, "completed"), output
        assert {file.field for file in progress.files} == {file.field for file in needed_files("dev", "fp16")}
        assert all(file.done == file.total > 0 for file in progress.files)
        for name, content in hub.files.items():
            assert (home / "models" / name.rpartition("/")[2]).read_bytes() == content
        assert not (home / "models" / ".download").exists()
        sent = dict(hub.sent)
        assert finished(start(hub.url))[2].state == "completed"
        assert hub.sent == sent


def test_a_cancelled_download_goes_on_where_it_was(tiny_models: TinyModels, home: Path) -> None:
    last = f"{DEV}/flux1-dev.safetensors"
    # The library hands on what arrives in pieces of 10 MB.
    large = {**load_file(tiny_models.flux_dev), "padding": torch.arange(26_000_000, dtype=torch.uint8)}
    files = {**published(tiny_models), last: save(large)}
    with FakeHub(files, frozenset({DEV}), pace=0.002) as hub:
        process = start(hub.url)
        end = time.monotonic() + 50
        while hub.sent.get(last, 0) < 15_000_000 and time.monotonic() < end:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert finished(process)[2].state == "cancelled"
        begun = next((home / "models" / ".download").glob("flux1-dev*")).stat().st_size
        assert 0 < begun < len(hub.files[last])
        hub.pace = 0.0
        code, output, progress = finished(start(hub.url))
        assert (code, progress.state) == (0, "completed"), output
        assert hub.ranges[-1] == f"bytes={begun}-"
        assert (home / "models" / "flux1-dev.safetensors").read_bytes() == hub.files[last]


@pytest.mark.parametrize(
    ("token", "words", "hint"),
    [
        ("", "needs a token", "Accept the licence"),
        ("hf_no_licence", "does not give ae.safetensors to this account", "Accept the licence"),
    ],
)
def test_a_refusal_says_what_to_do(tiny_models: TinyModels, home: Path, token: str, words: str, hint: str) -> None:
    with FakeHub(published(tiny_models), frozenset({DEV})) as hub:
        code, output, progress = finished(start(hub.url, HF_TOKEN=token))
        assert (code, progress.state) == (3, "failed"), output
        assert words in progress.message
        assert hint in progress.hint
        assert f"{hub.url}/{DEV}" in progress.hint
        assert "Traceback" not in output


def test_no_network_and_a_full_disk_and_damage_are_told(tiny_models: TinyModels, home: Path) -> None:
    _, output, progress = finished(start("http://127.0.0.1:9"))
    assert "cannot be reached at http://127.0.0.1:9" in progress.message, output
    with FakeHub(published(tiny_models), frozenset({DEV}), num_bytes=1 << 50) as hub:
        _, output, progress = finished(start(hub.url))
        assert "GB are still to come" in progress.message, output
        assert hub.sent == {}
    with FakeHub(published(tiny_models), frozenset({DEV}), damage=True) as hub:
        _, output, progress = finished(start(hub.url))
        assert "arrived damaged" in progress.message, output
        assert not (home / "models" / "ae.safetensors").exists()
    other = {name: tiny_models.clip_l.read_bytes() for name in published(tiny_models)}
    with FakeHub(other, frozenset({DEV})) as hub:
        assert "is not what it should be (autoencoder)" in finished(start(hub.url))[2].message
