"""Who may ask, what a request may be, and what is told to whom: a real router, scripted workers."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import openai
import pytest
import router_support as support

from common.errors import UnauthenticatedError, UnavailableError
from common.types.keys import hashed_key
from services.router.admission.callers import ANYONE, Caller, Callers

KEY, OTHER = "sk-test-of-one-tenant", "sk-test-of-another"
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


# -- the table --


def test_open_without_keys_and_closed_with_one() -> None:
    assert Callers(()).caller([(b"authorization", b"Bearer whatever")]) is ANYONE
    callers = Callers((KEY, f"sha256:{hashed_key(OTHER)}"))
    for key in (KEY, OTHER):
        assert callers.caller([(b"authorization", f"Bearer {key}".encode())]).key_id == hashed_key(key)[:12]
        assert callers.caller([(b"x-api-key", key.encode())]).key_id == hashed_key(key)[:12]
    for headers in ([], [(b"authorization", b"Bearer nope")], [(b"authorization", b"Basic " + KEY.encode())]):
        with pytest.raises(UnauthenticatedError):
            callers.caller(headers)


def test_a_hash_is_not_a_key() -> None:
    callers = Callers((KEY,))
    with pytest.raises(UnauthenticatedError):
        callers.caller([(b"authorization", hashed_key(KEY).encode())])
    with pytest.raises(UnauthenticatedError):
        callers.caller([(b"authorization", b"Bearer sha256:" + hashed_key(KEY).encode())])


def test_nothing_is_served_before_it_is_known_whether_keys_are_needed() -> None:
    callers = Callers((), admin_token="admin-token")
    with pytest.raises(UnavailableError):
        callers.caller([])
    assert callers.caller([(b"authorization", b"Bearer admin-token")]).key_id == "admin"
    callers.replace({})
    assert callers.caller([]) is ANYONE
    with pytest.raises(UnauthenticatedError):
        Callers((), required=True).caller([])


def test_salts_keep_tenants_apart() -> None:
    callers = Callers((KEY, OTHER))
    mine, its = (callers.caller([(b"authorization", f"Bearer {key}".encode())]) for key in (KEY, OTHER))
    salts = [caller.salt(own) for caller in (mine, its) for own in ("", "a", mine.salt(""))]
    assert len(set(salts)) == len(salts)
    assert mine.salt("a") == mine.salt("a")
    assert ANYONE.salt("a") == "a"


def test_a_request_comes_no_sooner_than_its_key() -> None:
    urgent = Caller("id", "tenant", -3)
    assert [urgent.lowered(wanted) for wanted in (0, 2, -9, 2**31 - 1)] == [-3, -1, -3, 2**31 - 4]
    assert Caller("id", "tenant", 5).lowered(2**31 - 1) == 2**31 - 1
    assert [ANYONE.lowered(wanted) for wanted in (0, 2, -9)] == [0, 2, -9]


def test_a_known_key_costs_a_look_up() -> None:
    callers = Callers((KEY,))
    headers = [(b"host", b"h"), (b"user-agent", b"u"), (b"authorization", f"Bearer {KEY}".encode())]
    callers.caller(headers)
    start = time.perf_counter()
    for _ in range(10_000):
        callers.caller(headers)
    assert (time.perf_counter() - start) / 10_000 < 20e-6, "a few microseconds, with room for a busy machine"


# -- over HTTP --


async def test_a_key_is_needed_where_there_is_one(tmp_path: Path) -> None:
    async with support.cluster(tmp_path, support.say("hello"), api_keys=(KEY,)) as made:
        for headers in ({}, bearer("sk-wrong"), {"Authorization": KEY}):
            for answer in (
                await made.http.post("/v1/chat/completions", json=CHAT, headers=headers),
                await made.http.get("/v1/models", headers=headers),
                await made.http.get("/v1/nothing", headers=headers),
                await made.http.post("/tokenize", json={"prompt": "a"}, headers=headers),
            ):
                assert answer.status_code == 401
                assert answer.json()["error"]["code"] == "invalid_api_key"
                assert answer.json()["error"]["type"] == "invalid_request_error"
                assert answer.headers["www-authenticate"] == "Bearer"
        assert not made.worker.requests
        for path in ("/health", "/ready", "/metrics"):
            assert (await made.http.get(path)).status_code == 200
        answer = await made.http.post("/v1/chat/completions", json=CHAT, headers=bearer(KEY))
        assert answer.status_code == 200
        client = openai.AsyncOpenAI(base_url=f"{made.url}/v1", api_key="sk-wrong", max_retries=0)
        with pytest.raises(openai.AuthenticationError, match="Incorrect API key"):
            await client.models.list()
        await client.close()


async def test_tenants_do_not_share_prefixes_and_keep_their_own_salts(tmp_path: Path) -> None:
    async with support.cluster(tmp_path, support.say("hello"), api_keys=(KEY, OTHER)) as made:
        for key, salt in ((KEY, None), (OTHER, None), (KEY, "s"), (OTHER, "s"), (KEY, "s")):
            body = CHAT if salt is None else {**CHAT, "cache_salt": salt}
            answer = await made.http.post("/v1/chat/completions", json=body, headers=bearer(key))
            assert answer.status_code == 200, answer.text
        salts = [request.cache_salt for request in made.worker.requests]
        assert len(set(salts)) == 4
        assert salts[2] == salts[4]


@pytest.mark.parametrize(
    ("change", "param", "said"),
    [
        ({"n": 5}, "n", "at most 4"),
        ({"timeout": 0.0}, "timeout", "above 0"),
        ({"timeout": -1.0}, "timeout", "above 0"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}] * 3}]},
            "messages",
            "at most 2 are allowed",
        ),
    ],
)
async def test_what_a_request_may_be(tmp_path: Path, change: dict[str, Any], param: str, said: str) -> None:
    async with support.cluster(tmp_path, support.say("hello"), max_n=4, max_images=2) as made:
        answer = await made.http.post("/v1/chat/completions", json=CHAT | change)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, param)
        assert said in error["message"]


async def test_too_many_prompts_and_too_large_a_body(tmp_path: Path) -> None:
    async with support.cluster(tmp_path, support.say("hello"), max_prompts=2, max_body_bytes=2000) as made:
        answer = await made.post("/v1/completions", prompt=["a", "b", "c"])
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")
        answer = await made.post("/v1/completions", prompt="a" * 3000)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")


@pytest.mark.parametrize("how", ["header", "field"])
async def test_a_deadline_of_the_callers(tmp_path: Path, how: str) -> None:
    async with support.cluster(tmp_path, support.say("hello there", delay_s=0.5), request_timeout_s=20) as made:
        body = CHAT | ({"timeout": 0.3} if how == "field" else {})
        headers = {"x-request-timeout": "0.3"} if how == "header" else {}
        start = time.monotonic()
        answer = await made.http.post("/v1/chat/completions", json=body, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
        assert time.monotonic() - start < 5
        answer = await made.http.post("/v1/chat/completions", json=CHAT, headers={"x-request-timeout": "soon"})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "x-request-timeout")
