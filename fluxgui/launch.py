"""Starts the page: reads the command line, takes a port, serves, opens the browser."""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import sys
import threading
import webbrowser
from collections.abc import Sequence
from typing import TextIO

import uvicorn

from fluxgui.demo import start_demo
from fluxgui.importing import read_only_allowed
from fluxgui.language import NAMES, choose_language
from fluxgui.machine import examine
from fluxgui.page import build_page
from fluxgui.run_start import QueueKeeper
from fluxgui.runs import RunWatcher
from fluxgui.server import Login, make_server
from fluxgui.system_line import LoadSampler
from trainer.schema.base import UserError
from trainer.schema.settings import read_settings

FIRST_PORT = 7860
NUM_PORTS = 20
EXIT_OPTIONS, EXIT_FIXABLE = 2, 3


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="app.py", description="The page of FluxGUI: trains FLUX.1 LoRAs.")
    parser.add_argument("--port", type=int, help=f"port of the page (default: the first free one from {FIRST_PORT})")
    parser.add_argument("--no-browser", action="store_true", help="do not open the browser")
    parser.add_argument("--demo", action="store_true", help="start the demo run at once and show it")
    parser.add_argument(
        "--listen",
        action="store_true",
        help="answer other machines too; needs FLUXGUI_AUTH=user:password in the environment",
    )
    parser.add_argument("--doctor", action="store_true", help="say what keeps this machine from training, and end")
    parser.add_argument(
        "--language", choices=sorted(NAMES), help="language of the page (default: that of the settings)"
    )
    arguments = parser.parse_args(argv)
    language = arguments.language or read_settings().language
    if language in NAMES:
        choose_language(language)

    if arguments.doctor:
        return _doctor()

    login: Login | None = None
    if arguments.listen:
        try:
            login = Login.parse(os.environ.get("FLUXGUI_AUTH", ""))
        except ValueError as error:
            return _fail(f"--listen: {error}.", EXIT_OPTIONS)
        read_only_allowed()
    try:
        listener = take_port(arguments.port, "0.0.0.0" if arguments.listen else "127.0.0.1")
    except (OSError, OverflowError) as error:
        return _fail(f"port {arguments.port or FIRST_PORT} cannot be used: {error}.", EXIT_FIXABLE)
    port = int(listener.getsockname()[1])

    path = "/"
    if arguments.demo:
        try:
            path = f"/?tab=runs&run={start_demo().path.name}"
        except UserError as error:
            return _fail(str(error), EXIT_FIXABLE)

    watcher = RunWatcher()
    queue, sampler = QueueKeeper(), LoadSampler()
    queue.start()
    sampler.start()
    application = make_server(build_page(watcher, sampler), watcher, login, port=port)
    server = uvicorn.Server(uvicorn.Config(application, log_level="warning", timeout_graceful_shutdown=1))
    address = f"http://127.0.0.1:{port}{path}"
    _say(f"FluxGUI is at {address}")
    if arguments.listen:
        _say(f"It answers other machines too, at port {port}, with the user and password of FLUXGUI_AUTH.")
    if not arguments.no_browser:
        threading.Timer(0.5, webbrowser.open, [address]).start()
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn hands Ctrl-C on after it has shut down
        server.run(sockets=[listener])
    queue.stop()
    sampler.stop()
    return 0


def _doctor() -> int:
    """Print what was found; the exit code says whether something has to be done before training."""
    found = examine()
    for each in found:
        mark = {"good": "ok", "warn": "note", "bad": "WRONG"}[each.verdict]
        _say(f"{mark:5}  {each.text}" + (f"\n       {each.remedy}" if each.remedy else ""))
    return EXIT_FIXABLE if any(each.verdict == "bad" for each in found) else 0


def take_port(port: int | None, host: str) -> socket.socket:
    """A socket bound to `port`, or to the first free one of the usual range when it is None."""
    candidates = range(FIRST_PORT, FIRST_PORT + NUM_PORTS) if port is None else (port,)
    problem: OSError | None = None
    for candidate in candidates:
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        if sys.platform != "win32":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, candidate))
            listener.listen()  # at once, so that a second start sees the port as taken
        except OSError as error:
            listener.close()
            problem = error
        else:
            return listener
    assert problem is not None
    raise problem


def _fail(message: str, code: int) -> int:
    _say(message, sys.stderr)
    return code


def _say(text: str, stream: TextIO | None = None) -> None:
    print(text, file=stream, flush=True)
