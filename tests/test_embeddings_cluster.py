"""Embeddings through a whole cluster that `up` started: the official client's vectors are those of transformers."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import tiny_models
from api_support import ended
from cluster_support import RunningCluster, eventually, run_cluster
from embedding_support import TOLERANCE, cut, reference_vector

from common.text import Tokenizer

SMALL = {"kv_cache_memory_bytes": 32 << 20, "max_model_len": 512, "max_num_seqs": 32, "max_num_batched_tokens": 128}
TEXT = " ".join(tiny_models.SENTENCES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make_qwen3_embedding(tmp_path_factory.mktemp("model"), seed=8)


@pytest.fixture(scope="module")
def cluster(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    """Two workers; those for prefill that are asked for are not started."""
    with run_cluster(tmp_path_factory.mktemp("cluster"), folder, "--prefill", "1", "--decode", "2", **SMALL) as running:
        yield running


def vector(folder: Path, text: str) -> Any:
    """Of the ids that the checkpoint's tokenizer gives, whose post-processor adds the last one."""
    ids = Tokenizer.load(folder).encode(text)
    assert ids[-1] == 0
    return reference_vector(folder, tuple(ids))


def close(found: Any, expected: Any) -> bool:
    return bool(np.abs(np.array(found, np.float32) - expected).max() < TOLERANCE)


def test_what_up_started_says_what_it_is(cluster: RunningCluster) -> None:
    assert [str(worker.role) for worker in cluster.workers()] == ["decode", "decode"]
    assert {worker.model.embedding_size for worker in cluster.workers()} == {64}
    card, *_ = httpx.get(f"{cluster.url}/v1/models", timeout=10).json()["data"]
    able = card["capabilities"]
    assert [name for name, can in able.items() if can] == ["embeddings"]
    refused = httpx.post(f"{cluster.url}/v1/completions", json={"prompt": "x"}, timeout=10)
    assert refused.status_code == 400


async def test_the_official_clients_vectors_are_those_of_transformers(cluster: RunningCluster, folder: Path) -> None:
    texts = [TEXT[:n] for n in (1, 20, 90, 250, 600)]
    async with openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="none") as client:
        for form in ({}, {"encoding_format": "float"}):
            found = await client.embeddings.create(model=cluster.model, input=texts, **form)  # type: ignore[arg-type]
            assert all(close(one.embedding, vector(folder, text)) for one, text in zip(found.data, texts, strict=True))
            tokenizer = Tokenizer.load(folder)
            assert found.usage.prompt_tokens == sum(len(tokenizer.encode(text)) for text in texts)
        short = await client.embeddings.create(model=cluster.model, input=texts[2], dimensions=12)
        assert close(short.data[0].embedding, cut(vector(folder, texts[2]), 12))
        with pytest.raises(openai.BadRequestError, match="dimensions must be at most 64"):
            await client.embeddings.create(model=cluster.model, input="x", dimensions=65)
        many = [f"{i} {TEXT[i : i + 40]}" for i in range(100)]
        answers = await asyncio.gather(
            *(client.embeddings.create(model=cluster.model, input=many[i : i + 10]) for i in range(0, 100, 10))
        )
        flat = [one.embedding for answer in answers for one in answer.data]
        assert all(close(one, vector(folder, text)) for one, text in zip(flat, many, strict=True))
    await asyncio.to_thread(eventually, cluster.is_idle, 10, "nothing is left behind")


async def test_a_batch_of_them(cluster: RunningCluster, folder: Path) -> None:
    lines = [
        {"custom_id": str(i), "method": "POST", "url": "/v1/embeddings", "body": {"input": TEXT[i : i + 50]}}
        for i in range(20)
    ]
    async with openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="none") as client:
        content = b"\n".join(json.dumps(line).encode() for line in lines)
        file = await client.files.create(file=("in.jsonl", content), purpose="batch")
        batch = await client.batches.create(input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h")
        done = await ended(lambda: client.batches.retrieve(batch.id), 60)
        assert done.status == "completed"
        assert done.output_file_id, done
        rows = [json.loads(row) for row in (await client.files.content(done.output_file_id)).text.splitlines()]
    assert len(rows) == 20
    for row in rows:
        i = int(row["custom_id"])
        assert close(row["response"]["body"]["data"][0]["embedding"], vector(folder, TEXT[i : i + 50]))


def runs(cluster: RunningCluster) -> bool:
    """Has the router a request? Workers tell of theirs once a second, which a quick one is over before."""
    text = httpx.get(f"{cluster.url}/metrics", timeout=10).text
    found = re.search(r"^nanodeploy:num_requests_running\{[^}]*\} (\S+)", text, re.MULTILINE)
    return found is not None and float(found[1]) > 0


def test_an_engine_and_a_worker_that_die_are_not_seen(cluster: RunningCluster, folder: Path) -> None:
    texts = [f"{i} {TEXT[i : i + 300]}" for i in range(256)]
    answers: list[httpx.Response] = []

    def ask() -> None:
        answers.append(httpx.post(f"{cluster.url}/v1/embeddings", json={"input": texts}, timeout=120))

    for name, end in (("decode-0", "engine"), ("decode-1", "worker")):
        threads = [threading.Thread(target=ask) for _ in range(4)]  # long enough to be seen
        for thread in threads:
            thread.start()
        eventually(lambda: runs(cluster), 20, "it runs")
        if end == "engine":
            os.kill(cluster.engine_pid(name), signal.SIGKILL)
        else:
            cluster.kill(name)
        for thread in threads:
            thread.join(120)
        assert [answer.status_code for answer in answers] == 4 * [200], [answer.text for answer in answers]
        wanted = [vector(folder, text) for text in texts]
        for answer in answers:
            found = [one["embedding"] for one in answer.json()["data"]]
            assert all(close(one, right) for one, right in zip(found, wanted, strict=True))
        answers.clear()
        eventually(lambda: len(cluster.workers()) == 2 and cluster.is_idle(), 60, "it is back")
