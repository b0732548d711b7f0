from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from cli_support import console
from port_support import free_port

from common.errors import ConfigError, NanoDeployError, UnavailableError
from services.cli.api import list_models, sse_events, stream_chat
from services.cli.chat import ChatOptions, run_chat
from services.cli.options import api_root


class Api(BaseHTTPRequestHandler):
    bodies: list[dict[str, Any]]

    def do_GET(self) -> None:
        if self.path.startswith("/elsewhere"):
            self._json(200, {"hello": "there"})
            return
        self._json(200, {"data": [{"id": "m1"}, {"id": "m2"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.bodies.append(body)
        text = body["messages"][-1]["content"]
        if text == "refuse":
            self._json(400, {"error": {"message": "temperature must be between 0 and 100"}})
            return
        self.send_response(200)
        self.end_headers()
        if text == "think":
            self._event({"choices": [{"delta": {"reasoning_content": "Hm", "reasoning": "Hm"}}]})
        for piece in ("Be", "cause", " of [bold]light[/bold]"):
            self._event({"choices": [{"delta": {"content": piece}}]})
        if text == "break":
            self._event({"error": {"message": "the engine died"}})
        self._event({"choices": [{"delta": {}, "finish_reason": "stop"}]})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, value: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(value).encode() + b"\n\n")

    def _json(self, status: int, value: dict[str, Any]) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def api() -> Iterator[str]:
    Api.bodies = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Api)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_answer_is_streamed_as_it_is(api: str) -> None:
    shown, out = console()
    options = ChatOptions(system="be brief", max_tokens=9, temperature=0.5, seed=1)
    assert run_chat(api, "Why is the sky blue?", options, shown) == 0
    assert out.getvalue() == "Because of [bold]light[/bold]\n"
    (body,) = Api.bodies
    assert body["messages"] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "Why is the sky blue?"},
    ]
    assert (body["model"], body["max_tokens"], body["temperature"], body["seed"]) == ("m1", 9, 0.5, 1)


def test_reasoning_is_shown_and_not_remembered(api: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(["think", "two", ""])
    shown, out = console()
    monkeypatch.setattr(shown, "input", lambda prompt: next(lines))
    assert run_chat(api, "", ChatOptions(), shown) == 0
    assert "Hm\n\nBecause of" in out.getvalue()
    assert Api.bodies[-1]["messages"][1]["content"] == "Because of [bold]light[/bold]"


def test_conversation_remembers(api: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(["one", "refuse", "two", ""])
    shown, out = console()
    monkeypatch.setattr(shown, "input", lambda prompt: next(lines))
    assert run_chat(api, "", ChatOptions(model="m2"), shown) == 0
    assert [m["role"] for m in Api.bodies[-1]["messages"]] == ["user", "assistant", "user"]
    assert Api.bodies[-1]["messages"][1]["content"] == "Because of [bold]light[/bold]"
    assert Api.bodies[-1]["model"] == "m2"
    assert "temperature must be" in out.getvalue()


def test_what_is_shown_ends_with_a_line(api: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def ends(prompt: str) -> str:
        out.write(prompt)
        raise EOFError

    shown, out = console()
    monkeypatch.setattr(shown, "input", ends)
    assert run_chat(api, "", ChatOptions(), shown) == 0
    assert out.getvalue().endswith("\n")


def test_errors_are_the_routers_own(api: str) -> None:
    shown, out = console()
    with pytest.raises(NanoDeployError, match="answered 400: temperature must be between 0 and 100"):
        run_chat(api, "refuse", ChatOptions(), shown)
    assert out.getvalue() == ""
    with pytest.raises(NanoDeployError, match="the engine died"):
        run_chat(api, "break", ChatOptions(), shown)
    assert out.getvalue().endswith("[/bold]\n"), "what follows begins a line of its own"


def test_nobody_there() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with httpx.Client() as client:
        with pytest.raises(UnavailableError, match="does not answer"):
            list_models(client, url)
        with pytest.raises(UnavailableError, match="connection broke"):
            list(stream_chat(client, url, {"messages": []}))


@pytest.mark.parametrize("given", ["http://h:8/v1", "http://h:8/v1/", "http://h:8", "http://h:8/", "h:8", "h:8/v1"])
def test_any_spelling_of_the_url(given: str) -> None:
    assert api_root(given) == "http://h:8"


def test_a_url_behind_a_path_or_tls() -> None:
    assert api_root("https://h/proxy/v1") == "https://h/proxy"
    for wrong in ("http://", "ftp://h", "h:port", ":8000"):
        with pytest.raises(ConfigError, match="no address of an API"):
            api_root(wrong)


def test_events_end_at_done() -> None:
    lines = [": comment", 'data: {"a": 1}', "", "data: [DONE]", 'data: {"a": 2}']
    assert list(sse_events(iter(lines))) == [{"a": 1}]


def test_no_cluster_is_said_clearly(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "services.cli.main", "chat", "hello"],
        env={**os.environ, "NANODEPLOY_STATE_DIR": str(tmp_path)},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.strip() == "error: no cluster 'default' is up: start one with `nanodeploy up`, or give --url"


def test_what_is_no_api_says_so_in_one_line(api: str) -> None:
    with httpx.Client() as client, pytest.raises(UnavailableError, match="is no OpenAI API"):
        list_models(client, f"{api}/elsewhere")
