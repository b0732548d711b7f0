"""Random requests against a whole cluster: no 500, every answer in its API's shape, and nothing is left behind."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest
import tiny_models
from cluster_support import RunningCluster, eventually, run_cluster
from fuzz_requests import Fuzzer, Request

AT_ONCE = 24
SEED = 20261126
SMALL = {"kv_cache_memory_bytes": 32 << 20, "max_model_len": 512, "max_num_seqs": 32, "max_num_batched_tokens": 128}
STUCK_S = 60.0  # an answer to a request of a few tokens


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    folder = tiny_models.make_llama(tmp_path_factory.mktemp("model"), seed=1)
    with run_cluster(tmp_path_factory.mktemp("cluster"), folder, **SMALL) as running:
        eventually(running.is_ready, 60, "the cluster serves")
        yield running


class Wrong(AssertionError):
    """Names the request."""

    def __init__(self, request: Request, what: str) -> None:
        super().__init__(f"{what}\n{request.path} {request.headers} {request.raw[:1500]!r}")


async def send(client: httpx.AsyncClient, request: Request) -> int:
    """The status, 0 where the client hung up first. Raises `Wrong`."""
    try:
        async with asyncio.timeout(request.leaves_s or STUCK_S):
            async with client.stream("POST", request.path, content=request.raw, headers=request.headers) as response:
                raw = await response.aread()
    except TimeoutError:
        if request.leaves_s is None:
            raise Wrong(request, f"no whole answer within {STUCK_S:g} s") from None
        return 0
    status = response.status_code
    asked_for = status == 504 and b'"timeout"' in request.raw  # by a time that is too short for anything
    if status >= 500 and status != 503 and not asked_for:
        raise Wrong(request, f"{status}: {raw[:500]!r}")
    if not response.headers.get("x-request-id"):
        raise Wrong(request, "the answer has no request id")
    if response.headers["content-type"].startswith("text/event-stream"):
        check_stream(request, raw)
    else:
        check_whole(request, status, raw)
    return status


def check_whole(request: Request, status: int, raw: bytes) -> None:
    try:
        answer = json.loads(raw)
    except ValueError:
        raise Wrong(request, f"{status} without JSON: {raw[:300]!r}") from None
    if status == 200:
        check_sums(request, answer)
    elif not (isinstance(answer.get("error"), dict) and answer["error"].get("message")):
        raise Wrong(request, f"{status} without an error object: {raw[:300]!r}")


def check_sums(request: Request, answer: dict[str, Any]) -> None:
    """Prompt tokens by where they came from, in every answer that says so."""
    for stats in answer.get("nanodeploy", {}).get("requests", ()):
        parts = stats["cached_tokens"] + stats["computed_tokens"] + stats["transferred_tokens"]
        if parts != stats["prompt_tokens"]:
            raise Wrong(request, f"{parts} prompt tokens came from somewhere, of {stats}")
    usage = answer.get("usage") or {}
    if "total_tokens" in usage and "prompt_tokens" in usage:
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        sums = usage["prompt_tokens"] + usage["completion_tokens"] == usage["total_tokens"]
        if not sums or not 0 <= cached <= usage["prompt_tokens"]:
            raise Wrong(request, f"usage does not add up: {usage}")


def check_stream(request: Request, raw: bytes) -> None:
    """Whole events, and one that ends it."""
    events = [event for event in raw.decode().split("\n\n") if event]
    data = [line[5:].strip() for event in events for line in event.split("\n") if line.startswith("data:")]
    try:
        parsed = [json.loads(one) for one in data if one != "[DONE]"]
    except ValueError:
        raise Wrong(request, f"an event is no JSON: {raw[-500:]!r}") from None
    for one in parsed:
        check_sums(request, one)
    if request.path in ("/v1/chat/completions", "/v1/completions"):
        failed = sum("error" in one for one in parsed)
        if data.count("[DONE]") + failed < 1 or failed > 1:
            raise Wrong(request, f"no end, or two: {raw[-500:]!r}")


async def storm(url: str, model: str, count: int, seed: int) -> Counter[int]:
    fuzzer, statuses = Fuzzer(seed, model), Counter[int]()
    limits = httpx.Limits(max_connections=None)  # the pool keeps some of those that are cancelled, to no end

    async def one(client: httpx.AsyncClient, numbers: Iterator[int]) -> None:
        for _ in numbers:
            statuses[await send(client, fuzzer.request())] += 1

    async with httpx.AsyncClient(base_url=url, timeout=STUCK_S, limits=limits) as client:
        numbers = iter(range(count))
        async with asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE):
                group.create_task(one(client, numbers))
    return statuses


def router_memory(cluster: RunningCluster) -> float:
    return psutil.Process(cluster.pid("router-0" if has(cluster, "router-0") else "router")).memory_info().rss / 1e6


def has(cluster: RunningCluster, service: str) -> bool:
    return any(s.name == service for s in cluster.state.services)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.soak)])
def test_random_requests(cluster: RunningCluster, count: int, record_property: Any) -> None:
    pids = {s.name: s.process.pid for s in cluster.state.services}
    before = cluster.complete("the sky is", max_tokens=8)["choices"]
    model = cluster.model
    asyncio.run(storm(cluster.url, model, min(count // 2, 300), SEED + 1))  # what grows once has grown
    memory = router_memory(cluster)
    statuses = asyncio.run(storm(cluster.url, model, count, SEED))
    record_property("statuses", dict(statuses))
    assert statuses[200] > count / 10, statuses
    assert statuses[400] > count / 20, statuses
    eventually(cluster.is_idle, 10, "all blocks are free or cached")
    grown = router_memory(cluster) - memory
    assert grown < 30 + count / 500, f"the router has grown by {grown:.0f} MB"
    assert cluster.complete("the sky is", max_tokens=8)["choices"] == before
    assert {s.name: s.process.pid for s in cluster.state.services} == pids, "a service was started again"
    running = httpx.get(f"{cluster.url}/metrics", timeout=10).text
    assert all(
        line.endswith(" 0.0") for line in running.split("\n") if "num_requests_running" in line and line[0] != "#"
    )
