"""Too much to do: fair order, bounded queues, and as much served in time as without the excess."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random
import time
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import router_support as support
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UnavailableError
from common.types import GenerationRequest
from services.router.admission.fair import FairQueue, Waiter
from services.router.admission.gate import Gate, GateSettings
from services.router.errors import RateLimitedError


def waiter(flow: str, cost: int, priority: int = 0) -> Waiter:
    return Waiter(flow, cost, 1, priority, since_s=0, give_up_s=1, settle=lambda error: None)


def drain(queue: FairQueue, limit: int = 10**9) -> list[Waiter]:
    out = []
    while len(out) < limit and (head := queue.head()) is not None:
        queue.take(head)
        out.append(head)
    return out


# -- order --


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 50_000), st.integers(-2, 2)), max_size=60))
def test_all_are_served_once_by_priority_and_in_the_order_of_their_key(rows: list[tuple[str, int, int]]) -> None:
    queue = FairQueue(100)
    waiters = [waiter(*row) for row in rows]
    assert [queue.offer(each) for each in waiters] == [None] * len(waiters)
    out = drain(queue)
    assert sorted(map(id, out)) == sorted(map(id, waiters))
    assert [w.level for w in out] == sorted(w.level for w in out)
    for flow, level in itertools.product("abc", range(3)):
        mine = [id(w) for w in out if (w.flow, w.level) == (flow, level)]
        assert mine == [id(w) for w in waiters if (w.flow, w.level) == (flow, level)]


@settings(max_examples=15, deadline=None)
@given(st.randoms(use_true_random=False))
def test_keys_that_wait_get_equal_tokens(rng: random.Random) -> None:
    """One sends requests of a few tokens, one of many, one in between: what each gets differs by little."""
    queue = FairQueue(10_000)
    sizes = {"small": 100, "middle": 1500, "large": 9000}
    for flow, size in sizes.items():
        for _ in range(300_000 // size):
            queue.offer(waiter(flow, rng.randint(size // 2, size)))
    served: Counter[str] = Counter()
    total = 0
    while total < 200_000:
        (head,) = drain(queue, 1)
        served[head.flow] += head.cost
        total += head.cost
    assert max(served.values()) - min(served.values()) <= 2 * 9000 + 2048


def test_a_full_queue_drops_from_the_key_that_fills_it() -> None:
    queue = FairQueue(10)
    for _ in range(10):
        assert queue.offer(waiter("greedy", 1000)) is None
    modest = waiter("modest", 1000)
    out = queue.offer(modest)
    assert out is not None
    assert out.flow == "greedy"
    more = waiter("greedy", 1000)
    assert queue.offer(more) is more
    assert modest in drain(queue, 3)


# -- goodput on virtual time --


class World:
    """A clock and timers that go only as fast as the test has events."""

    def __init__(self) -> None:
        self._now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._number = itertools.count()

    def now(self) -> float:
        return self._now

    def call_later(self, delay_s: float, work: Callable[[], None]) -> Any:
        heapq.heappush(self._events, (self._now + delay_s, next(self._number), work))
        return "a handle"

    def run(self, until_s: float) -> None:
        while self._events and self._events[0][0] <= until_s:
            self._now, _, work = heapq.heappop(self._events)
            work()


class StubWorker:
    """Runs `batch` sequences at once, first come first served, each for the time that its tokens take."""

    def __init__(self, world: World, batch: int, tokens_per_s: float) -> None:
        self._world = world
        self._free = batch
        self._tokens_per_s = tokens_per_s
        self._waiting: deque[tuple[int, Callable[[], None]]] = deque()

    def submit(self, tokens: int, done: Callable[[], None]) -> None:
        self._waiting.append((tokens, done))
        self._next()

    def _next(self) -> None:
        while self._free and self._waiting:
            self._free -= 1
            tokens, done = self._waiting.popleft()
            self._world.call_later(tokens / self._tokens_per_s, lambda done=done: self._end(done))

    def _end(self, done: Callable[[], None]) -> None:
        self._free += 1
        done()
        self._next()


def goodput(load: float, *, factor: float, seconds: float = 120.0, patience_s: float = 10.0) -> dict[str, Any]:
    """Requests answered within `patience_s`, per second, of `load` times what a worker can do."""
    world, rng = World(), random.Random(5)
    batch, mean_tokens, speed = 32, 400, 200.0
    worker = StubWorker(world, batch, speed)
    capacity = round(batch * factor)
    gate = Gate(GateSettings(1024, 30.0), lambda running: capacity, world, world.call_later)
    counts: Counter[str] = Counter()
    in_time: Counter[str] = Counter()

    def arrive() -> None:
        world.call_later(rng.expovariate(load * batch * speed / mean_tokens), arrive)
        flow, tokens = rng.choice("aaaab"), rng.randint(mean_tokens // 2, mean_tokens * 3 // 2)
        came_s = world.now()

        def begin(error: Exception | None) -> None:
            if error is not None:
                counts[type(error).__name__] += 1
                return
            entered_s = world.now()

            def done() -> None:
                gate.leave(1, world.now() - entered_s)
                kept = world.now() - came_s <= patience_s
                counts["in time" if kept else "late"] += 1
                in_time[flow] += kept

            worker.submit(tokens, done)

        if gate.try_enter(1):
            begin(None)
            return
        try:
            gate.offer(flow, tokens, 1, 0, came_s + patience_s, begin)
        except RateLimitedError as error:
            counts["without a time"] += error.retry_after_s < 1
            counts["refused"] += 1

    world.call_later(0.0, arrive)
    world.run(seconds)
    most = batch * speed / mean_tokens
    return {"share": counts["in time"] / seconds / most, "flows": in_time, "counts": counts}


def test_goodput_stays_flat_at_three_times_the_capacity(capsys: pytest.CaptureFixture[str]) -> None:
    found = {load: goodput(load, factor=2.0) for load in (1.0, 2.0, 3.0)}
    without = {load: goodput(load, factor=1e6)["share"] for load in (1.0, 2.0, 3.0)}
    with capsys.disabled():
        shown = " ".join(f"{load:g}x {one['share']:.2f} (no gate {without[load]:.2f})" for load, one in found.items())
        print(f"\ngoodput as a share of the capacity: {shown}")
    assert found[1.0]["share"] > 0.9
    for load in (2.0, 3.0):
        assert found[load]["share"] > 0.93, found[load]
        assert found[load]["counts"]["late"] < 0.05 * found[load]["counts"]["in time"]
        assert without[load] < 0.3, "what the gate is for"


def test_a_modest_key_is_not_drowned_by_one_that_sends_four_times_as_much() -> None:
    """At three times the capacity, "b" asks for 0.6 of it and may have half."""
    flows = goodput(3.0, factor=2.0)["flows"]
    assert flows["b"] > 0.42 * sum(flows.values()), flows


def test_who_is_refused_for_the_time_of_an_answer_is_told_so() -> None:
    world = World()
    gate = Gate(GateSettings(4, 30.0), lambda running: 1, world, world.call_later)
    for _ in range(400):
        assert gate.try_enter(1)
        gate.leave(1, 4.0)
    assert gate.try_enter(1)
    gate.offer("a", 10, 1, 0, 20.0, lambda error: None)
    with pytest.raises(RateLimitedError, match=r"wait would be about 0\.0 s, an answer takes up to 4\.0 s: past its d"):
        gate.check("a", 10, 0, 2.0)


# -- the real router --


class Batch:
    """What a scripted worker lacks: a batch with so many places, and a queue before it."""

    def __init__(self, places: int, seconds: float) -> None:
        self.seconds = seconds
        self._ends = [0.0] * places

    def delay_s(self) -> float:
        now = time.monotonic()
        start = max(now, heapq.heappop(self._ends))
        heapq.heappush(self._ends, start + self.seconds)
        return start + self.seconds - now


def scripts(batch: Batch) -> Callable[[GenerationRequest], support.Script]:
    def script(request: GenerationRequest) -> support.Script:
        return support.Script(outputs=[[72]], delay_s=batch.delay_s())

    return script


async def offered(made: support.Cluster, rate: float, seconds: float, timeout_s: float) -> Counter[int]:
    """Answers by status, of requests that come at `rate` a second."""
    found: Counter[int] = Counter()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=200)
    headers = {"x-request-timeout": str(timeout_s)}
    async with httpx.AsyncClient(base_url=made.url, timeout=20, limits=limits, headers=headers) as http:

        async def one() -> None:
            answer = await http.post("/v1/completions", json={"prompt": "abc", "max_tokens": 1})
            if answer.status_code in (429, 503):
                assert int(answer.headers["retry-after"]) >= 1
                assert answer.json()["error"]["code"] in ("rate_limit_exceeded", "service_unavailable")
            found[answer.status_code] += 1

        start = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for number in range(round(rate * seconds)):
                await asyncio.sleep(max(0.0, start + number / rate - time.monotonic()))
                group.create_task(one())
    return found


async def test_goodput_of_the_real_router(tmp_path: Path) -> None:
    """8 places of 0.8 s: 10 a second. Three times as many come, each with 6 s."""
    batch = Batch(8, 0.8)
    async with support.cluster(tmp_path, scripts(batch), queue_factor=1.0) as made:
        made.worker.max_num_seqs = 8
        made.members.put(made.worker.info())
        plain = await offered(made, 9, 3.0, 6.0)
        loaded = await offered(made, 30, 8.0, 6.0)
        assert plain[200] > 0.9 * plain.total(), plain
        assert set(loaded) <= {200, 429, 503, 504}, loaded
        assert loaded[200] >= 0.8 * 10 * 8.0, loaded
        assert loaded[504] < 0.2 * loaded.total(), loaded
        assert loaded[429] > 0
        gate = made.router.gateway.places.gate(support.MODEL)
        assert (gate.running, sum(gate.waiting)) == (0, 0)


async def test_a_full_queue_and_one_that_does_not_move(tmp_path: Path) -> None:
    config: dict[str, Any] = {"queue_factor": 1.0, "max_queued_requests": 2, "max_queue_wait_s": 0.5}
    async with support.cluster(tmp_path, support.say("hello", delay_s=1.0), **config) as made:
        made.worker.max_num_seqs = 1
        made.members.put(made.worker.info())
        body = {"prompt": "abc", "max_tokens": 2}
        running = asyncio.create_task(made.http.post("/v1/completions", json=body))
        gate = made.router.gateway.places.gate(support.MODEL)
        await support.until(lambda: gate.running == 1)
        waiting = [asyncio.create_task(made.http.post("/v1/completions", json=body)) for _ in range(2)]
        await support.until(lambda: sum(gate.waiting) == 2)
        assert 'router_requests_waiting{priority="normal"} 2.0' in (await made.http.get("/metrics")).text
        refused = await made.http.post("/v1/completions", json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert int(refused.headers["retry-after"]) >= 1
        urgent = asyncio.create_task(made.http.post("/v1/completions", json={**body, "priority": -1}))
        await support.until(lambda: gate.waiting == (1, 2, 0))
        for task in waiting:
            answer = await task
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "service_unavailable")
            assert int(answer.headers["retry-after"]) >= 1
        assert (await urgent).status_code == 503
        hasty = await made.http.post("/v1/completions", json={**body, "timeout": 0.2})
        assert (hasty.status_code, hasty.json()["error"]["code"]) == (504, "timeout")
        assert "would be late: no place on a worker within" in hasty.json()["error"]["message"]
        assert (await running).status_code == 200
        assert gate.running == 0


async def test_a_client_that_leaves_while_it_waits(tmp_path: Path) -> None:
    async with support.cluster(tmp_path, support.say("hello", delay_s=0.3), queue_factor=1.0) as made:
        made.worker.max_num_seqs = 1
        made.members.put(made.worker.info())
        body = {"prompt": "abc", "max_tokens": 3}
        running = asyncio.create_task(made.http.post("/v1/completions", json=body))
        gate = made.router.gateway.places.gate(support.MODEL)
        await support.until(lambda: gate.running == 1)
        with pytest.raises(httpx.ReadTimeout):
            await made.http.post("/v1/completions", json=body, timeout=0.2)
        await support.until(lambda: not sum(gate.waiting))
        assert (await running).status_code == 200
        assert gate.running == 0
        assert len(made.worker.requests) == 1


async def test_a_router_that_stops_ends_the_waits(tmp_path: Path) -> None:
    gate = Gate(GateSettings(4, 30.0), lambda running: 1, World())
    assert gate.try_enter(1)
    told: list[Exception | None] = []
    gate.offer("", 1, 1, 0, 1e9, told.append)
    gate.close(UnavailableError("stopping"))
    assert [type(error) for error in told] == [UnavailableError]
