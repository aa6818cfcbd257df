"""Who may ask, and what answers carry."""

from __future__ import annotations

import base64
import socket

import pytest
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

from fluxgui.launch import main, take_port
from fluxgui.server import Guard, Login


def client(login: Login | None = None) -> TestClient:
    return TestClient(Guard(PlainTextResponse("the page"), login), base_url="http://127.0.0.1:7860")


def basic(text: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(text.encode()).decode()}


def test_this_machine_is_answered_with_strict_headers() -> None:
    answer = client().get("/")
    assert (answer.status_code, answer.text) == (200, "the page")
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:7860", "127.0.0.1.evil.example", "192.168.1.5:7860", ""]
)
def test_a_foreign_host_name_is_refused_without_login(host: str) -> None:
    assert client().get("/", headers={"Host": host}).status_code == 421


@pytest.mark.parametrize("host", ["localhost:7860", "127.0.0.1", "[::1]:7860"])
def test_this_machines_names_are_answered(host: str) -> None:
    assert client().get("/", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1"])
def test_a_request_from_another_site_is_refused(origin: str) -> None:
    assert client().post("/", headers={"Origin": origin}).status_code == 403


def test_a_request_from_the_page_itself_is_answered() -> None:
    assert client().post("/", headers={"Origin": "http://127.0.0.1:7860"}).status_code == 200


def test_with_a_login_only_the_right_user_and_password_get_in() -> None:
    guarded = client(Login.parse("me:long-password:with colon"))
    assert guarded.get("/", headers={"Host": "gpu-box"}).status_code == 401
    assert guarded.get("/", headers=basic("me:long-password")).status_code == 401
    assert guarded.get("/", headers=basic("you:long-password:with colon")).status_code == 401
    assert guarded.get("/", headers={"Authorization": "Basic %%%"}).status_code == 401
    assert guarded.get("/", headers={"Host": "gpu-box", **basic("me:long-password:with colon")}).status_code == 200


@pytest.mark.parametrize("text", ["", "me", ":password1", "me:short"])
def test_a_weak_or_missing_login_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="FLUXGUI_AUTH"):
        Login.parse(text)


def test_listening_without_a_login_ends_with_an_explanation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("FLUXGUI_AUTH", raising=False)
    assert main(["--listen", "--no-browser"]) == 2
    assert "FLUXGUI_AUTH must be user:password" in capsys.readouterr().err


def test_a_taken_port_is_named_and_another_one_is_found_when_none_was_asked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["--port", str(port), "--no-browser"]) == 3
        assert f"port {port} cannot be used" in capsys.readouterr().err
    first, second = take_port(None, "127.0.0.1"), take_port(None, "127.0.0.1")
    with first, second:
        assert first.getsockname()[1] != second.getsockname()[1]
        assert first.getsockname()[0] == "127.0.0.1"
