"""Hand-offs that go wrong: never a wrong token, never a lost request, never a block that stays behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from engine_support import PEER, READER, Answer, Pair, abort_after, greedy, llama, prompts, reference_tokens, windowed

from common.engine.messages import PeerEvent
from common.kvtransfer.memory import Fault
from common.kvtransfer.orders import OrderExtent, OrderFailed, OrderFinished, OrderStarted, PlaceOrder, ReleaseLease
from common.types.prefix import pack_tokens

__all__ = ["llama", "windowed"]

COUNT = 10
(PROMPT,) = prompts(20, (100,))
SMALL_CHUNKS = {"max_num_batched_tokens": 32}


def settle(pair: Pair, answer: Answer, folder: Path, prompt: tuple[int, ...] = PROMPT) -> None:
    pair.run(answer)
    assert answer.failure is None
    assert answer.tokens[0] == reference_tokens(folder, prompt, COUNT)


@pytest.mark.parametrize("fault", [Fault.FAIL, Fault.CORRUPT, Fault.SHORT, Fault.MISPLACE, Fault.EARLY])
@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_a_bad_read_is_a_recompute_never_a_token(llama: Path, fault: Fault, index: int) -> None:
    pair = Pair(llama, prefill=SMALL_CHUNKS)
    seen: list[int] = []

    def fault_for(read_id: int, pieces: object) -> Fault:
        seen.append(read_id)
        return fault if len(seen) == index + 1 else Fault.NONE

    pair.network.fault_for = fault_for
    answer = pair.submit(PROMPT, greedy(COUNT))
    settle(pair, answer, llama)
    assert answer.stats.fallback in ("digest_mismatch", "read_failed")
    assert answer.stats.computed_tokens > 0
    s = answer.stats
    assert s.cached_tokens + s.computed_tokens + s.transferred_tokens == s.prompt_tokens
    pair.network.fault_for = lambda read_id, pieces: Fault.NONE
    pair.check_idle()


def test_a_read_that_never_ends_is_fenced_and_recomputed(llama: Path) -> None:
    pair = Pair(llama, handoff={"read_timeout_s": 2.0, "progress_timeout_s": 60.0})
    pair.network.fault_for = lambda read_id, pieces: Fault.STUCK
    answer = pair.submit(PROMPT, greedy(COUNT))
    for _ in range(5):
        pair.step()
    assert not answer.tokens
    pair.clock.advance(2.1)
    settle(pair, answer, llama)
    assert answer.stats.fallback == "read_timeout"
    assert [v.state for v in pair.verdicts] == ["ready", "lost"]
    assert not pair.decode.parts.reader.usable(PEER)
    pair.clock.advance(60.0)  # the lease of the lost hand-off runs out by itself
    pair.check_idle()


@pytest.mark.parametrize("after", range(6))
def test_a_prefill_worker_killed_at_any_moment_is_invisible(llama: Path, after: int) -> None:
    pair = Pair(llama, prefill=SMALL_CHUNKS)
    pair.network.held = True
    answer = pair.submit(PROMPT, greedy(COUNT))
    for _ in range(after):
        pair.step()
        pair.network.step()
    pair.kill_prefill()
    settle(pair, answer, llama)
    pair.check_idle()
    later = pair.submit(PROMPT, greedy(COUNT))
    settle(pair, later, llama)


def test_silence_ends_in_a_local_prefill(llama: Path) -> None:
    pair = Pair(llama, handoff={"accept_timeout_s": 1.0})
    pair.cut = True
    answer = pair.submit(PROMPT, greedy(COUNT))
    pair.step()
    assert not answer.tokens
    pair.clock.advance(1.1)
    settle(pair, answer, llama)
    assert answer.stats.fallback == "accept_timeout"


def test_a_refused_order_is_computed_here(llama: Path) -> None:
    pair = Pair(llama, prefill={"max_model_len": 64})
    answer = pair.submit(PROMPT, greedy(COUNT))
    settle(pair, answer, llama)
    assert answer.stats.fallback == "rejected"
    pair.check_idle()


def test_a_broken_session_loses_nothing_and_its_leases_run_out(llama: Path) -> None:
    pair = Pair(llama, prefill=SMALL_CHUNKS | {"lease_ttl_s": 5.0})
    pair.network.held = True
    answer = pair.submit(PROMPT, greedy(COUNT))
    for _ in range(4):
        pair.step()
    pair.lose_session()
    settle(pair, answer, llama)
    leased = {s.group: s.leased for s in pair.prefill.parts.cache.ledger()}
    assert leased["full"] > 0
    pair.clock.advance(5.1)
    pair.prefill.engine.step()
    pair.prefill.parts.cache.check_idle()


def forged(order_id: int, extent: OrderExtent) -> list[OrderExtent]:
    far = 10**6
    fields = {
        "order_id": extent.order_id,
        "lease_id": extent.lease_id,
        "group": extent.group,
        "start_position": extent.start_position,
        "num_tokens": extent.num_tokens,
        "block_ids": extent.block_ids,
        "prefix_hash": extent.prefix_hash,
        "digests": extent.digests,
    }
    bent: list[dict[str, object]] = [
        {"lease_id": extent.lease_id + 1},
        {"group": "nowhere"},
        {"start_position": extent.start_position + 16},
        {"num_tokens": extent.num_tokens + far},
        {"block_ids": tuple(b + far for b in extent.block_ids)},
        {"block_ids": extent.block_ids[::-1]},
        {"prefix_hash": bytes(16)},
        {"digests": extent.digests[:-1]},
        {"digests": tuple(d ^ 1 for d in extent.digests)},
    ]
    return [OrderExtent(**(fields | change)) for change in bent]  # type: ignore[arg-type]


OTHER_WAY_ROUND = 5  # of `forged`: of one block that is no forgery


@pytest.mark.parametrize(
    ("group", "variant"),
    [(group, i) for group in ("full", "tail") for i in range(9) if (group, i) != ("tail", OTHER_WAY_ROUND)],
)
def test_a_forged_extent_never_becomes_a_token(llama: Path, group: str, variant: int) -> None:
    pair = Pair(llama)
    handle = pair.decode.engine.handle
    bent = 0

    def forging(message: object) -> None:
        nonlocal bent
        event = message.event if isinstance(message, PeerEvent) else None
        if isinstance(event, OrderExtent) and event.group == group and not bent:
            bent += 1
            message = PeerEvent(PEER, forged(event.order_id, event)[variant])
        handle(message)  # type: ignore[arg-type]

    pair.decode.engine.handle = forging  # type: ignore[method-assign]
    answer = pair.submit(PROMPT, greedy(COUNT))
    settle(pair, answer, llama)
    assert bent == 1
    assert answer.stats.fallback in ("protocol", "prefix_hash", "digest_mismatch")
    pair.check_idle()


def test_events_of_unknown_orders_and_leases_change_nothing(llama: Path) -> None:
    pair = Pair(llama)
    for event in (
        OrderStarted(99, 5, 0),
        OrderExtent(99, 5, "full", 0, 16, (0,), bytes(16), (1, 2)),
        OrderFinished(99, 5, 16, 0.0, 0.0),
    ):
        pair.decode.engine.handle(PeerEvent(PEER, event))
    pair.prefill.engine.handle(ReleaseLease(READER, 12345))
    assert pair.decode.parts.reader.counters.unknown_events == 3
    answer = pair.submit(PROMPT, greedy(COUNT))
    settle(pair, answer, llama)
    pair.check_idle()


@pytest.mark.parametrize("steps", range(8))
def test_an_abort_in_every_state_gives_everything_back(llama: Path, steps: int) -> None:
    pair = Pair(llama, prefill=SMALL_CHUNKS, max_num_batched_tokens=32)
    bystander = abort_after(pair, steps, PROMPT, COUNT)
    settle(pair, bystander, llama, PROMPT[:50])
    pair.check_idle()


def test_blocks_of_an_aborted_hand_off_are_not_reused_while_bytes_may_land(llama: Path) -> None:
    pair = Pair(llama, kv_cache_memory_bytes=175_000, max_model_len=192, max_num_seqs=6)
    pair.network.held = True
    aborted = pair.submit(PROMPT, greedy(COUNT))
    for _ in range(3):
        pair.step()
    pair.cancel(aborted)
    pair.step()
    states = {s.group: s for s in pair.decode.parts.cache.ledger()}
    assert states["full"].in_flight == 7
    other = pair.submit(PROMPT[30:90], greedy(COUNT), prefill=0)
    settle(pair, other, llama, PROMPT[30:90])
    pair.network.held = False
    pair.network.advance()
    pair.check_idle()


def test_a_storm_of_aborts_leaves_no_block_behind(llama: Path) -> None:
    pair = Pair(llama, prefill=SMALL_CHUNKS)
    given = prompts(30, [20 + 7 * i for i in range(12)])
    for round_ in range(6):
        answers = [pair.submit(p, greedy(COUNT)) for p in given]
        for _ in range(round_):
            pair.step()
        for answer in answers[::2]:
            pair.cancel(answer)
        pair.run(*answers)
        for prompt, answer in list(zip(given, answers, strict=True))[1::2]:
            assert answer.tokens[0] == reference_tokens(llama, prompt, COUNT)
    pair.check_idle()


def test_bad_orders_are_answered_by_name(llama: Path) -> None:
    pair = Pair(llama)

    def ask(order_id: int, **change: object) -> str:
        fields: dict[str, object] = {
            "peer": READER,
            "order_id": order_id,
            "request_id": "x",
            "packed_tokens": pack_tokens(PROMPT),
            "start_position": 0,
            "adapter_id": "",
            "cache_salt": "",
            "embeddings": (),
            "priority": 0,
            "remaining_s": 0.0,
        }
        pair.prefill.engine.handle(PlaceOrder(**(fields | change)))  # type: ignore[arg-type]
        pair.step()
        failures = [e for e in pair.events if isinstance(e, OrderFailed) and e.order_id == order_id]
        assert len(failures) == 1
        return failures[0].failure.message

    cases: list[tuple[Callable[[], str], str]] = [
        (lambda: ask(1, packed_tokens=b""), "0 tokens"),
        (lambda: ask(2, packed_tokens=pack_tokens([1] * 1000)), "1000 tokens"),
        (lambda: ask(3, start_position=100), "start_position 100"),
        (lambda: ask(4, packed_tokens=pack_tokens([10**6])), "vocabulary"),
        (lambda: ask(5, adapter_id="lora"), "adapters"),
        (lambda: ask(6, packed_tokens=bytes(7)), "no whole token ids"),
        (lambda: ask(7, packed_tokens=b"\xff" * 4), "vocabulary"),
    ]
    for attempt, expected in cases:
        assert expected in attempt()
    pair.check_idle()


def test_an_order_runs_out_of_time_and_the_reader_goes_on(llama: Path) -> None:
    pair = Pair(llama, prefill={"max_num_batched_tokens": 16})
    answer = pair.submit(PROMPT, greedy(COUNT), remaining_s=30.0)
    pair.step()
    pair.step()
    pair.clock.advance(29.0)
    pair.run(answer)
    assert answer.failure is None
    late = pair.submit(PROMPT, greedy(COUNT), remaining_s=1.0)
    pair.clock.advance(1.5)
    pair.run(late)
    assert late.failure is not None
    assert late.failure.code == "deadline_exceeded"
    pair.check_idle()


def test_a_prefill_worker_with_windows_takes_any_prompt_it_says_it_does(windowed: Path) -> None:
    prefill = {"max_num_seqs": 1, "max_num_batched_tokens": 32, "max_model_len": 512}
    pair = Pair(windowed, prefill=prefill, max_model_len=512)
    (prompt,) = prompts(21, (400,))
    answer = pair.submit(prompt, greedy(COUNT))
    pair.run(answer)
    assert answer.stats.fallback == ""
    assert answer.tokens[0] == reference_tokens(windowed, prompt, COUNT)
    pair.check_idle()


@pytest.mark.parametrize("blocks", [(16, 32), (32, 32), (64, 64)])
@pytest.mark.parametrize(("length", "kept"), [(46, 46), (73, 72)])
def test_what_a_window_begins_amid_is_no_prefix_for_others(
    windowed: Path, blocks: tuple[int, int], length: int, kept: int
) -> None:
    """Of a handed-over prompt's first block in a window group only the end came: the next turn does without it."""
    pair = Pair(windowed, prefill={"block_size": blocks[0]}, block_size=blocks[1])
    prompt, more = prompts(length, (length, 20))
    settle(pair, pair.submit(prompt, greedy(COUNT)), windowed, prompt)
    turn = (*prompt[:kept], *more)
    answer = pair.submit(turn, greedy(COUNT), prefill=0)
    pair.run(answer)
    assert answer.tokens[0] == reference_tokens(windowed, turn, COUNT)
    pair.check_idle()


def test_a_lease_that_ends_while_a_cached_prompt_is_published_fails_that_order_alone(llama: Path) -> None:
    pair = Pair(llama, prefill={"lease_ttl_s": 5.0})
    settle(pair, pair.submit(PROMPT, greedy(COUNT)), llama)
    pair.decode.parts.cache.reset_prefix_cache()
    leases = pair.prefill.parts.supply._p.leases
    extend, late = leases.extend, 0

    def slow(*arguments: object) -> None:
        nonlocal late
        if not late:
            late += 1
            pair.clock.advance(6.0)
        extend(*arguments)  # type: ignore[arg-type]

    leases.extend = slow  # type: ignore[method-assign,assignment]
    answer = pair.submit(PROMPT, greedy(COUNT))
    settle(pair, answer, llama)
    assert (late, answer.stats.fallback) == (1, "rejected")
    pair.check_idle()


def test_the_waterfall_of_a_failed_hand_off_ends_with_the_prompt_computed_here(llama: Path) -> None:
    pair = Pair(llama, handoff={"accept_timeout_s": 1.0}, max_num_batched_tokens=60)
    pair.cut = True
    answer = pair.submit(PROMPT, greedy(COUNT))
    pair.step()
    pair.clock.advance(1.5)
    pair.step()
    pair.clock.advance(2.0)
    settle(pair, answer, llama)
    s = answer.stats
    assert (s.queue_ms, s.prefill_ms, s.decode_queue_ms) == pytest.approx((0.0, 3.5e3, 0.0))


def test_the_waterfall_tells_how_long_a_prompt_waited_and_was_computed_on_the_prefill_worker(llama: Path) -> None:
    pair = Pair(llama, prefill=SMALL_CHUNKS | {"max_num_seqs": 1})
    answers = [pair.submit(prompt, greedy(2)) for prompt in prompts(8, (100, 100))]
    while not all(answer.finish for answer in answers):
        pair.step()
        pair.clock.advance(0.1)
    one, two = (answer.stats for answer in answers)
    assert one.prefill_compute_ms > 100
    assert two.prefill_queue_ms >= one.prefill_queue_ms + one.prefill_compute_ms
    assert two.prefill_compute_ms == pytest.approx(one.prefill_compute_ms)
    for stats in (one, two):
        assert stats.transferred_tokens == 100
        assert stats.prefill_queue_ms + stats.prefill_compute_ms <= stats.prefill_ms


@pytest.mark.parametrize("length", [60, 130, 150, 250])
def test_a_hand_off_that_could_never_fit_is_done_without(windowed: Path, length: int) -> None:
    """A read takes a window from a multiple of 128 tokens on: more than a decode worker of short steps needs."""
    pair = Pair(windowed, max_num_seqs=1, max_num_batched_tokens=16, max_model_len=256)
    (prompt,) = prompts(3, (length,))
    answer = pair.submit(prompt, greedy(4))
    pair.run(limit=200)
    assert answer.tokens[0] == reference_tokens(windowed, prompt, 4)
    fits = length in (60, 250)
    assert (answer.stats.transferred_tokens > 0) == fits
    assert answer.stats.fallback == ("" if fits else "more blocks at once than there are")
    pair.check_idle()
