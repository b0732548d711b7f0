"""Wrong, hostile and unlucky requests: each gets its own clear answer, and the router goes on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from router_support import ENGINE_FAILED, MAX_MODEL_LEN, MODEL, Cluster, cluster, events, say, tokenizer, until

from common.errors import OverloadedError, UnavailableError
from common.types import Failure, WorkerState
from services.router import protocol

CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
TEXT: dict[str, Any] = {"model": MODEL, "prompt": "Hi"}


@pytest.fixture
async def tiny(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with cluster(tmp_path / "model", say("Hello, world!"), max_body_bytes=12 * 2**20) as made:
        yield made


async def assert_alive(made: Cluster) -> None:
    answer = await made.post("/v1/chat/completions", **CHAT)
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["message"]["content"] == "Hello, world!"


ALLOWED_MODE = "tool_choice.allowed_tools.mode"
BOTH: list[tuple[dict[str, Any], str]] = [
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 2**31}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"min_tokens": 9, "max_tokens": 5}, "min_tokens"),
    ({"stop": [""]}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": "x" * 5000}, "stop"),
    ({"stop": 5}, "stop"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"stop_token_ids": [10**6]}, "stop_token_ids"),
    ({"seed": 2**65}, "seed"),
    ({"seed": "x"}, "seed"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -2.5}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 200}}, "logit_bias"),
    ({"logit_bias": {"99999": 1}}, "logit_bias"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ({"priority": 2**40}, "priority"),
    ({"metadata": {"a": 1}}, "metadata.a"),
    ({"response_format": {"type": "x"}}, "response_format"),
    ({"response_format": {"type": "json_object", "schema": {}}}, "response_format.schema"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": 5}}}, "response_format.json_schema.name"),
    ({"tempreature": 1}, "tempreature"),
    ({"model": 5}, "model"),
]
CHATS: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": "Hi"}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content"),
    ({"messages": [{"role": "boss", "content": "x"}]}, "messages[0].role"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": 3}, "logprobs"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"tool_choice": "x"}, "tool_choice"),
    ({"tool_choice": {"type": "x"}}, "tool_choice"),
    ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice.function"),
    ({"tool_choice": {"type": "function", "function": {"name": 5}}}, "tool_choice.function.name"),
    ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "x", "tools": []}}}, ALLOWED_MODE),
    ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    ({"prompt": "x"}, "prompt"),
]
COMPLETIONS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt[1]"),
    ({"prompt": [10**6]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": ["x", ""]}, "prompt[1]"),
    ({"prompt": [[5], [10**6]]}, "prompt[1]"),
    ({"prompt": ["x", "y" * 400, "x"]}, "prompt[1]"),
    ({"prompt": ["x", "y" * 5000]}, "prompt[1]"),
    ({"prompt": ["x"] * 2000}, "prompt"),
    ({"prompt": ["x"] * 500, "n": 4}, "n"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"suffix": "x"}, "suffix"),
    ({"best_of": 2}, "best_of"),
    ({"max_tokens": 0}, "max_tokens"),
]


async def test_every_bad_field_is_named(tiny: Cluster) -> None:
    cases = [("/v1/chat/completions", CHAT | body, param) for body, param in BOTH + CHATS]
    cases += [("/v1/completions", TEXT | body, param) for body, param in BOTH + COMPLETIONS]
    for path, body, param in cases:
        answer = await tiny.post(path, **body)
        error = answer.json()["error"]
        assert answer.status_code == 400, (body, error)
        assert error["param"] == param, (body, error)
        assert param.split("[")[0].split(".")[-1] in error["message"], error
        assert error["type"] == "invalid_request_error"
        assert set(error) == {"message", "type", "param", "code"}
    assert tiny.worker.entries == {}
    await assert_alive(tiny)


async def test_missing_fields_and_unknown_models(tiny: Cluster) -> None:
    missing = await tiny.post("/v1/completions", model=MODEL)
    assert (missing.status_code, missing.json()["error"]["param"]) == (400, "prompt")
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", TEXT), ("/tokenize", {"prompt": "x"})):
        unknown = await tiny.post(path, **{**body, "model": "gpt-9"})
        assert unknown.status_code == 404
        assert unknown.json()["error"]["code"] == "model_not_found"
        assert "gpt-9" in unknown.json()["error"]["message"]
    assert (await tiny.http.get("/v1/models/gpt-9")).json()["error"]["code"] == "model_not_found"
    async with tiny.openai() as client:
        with pytest.raises(openai.NotFoundError):
            await client.chat.completions.create(**{**CHAT, "model": "gpt-9"})
        with pytest.raises(openai.BadRequestError, match="top_p"):
            await client.chat.completions.create(**CHAT, top_p=7)


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"5", b"null", b'{"model": "tiny",}', b"\xff\xfe", b"[" * 10000, b'{"prompt": "\\ud800"}']
)
async def test_malformed_bodies(tiny: Cluster, raw: bytes) -> None:
    for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"):
        answer = await tiny.http.post(path, content=raw)
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["type"] == "invalid_request_error"


async def test_unknown_paths_and_methods(tiny: Cluster) -> None:
    missing = await tiny.http.get("/v2/everything")
    assert (missing.status_code, "Unknown path" in missing.json()["error"]["message"]) == (404, True)
    wrong = await tiny.http.get("/v1/chat/completions")
    assert (wrong.status_code, "error" in wrong.json()) == (405, True)


async def test_tokenize_errors(tiny: Cluster) -> None:
    both = await tiny.post("/tokenize", prompt="x", messages=CHAT["messages"])
    neither = await tiny.post("/tokenize", model=MODEL)
    assert (both.status_code, neither.status_code) == (400, 400)
    outside = await tiny.post("/detokenize", tokens=[10**6])
    assert outside.json()["error"]["param"] == "tokens"
    negative = await tiny.post("/detokenize", tokens=[-5])
    assert negative.json()["error"]["param"] == "tokens[0]"


async def test_a_prompt_over_the_models_length_says_both_numbers(tiny: Cluster) -> None:
    ids = list(range(20, 20 + 300))
    answer = await tiny.post("/v1/completions", model=MODEL, prompt=ids)
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert error["code"] == "context_length_exceeded"
    assert str(MAX_MODEL_LEN) in error["message"]
    assert "300" in error["message"]
    text = "Hello, world! " * 100
    tokens = len(tokenizer().encode(text))
    error = (await tiny.post("/v1/completions", model=MODEL, prompt=text)).json()["error"]
    assert str(tokens) in error["message"]
    error = (await tiny.post("/v1/completions", model=MODEL, prompt=ids[:200], max_tokens=100)).json()["error"]
    assert error["param"] == "max_tokens"
    assert all(number in error["message"] for number in ("256", "300", "200", "100"))
    error = (await tiny.post("/v1/chat/completions", **CHAT, max_completion_tokens=256)).json()["error"]
    assert error["param"] == "max_completion_tokens"


async def test_ten_megabytes_are_refused_quickly_and_others_are_served_meanwhile(tiny: Cluster) -> None:
    huge = "Hello world, " * (10 * 2**20 // 13)
    bodies = {
        "/v1/chat/completions": {"model": MODEL, "messages": [{"role": "user", "content": huge}]},
        "/v1/completions": {"model": MODEL, "prompt": huge},
    }
    for path, body in bodies.items():
        start = time.monotonic()
        big = asyncio.create_task(tiny.post(path, **body))
        await assert_alive(tiny)
        answer = await big
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "context_length_exceeded"
        assert "at least" in answer.json()["error"]["message"]
        assert time.monotonic() - start < 10
    assert len(tiny.worker.entries) == 2


async def test_bodies_over_the_limit(tiny: Cluster) -> None:
    answer = await tiny.http.post("/v1/completions", content=b'{"prompt": "' + b"x" * (13 * 2**20) + b'"}')
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "request_too_large"

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(13):
            yield b"x" * 2**20

    answer = await tiny.http.post("/v1/completions", content=chunks())
    assert answer.status_code == 413
    await assert_alive(tiny)


async def test_half_open_connections_are_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEAD_TIMEOUT_S", 0.3)
    monkeypatch.setattr("services.router.exchange.BODY_TIMEOUT_S", 0.3)
    async with cluster(tmp_path, say("Hello, world!")) as made:

        async def talk(sent: bytes) -> bytes:
            reader, writer = await asyncio.open_connection("127.0.0.1", made.router.port)
            writer.write(sent)
            answer = await asyncio.wait_for(reader.read(), 5)
            writer.close()
            return answer

        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"
        silent, half, stalled, endless, garbage = await asyncio.gather(
            talk(b""),
            talk(head),
            talk(head + b"content-length: 100\r\n\r\n{"),
            talk(head + b"x-a: " + b"a" * 100_000),
            talk(b"\x16\x03\x01 not http\r\n\r\n"),
        )
        assert silent == half == b""
        assert stalled.startswith(b"HTTP/1.1 408")
        assert endless.startswith(b"HTTP/1.1 400")
        assert garbage.startswith(b"HTTP/1.1 400")
        await assert_alive(made)
        assert made.router.gateway is not None
        assert made.router.gateway.in_flight == 0


async def test_overload(tmp_path: Path) -> None:
    async with cluster(tmp_path, say("x" * 50, delay_s=0.05), max_concurrent_requests=2) as made:
        running = [asyncio.create_task(made.post("/v1/chat/completions", **CHAT)) for _ in range(2)]
        await until(lambda: len(made.worker.entries) == 2)
        refused = await made.post("/v1/chat/completions", **CHAT)
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        for task in running:
            task.cancel()
        await until(lambda: made.router.gateway is not None and made.router.gateway.in_flight == 0)
        assert (await made.post("/v1/chat/completions", **CHAT, max_tokens=1)).status_code == 200


@pytest.mark.parametrize(
    ("error", "status"), [(OverloadedError("the queue is full"), 429), (UnavailableError("draining"), 503)]
)
async def test_workers_that_refuse(tmp_path: Path, error: Any, status: int) -> None:
    async with cluster(tmp_path, say("x", refuse=error), num_workers=2) as made:
        answer = await made.post("/v1/chat/completions", **CHAT)
        assert answer.status_code == status
        assert answer.headers["retry-after"] == "1"
        assert error.message in answer.json()["error"]["message"]
        made.workers[1].script = say("Hello, world!")
        await assert_alive(made)


async def test_no_worker_is_503_until_one_is_there(tmp_path: Path) -> None:
    async with cluster(tmp_path, say("Hello, world!")) as made:
        info = made.worker.info()
        made.members.remove("d0")
        gone = await made.post("/v1/chat/completions", **CHAT)
        assert (gone.status_code, gone.json()["error"]["code"]) == (503, "service_unavailable")
        assert (await made.http.get("/ready")).status_code == 503
        made.members.put(made.worker.info(WorkerState.STARTING))
        assert (await made.post("/v1/chat/completions", **CHAT)).status_code == 503
        made.members.put(info)
        await assert_alive(made)


@pytest.mark.parametrize("stream", [False, True])
async def test_errors_of_the_engine(tmp_path: Path, stream: bool) -> None:
    """Before the first token with a status of its own, after it as an event."""
    async with cluster(tmp_path, say("Hello, world!", fail_at=0)) as made:
        early = await made.post("/v1/chat/completions", **CHAT, stream=stream)
        assert early.status_code == 500
        assert early.json()["error"]["message"] == ENGINE_FAILED.message
        made.worker.script = say("Hello, world!", fail_at=3, failure=Failure("invalid_request", "no such image", "x"))
        late = await made.post("/v1/chat/completions", **CHAT, stream=stream)
        if stream:
            assert late.status_code == 200
            assert events(late.text)[-1]["error"]["message"] == "no such image"
        else:
            assert late.status_code == 400
            assert late.json()["error"]["param"] == "x"


async def test_time_runs_out(tmp_path: Path) -> None:
    async with cluster(tmp_path, say("x" * 99, delay_s=0.05), request_timeout_s=0.4) as made:
        whole = await made.post("/v1/chat/completions", **CHAT)
        assert (whole.status_code, whole.json()["error"]["code"]) == (504, "timeout")
        stream = await made.post("/v1/chat/completions", **CHAT, stream=True)
        assert events(stream.text)[-1]["error"]["code"] == "timeout"
        await until(lambda: all(entry.cancelled_at for entry in made.worker.entries.values()))


async def test_a_missing_tokenizer_is_said_and_found_later(tmp_path: Path) -> None:
    async with cluster(tmp_path / "m", say("Hello, world!")) as made:
        path = tmp_path / "m" / "tokenizer.json"
        await assert_alive(made)
        assert made.router.gateway is not None
        made.router.gateway.texts._loaded.clear()
        content = path.read_bytes()
        path.unlink()
        answer = await made.post("/v1/chat/completions", **CHAT)
        assert answer.status_code == 503
        assert "tokenizer.json" in answer.json()["error"]["message"]
        path.write_bytes(content)
        await assert_alive(made)
