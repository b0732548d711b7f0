"""The whole cluster, every service its own process, as a client sees it while things are killed under it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import tiny_models
from cluster_support import RunningCluster, eventually, run_cluster
from engine_support import reference_tokens

from common.errors import NanoDeployError
from common.text.tokenizer import Tokenizer
from common.types import WorkerState

TEXT = " ".join(tiny_models.SENTENCES)
SMALL = {"kv_cache_memory_bytes": 32 << 20, "max_model_len": 512, "max_num_seqs": 32}
HANG_S = 7.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make_llama(tmp_path_factory.mktemp("model"), seed=1)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Iterator[RunningCluster]:
    """One prefill and one decode worker; chunks are small, so that a hand-off takes several steps."""
    with run_cluster(
        tmp_path_factory.mktemp("cluster"), folder, max_num_batched_tokens=64, hang_timeout_s=HANG_S, **SMALL
    ) as running:
        yield running


@pytest.fixture(autouse=True)
def _whole_again(cluster: RunningCluster) -> Iterator[None]:
    """Each test finds a cluster that works end to end, and leaves one without a block in use."""
    eventually(cluster.is_ready, 60, "the cluster serves")
    yield
    eventually(cluster.is_ready, 60, "the cluster serves again")
    eventually(cluster.is_idle, 35, "every block is free or cached again")


def expected_text(folder: Path, prompt: list[int], count: int) -> str:
    stream = Tokenizer.load(folder).detokenizer(context=prompt)
    return stream.push(reference_tokens(folder, tuple(prompt), count)) + stream.finish()


def prompt_ids(folder: Path, start: int, count: int) -> list[int]:
    ids = Tokenizer.load(folder).encode(TEXT * 4)
    return ids[start : start + count]


def test_tokens_through_all_services_are_those_of_transformers(cluster: RunningCluster, folder: Path) -> None:
    for start, count in ((0, 40), (3, 200), (7, 333)):
        prompt = prompt_ids(folder, start, count)
        answer = cluster.complete(prompt, max_tokens=16, ignore_eos=True)
        assert answer["choices"][0]["text"] == expected_text(folder, prompt, 16)
        (stats,) = answer["nanodeploy"]["requests"]
        assert stats["prefill_worker"] == "prefill-0"
        assert stats["fallback"] == ""
        assert stats["transport"].startswith("ucx/")
        assert stats["cached_tokens"] + stats["computed_tokens"] + stats["transferred_tokens"] == count
        assert answer["usage"]["prompt_tokens"] == count
        assert answer["usage"]["completion_tokens"] == 16
    assert all(t.startswith("ucx/") for t in cluster.transports())


def test_the_router_knows_what_workers_have_cached(cluster: RunningCluster, folder: Path) -> None:
    """From the engines' caches over gRPC into the index: the second time the prompt is known to the token."""
    body = {"model": cluster.model, "prompt": prompt_ids(folder, 11, 300), "max_tokens": 2, "temperature": 0}

    def best() -> dict[str, Any]:
        headers = {"x-nanodeploy-explain": "1"}
        answer = httpx.post(f"{cluster.url}/v1/completions", json=body, headers=headers, timeout=30).json()
        (placed,) = answer["nanodeploy"]["routing"][0]
        (stats,) = answer["nanodeploy"]["requests"]
        found: dict[str, Any] = placed["candidates"][0]
        return found | {"was_cached": stats["cached_tokens"], "policy": placed["policy"]}

    best()
    time.sleep(2.5)  # what was sent a moment ago counts as cached: here the events have to say so
    second = best()
    assert second["index"] == "EXACT"
    assert second["cached_tokens"] == second["was_cached"] == 288
    metrics = httpx.get(f"{cluster.url}/metrics", timeout=10).text
    assert "nanodeploy:router_prefix_index_exact_workers 2.0" in metrics


def test_the_official_client_chats_streaming_and_not(cluster: RunningCluster) -> None:
    client = openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none")
    messages: Any = [{"role": "user", "content": TEXT[:200]}]
    whole = client.chat.completions.create(
        model=cluster.model, messages=messages, max_tokens=24, temperature=0.8, seed=11, logprobs=True, top_logprobs=2
    )
    chunks = list(
        client.chat.completions.create(
            model=cluster.model,
            messages=messages,
            max_tokens=24,
            temperature=0.8,
            seed=11,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    streamed = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert streamed == whole.choices[0].message.content
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert whole.choices[0].logprobs is not None
    assert len(whole.choices[0].logprobs.content or []) == whole.usage.completion_tokens


async def _stream_and_vanish(url: str, body: dict[str, Any], started: asyncio.Event, count: list[int]) -> None:
    reader, writer = await asyncio.open_connection(url.removeprefix("http://").split(":")[0], int(url.split(":")[-1]))
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    try:
        writer.write(head.encode() + b"\r\n\r\n" + data)
        await reader.readuntil(b"data: ")
        count[0] += 1
        if count[0] >= 40:
            started.set()
        await reader.read(-1)
    finally:
        writer.close()


async def _kill_streams(url: str, body: dict[str, Any]) -> None:
    started, count = asyncio.Event(), [0]
    tasks = [asyncio.create_task(_stream_and_vanish(url, {**body, "seed": i}, started, count)) for i in range(200)]
    async with asyncio.timeout(60):
        await started.wait()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def test_200_streams_killed_mid_answer_leave_nothing_within_two_seconds(cluster: RunningCluster) -> None:
    body = {"model": cluster.model, "prompt": TEXT[:150], "max_tokens": 400, "stream": True, "ignore_eos": True}
    asyncio.run(_kill_streams(cluster.url, body))
    took = eventually(cluster.is_idle, 2.0 + 1.0, "no block is live, leased or in flight")
    print(f"idle after {took:.2f} s")


class InBackground:
    """A request under way in a thread."""

    def __init__(self, cluster: RunningCluster, prompt: list[int], **params: Any) -> None:
        self.answer: dict[str, Any] = {}
        self.error: Exception | None = None
        self._call = lambda: cluster.complete(prompt, timeout_s=90, **params)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.answer = self._call()
        except (httpx.HTTPError, AssertionError) as error:
            self.error = error

    def join(self) -> dict[str, Any]:
        self._thread.join(100)
        assert not self._thread.is_alive()
        assert self.error is None, self.error
        return self.answer


@pytest.mark.parametrize("what", ["service", "engine"])
def test_a_prefill_worker_killed_under_load_is_invisible(cluster: RunningCluster, folder: Path, what: str) -> None:
    prompts = [prompt_ids(folder, 11 + i, 320) for i in range(6)]
    running = [InBackground(cluster, p, max_tokens=8, ignore_eos=True) for p in prompts]
    time.sleep(0.15)
    if what == "service":
        cluster.kill("prefill-0")
    else:
        os.kill(cluster.engine_pid("prefill-0"), signal.SIGKILL)
    for prompt, request in zip(prompts, running, strict=True):
        assert request.join()["choices"][0]["text"] == expected_text(folder, prompt, 8)
    eventually(lambda: "prefill-0" in {w.ref.worker_id for w in cluster.workers()}, 60, "the worker is back")
    (fresh,) = cluster.complete(prompt_ids(folder, 60, 250), max_tokens=2)["nanodeploy"]["requests"]
    assert fresh["prefill_worker"] in ("prefill-0", "")


def test_answers_outlive_the_engine_of_the_only_decode_worker(cluster: RunningCluster, folder: Path) -> None:
    prompts = [prompt_ids(folder, 23 + i, 60) for i in range(4)]
    running = [InBackground(cluster, p, max_tokens=300, ignore_eos=True) for p in prompts]
    time.sleep(0.5)
    os.kill(cluster.engine_pid("decode-0"), signal.SIGKILL)
    for prompt, request in zip(prompts, running, strict=True):
        assert request.join()["choices"][0]["text"] == expected_text(folder, prompt, 300)
    eventually(cluster.is_ready, 60, "the worker is back by itself")
    assert "engine died" in cluster.log("decode-0")


def test_a_stopped_decode_engine_is_left_out_and_then_replaced(cluster: RunningCluster, folder: Path) -> None:
    """SIGSTOP is the kindest hang: the process is there, its sockets are open, and nothing comes any more."""
    prompts = [prompt_ids(folder, 27 + i, 60) for i in range(3)]
    running = [InBackground(cluster, p, max_tokens=300, ignore_eos=True) for p in prompts]
    time.sleep(0.5)
    stopped = cluster.engine_pid("decode-0")
    os.kill(stopped, signal.SIGSTOP)

    def state() -> WorkerState:
        return next(w.state for w in cluster.workers() if w.ref.worker_id == "decode-0")

    eventually(lambda: state() is WorkerState.UNREADY, HANG_S, "the router is told to choose others")
    assert Path(f"/proc/{stopped}").exists()
    for prompt, request in zip(prompts, running, strict=True):
        assert request.join()["choices"][0]["text"] == expected_text(folder, prompt, 300)
    eventually(cluster.is_ready, 60, "the worker is back by itself")
    assert not Path(f"/proc/{stopped}").exists()
    assert "engine hangs" in cluster.log("decode-0")


@pytest.mark.parametrize("service", ["controller", "storage"])
def test_requests_go_on_without_the_control_plane(cluster: RunningCluster, folder: Path, service: str) -> None:
    killed = cluster.kill(service)
    prompt = prompt_ids(folder, 31, 100)
    for _ in range(5):
        answer = cluster.complete(prompt, max_tokens=4, ignore_eos=True)
        assert answer["choices"][0]["text"] == expected_text(folder, prompt, 4)
    eventually(lambda: cluster.pid(service) != killed, 30, f"{service} is started again")
    names = {"prefill-0", "decode-0"}

    def members() -> bool:
        try:
            return {w.ref.worker_id for w in cluster.workers()} == names
        except NanoDeployError:
            return False

    eventually(members, 30, "both workers have registered again")
    assert cluster.complete(prompt, max_tokens=4, ignore_eos=True)["choices"]


def test_a_killed_router_comes_back_and_its_requests_are_let_go(cluster: RunningCluster, folder: Path) -> None:
    body = {"model": cluster.model, "prompt": TEXT[:150], "max_tokens": 400, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{cluster.url}/v1/completions", json=body, timeout=30) as response:
        lines = response.iter_lines()
        next(lines)
        killed = cluster.kill("router")
        with pytest.raises(httpx.HTTPError):
            list(lines)
    eventually(lambda: cluster.pid("router") != killed, 30, "the router is started again")
    eventually(cluster.is_ready, 30, "the router serves")


def test_metrics_health_and_ready_on_every_service(cluster: RunningCluster) -> None:
    for worker in cluster.workers():
        base = f"http://{worker.http_address}"
        assert httpx.get(f"{base}/health").status_code == 200
        assert httpx.get(f"{base}/ready").json()["ready"] is True
        metrics = httpx.get(f"{base}/metrics").text
        for name in ("kv_blocks{", "num_requests_running", "kv_cache_usage_perc", "engine_steps"):
            assert f"nanodeploy:{name}" in metrics
    metrics = httpx.get(f"{cluster.url}/metrics").text
    assert "nanodeploy:time_to_first_token_seconds" in metrics


def test_one_request_can_be_followed_through_the_logs_of_all_hops(cluster: RunningCluster, folder: Path) -> None:
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    response = httpx.post(
        f"{cluster.url}/v1/completions",
        json={"model": cluster.model, "prompt": prompt_ids(folder, 41, 120), "max_tokens": 2},
        headers={"traceparent": f"00-{trace}-00f067aa0ba902b7-01"},
        timeout=30,
    )
    assert response.status_code == 200
    assert response.headers["x-request-id"]
    for service in ("router", "decode-0", "prefill-0"):
        eventually(lambda s=service: trace in cluster.log(s), 5, f"{service} logs the trace id")
