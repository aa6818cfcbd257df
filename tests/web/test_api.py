"""The endpoints for programs: the example of docs/api.md runs as it stands there, and nothing else is listed."""

from __future__ import annotations

import base64
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from gradio_client import Client

from tests.tiny import TinyModels
from tests.web.page_process import ROOT, App
from trainer.tools.tiny_models import make_images

pytestmark = [pytest.mark.web, pytest.mark.timeout(300)]

EXAMPLE = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "api.md").read_text("utf-8"), re.DOTALL)


def command(models: TinyModels) -> str:
    words = [
        "python flux_train_network.py",
        *models.arguments(),
        "--network_dim=2 --max_train_steps=3 --output_name=cat",
    ]
    words += ["--t5xxl_max_token_length=16 --learning_rate=1e-3 --network_train_unet_only --device=cpu --wxyzq=1"]
    return " ".join(words)


def dataset(folder: Path) -> str:
    return f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{folder}'\nnum_repeats = 3\n"


def test_the_example_of_the_documentation_trains_a_lora(app: App, tiny_models: TinyModels, tmp_path: Path) -> None:
    assert EXAMPLE is not None
    make_images(tmp_path / "images", 1)
    code = EXAMPLE[1].replace("http://127.0.0.1:7860/", app.url).replace("--w 512 --h 512", "--w 64 --h 64 --s 1")
    code = f"PROJECT = {command(tiny_models)!r}\nDATASET = {dataset(tmp_path / 'images')!r}\n{code}"
    environment = {**os.environ, "FLUXGUI_HOME": str(app.home)}
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert "not understood: --wxyzq=1" in found.stdout
    assert "completed []" in found.stdout
    saved = app.runs()[0] / "checkpoints" / "cat.safetensors"
    assert (tmp_path / "cat.safetensors").read_bytes() == saved.read_bytes()


def test_only_the_named_endpoints_are_listed_and_refusals_say_why(
    app: App, tiny_models: TinyModels, tmp_path: Path
) -> None:
    client = Client(app.url, verbose=False)
    listed = client.view_api(return_format="dict")
    assert isinstance(listed, dict)
    assert sorted(listed["named_endpoints"]) == ["/create", "/download", "/list", "/start", "/status", "/stop"]
    assert not listed["unnamed_endpoints"]
    assert client.predict(api_name="/list") == []
    with pytest.raises(Exception, match="there is no run nothing"):
        client.predict(run="nothing", api_name="/status")
    with pytest.raises(Exception, match="does not exist"):
        client.predict(
            project=f"{command(tiny_models)} --train_data_dir=/gone",
            dataset="",
            prompts="",
            name="",
            api_name="/create",
        )
    made = client.predict(
        project=command(tiny_models), dataset=dataset(tmp_path), prompts="", name="mine", api_name="/create"
    )
    assert client.predict(run=made["run"], api_name="/status")["state"] == "stopped"
    with pytest.raises(Exception, match="is not running"):
        client.predict(run=made["run"], api_name="/stop")
    with pytest.raises(ValueError, match="Cannot find a function"):
        client.predict(api_name="/check")
    answer = httpx.post(app.url + "gradio_api/call/list", json={"data": []}, headers={"Origin": "http://evil.example"})
    assert answer.status_code == 403


@pytest.fixture
def guarded_app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("FLUXGUI_AUTH", "me:long password")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "app.py", "--no-browser", "--listen", "--port", str(port)],
        cwd=ROOT,
        env={**os.environ, "FLUXGUI_HOME": str(tmp_path / "home")},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert "FluxGUI is at" in process.stdout.readline()
    yield f"http://127.0.0.1:{port}/"
    process.kill()
    process.communicate()


def test_with_a_login_a_program_gives_user_and_password(guarded_app: str) -> None:
    right = {"Authorization": "Basic " + base64.b64encode(b"me:long password").decode()}
    assert Client(guarded_app, headers=right, verbose=False).predict(api_name="/list") == []
    with pytest.raises(Exception, match="credentials"):
        Client(guarded_app, verbose=False)
