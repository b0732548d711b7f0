"""Streams: the same as the whole answer, cut at stop strings, ended by the client in time, never slowed by it."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from router_support import MODEL, Cluster, Script, cluster, events, say, tokenizer, until

from common.types import GenerationRequest

CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}


async def both(made: Cluster, **body: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The whole answer's first choice and the same choice put together from a stream."""
    whole = await made.post("/v1/chat/completions", **CHAT, **body)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    stream = events((await made.post("/v1/chat/completions", **CHAT, **body, **options)).text)
    joined: dict[str, Any] = {"content": "", "logprobs": []}
    for event in stream:
        for choice in event["choices"]:
            joined["content"] += choice["delta"].get("content", "")
            joined["logprobs"] += (choice["logprobs"] or {}).get("content") or []
            if choice["finish_reason"]:
                joined |= {key: choice[key] for key in ("finish_reason", "stop_reason")}
    choice = whole.json()["choices"][0]
    expected = {
        "content": choice["message"]["content"],
        "logprobs": (choice["logprobs"] or {}).get("content") or [],
        "finish_reason": choice["finish_reason"],
        "stop_reason": choice["stop_reason"],
    }
    return expected | {"usage": whole.json()["usage"]}, joined | {"usage": stream[-1]["usage"]}


async def test_random_tokens_stream_as_they_answer(tmp_path: Path) -> None:
    """Invalid UTF-8, special tokens, several tokens a step, stop strings: stream == whole."""
    rng = random.Random(7)
    outputs: dict[int, list[int]] = {}

    def script(request: GenerationRequest) -> Script:
        assert request.sampling.seed is not None
        return Script([outputs[request.sampling.seed]], step_tokens=1 + request.sampling.seed % 4)

    async with cluster(tmp_path, script) as made:
        for seed in range(30):
            outputs[seed] = [rng.randrange(467) for _ in range(rng.randrange(1, 60))]
            text = tokenizer().decode(outputs[seed])
            body: dict[str, Any] = {"seed": seed, "logprobs": bool(seed % 2)}
            if seed % 3 and len(text) > 8:
                start = rng.randrange(len(text) - 4)
                body["stop"] = [text[start : start + 3], "never there"]
                body["include_stop_str_in_output"] = bool(seed % 5 == 0)
            whole, joined = await both(made, **body)
            assert joined == whole
            assert len(whole["logprobs"]) in (0, whole["usage"]["completion_tokens"])
            if "stop" not in body:
                assert whole["content"] == text
                assert whole["usage"]["completion_tokens"] == len(outputs[seed])
            else:
                assert whole["finish_reason"] == "stop"
                assert whole["content"] == text[: text.index(body["stop"][0])] + (
                    body["stop"][0] if body["include_stop_str_in_output"] else ""
                )


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_tokens_taken_together_are_an_event_each(tmp_path: Path, path: str) -> None:
    """Rows of a token each, as fast as they come; parts of characters are no event."""
    rng = random.Random(11)
    outputs = [[rng.randrange(467) for _ in range(200)] for _ in range(3)]
    ask = CHAT if path.endswith("chat/completions") else {"model": MODEL, "prompt": "x"}
    async with cluster(tmp_path, lambda request: Script(outputs)) as made:
        said = events((await made.post(path, **ask, n=3, max_tokens=200, stream=True)).text)
    for index, ids in enumerate(outputs):
        detokenizer = tokenizer().detokenizer()
        pieces = [detokenizer.push((token,)) for token in ids]
        pieces[-1] += detokenizer.finish()
        choices = [c for event in said for c in event["choices"] if c["index"] == index]
        texts = [c["text"] if "text" in c else c["delta"].get("content", "") for c in choices]
        assert [text for text in texts if text] == [piece for piece in pieces if piece]
        assert [c["finish_reason"] for c in choices if c["finish_reason"]] == ["length"]


async def test_a_stop_string_split_over_tokens_never_leaks(tmp_path: Path) -> None:
    text = "The lazy dog###END and more of it"
    ids = tokenizer().encode(text)
    for step in (1, 2, 5, 50):
        async with cluster(tmp_path, lambda r, step=step: Script([ids], step_tokens=step, delay_s=0.002)) as made:
            stream = events((await made.post("/v1/chat/completions", **CHAT, stop="###END", stream=True)).text)
            pieces = [c["delta"].get("content", "") for e in stream for c in e["choices"]]
            assert "".join(pieces) == "The lazy dog"
            assert not any("#" in piece for piece in pieces)
            whole = (await made.post("/v1/chat/completions", **CHAT, stop=["zzz", "###END"])).json()
            assert whole["choices"][0]["message"]["content"] == "The lazy dog"
            assert whole["choices"][0]["stop_reason"] == "###END"
            spoken = tokenizer().decode(ids[: whole["usage"]["completion_tokens"]])
            assert spoken.startswith("The lazy dog###END")
            assert (
                not tokenizer().decode(ids[: whole["usage"]["completion_tokens"] - 1]).startswith("The lazy dog###END")
            )
            if step < 50:
                await until(lambda made=made: all(entry.cancelled_at for entry in made.worker.entries.values()))


async def test_min_tokens_puts_stop_strings_off(tmp_path: Path) -> None:
    ids = tokenizer().encode("abxabxabx")
    async with cluster(tmp_path, lambda request: Script([ids])) as made:
        answer = (await made.post("/v1/chat/completions", **CHAT, stop="x", min_tokens=4)).json()
        text = answer["choices"][0]["message"]["content"]
        assert answer["usage"]["completion_tokens"] > 4
        assert text.startswith("abxab")
        assert not text.endswith("x")


async def test_one_choice_stops_and_the_others_go_on(tmp_path: Path) -> None:
    outputs = [tokenizer().encode("one STOP two"), tokenizer().encode("a longer answer that never says it")]
    async with cluster(tmp_path, lambda request: Script(outputs, delay_s=0.002)) as made:
        answer = (await made.post("/v1/chat/completions", **CHAT, n=2, stop="STOP")).json()
        assert [c["message"]["content"] for c in answer["choices"]] == ["one ", "a longer answer that never says it"]
        assert [c["finish_reason"] for c in answer["choices"]] == ["stop", "length"]


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_cancels_at_once(tmp_path: Path, stream: bool) -> None:
    async with cluster(tmp_path, say("Hello, world! " * 60, delay_s=0.01)) as made:
        tasks = [
            asyncio.create_task(made.post("/v1/chat/completions", **CHAT, max_tokens=200, stream=stream))
            for _ in range(8)
        ]
        await until(lambda: len(made.worker.entries) == 8)
        await asyncio.sleep(0.05)
        left = time.monotonic()
        for task in tasks:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks)
        await until(lambda: all(entry.cancelled_at for entry in made.worker.entries.values()))
        assert max(entry.cancelled_at for entry in made.worker.entries.values()) - left < 0.5
        assert made.router.gateway is not None
        await until(lambda: made.router.gateway is not None and made.router.gateway.in_flight == 0)


async def test_a_client_that_leaves_before_the_first_token(tmp_path: Path) -> None:
    async with cluster(tmp_path, say("x" * 100, delay_s=0.6)) as made:
        task = asyncio.create_task(made.post("/v1/chat/completions", **CHAT, stream=True))
        await until(lambda: len(made.worker.entries) == 1)
        task.cancel()
        took = await until(lambda: bool(made.worker.entries[1].cancelled_at))
        assert took < 0.5


async def test_a_slow_client_is_cut_off_and_slows_nobody(tmp_path: Path) -> None:
    ids = tokenizer().encode("Hello, world! " * 12)

    def script(request: GenerationRequest) -> Script:
        return Script([ids * (400 if request.sampling.ignore_eos else 1)], step_tokens=50)

    async with cluster(tmp_path, script, stream_buffer_tokens=2000) as made:
        raw = socket.socket()
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(raw, ("127.0.0.1", made.router.port))
        body = b'{"model": "tiny", "prompt": "x", "stream": true, "ignore_eos": true, "logprobs": 20}'
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode()
        await loop.sock_sendall(raw, head + body)
        await until(lambda: len(made.worker.entries) == 1)
        start = time.monotonic()
        answers = await asyncio.gather(*(made.post("/v1/chat/completions", **CHAT, stream=True) for _ in range(8)))
        assert all(events(answer.text) for answer in answers)
        assert time.monotonic() - start < 5
        await until(lambda: bool(made.worker.entries[1].cancelled_at))
        assert made.router.gateway is not None
        await until(lambda: made.router.gateway is not None and made.router.gateway.in_flight == 0)
        raw.close()


async def test_many_tokens_at_once_leave_in_one_write(tmp_path: Path) -> None:
    """One message of the worker is one write to the client, whatever it holds."""
    ids = tokenizer().encode("Hello, world! " * 4)
    async with cluster(tmp_path, lambda request: Script([ids] * 4, step_tokens=1000)) as made:
        async with made.http.stream(
            "POST", "/v1/completions", json={"model": MODEL, "prompt": "x", "n": 4, "stream": True}
        ) as answer:
            chunks = [chunk async for chunk in answer.aiter_raw()]
        text = b"".join(chunks).decode()
        assert len({c["index"] for e in events(text) for c in e["choices"]}) == 4
        assert len(chunks) <= 3
