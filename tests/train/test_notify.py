"""The end of a run is told to the user's program and address."""

from __future__ import annotations

import json
import logging
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from trainer.schema.events import EventWriter
from trainer.schema.run_folder import RunFolder
from trainer.schema.settings import change_settings
from trainer.train.notify import notify_end, run_summary, try_out


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.setenv("FLUXGUI_HOME", str(tmp_path / "home"))
    run = RunFolder.create(
        tmp_path / "runs", "cat", config_toml="", dataset_toml="", sample_prompts="", info={"name": "cat"}
    )
    events = EventWriter(run.events_jsonl, 1)
    events.write("run_started")
    events.write("error", message="out of memory")
    events.write("run_finished", outcome="failed", steps=12)
    return run


def test_a_program_is_started_without_a_shell_and_told_what_happened(run: RunFolder, tmp_path: Path) -> None:
    code = "import os, sys, json; open(sys.argv[1], 'w').write(json.dumps([sys.argv[2], dict(os.environ)]))"
    change_settings(notify_command=(sys.executable, "-c", code, str(tmp_path / "told"), "$HOME; echo `x`"))
    notify_end(run)
    word, environment = json.loads((tmp_path / "told").read_text(encoding="utf-8"))
    assert word == "$HOME; echo `x`"
    assert environment["FLUXGUI_OUTCOME"] == "failed"
    assert environment["FLUXGUI_TEXT"] == "FluxGUI: cat failed after 12 steps: out of memory"
    assert "HF_TOKEN" not in environment


def test_an_address_is_sent_json(run: RunFolder) -> None:
    bodies: list[dict[str, object]] = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            return

    server = HTTPServer(("127.0.0.1", 0), Hook)
    threading.Thread(target=server.handle_request, daemon=True).start()
    change_settings(notify_webhook=f"http://127.0.0.1:{server.server_port}/hook")
    notify_end(run)
    server.server_close()
    assert bodies[0]["content"] == "FluxGUI: cat failed after 12 steps: out of memory"
    assert bodies[0]["run"] == run.path.name


def test_what_does_not_work_is_a_line_in_the_log_that_keeps_the_address(
    run: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    change_settings(notify_command=("/no/such/program",), notify_webhook="http://127.0.0.1:9/secret-key")
    with caplog.at_level(logging.WARNING, logger="trainer"):
        notify_end(run)
    assert "did not work" in caplog.text
    assert "did not answer" in caplog.text
    assert "secret-key" not in caplog.text


def test_a_resumed_run_forgets_the_error_of_the_attempt_before(run: RunFolder) -> None:
    events = EventWriter(run.events_jsonl, 2)
    events.write("run_started")
    events.write("run_finished", outcome="completed", steps=20)
    assert run_summary(run)["text"] == "FluxGUI: cat completed after 20 steps"


def test_the_settings_can_be_tried_without_a_run(run: RunFolder, tmp_path: Path) -> None:
    code = "import os, sys; open(sys.argv[1], 'w').write(os.environ['FLUXGUI_TEXT'])"
    change_settings(notify_command=(sys.executable, "-c", code, str(tmp_path / "told")))
    assert try_out() == []
    assert (tmp_path / "told").read_text(encoding="utf-8") == "FluxGUI: this is a trial"
    change_settings(notify_command=(sys.executable, "-c", "import sys; sys.exit('no sound')"))
    assert try_out() == ["the program ended with code 1: no sound\n"]
