"""Token streams of a decode worker: nothing lost or repeated across broken streams, nothing kept for ever."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st
from worker_support import ManualClock

from common.engine.messages import Cancel, DeltaRow, Deltas, FailureOf, PromptLogprobsOf
from common.rpc.codec import deltas_to_proto
from common.types import ChoiceDelta, Failure, FinishReason, TokenLogprobs
from services.decode_worker.streams import MAX_BACKLOG_ROWS, MAX_MESSAGE_ROWS, Link, Rows, Streams


class Harness:
    def __init__(self) -> None:
        self.clock = ManualClock()
        self.cancelled: list[int] = []
        self.choices: list[int | None] = []
        self.streams = Streams(self._cancel, 30.0, self.clock)

    def _cancel(self, message: Cancel) -> None:
        self.cancelled.extend(message.slots)
        self.choices.extend(message.choices)

    def token(
        self, slot: int, position: int, token: int, *, choice: int = 0, finish: FinishReason | None = None
    ) -> None:
        delta = ChoiceDelta(choice=choice, position=position, token_ids=(token,), finish=finish)
        self.streams.deliver(Deltas(1, rows=(DeltaRow(slot, delta),)))


async def rows_of(link: Link, generation: int | None = None) -> Rows | None:
    return await asyncio.wait_for(link.take(link.generation if generation is None else generation), 1)


def positions(rows: Rows | None) -> list[tuple[int, int]]:
    assert rows is not None
    return [(d.position + i, t) for _, d in rows.deltas for i, t in enumerate(d.token_ids)]


def taken(link: Link) -> list[tuple[int, int]]:
    return positions(asyncio.run(rows_of(link)))


def test_rows_of_one_step_leave_together() -> None:
    h = Harness()
    link, _, unknown = h.streams.attach("r", [])
    assert unknown == []
    a, b = h.streams.open("r", "a", range(1)), h.streams.open("r", "b", range(1))
    rows = tuple(DeltaRow(log.slot, ChoiceDelta(choice=0, position=0, token_ids=(7,))) for log in (a, b))
    asyncio.run(rows_of(link))
    h.streams.deliver(Deltas(1, rows=rows))
    assert taken(link) == [(0, 7), (0, 7)]


@given(st.integers(0, 8), st.integers(0, 8), st.integers(0, 8))
def test_a_router_that_comes_back_gets_exactly_the_rest(received: int, acked: int, total: int) -> None:
    acked, total = min(acked, received), max(total, received)
    h = Harness()
    link, generation, _ = h.streams.attach("r", [])
    log = h.streams.open("r", "a", range(1))
    for i in range(received):
        h.token(log.slot, i, 100 + i)
    h.streams.ack(link, [(log.slot, 0, acked)])
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
    mine, other = h.streams.open("r", "a", range(1)), h.streams.open("s", "b", range(1))
    _, _, unknown = h.streams.attach("r", [(mine.slot, 0, 0), (other.slot, 0, 0), (99, 0, 0)])
    assert unknown == sorted([other.slot, 99])


def test_requests_of_a_router_that_never_returns_are_cancelled_after_the_reattach_time() -> None:
    h = Harness()
    link, generation, _ = h.streams.attach("r", [])
    log = h.streams.open("r", "a", range(1))
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
    link, _, _ = h.streams.attach("r", [])
    log = h.streams.open("r", "a", range(1))
    h.token(log.slot, 0, 5)
    h.token(log.slot, 1, 6, finish=FinishReason.STOP)
    h.streams.ack(link, [(log.slot, 0, 2)])
    _, _, unknown = h.streams.attach("r", [(log.slot, 0, 2)])
    assert unknown == [log.slot]
    assert h.cancelled == []


def test_a_dead_engine_gives_each_open_request_one_failure() -> None:
    h = Harness()
    link, _, _ = h.streams.attach("r", [])
    done, running = h.streams.open("r", "a", range(1)), h.streams.open("r", "b", range(1))
    h.token(done.slot, 0, 5, finish=FinishReason.LENGTH)
    asyncio.run(rows_of(link))
    h.streams.fail_all(Failure("unavailable", "gone"))
    h.streams.fail_all(Failure("unavailable", "gone again"))
    rows = asyncio.run(rows_of(link))
    assert rows is not None
    assert [(s, f.message) for s, f in rows.failures] == [(running.slot, "gone")]


def test_a_failure_reaches_a_router_that_was_away() -> None:
    h = Harness()
    log = h.streams.open("r", "a", range(1))
    h.streams.deliver(Deltas(1, failures=(FailureOf(log.slot, Failure("internal", "boom")),)))
    link, _, _ = h.streams.attach("r", [(log.slot, 0, 0)])
    rows = asyncio.run(rows_of(link))
    assert rows is not None
    assert [(s, f.message) for s, f in rows.failures] == [(log.slot, "boom")]


async def test_what_a_newer_stream_is_sent_again_is_not_taken_by_the_older_one() -> None:
    h = Harness()
    link, old, _ = h.streams.attach("r", [])
    log = h.streams.open("r", "a", range(1))
    await rows_of(link)
    waiting = asyncio.create_task(rows_of(link, old))
    await asyncio.sleep(0)
    h.token(log.slot, 0, 5, finish=FinishReason.STOP)
    link, new, _ = h.streams.attach("r", [(log.slot, 0, 0)])
    assert await waiting is None
    assert positions(await rows_of(link, new)) == [(0, 5)]


def test_cancelling_a_choice_that_has_ended_leaves_the_others_alone() -> None:
    h = Harness()
    link, _, _ = h.streams.attach("r", [])
    log = h.streams.open("r", "a", range(2))
    h.token(log.slot, 0, 5, choice=0, finish=FinishReason.LENGTH)
    h.streams.cancel(link, log.slot, 0)
    assert h.cancelled == []
    h.token(log.slot, 0, 6, choice=1, finish=FinishReason.LENGTH)
    assert positions(asyncio.run(rows_of(link))) == [(0, 5), (0, 6)]


def test_the_last_open_choice_cancelled_is_the_whole_request_cancelled() -> None:
    h = Harness()
    link, _, _ = h.streams.attach("r", [])
    log = h.streams.open("r", "a", range(2))
    h.streams.cancel(link, log.slot, 0)
    h.token(log.slot, 0, 5, choice=0, finish=FinishReason.CANCELLED)
    h.streams.cancel(link, log.slot, 1)
    assert (h.cancelled, h.choices) == ([log.slot, log.slot], [0])
    assert len(h.streams) == 0


def test_a_router_can_neither_cancel_nor_acknowledge_what_is_not_its_own() -> None:
    h = Harness()
    link, _, _ = h.streams.attach("r", [])
    other = h.streams.open("s", "b", range(1))
    h.token(other.slot, 0, 5, finish=FinishReason.STOP)
    h.streams.ack(link, [(other.slot, 0, 1)])
    h.streams.cancel(link, other.slot, None)
    theirs, _, unknown = h.streams.attach("s", [(other.slot, 0, 0)])
    assert (unknown, taken(theirs)) == ([], [(0, 5)])
    assert h.cancelled == []


def test_a_finish_without_tokens_is_kept_until_it_was_received() -> None:
    h = Harness()
    link, generation, _ = h.streams.attach("r", [])
    log = h.streams.open("r", "a", range(1))
    h.token(log.slot, 0, 5)
    end = ChoiceDelta(choice=0, position=1, token_ids=(), finish=FinishReason.CANCELLED)
    h.streams.deliver(Deltas(2, rows=(DeltaRow(log.slot, end),)))
    h.streams.ack(link, [(log.slot, 0, 1)])  # of the token: sent before the end had come
    h.streams.detach(link, generation)
    link, _, unknown = h.streams.attach("r", [(log.slot, 0, 1)])
    rows = asyncio.run(rows_of(link))
    assert rows is not None
    assert (unknown, [d.finish for _, d in rows.deltas]) == ([], [FinishReason.CANCELLED])


def test_a_vector_is_kept_until_its_position_was_acknowledged() -> None:
    h = Harness()
    link, generation, _ = h.streams.attach("r", [])
    log = h.streams.open("r", "a", range(1))
    end = ChoiceDelta(choice=0, position=0, token_ids=(), finish=FinishReason.STOP, vector=b"1234")
    h.streams.deliver(Deltas(1, rows=(DeltaRow(log.slot, end),)))
    h.streams.ack(link, [(log.slot, 0, 0)])
    h.streams.detach(link, generation)
    link, generation, unknown = h.streams.attach("r", [(log.slot, 0, 0)])
    rows = asyncio.run(rows_of(link))
    assert rows is not None
    assert (unknown, rows.deltas) == ([], [(log.slot, end)])
    h.streams.ack(link, [(log.slot, 0, 1)])
    h.streams.detach(link, generation)
    assert h.streams.attach("r", [(log.slot, 0, 0)])[2] == [log.slot], "it is dropped"


def test_a_router_that_does_not_read_is_cut_off_and_finds_everything_in_the_log() -> None:
    h = Harness()
    link, generation, _ = h.streams.attach("r", [])
    log = h.streams.open("r", "a", range(1))
    for i in range(MAX_BACKLOG_ROWS + 1):
        h.token(log.slot, i, 100)
    assert asyncio.run(rows_of(link, generation)) is None
    assert not link.rows
    link, generation, _ = h.streams.attach("r", [(log.slot, 0, 0)])
    h.token(log.slot, MAX_BACKLOG_ROWS + 1, 101)
    assert link.generation == generation, "what is sent again does not count as a backlog"
    received: list[tuple[int, int]] = []
    while link.rows:
        received += taken(link)
    assert received == [*((i, 100) for i in range(MAX_BACKLOG_ROWS + 1)), (MAX_BACKLOG_ROWS + 1, 101)]


def test_a_router_that_submits_and_does_not_read_the_answers_is_cut_off() -> None:
    h = Harness()
    link, generation, _ = h.streams.attach("r", [])
    for number in range(MAX_BACKLOG_ROWS + 1):
        h.streams.submitted(link, generation, number, Failure("not_found", "no such model"))
    assert asyncio.run(rows_of(link, generation)) is None
    assert not link.rows


async def test_many_rows_leave_in_several_messages_and_a_failure_after_them() -> None:
    h = Harness()
    log = h.streams.open("r", "a", range(1))
    for i in range(MAX_MESSAGE_ROWS + 5):
        h.token(log.slot, i, 100)
    h.streams.fail_all(Failure("unavailable", "gone"))
    link, _, _ = h.streams.attach("r", [(log.slot, 0, 0)])
    first, second = await rows_of(link), await rows_of(link)
    assert first is not None
    assert second is not None
    assert (len(first.deltas), len(second.deltas)) == (MAX_MESSAGE_ROWS, 5)
    assert (first.failures, [f.message for _, f in second.failures]) == ([], ["gone"])


@pytest.mark.parametrize("limit", [1, 10_000, 200_000, 1 << 20])
async def test_large_prompt_logprobs_leave_apart_and_no_row_before_them(limit: int) -> None:
    clock = ManualClock()
    streams = Streams(lambda message: None, 30.0, clock, limit)
    link, _, _ = streams.attach("r", [])
    await rows_of(link)
    num_tokens, top_n = 500, 20
    prompt = TokenLogprobs((-1.0,) * num_tokens, top_n, (2**31 - 1,) * num_tokens * top_n, (-2.0,) * num_tokens * top_n)
    slots = [streams.open("r", f"r{i}", range(1)).slot for i in range(6)]
    asked, failed = slots[1:5], slots[5]
    end = ChoiceDelta(choice=0, position=0, token_ids=(7,), finish=FinishReason.LENGTH)
    streams.deliver(
        Deltas(
            1,
            rows=tuple(DeltaRow(slot, end) for slot in slots[:5]),
            failures=(FailureOf(failed, Failure("internal", "no")),),
            prompt_logprobs=tuple(PromptLogprobsOf(slot, prompt) for slot in asked),
        )
    )
    had: set[int] = set()
    ended: list[int] = []
    messages = 0
    while link.rows:
        rows = await rows_of(link)
        assert rows is not None
        messages += 1
        nbytes = deltas_to_proto(rows.deltas, rows.failures, rows.stats, rows.prompt_logprobs).ByteSize()
        assert nbytes < limit + 1000 or len(rows.prompt_logprobs) == 1
        assert all(p == prompt for _, p in rows.prompt_logprobs)
        had |= {slot for slot, _ in rows.prompt_logprobs}
        assert all(slot in had for slot, _ in rows.deltas if slot in asked)
        assert messages > 1 or slots[0] in [slot for slot, _ in rows.deltas], "others are not held up"
        assert not rows.failures or not link.rows
        ended += [slot for slot, _ in rows.deltas] + [slot for slot, _ in rows.failures]
    assert had == set(asked)
    assert sorted(ended) == slots
    assert messages == {1: 4, 10_000: 4, 200_000: 2, 1 << 20: 1}[limit]
