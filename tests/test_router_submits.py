"""Requests share calls: who goes at once, who waits for whom, and what each hears."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from common.errors import InvalidRequestError, NanoDeployError, UnavailableError
from common.types import GenerationRequest, SamplingParams
from services.router import submits
from services.router.submits import Submission, Submits

Answer = tuple[int, int | NanoDeployError]


class Worker:
    """Answers a call when `go` says so: slots are the request ids' numbers, and "bad" ones are refused."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.go = asyncio.Event()
        self.slow: set[str] = set()

    async def send(self, submissions: list[Submission]) -> AsyncIterator[list[Answer]]:
        ids = [s.request.request_id for s in submissions]
        self.calls.append(ids)
        await self.go.wait()
        yield [(i, self._answer(name)) for i, name in enumerate(ids) if name not in self.slow]
        if self.slow.intersection(ids):
            await asyncio.sleep(0.2)
            yield [(i, self._answer(name)) for i, name in enumerate(ids) if name in self.slow]

    def _answer(self, name: str) -> int | NanoDeployError:
        return InvalidRequestError(f"{name} is refused") if name.startswith("bad") else int(name)


def request(name: str, num_tokens: int = 1) -> GenerationRequest:
    return GenerationRequest(
        request_id=name, model="m", prompt_token_ids=(1,) * num_tokens, sampling=SamplingParams(max_tokens=1)
    )


async def test_those_of_one_turn_share_a_call_and_each_gets_its_own_answer() -> None:
    worker = Worker()
    worker.go.set()
    joined = Submits(worker.send)
    results = await asyncio.gather(
        *(joined.submit(request(name), None, 1.0) for name in ("1", "bad", "3")), return_exceptions=True
    )
    assert worker.calls == [["1", "bad", "3"]]
    assert results[0] == 1
    assert results[2] == 3
    assert isinstance(results[1], InvalidRequestError)


async def test_who_comes_while_a_call_is_out_waits_for_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submits, "HOLD_S", 10.0)
    worker = Worker()
    joined = Submits(worker.send)
    first = asyncio.create_task(joined.submit(request("1"), None, 1.0))
    await asyncio.sleep(0.01)
    others = [asyncio.create_task(joined.submit(request(name), None, 1.0)) for name in ("2", "3")]
    await asyncio.sleep(0.01)
    assert worker.calls == [["1"]]
    worker.go.set()
    async with asyncio.timeout(1):
        assert await asyncio.gather(first, *others) == [1, 2, 3]
    assert worker.calls == [["1"], ["2", "3"]]


async def test_nobody_waits_longer_than_the_hold() -> None:
    """The first call is never answered."""
    worker = Worker()
    joined = Submits(worker.send)
    first = asyncio.create_task(joined.submit(request("1"), None, 1.0))
    await asyncio.sleep(0.01)
    second = asyncio.create_task(joined.submit(request("2"), None, 1.0))
    await asyncio.sleep(20 * submits.HOLD_S)
    assert worker.calls == [["1"], ["2"]]
    await joined.close()
    for task in (first, second):
        with pytest.raises(UnavailableError):
            await task


async def test_a_slow_one_delays_nobody() -> None:
    worker = Worker()
    worker.go.set()
    worker.slow = {"2"}
    joined = Submits(worker.send)
    slow = asyncio.create_task(joined.submit(request("2"), None, 1.0))
    async with asyncio.timeout(0.1):
        assert await joined.submit(request("1"), None, 1.0) == 1
        assert await joined.submit(request("3"), None, 1.0) == 3
    assert await slow == 2


async def test_calls_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submits, "MOST_REQUESTS", 3)
    monkeypatch.setattr(submits, "MOST_TOKENS", 10)
    worker = Worker()
    worker.go.set()
    joined = Submits(worker.send)
    sizes = {"1": 1, "2": 1, "3": 1, "4": 9, "5": 9, "6": 99}
    await asyncio.gather(*(joined.submit(request(name, size), None, 1.0) for name, size in sizes.items()))
    assert worker.calls == [["1", "2", "3"], ["4"], ["5"], ["6"]]


async def test_an_error_of_the_call_is_that_of_all_it_did_not_answer() -> None:
    async def send(submissions: list[Submission]) -> AsyncIterator[list[Answer]]:
        yield [(0, 7)]
        raise UnavailableError("the worker is gone")

    joined = Submits(send)
    first, second = await asyncio.gather(
        *(joined.submit(request(name), None, 1.0) for name in ("1", "2")), return_exceptions=True
    )
    assert first == 7
    assert isinstance(second, UnavailableError)
    assert "gone" in str(second)
