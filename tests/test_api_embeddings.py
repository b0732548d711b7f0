"""`/v1/embeddings` at the router: shapes, limits, errors, and workers that fail; the vectors are scripted."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from router_support import MODEL, Cluster, Script, cluster, tokenizer, until

from common.errors import OverloadedError
from common.types import Failure, FinishReason, GenerationRequest

SIZE = 8


def vector_of(request: GenerationRequest) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Of the prompt: its length and its first and last token, so that answers in a wrong order are seen."""
    assert request.pooling is not None
    ids = request.prompt_token_ids
    whole = np.array([len(ids), ids[0], ids[-1], 1.5, -2.25, 1e-3, 0.1, 7], np.float32)
    return whole[: request.pooling.dimensions or SIZE]


def embeds(**more: Any) -> Callable[[GenerationRequest], Script]:
    def script(request: GenerationRequest) -> Script:
        return Script([[]], finish=FinishReason.STOP, vector=vector_of(request).tobytes(), **more)

    return script


def embedding_cluster(
    folder: Path, script: Callable[[GenerationRequest], Script] | None = None, **config: Any
) -> AbstractAsyncContextManager[Cluster]:
    return cluster(folder, script or embeds(), embedding_size=SIZE, **config)


def expected(ids: list[int], dimensions: int = SIZE) -> list[float]:
    whole = [len(ids), ids[0], ids[-1], 1.5, -2.25, 1e-3, 0.1, 7]
    return [float(x) for x in np.array(whole[:dimensions], np.float32)]


def read(vector: Any) -> list[float]:
    """As float32: JSON has the shortest decimals that are that number, which in 64 bits is another."""
    return [float(x) for x in np.array(vector, np.float32)]


async def test_every_form_of_input(tmp_path: Path) -> None:
    encode = tokenizer().encode
    texts = ["Why is the sky blue?", "Hi"]
    async with embedding_cluster(tmp_path) as made, made.openai() as client:
        for given, ids in (
            (texts[0], [encode(texts[0])]),
            (texts, [encode(text) for text in texts]),
            ([5, 6, 7], [[5, 6, 7]]),
            ([[5, 6, 7], [8], [9, 10]], [[5, 6, 7], [8], [9, 10]]),
        ):
            asked: Any = {"model": MODEL, "input": given}
            for form in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}):
                found = await client.embeddings.create(**asked, **form)
                assert (found.object, found.model) == ("list", MODEL)
                assert [one.index for one in found.data] == [*range(len(ids))]
                shown: Any = [one.embedding for one in found.data]
                if form.get("encoding_format") == "base64":  # asked for by hand, the client leaves it as it is
                    shown = [np.frombuffer(base64.b64decode(one), "<f4").tolist() for one in shown]
                assert [read(one) for one in shown] == [expected(one) for one in ids]
                assert found.usage.prompt_tokens == found.usage.total_tokens == sum(map(len, ids))
        raw = (await made.post("/v1/embeddings", model=MODEL, input="Hi")).json()
        assert read(raw["data"][0]["embedding"]) == expected(encode("Hi"))
        assert raw["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}


async def test_dimensions_and_the_rest_reach_the_worker(tmp_path: Path) -> None:
    async with embedding_cluster(tmp_path) as made:
        body: dict[str, Any] = {"input": [[1, 2, 3, 4], [5]], "dimensions": 3, "truncate_prompt_tokens": 2}
        answer = (await made.post("/v1/embeddings", model=MODEL, **body, priority=5, cache_salt="s", user="u")).json()
        assert [read(one["embedding"]) for one in answer["data"]] == [expected([3, 4], 3), expected([5], 3)]
        for request in made.worker.requests:
            assert request.pooling is not None
            assert (request.pooling.dimensions, request.priority) == (3, 5)
            assert request.cache_salt
        timed = await made.http.post(
            "/v1/embeddings", json={"input": "Hi"}, headers={"x-nanodeploy-timings": "1", "x-nanodeploy-explain": "1"}
        )
        assert set(timed.json()["nanodeploy"]) == {"router", "requests", "routing"}


async def test_a_whole_context_is_taken_and_one_more_is_not(tmp_path: Path) -> None:
    async with embedding_cluster(tmp_path, max_model_len=16) as made:
        answer = await made.post("/v1/embeddings", input=[[7] * 16])
        assert answer.json()["usage"] == {
            "prompt_tokens": 16,
            "total_tokens": 16,
            "prompt_tokens_details": {"cached_tokens": 0},
        }
        longer = await made.post("/v1/embeddings", input=[[7] * 17])
        error = longer.json()["error"]
        assert (longer.status_code, error["param"], error["code"]) == (400, "input", "context_length_exceeded")
        cut = await made.post("/v1/embeddings", input=[[7] * 17], truncate_prompt_tokens=-1)
        assert cut.json()["usage"]["prompt_tokens"] == 16


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": ["x", "", "x"]}, "input[1]"),
        ({"input": [[5], [5] * 300]}, "input[1]"),
        ({"input": ["x"] * 5}, "input"),
        ({"input": {"text": "x"}}, "input"),
        ({"input": [10**6]}, "input"),
        ({}, "input"),
        ({"input": "x", "dimensions": SIZE + 1}, "dimensions"),
        ({"input": "x", "dimensions": 0}, "dimensions"),
        ({"input": "x", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "x", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"input": "x", "stream": True}, "stream"),
    ],
)
async def test_errors_name_the_field(tmp_path: Path, body: dict[str, Any], param: str) -> None:
    async with embedding_cluster(tmp_path, max_prompts=4) as made:
        answer = await made.post("/v1/embeddings", **body)
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"] == param
        assert not made.worker.entries


async def test_its_model_says_so_and_generates_nothing(tmp_path: Path) -> None:
    async with embedding_cluster(tmp_path) as made, made.openai() as client:
        await client.embeddings.create(model=MODEL, input="x")
        (model,) = (await client.models.list()).data
        able = model.model_dump()["capabilities"]
        assert [name for name, can in able.items() if can] == ["embeddings"]
        for path, body in (
            ("completions", {"prompt": "x"}),
            ("chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
            ("responses", {"input": "x", "store": False}),
            ("messages", {"max_tokens": 5, "messages": [{"role": "user", "content": "x"}]}),
        ):
            refused = await made.post(f"/v1/{path}", **body)
            assert refused.status_code == 400, path
            assert "has embeddings and generates no text" in refused.json()["error"]["message"]


async def test_inputs_run_together_and_a_key_and_a_queue_hold(tmp_path: Path) -> None:
    config: dict[str, Any] = {"api_keys": ("secret",), "queue_factor": 1.0, "max_queued_requests": 1}
    async with embedding_cluster(tmp_path, embeds(delay_s=0.5), **config) as made:
        assert (await made.post("/v1/embeddings", input="x")).status_code == 401
        made.http.headers["authorization"] = "Bearer secret"
        many = asyncio.create_task(made.post("/v1/embeddings", input=[[i] for i in range(64)]))
        await until(lambda: len(made.worker.entries) == 64)
        assert not any(entry.rows for entry in made.worker.entries.values()), "all before the first has ended"
        waits = asyncio.create_task(made.post("/v1/embeddings", input="x"))
        await asyncio.sleep(0.1)
        full = await made.post("/v1/embeddings", input="x")
        assert full.status_code == 429
        assert len((await many).json()["data"]) == 64
        assert (await waits).status_code == 200
        await until(lambda: all(entry.acked == {0: 1} for entry in made.worker.entries.values()))


async def test_a_deadline_and_a_client_that_leaves_cancel_it(tmp_path: Path) -> None:
    async with embedding_cluster(tmp_path, embeds(delay_s=30)) as made:
        late = await made.post("/v1/embeddings", input=["x", "y"], timeout=0.2)
        assert late.status_code == 504
        await until(lambda: all(entry.cancelled_at for entry in made.worker.entries.values()))
        task = asyncio.create_task(made.post("/v1/embeddings", input=["x", "y"]))
        await until(lambda: len(made.worker.entries) == 4)
        task.cancel()
        await until(lambda: all(entry.cancelled_at for entry in made.worker.entries.values()))


async def test_a_worker_that_dies_is_not_seen(tmp_path: Path) -> None:
    async with embedding_cluster(tmp_path, embeds(delay_s=0.3), num_workers=2) as made:
        asked = [[i, i + 1] for i in range(20)]
        task = asyncio.create_task(made.post("/v1/embeddings", input=asked))
        await until(lambda: sum(len(worker.entries) for worker in made.workers) == 20)
        dead = next(worker for worker in made.workers if worker.entries)
        await dead.kill()
        answer = (await task).json()
        assert [read(one["embedding"]) for one in answer["data"]] == [expected(ids) for ids in asked]


async def test_a_stream_that_breaks_brings_it_all_the_same(tmp_path: Path) -> None:
    async with embedding_cluster(tmp_path, embeds(delay_s=0.2)) as made:
        task = asyncio.create_task(made.post("/v1/embeddings", input=[[5, 6], [7]]))
        await until(lambda: len(made.worker.entries) == 2)
        made.worker.break_streams()
        assert [read(one["embedding"]) for one in (await task).json()["data"]] == [expected([5, 6]), expected([7])]
        assert len(made.worker.entries) == 2, "nothing was submitted twice"


async def test_failures_of_one_input_are_the_requests(tmp_path: Path) -> None:
    def script(request: GenerationRequest) -> Script:
        good = embeds()(request)
        first = request.prompt_token_ids[0]
        if first == 9:
            good.refuse = OverloadedError("full")
        if first == 8:
            good.fail_at, good.failure = 0, Failure("invalid_request", "no such thing", "input")
        if first == 7:
            good.vector = b""
            good.outputs = [[3]]
        return good

    async with embedding_cluster(tmp_path, script) as made, made.openai() as client:
        for token, error in (
            (9, openai.RateLimitError),
            (8, openai.BadRequestError),
            (7, openai.InternalServerError),
        ):
            with pytest.raises(error):
                await client.embeddings.create(model=MODEL, input=[[1], [token], [2]])
        assert len((await client.embeddings.create(model=MODEL, input=[[1], [2]])).data) == 2
