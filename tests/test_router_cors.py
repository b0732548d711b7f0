"""Web pages of other origins: what a browser asks before and with their requests, and what it lets them read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from router_support import MODEL, cluster, say

CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
PAGE = "https://page.example"
ASKED = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
ALLOWED = "access-control-allow-origin"


async def test_a_page_may_ask_and_read_answers_streams_and_errors(tmp_path: Path) -> None:
    async with cluster(tmp_path, say("one two three"), api_keys=("secret-key-1",)) as made:
        before = await made.http.options("/v1/chat/completions", headers={"origin": PAGE, **ASKED})
        assert before.status_code == 200
        assert before.headers[ALLOWED] == "*"
        assert "POST" in before.headers["access-control-allow-methods"]
        assert before.headers["access-control-allow-headers"] == "authorization,content-type"
        for key, stream, status in (("secret-key-1", False, 200), ("secret-key-1", True, 200), ("wrong", False, 401)):
            headers = {"origin": PAGE, "authorization": f"Bearer {key}"}
            answer = await made.http.post("/v1/chat/completions", json={**CHAT, "stream": stream}, headers=headers)
            assert answer.status_code == status
            assert answer.headers[ALLOWED] == "*"
            assert "x-request-id" in answer.headers["access-control-expose-headers"]
            assert "access-control-allow-credentials" not in answer.headers
        models = await made.http.get("/v1/models", headers={"origin": PAGE, "authorization": "Bearer secret-key-1"})
        assert models.headers[ALLOWED] == "*"


async def test_who_says_no_origin_and_the_dashboard_hear_nothing_of_it(tmp_path: Path) -> None:
    async with cluster(tmp_path, say("one two three")) as made:
        plain = await made.http.post("/v1/chat/completions", json=CHAT)
        board = await made.http.get("/dashboard/data", headers={"origin": PAGE})
        assert plain.status_code == board.status_code == 200
        for answer in (plain, board):
            assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize("origins", [(PAGE,), ()], ids=["one", "none"])
async def test_only_the_origins_of_the_config(tmp_path: Path, origins: tuple[str, ...]) -> None:
    async with cluster(tmp_path, say("one two three"), allowed_origins=origins) as made:
        for origin in (PAGE, "https://other.example"):
            answer = await made.http.post("/v1/chat/completions", json=CHAT, headers={"origin": origin})
            assert answer.status_code == 200, "it is the browser that keeps it from the page"
            assert answer.headers.get(ALLOWED) == (origin if origin in origins else None)
            before = await made.http.options("/v1/chat/completions", headers={"origin": origin, **ASKED})
            assert before.headers.get(ALLOWED) == (origin if origin in origins else None)
            assert (before.status_code == 200) == (origin in origins)
