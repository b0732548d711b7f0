"""A router's part of keys and limits, by itself: no storage, no controller, no time of its own."""

from __future__ import annotations

import time

from limits_support import KEY, key

from common.types import MonotonicClock
from common.types.keys import Grant, Lease
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
