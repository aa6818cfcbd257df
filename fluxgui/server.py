"""The web server around the page: who may ask, what headers say, and a run's files by name.

Nothing is served by path. A run's file is served when the run's events name it, a dataset's picture when its folder lists
it, and that is all there is beside gradio's own routes.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import mimetypes
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import quote, urlsplit

import gradio as gr
from fastapi import FastAPI, HTTPException
from fastapi.responses import FileResponse, HTMLResponse, Response, StreamingResponse
from starlette.background import BackgroundTask
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fluxgui.dataset_extras import mask_path
from fluxgui.dataset_zip import write_zip
from fluxgui.datasets import find_dataset, picture_path
from fluxgui.jobs import find_job, look_at_job
from fluxgui.library import find_entry
from fluxgui.library_jobs import made_picture
from fluxgui.pictures import safe_name
from fluxgui.run_export import report, zip_stream
from fluxgui.run_view import status_words
from fluxgui.runs import RunWatcher, find_run, served_file
from fluxgui.theme import STYLE, make_theme
from fluxgui.thumbnails import SIZES, thumbnail
from trainer.schema.folders import data_home
from trainer.schema.settings import read_settings

MAX_UPLOAD_BYTES: Final = 64 * 1024 * 1024
MAX_STATES: Final = 50
"""Older runs ended long ago."""
LOCAL_NAMES: Final = frozenset({"localhost", "127.0.0.1", "::1"})

# Everything comes from this server. gradio's front end needs inline scripts and evaluates its own templates.
CONTENT_POLICY: Final = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; "
    "worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
HEADERS: Final = {
    "Content-Security-Policy": CONTENT_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}

SCRIPT: Final = Path(__file__).with_name("browser.js")
PICTURES_SCRIPT: Final = Path(__file__).with_name("samples.js")


@dataclass(frozen=True)
class Login:
    """One user; only digests are kept."""

    user: bytes
    password: bytes

    @classmethod
    def parse(cls, text: str) -> Login:
        """From "user:password". Raises `ValueError` when either is missing or the password is short."""
        user, colon, password = text.partition(":")
        if not colon or not user:
            raise ValueError("FLUXGUI_AUTH must be user:password")
        if len(password) < 8:
            raise ValueError("the password in FLUXGUI_AUTH must have at least 8 characters")
        return cls(_digest(user), _digest(password))

    def accepts(self, authorization: str | None) -> bool:
        """Whether the value of an Authorization header names this user with this password (HTTP Basic)."""
        scheme, _, encoded = (authorization or "").partition(" ")
        if scheme.lower() != "basic":
            return False
        try:
            user, _, password = base64.b64decode(encoded, validate=True).decode("utf-8").partition(":")
        except (binascii.Error, UnicodeDecodeError):
            return False
        user_fits = hmac.compare_digest(_digest(user), self.user)
        return hmac.compare_digest(_digest(password), self.password) and user_fits


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8")).digest()


class Guard:
    """Refuses requests that another site's page could have caused, and, with a login, everybody else's.

    Without a login only this machine's names are answered, so that a foreign name that resolves to 127.0.0.1 leads nowhere.
    """

    def __init__(self, app: ASGIApp, login: Login | None) -> None:
        self._app = app
        self._login = login

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return  # no websockets here
        headers = Headers(scope=scope)
        refusal = self._refusal(headers)
        if refusal is not None:
            await refusal(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                response_headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    response_headers[name] = value
            await send(message)

        await self._app(scope, receive, send_with_headers)

    def _refusal(self, headers: Mapping[str, str]) -> PlainTextResponse | None:
        host = headers.get("host", "")
        if self._login is None and (urlsplit(f"//{host}").hostname or "") not in LOCAL_NAMES:
            return PlainTextResponse("This page answers to localhost only.", status_code=421)
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            return PlainTextResponse("Requests from other sites are refused.", status_code=403)
        if self._login is not None and not self._login.accepts(headers.get("authorization")):
            return PlainTextResponse(
                "User and password, please.",
                status_code=401,
                headers={"WWW-Authenticate": 'Basic realm="FluxGUI", charset="UTF-8"'},
            )
        return None


def dataset_zip(dataset: str) -> FileResponse:
    """A dataset's pictures and captions as one file, which is removed when it was sent."""
    found = find_dataset(dataset)
    if found is None:
        raise HTTPException(status_code=404, detail="There is no such dataset.")
    folder = data_home() / "cache" / "zip"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{uuid.uuid4().hex}.zip"
    write_zip(found, file)
    return FileResponse(
        file, media_type="application/zip", filename=f"{found.name}.zip", background=BackgroundTask(file.unlink)
    )


UNREADABLE: Final = (
    '<svg xmlns="http://www.w3.org/2000/svg" width="256" height="256" viewBox="0 0 256 256">'
    '<rect width="256" height="256" fill="#fee2e2"/><path d="M88 88l80 80m0-80l-80 80" stroke="#b91c1c" '
    'stroke-width="14" stroke-linecap="round"/></svg>'
)


def dataset_picture(dataset: str, size: str, name: str, mask: bool = False) -> Response:
    """A dataset's picture, or its mask, made small; a cross where it cannot be decoded."""
    found = find_dataset(dataset)
    find = mask_path if mask else picture_path
    path = find(found, name) if found is not None and size in SIZES else None
    if path is None:
        raise HTTPException(status_code=404, detail="There is no such picture.")
    return _small_picture(path, size)


def _small_picture(path: Path, size: str) -> Response:
    kept = thumbnail(path, size)
    if kept is None:
        return Response(UNREADABLE, media_type="image/svg+xml", headers={"Cache-Control": "no-store"})
    return FileResponse(kept, media_type="image/webp", headers={"Cache-Control": "private, max-age=3600"})


def library_preview(entry_id: str) -> Response:
    """A LoRA's picture made small."""
    entry = find_entry(entry_id)
    kept = thumbnail(entry.preview, "small") if entry is not None and entry.preview is not None else None
    if kept is None:
        raise HTTPException(status_code=404, detail="There is no such picture.")
    return FileResponse(kept, media_type="image/webp", headers={"Cache-Control": "private, max-age=60"})


def library_file(entry_id: str) -> FileResponse:
    """A LoRA of the library, under the name that it has there."""
    entry = find_entry(entry_id)
    if entry is None:
        raise HTTPException(status_code=404, detail="There is no such file.")
    name = f"{safe_name(entry.title)}.safetensors"
    return FileResponse(entry.path, media_type="application/octet-stream", filename=name)


def library_picture(job_id: str, name: str) -> FileResponse:
    """A picture that a job of the library made."""
    job = find_job(job_id)
    path = made_picture(look_at_job(job), name) if job is not None else None
    if path is None:
        raise HTTPException(status_code=404, detail="There is no such picture.")
    return FileResponse(path, media_type="image/png", headers={"Cache-Control": "private, max-age=3600"})


def _download(name: str) -> dict[str, str]:
    """Headers of something to keep; a run's id is plain ASCII."""
    return {"Content-Disposition": f'attachment; filename="{quote(name)}"', "Cache-Control": "no-store"}


def head_of_page(theme: str) -> str:
    """The page's own script; `theme` is for browsers in which none was chosen."""
    script = SCRIPT.read_text(encoding="utf-8").replace("THEME", theme)
    pictures = PICTURES_SCRIPT.read_text(encoding="utf-8")
    return f'<meta name="color-scheme" content="light dark"><script>{script}{pictures}</script>'


def make_server(page: gr.Blocks, watcher: RunWatcher, login: Login | None, *, port: int) -> ASGIApp:
    """The whole application, ready for an ASGI server."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    def run_file(run_id: str, kind: str, name: str) -> Response:
        run = find_run(run_id)
        if run is not None and (kind, name) == ("all", f"{run_id}.zip"):
            return StreamingResponse(zip_stream(run.path), media_type="application/zip", headers=_download(name))
        if run is not None and (kind, name) == ("report", f"{run_id}.html"):
            return HTMLResponse(report(watcher.look(run)), headers=_download(name))
        path = served_file(watcher.look(run), kind, name) if run is not None else None
        if path is None:
            raise HTTPException(status_code=404, detail="There is no such file.")
        if kind == "thumbs":
            return _small_picture(path, "small")
        if kind == "samples":
            media_type = mimetypes.guess_type(path.name)[0]
            return FileResponse(path, media_type=media_type, headers={"Cache-Control": "private, max-age=3600"})
        if kind == "log":
            return FileResponse(path, media_type="text/plain; charset=utf-8", headers={"Cache-Control": "no-store"})
        return FileResponse(path, media_type="application/octet-stream", filename=path.name)

    def run_states() -> dict[str, dict[str, str]]:
        """State of each run, for the browser's notifications."""
        return {
            view.run_id: {
                "state": view.status.state,
                "text": f"{view.name}: {status_words(view.status, view.state)}",
            }
            for view in watcher.look_at_all()[:MAX_STATES]
        }

    app.add_api_route("/run-states", run_states, methods=["GET"])
    app.add_api_route("/files/{run_id}/{kind}/{name}", run_file, methods=["GET"])
    app.add_api_route("/pictures/{dataset}/{size}/{name}", dataset_picture, methods=["GET"])
    app.add_api_route("/library/preview/{entry_id}", library_preview, methods=["GET"])
    app.add_api_route("/library/file/{entry_id}", library_file, methods=["GET"])
    app.add_api_route("/library/picture/{job_id}/{name}", library_picture, methods=["GET"])
    app.add_api_route("/datasets/{dataset}/zip", dataset_zip, methods=["GET"])
    gr.mount_gradio_app(
        app,
        page,
        path="/",
        server_name="127.0.0.1",
        server_port=port,
        theme=make_theme(),
        css=STYLE.read_text(encoding="utf-8"),
        head=head_of_page(read_settings().theme),
        footer_links=[],
        run_history=False,
        max_file_size=MAX_UPLOAD_BYTES,
        show_error=True,
        ssr_mode=False,
        allowed_paths=[],
    )
    return Guard(app, login)
