"""Token streams of a decode worker: nothing lost or repeated across broken streams, nothing kept for ever."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st
from worker_support import ManualClock

from common.engine.messages import Cancel, DeltaRow, Deltas, FailureOf
from common.types import ChoiceDelta, Failure, FinishReason
from services.decode_worker.streams import Link, Streams


class Harness:
    def __init__(self) -> None:
        self.clock = ManualClock()
        self.cancelled: list[int] = []
        self.streams = Streams(self._cancel, 30.0, self.clock)

    def _cancel(self, message: Cancel) -> None:
        self.cancelled.extend(message.slots)

    def token(self, slot: int, position: int, token: int, *, finish: FinishReason | None = None) -> None:
        delta = ChoiceDelta(choice=0, position=position, token_ids=(token,), finish=finish)
        self.streams.deliver(Deltas(1, rows=(DeltaRow(slot, delta),)))


def taken(link: Link) -> list[tuple[int, int]]:
    rows = asyncio.run(asyncio.wait_for(link.take(), 1))
    return [(d.position + i, t) for _, d in rows.deltas for i, t in enumerate(d.token_ids)]


def test_rows_of_one_step_leave_together() -> None:
    h = Harness()
    link, _, unknown = h.streams.attach("r", [])
    assert unknown == []
    a, b = h.streams.open("r", "a", 1), h.streams.open("r", "b", 1)
    rows = tuple(
        DeltaRow(log.slot, ChoiceDelta(choice=0, position=0, token_ids=(7,))) for log in (a, b)
    )
    asyncio.run(link.take())
    h.streams.deliver(Deltas(1, rows=rows))
    assert taken(link) == [(0, 7), (0, 7)]


@given(st.integers(0, 8), st.integers(0, 8), st.integers(0, 8))
def test_a_router_that_comes_back_gets_exactly_the_rest(received: int, acked: int, total: int) -> None:
    acked, total = min(acked, received), max(total, received)
    h = Harness()
    link, generation, _ = h.streams.attach("r", [])
    log = h.streams.open("r", "a", 1)
    for i in range(received):
        h.token(log.slot, i, 100 + i)
    h.streams.ack([(log.slot, 0, acked)])
    h.streams.detach(link, generation)
    for i in range(received, total):
        h.token(log.slot, i, 100 + i)
    link, _, unknown = h.streams.attach("r", [(log.slot, 0, received)])
    assert unknown == []
    assert taken(link) == [(i, 100 + i) for i in range(received, total)]


def test_a_stream_that_was_replaced_does_not_detach_its_successor() -> None:
    h = Harness()
    link, old, _ = h.streams.attach("r", [])
    again, new, _ = h.streams.attach("r", [])
    assert again is link
    assert new != old
    h.streams.detach(link, old)
    assert link.attached
    h.streams.detach(link, new)
    assert not link.attached


def test_unknown_slots_are_named_and_other_routers_slots_are_unknown() -> None:
    h = Harness()
    mine, other = h.streams.open("r", "a", 1), h.streams.open("s", "b", 1)
    _, _, unknown = h.streams.attach("r", [(mine.slot, 0, 0), (other.slot, 0, 0), (99, 0, 0)])
    assert unknown == sorted([other.slot, 99])


def test_requests_of_a_router_that_never_returns_are_cancelled_after_the_reattach_time() -> None:
    h = Harness()
    link, generation, _ = h.streams.attach("r", [])
    log = h.streams.open("r", "a", 1)
    h.streams.detach(link, generation)
    h.clock.advance(29.0)
    h.streams.sweep()
    assert h.cancelled == []
    h.clock.advance(2.0)
    h.streams.sweep()
    assert h.cancelled == [log.slot]
    assert len(h.streams) == 0


def test_an_ended_request_is_dropped_once_acknowledged() -> None:
    h = Harness()
    h.streams.attach("r", [])
    log = h.streams.open("r", "a", 1)
    h.token(log.slot, 0, 5)
    h.token(log.slot, 1, 6, finish=FinishReason.STOP)
    h.streams.ack([(log.slot, 0, 2)])
    _, _, unknown = h.streams.attach("r", [(log.slot, 0, 2)])
    assert unknown == [log.slot]
    assert h.cancelled == []


def test_a_dead_engine_gives_each_open_request_one_failure() -> None:
    h = Harness()
    link, _, _ = h.streams.attach("r", [])
    done, running = h.streams.open("r", "a", 1), h.streams.open("r", "b", 1)
    h.token(done.slot, 0, 5, finish=FinishReason.LENGTH)
    asyncio.run(link.take())
    h.streams.fail_all(Failure("unavailable", "gone"))
    h.streams.fail_all(Failure("unavailable", "gone again"))
    rows = asyncio.run(link.take())
    assert [(s, f.message) for s, f in rows.failures] == [(running.slot, "gone")]


def test_a_failure_reaches_a_router_that_was_away() -> None:
    h = Harness()
    log = h.streams.open("r", "a", 1)
    h.streams.deliver(Deltas(1, failures=(FailureOf(log.slot, Failure("internal", "boom")),)))
    link, _, _ = h.streams.attach("r", [(log.slot, 0, 0)])
    rows = asyncio.run(link.take())
    assert [(s, f.message) for s, f in rows.failures] == [(log.slot, "boom")]
