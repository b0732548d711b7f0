"""Requests share messages: who goes at once, who waits for whom, what each hears, and what a broken stream costs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from common.errors import InvalidRequestError, NanoDeployError, UnavailableError
from common.types import MonotonicClock
from nanodeploy.v1 import decode_pb2 as pb
from nanodeploy.v1 import types_pb2
from services.router import submits
from services.router.submits import Submission, Submits


class Worker:
    """What reaches it, by message. `answer` is told what to say to a request's name."""

    def __init__(self, joined: Submits) -> None:
        self.joined = joined
        self.messages: list[list[str]] = []
        self.numbers: dict[str, int] = {}

    async def send(self, submissions: list[Submission]) -> None:
        names = [pb.SubmitItem.FromString(s.item).request.request_id for s in submissions]
        first = len(self.numbers)
        self.numbers |= {name: first + i for i, name in enumerate(names)}
        self.messages.append(names)

    def answer(self, name: str, said: int | InvalidRequestError) -> None:
        self.joined.answered(self.numbers[name], said)


@asynccontextmanager
async def stream(joined: Submits) -> AsyncIterator[Worker]:
    worker = Worker(joined)
    task = asyncio.create_task(joined.write_to(worker.send))
    try:
        yield worker
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def ask(joined: Submits, *names: str, num_tokens: int = 1, timeout_s: float = 5.0) -> list[asyncio.Future[int]]:
    made = (types_pb2.GenerationRequest(request_id=name, prompt_token_ids=[1] * num_tokens) for name in names)
    return [submit(joined, request, timeout_s) for request in made]


def submit(joined: Submits, request: types_pb2.GenerationRequest, timeout_s: float = 5.0) -> asyncio.Future[int]:
    future: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def answered(answer: int | NanoDeployError) -> None:
        assert not future.done(), "one answer each"
        if isinstance(answer, int):
            future.set_result(answer)
        else:
            future.set_exception(answer)

    joined.submit(item(request), timeout_s, answered)
    return future


def item(request: types_pb2.GenerationRequest) -> bytes:
    return pb.SubmitItem(request=request).SerializeToString()


async def settle() -> None:
    await asyncio.sleep(0.01)


@pytest.fixture
def joined() -> Submits:
    return Submits(MonotonicClock())


async def test_those_of_one_turn_share_a_message_and_each_gets_its_own_answer(joined: Submits) -> None:
    async with stream(joined) as worker:
        one, bad, three = ask(joined, "1", "bad", "3")
        await settle()
        assert worker.messages == [["1", "bad", "3"]]
        worker.answer("3", 33)
        assert await three == 33
        worker.answer("bad", InvalidRequestError("bad is refused"))
        worker.answer("1", 11)
        with pytest.raises(InvalidRequestError, match="refused"):
            await bad
        assert await one == 11


async def test_who_comes_while_a_message_is_out_waits_for_its_first_answer(
    joined: Submits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submits, "HOLD_S", 10.0)
    async with stream(joined) as worker:
        tasks = ask(joined, "1", "2")
        await settle()
        tasks += ask(joined, "3", "4")
        await settle()
        assert worker.messages == [["1", "2"]]
        worker.answer("2", 2)
        await settle()
        assert worker.messages == [["1", "2"], ["3", "4"]]
        for name in ("1", "3", "4"):
            worker.answer(name, int(name))
        assert await asyncio.gather(*tasks) == [1, 2, 3, 4]


async def test_nobody_waits_longer_than_the_hold(joined: Submits) -> None:
    async with stream(joined) as worker:
        tasks = ask(joined, "1")
        await settle()
        tasks += ask(joined, "2")
        await asyncio.sleep(20 * submits.HOLD_S)
        assert worker.messages == [["1"], ["2"]]
    joined.close()
    for task in tasks:
        with pytest.raises(UnavailableError):
            await task


async def test_messages_are_bounded(joined: Submits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submits, "MOST_REQUESTS", 3)
    monkeypatch.setattr(submits, "MOST_NBYTES", 100)
    sizes = {"1": 1, "2": 1, "3": 1, "4": 80, "5": 80, "6": 999}
    tasks = [task for name, size in sizes.items() for task in ask(joined, name, num_tokens=size)]
    await settle()
    async with stream(joined) as worker:
        await asyncio.sleep(20 * submits.HOLD_S)
        assert worker.messages == [["1", "2", "3"], ["4"], ["5"], ["6"]]
        for name in sizes:
            worker.answer(name, 1)
        await asyncio.gather(*tasks)


async def test_a_request_larger_than_a_message_ends_alone(joined: Submits, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were it sent, it would end the stream that all others are on, and again on the next."""
    monkeypatch.setattr(submits, "MOST_NBYTES", 10_000)
    monkeypatch.setattr(submits, "MOST_NBYTES_ALONE", 40_000)
    sampling = types_pb2.SamplingParams(grammar=types_pb2.Grammar(source="x" * 30_000))
    made = [types_pb2.GenerationRequest(request_id=name, sampling=sampling) for name in ("1", "2", "3")]
    made[2].sent.append(types_pb2.ChoiceOutput(token_ids=range(10_000)))
    tasks = [submit(joined, request) for request in made[:2]]
    with pytest.raises(InvalidRequestError, match="allowed"):
        submit(joined, made[2])
    async with stream(joined) as worker:
        await asyncio.sleep(20 * submits.HOLD_S)
        assert worker.messages == [["1"], ["2"]], "what is large goes alone"
        worker.answer("1", 1)
        worker.answer("2", 2)
        assert await asyncio.gather(*tasks) == [1, 2]


async def test_what_a_broken_stream_left_unanswered_goes_first_on_the_next(joined: Submits) -> None:
    async with stream(joined) as worker:
        tasks = ask(joined, "1", "2", "3")
        await settle()
        worker.answer("2", 2)
        await settle()
        assert worker.messages == [["1", "2", "3"]]
    tasks += ask(joined, "4")
    await settle()
    async with stream(joined) as worker:
        await settle()
        assert worker.messages == [["1", "3", "4"]]
        for name in ("1", "3", "4"):
            worker.answer(name, int(name))
        assert await asyncio.gather(*tasks) == [1, 2, 3, 4]


async def test_an_answer_of_the_stream_before_is_nobodys(joined: Submits) -> None:
    """Numbers begin again with each stream."""
    async with stream(joined) as worker:
        (task,) = ask(joined, "1")
        await settle()
    joined.answered(7, 70)
    async with stream(joined) as worker:
        await settle()
        worker.answer("1", 11)
        worker.answer("1", 99)
        assert await task == 11


async def test_one_that_is_not_answered_in_time_ends_alone(joined: Submits) -> None:
    async with stream(joined) as worker:
        (late,) = ask(joined, "1", timeout_s=0.05)
        (other,) = ask(joined, "2", timeout_s=5.0)
        await settle()
        with pytest.raises(UnavailableError, match="did not answer"):
            await asyncio.wait_for(late, 1)
        worker.answer("2", 2)
        assert await other == 2
        (later,) = ask(joined, "3", timeout_s=0.05)  # the watch goes on
        with pytest.raises(UnavailableError, match="did not answer"):
            await asyncio.wait_for(later, 1)


async def test_a_lost_worker_fails_all_at_once(joined: Submits) -> None:
    async with stream(joined):
        tasks = ask(joined, "1", "2")
        await settle()
        tasks += ask(joined, "3")
        await settle()
        joined.fail(UnavailableError("the worker is gone"))
        for task in tasks:
            with pytest.raises(UnavailableError, match="gone"):
                await task
