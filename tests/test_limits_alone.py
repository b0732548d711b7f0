"""A router's part of keys and limits, by itself: no storage, no controller, no time of its own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import pytest
from limits_support import KEY, Ticking, key

from common.errors import UnavailableError
from common.types import MonotonicClock
from common.types.keys import ApiKey, Grant, KeyTable, Lease, LeaseAsk
from services.router.admission import limiter as limiter_module
from services.router.admission.callers import Callers
from services.router.admission.gate import Gate, GateSettings
from services.router.admission.limiter import Limiter, headers
from services.router.admission.meters import KeyMeters


def test_alone_a_router_spends_its_share_and_no_more() -> None:
    meters = KeyMeters(key(requests_per_minute=600, quota_tokens=1000), 0.0)
    meters.put(Lease(meters.key.key_hash, Grant(10, 50), Grant(), Grant(100, 800), 4), 1, 1, 0.0)
    taken = 0
    for tenth in range(601):
        meters.refill(tenth / 10)
        while meters.take(1, 0, tenth / 10):
            taken += 1
    assert 170 <= taken <= 173, "in hand 10, of what was left 12, and a quarter of a minute's"
    assert meters.quota is not None
    assert meters.quota.left == 100 + 800 / 4


def test_a_debt_is_paid_before_more_is_spent() -> None:
    meters = KeyMeters(key(tokens_per_minute=600), 0.0)
    meters.put(Lease(meters.key.key_hash, Grant(), Grant(100, 500), Grant(), 1), 1, 100, 0.0)
    assert meters.take(1, 100, 0.0)
    meters.settle(100, 400)
    assert not meters.take(1, 1, 0.0)
    wanted = meters.ask(1, 50).tokens
    assert wanted.need == 350
    meters.put(Lease(meters.key.key_hash, Grant(), Grant(350, 0), Grant(), 1), 1, 50, 0.0)
    assert meters.take(1, 50, 0.0)


class Book:
    """A ledger of one key that takes a while to hear and to be heard.

    `lost`: what is said of its next calls, of which it hears those that are True, and whose answers do not come.
    """

    def __init__(self, mine: ApiKey, *lost: bool) -> None:
        self.key = mine
        self.answers: dict[int, Lease] = {}
        self._lost = list(lost)
        self.quota, self.requests = mine.quota_tokens, mine.requests_per_minute
        self.spent = self.calls = self.most_at_once = self._at_once = 0

    async def put_keys(self, keys: Sequence[ApiKey]) -> int:
        raise AssertionError("it has lost none")

    async def list_keys(self, incarnation: str = "", revision: int = 0) -> KeyTable:
        return KeyTable("book", 1, None if revision else (self.key,))

    async def lease(self, router_id: str, asks: Sequence[LeaseAsk], *, number: int = 0, oldest: int = 0) -> list[Lease]:
        (ask,) = asks
        self.calls += 1
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        await asyncio.sleep(0)
        heard = self._lost.pop(0) if self._lost else None
        if heard is not False and number not in self.answers:
            self.quota -= ask.quota.want - ask.quota.give_back
            self.requests -= ask.requests.want - ask.requests.give_back
            self.spent += ask.spent_tokens
            requests, quota = Grant(ask.requests.want, self.requests), Grant(ask.quota.want, self.quota)
            self.answers = {n: answer for n, answer in self.answers.items() if n >= oldest}
            self.answers[number] = Lease(ask.key_hash, requests, Grant(), quota)
        await asyncio.sleep(0)
        self._at_once -= 1
        if heard is not None:
            raise UnavailableError("the controller is silent")
        return [self.answers[number]]

    async def close(self) -> None:
        assert not self._at_once


@pytest.mark.parametrize("mine", [key(quota_tokens=100_000), key(requests_per_minute=600)], ids=["quota", "rate"])
@pytest.mark.parametrize("who", [{0}, {1}, {2}, {0, 1, 2}], ids=["first", "second", "last", "all"])
async def test_a_request_that_ends_while_it_asks_takes_nothing_along(mine: ApiKey, who: set[int]) -> None:
    """At each of its steps, beside others of its key: all that was granted is used or given back."""
    for steps in range(100):
        book, callers = Book(mine), Callers((), admin_token="t")
        limiter = Limiter(callers, book, "r", Ticking())
        await limiter.start(1.0)
        caller = callers.caller([(b"authorization", f"Bearer {KEY}".encode())])
        assert caller.meters is not None
        caller.meters.spent = 7
        tasks = [asyncio.create_task(limiter.charge(caller, 10, 500)) for _ in range(3)]
        for _ in range(steps):
            await asyncio.sleep(0)
        over = {each for each in who if tasks[each].done()}
        for each in who:
            tasks[each].cancel()
        taken = await asyncio.gather(*tasks, return_exceptions=True)
        assert {each for each in range(3) if isinstance(taken[each], asyncio.CancelledError)} == who - over
        charged = [tokens for tokens in taken if isinstance(tokens, int)]
        assert len(charged) == 3 - len(who - over)
        await limiter.stop()
        assert book.spent == 7
        if mine.quota_tokens:
            assert book.quota == mine.quota_tokens - sum(charged)
        else:
            assert book.requests == mine.requests_per_minute - len(charged)
        assert (book.calls <= 2, book.most_at_once) == (True, 1), "a lease, and then what was given back"
        if over == who:
            return
    pytest.fail("a request without end")


@pytest.mark.parametrize("lost", [(True,), (False,), (True, False, True, True, False)])
async def test_calls_whose_answers_are_lost_count_once(lost: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """A lease, what is given back and what was spent: whether the call was heard or not, and each time that it is."""
    monkeypatch.setattr(limiter_module, "FOLLOW_S", 0.01)
    mine, clock = key(quota_tokens=100_000), Ticking()
    book, callers = Book(mine, *lost), Callers((), admin_token="t")
    limiter = Limiter(callers, book, "r", clock)
    await limiter.start(1.0)
    caller = callers.caller([(b"authorization", f"Bearer {KEY}".encode())])
    assert caller.meters is not None
    caller.meters.spent = 7
    used = 0
    for _ in range(2):  # what the second needs is a slice that the first gave back
        taken = await limiter.charge(caller, 10, 500)
        limiter.settle(caller, taken, 400)
        used += 400
        clock.t += 60.0
        async with asyncio.timeout(5):
            while not limiter.following or book.calls < len(lost):  # noqa: ASYNC110 - nothing tells of it
                await asyncio.sleep(0.01)
    await limiter.stop()
    assert (mine.quota_tokens - book.quota + book.spent, len(book.answers)) == (used + 7, 1)


async def test_what_admission_costs_a_request() -> None:
    """A key's check, its limits and a place: about 6 us on an idle core of 2026; the bound is for busy ones."""
    clock = MonotonicClock()
    callers, meters = Callers(()), KeyMeters(key(requests_per_minute=10**9, tokens_per_minute=10**12, tenant="t"), 0.0)
    callers.replace({meters.key.key_hash: meters})
    assert meters.requests is not None
    assert meters.tokens is not None
    meters.requests.left = meters.tokens.left = 1e12
    limiter, gate = Limiter(callers, None, "r", clock), Gate(GateSettings(8, 1.0), lambda running: 8, clock)
    sent = [(b"host", b"h"), (b"accept", b"*/*"), (b"authorization", f"Bearer {KEY}".encode())]
    start = time.process_time()
    for _ in range(5000):
        caller = callers.caller(sent)
        limiter.check(caller)
        gate.check(caller.key_id, 1, caller.lowered(0), 1e9)
        taken = await limiter.charge(caller, 512, 576)
        headers(meters)
        assert gate.try_enter(1)
        gate.leave(1, 0.1)
        limiter.settle(caller, taken, 526)
    assert (time.process_time() - start) / 5000 < 60e-6
