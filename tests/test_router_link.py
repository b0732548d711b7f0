"""A link with a fake worker: what happens between a Submit and its answer; how arrivals reach their consumer."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import weakref
from collections.abc import Sequence
from typing import Any

import pytest

from common.errors import NanoDeployError, OverloadedError, UnavailableError
from common.rpc.codec import StepRows, deltas_from_proto, deltas_to_proto
from common.types import (
    ChoiceDelta,
    FinishReason,
    GenerationRequest,
    MonotonicClock,
    SamplingParams,
    WorkerRef,
    new_epoch,
)
from services.router.contract import DecodeStream
from services.router.generation import LOAD_MEMORY_S, Batch, Courier, Generation, Mailbox, Singles
from services.router.link import WorkerLink
from services.router.outbox import Cancels, Positions
from services.router.routing.board import NO_HINTS
from services.router.submits import Answer

SLOT = 7


class FakeStream:
    def __init__(self, peer: FakePeer) -> None:
        self._peer = peer
        self._over = asyncio.Event()

    async def attach(self, epoch: int, positions: Positions) -> tuple[int, Sequence[int]]:
        return epoch, ()

    async def read(self) -> StepRows:
        over = asyncio.ensure_future(self._over.wait())
        rows = asyncio.ensure_future(self._peer.rows.get())
        await asyncio.wait((over, rows), return_when=asyncio.FIRST_COMPLETED)
        over.cancel()
        if rows.done():
            return rows.result()
        rows.cancel()
        raise UnavailableError("closed")

    async def send(self, cancels: Cancels, acks: Positions) -> None:
        self._peer.cancels.extend(cancels)

    def close(self) -> None:
        self._over.set()


class FakePeer:
    """Answers a Submit when told to."""

    def __init__(self) -> None:
        self.submitted: list[GenerationRequest] = []
        self.asked = asyncio.Event()
        self.answer = asyncio.Event()
        self.answering: list[asyncio.Task[None]] = []
        self.cancels: list[tuple[int, int | None]] = []
        self.rows: asyncio.Queue[StepRows] = asyncio.Queue()
        self.streams = 0

    def submit(self, request: GenerationRequest, prefill: WorkerRef | None, timeout_s: float, answer: Answer) -> None:
        self.submitted.append(request)
        self.asked.set()
        self.answering.append(asyncio.create_task(self._answer(answer)))

    async def _answer(self, answer: Answer) -> None:
        await self.answer.wait()
        answer(SLOT)

    def open_stream(self) -> DecodeStream:
        self.streams += 1
        return FakeStream(self)

    async def close(self) -> None:
        for task in self.answering:
            task.cancel()


def make_link(peer: FakePeer, connect_timeout_s: float = 1.0) -> WorkerLink:
    def lost(generation: Generation, why: NanoDeployError, forgotten: bool) -> None:
        raise AssertionError(f"lost: {why}")

    return WorkerLink(
        WorkerRef("d0", new_epoch(), "127.0.0.1:1"),
        peer,
        clock=MonotonicClock(),
        rng=random.Random(1),
        connect_timeout_s=connect_timeout_s,
        on_lost=lost,
        others_ready=lambda ref: False,
        on_attached=lambda: None,
    )


def row(choice: int, position: int, tokens: int = 1, finish: FinishReason | None = None) -> ChoiceDelta:
    return ChoiceDelta(choice=choice, position=position, token_ids=tuple(range(tokens)), finish=finish)


def make_generation(mailbox: Mailbox, n: int) -> Generation:
    request = GenerationRequest(
        request_id="r" * 32, model="m", prompt_token_ids=(1, 2), sampling=SamplingParams(n=n, max_tokens=64, seed=1)
    )
    return Generation(request, mailbox, 0, NO_HINTS)


def deltas_of(batch: Batch) -> list[ChoiceDelta]:
    """Each row by itself."""
    return [d for _, found in batch for d in (found.deltas() if isinstance(found, Singles) else (found,))]


def make_mailbox(limit: int = 1000) -> Mailbox:
    return Mailbox(Courier(MonotonicClock()), limit, lambda: None)


@pytest.mark.parametrize("told", [False, True])
async def test_a_choice_closed_while_its_request_moves_is_cancelled(told: bool) -> None:
    """A stop string found in what the lost worker had sent: the next worker runs the choice until it hears of it."""
    peer = FakePeer()
    link = make_link(peer)
    generation = make_generation(make_mailbox(), n=3)
    for choice in range(3):
        assert generation.accept(row(choice, 0, tokens=4))
    generation.accept(row(2, 4, finish=FinishReason.LENGTH))
    if told:
        generation.close_choice(1)
    moving = asyncio.create_task(link.submit(generation, None))
    await asyncio.wait_for(peer.asked.wait(), 5)
    assert peer.submitted[0].ended_choices == ((1, 2) if told else (2,))
    generation.close_choice(1)
    peer.answer.set()
    await moving
    await link._outbox.drained(5)
    assert peer.cancels == ([] if told else [(SLOT, 1)])
    assert generation.link is link, "the open choice goes on"
    generation.cancel()
    await link.close()


async def test_a_request_cancelled_while_it_is_submitted_is_cancelled_at_the_worker() -> None:
    peer = FakePeer()
    link = make_link(peer)
    generation = make_generation(make_mailbox(), n=2)
    moving = asyncio.create_task(link.submit(generation, None))
    await asyncio.wait_for(peer.asked.wait(), 5)
    generation.cancel()
    peer.answer.set()
    await moving
    await link._outbox.drained(5)
    assert peer.cancels == [(SLOT, None)]
    await link.close()


async def test_a_worker_that_left_is_asked_for_the_answer_it_owes() -> None:
    """A Submit is out when it leaves: its answer comes down the next stream, or that stream fails."""
    peer = FakePeer()
    link = make_link(peer)
    generation = make_generation(make_mailbox(), n=1)
    moving = asyncio.create_task(link.submit(generation, None))
    await asyncio.wait_for(peer.asked.wait(), 5)
    link.retire()
    await asyncio.sleep(0.05)
    assert (peer.streams, link.over) == (2, False)
    peer.answer.set()
    await asyncio.wait_for(moving, 5)
    assert generation.link is link
    generation.cancel()
    await link.close()


async def test_a_slot_that_no_answer_names_is_cancelled_however_busy_the_link() -> None:
    """One whose answer was lost with its stream runs for nobody; others are being submitted all the time."""
    peer = FakePeer()
    link = make_link(peer, connect_timeout_s=0.1)
    moving = [asyncio.create_task(link.submit(make_generation(make_mailbox(), n=1), None)) for _ in range(2)]
    await asyncio.wait_for(peer.asked.wait(), 5)
    for position in range(30):
        peer.rows.put_nowait(deltas_from_proto(deltas_to_proto([(99, row(0, position))])))
        await asyncio.sleep(0.01)
    assert peer.cancels == [(99, None)]
    assert not link._stash.num_rows
    for task in moving:
        task.cancel()
    await link.close()


# -- mailboxes ---------------------------------------------------------------------------------------------------------


async def test_what_arrives_in_a_tick_is_handed_over_together() -> None:
    mailbox = make_mailbox()
    generation = make_generation(mailbox, n=1)
    batches: list[int] = []

    def consume(deltas: Batch) -> None:
        batches.append(len(deltas_of(deltas)))
        if sum(batches) == 5:
            mailbox.finish()

    mailbox.consume = consume
    for position in range(3):
        generation.accept(row(0, position))
    assert batches == [], "never from inside the stream's reader"
    await asyncio.sleep(0)
    assert batches == [3]
    generation.accept(row(0, 3, tokens=2))
    generation.accept(row(0, 5))
    await asyncio.wait_for(mailbox.ended(), 5)
    assert batches == [3, 2]


@pytest.mark.parametrize("load", [0.0, 1.0])
async def test_a_core_with_little_time_left_takes_several_steps_per_write(load: float) -> None:
    clock = MonotonicClock()
    courier = Courier(clock, lambda: load * clock.now())
    mailbox = Mailbox(courier, 1000, lambda: None)
    generation = make_generation(mailbox, n=1)
    batches: list[int] = []
    mailbox.consume = lambda deltas: batches.append(len(deltas_of(deltas)))
    generation.accept(row(0, 0))
    await asyncio.sleep(2 * LOAD_MEMORY_S)
    generation.accept(row(0, 1))
    await asyncio.sleep(0.05)
    assert batches == [1, 1], "there was time"
    generation.accept(row(0, 2))  # what the loop did in the pauses is known now
    for position in range(3, 6):
        await asyncio.sleep(0)
        generation.accept(row(0, position))
    await asyncio.sleep(0.05)
    assert courier.is_behind == bool(load)
    assert batches == ([1, 1, 1, 3] if load else [1] * 6)


async def test_a_held_mailbox_keeps_order_and_is_bounded() -> None:
    overflows: list[bool] = []
    mailbox = Mailbox(Courier(MonotonicClock()), 8, lambda: overflows.append(True))
    generation = make_generation(mailbox, n=1)
    taken: list[int] = []
    mailbox.consume = lambda deltas: taken.extend(delta.position for delta in deltas_of(deltas))
    mailbox.hold()
    for position in range(6):
        generation.accept(row(0, position))
        await asyncio.sleep(0)
    await asyncio.wait_for(mailbox.begun(), 5)
    assert taken == []
    mailbox.release()
    await asyncio.sleep(0.02)
    assert taken == [0, 1, 2, 3, 4, 5]
    mailbox.hold()
    for position in range(6, 20):
        generation.accept(row(0, position))
    assert overflows == [True]
    with pytest.raises(OverloadedError, match="8 tokens behind"):
        await asyncio.wait_for(mailbox.ended(), 5)
    assert len(taken) == 6, "what was cut off is not given out"


async def test_a_burst_is_no_slow_client() -> None:
    """What a stream that was taken up again brings at once, however much: the client has had no chance to read it."""
    mailbox = make_mailbox(limit=8)
    generation = make_generation(mailbox, n=1)
    taken: list[int] = []
    mailbox.consume = lambda deltas: taken.extend(delta.position for delta in deltas_of(deltas))
    for position in range(50):
        generation.accept(row(0, position))
    await asyncio.sleep(0)
    assert taken == list(range(50))


async def test_a_failure_comes_after_what_was_delivered() -> None:
    mailbox = make_mailbox()
    generation = make_generation(mailbox, n=1)
    taken: list[int] = []
    mailbox.consume = lambda deltas: taken.extend(delta.position for delta in deltas_of(deltas))
    mailbox.hold()
    generation.accept(row(0, 0))
    mailbox.fail(UnavailableError("first"))
    mailbox.fail(UnavailableError("second"))
    generation.accept(row(0, 1))
    waiting = asyncio.create_task(mailbox.ended())
    await asyncio.sleep(0.02)
    assert not waiting.done(), "the client has not caught up yet"
    mailbox.release()
    with pytest.raises(UnavailableError, match="first"):
        await asyncio.wait_for(waiting, 5)
    assert taken == [0]


async def test_a_closed_mailbox_needs_no_garbage_collector() -> None:
    """Its consumer refers to it, and so does the traceback of its failure."""

    async def request() -> weakref.ref[Any]:
        mailbox = make_mailbox()

        def consume(deltas: Batch) -> None:
            mailbox.finish()

        mailbox.consume = consume
        mailbox.fail(UnavailableError("gone"))
        try:
            with contextlib.suppress(UnavailableError):
                await mailbox.ended()
            return weakref.ref(consume)
        finally:
            mailbox.close()

    gc.disable()
    try:
        consumer = await request()
        await asyncio.sleep(0)
        assert consumer() is None
    finally:
        gc.enable()


async def test_an_error_of_the_consumer_ends_its_request_alone() -> None:
    courier = Courier(MonotonicClock())
    broken, sound = (Mailbox(courier, 100, lambda: None) for _ in range(2))

    def fail(deltas: Batch) -> None:
        raise ZeroDivisionError("in the consumer")

    broken.consume = fail
    sound.consume = lambda deltas: sound.finish()
    for mailbox in (broken, sound):
        make_generation(mailbox, n=1).accept(row(0, 0))
    with pytest.raises(ZeroDivisionError):
        await asyncio.wait_for(broken.ended(), 5)
    await asyncio.wait_for(sound.ended(), 5)
