"""A hub on this machine: gives files as the real one does, gated ones with a token only, and counts what it gave."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class FakeHub:
    """`files` by "owner/name/file". `pace` is seconds of rest per block of 64 KiB."""

    files: Mapping[str, bytes]
    gated: frozenset[str] = frozenset()
    token: str = "hf_right"
    pace: float = 0.0
    sent: dict[str, int] = field(default_factory=dict[str, int])
    ranges: list[str] = field(default_factory=list[str])
    damage: bool = False
    num_bytes: int | None = None
    """What it says a file has, where that is not the truth."""

    def __enter__(self) -> FakeHub:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self._answer(with_body=False)

            def do_GET(self) -> None:
                self._answer(with_body=True)

            def log_message(self, format: str, *args: object) -> None:
                return

            def _answer(self, *, with_body: bool) -> None:
                name = self.path.lstrip("/").replace("/resolve/main", "")
                repo = name.rpartition("/")[0]
                sent_token = self.headers.get("authorization", "").removeprefix("Bearer ")
                if repo in hub.gated and sent_token != hub.token:
                    status, code = (403, "GatedRepo") if sent_token == "hf_no_licence" else (401, "GatedRepo")
                    return self._refuse(status, code)
                if name not in hub.files:
                    return self._refuse(404, "EntryNotFound")
                data = hub.files[name]
                start = 0
                asked = self.headers.get("Range")
                if asked:
                    start = int(asked.removeprefix("bytes=").partition("-")[0])
                    if with_body:
                        hub.ranges.append(asked)
                self.send_response(206 if asked else 200)
                self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
                self.send_header("X-Repo-Commit", "0" * 40)
                self.send_header("Content-Length", str(len(data) - start))
                if asked:
                    self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
                if hub.num_bytes is not None and not with_body:
                    self.send_header("X-Linked-Size", str(hub.num_bytes))
                self.end_headers()
                if not with_body:
                    return None
                for place in range(start, len(data), 65536):
                    block = data[place : place + 65536]
                    try:
                        self.wfile.write(block[::-1] if hub.damage else block)
                    except OSError:
                        return None
                    hub.sent[name] = hub.sent.get(name, 0) + len(block)
                    time.sleep(hub.pace)
                return None

            def _refuse(self, status: int, code: str) -> None:
                self.send_response(status)
                self.send_header("X-Error-Code", code)
                self.send_header("X-Error-Message", code)
                self.send_header("Content-Length", "0")
                self.end_headers()

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"
