"""The access log: a line for each request, with who and how much, and never a key or a text."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from router_support import MODEL, cluster, say, until

KEY = "sk-access-test-0123456789abcdef"
HEADERS = {"authorization": f"Bearer {KEY}"}


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []

    class Log:
        def info(self, event: str, **fields: Any) -> None:
            found.append({"event": event, **fields})

    monkeypatch.setattr("services.router.console.access._log", Log())
    return found


async def test_a_line_for_each_request(tmp_path: Path, lines: list[dict[str, Any]]) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "a secret of mine"}]}
    async with cluster(tmp_path / "model", say("hello"), access_log=True, api_keys=(KEY,)) as made:
        whole = await made.http.post("/v1/chat/completions", json=body, headers={**HEADERS, "x-request-id": "mine"})
        await made.http.post("/v1/chat/completions", json=body | {"stream": True}, headers=HEADERS)
        await made.http.post("/v1/chat/completions", json=body)
        await made.http.post("/v1/chat/completions", json=body | {"model": "other"}, headers=HEADERS)
        await made.http.get("/v1/models?key=secret", headers=HEADERS)
        await made.http.get("/nowhere")
        await until(lambda: len(lines) == 6)
    usage = whole.json()["usage"]
    assert [(line["method"], line["path"], line["status"]) for line in lines] == [
        ("POST", "/v1/chat/completions", 200),
        ("POST", "/v1/chat/completions", 200),
        ("POST", "/v1/chat/completions", 401),
        ("POST", "/v1/chat/completions", 404),
        ("GET", "/v1/models", 200),
        ("GET", "/nowhere", 404),
    ]
    assert lines[0]["request_id"] == "mine"
    assert all(line["request_id"] and line["ms"] >= 0 and line["event"] == "access" for line in lines)
    keys = [line["key_id"] for line in lines]
    assert keys[0]
    assert keys == [keys[0], keys[0], "", keys[0], keys[0], ""]
    for line in lines[:2]:
        assert line["prompt_tokens"] == usage["prompt_tokens"]
        assert line["completion_tokens"] == usage["completion_tokens"]
    assert "prompt_tokens" not in lines[2]
    assert KEY not in repr(lines)
    assert "secret" not in repr(lines)


async def test_it_is_off_by_default(
    tmp_path: Path, lines: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with cluster(tmp_path / "model", say("hello")) as made:
        await made.http.get("/health")
    assert lines == []
