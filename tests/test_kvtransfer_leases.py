from __future__ import annotations

import itertools

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from kvtransfer_support import FakeCache, FakeClock, small_layout

from common.errors import LeaseLostError
from common.kvcache.layout import FULL_GROUP
from common.kvtransfer.leases import Leases


def make(ttl_s: float = 10.0) -> tuple[Leases, FakeCache, FakeClock]:
    clock, cache = FakeClock(), FakeCache(small_layout())
    return Leases(cache, clock, ttl_s), cache, clock


def test_a_lease_keeps_blocks_past_their_sequence_until_release() -> None:
    leases, cache, _ = make()
    cache.open(1, 64)
    blocks = list(cache.block_table(1, FULL_GROUP))
    lease_id = leases.open("r1")
    assert 0 < lease_id < 2**64
    leases.extend(lease_id, FULL_GROUP, blocks[:2])
    leases.extend(lease_id, FULL_GROUP, blocks[2:])
    cache.close(1)
    assert cache.count("leased") == 4
    assert [(x.lease_id, x.label, x.num_blocks) for x in leases.snapshot()] == [(lease_id, "r1", 4)]
    assert leases.release(lease_id)
    assert cache.is_idle
    assert leases.num_active == 0


def test_release_is_idempotent_and_counts_what_was_never_ours() -> None:
    leases, _, _ = make()
    lease_id = leases.open("r1")
    assert leases.release(lease_id)
    assert not leases.release(lease_id)
    assert not leases.release(lease_id ^ 1)
    counters = leases.counters
    assert (counters.opened, counters.released, counters.repeated, counters.lost) == (1, 1, 1, 1)


def test_only_the_clock_or_a_release_ends_a_lease() -> None:
    leases, cache, clock = make(ttl_s=10.0)
    cache.open(1, 16)
    lease_id = leases.open("r1")
    assert leases.next_deadline() == clock.now() + 10.0
    clock.time += 9.0
    leases.extend(lease_id, FULL_GROUP, cache.block_table(1, FULL_GROUP))
    cache.close(1)
    clock.time += 9.0
    assert leases.expire() == []
    assert cache.count("leased") == 1
    clock.time += 1.0
    assert leases.expire() == [lease_id]
    assert cache.is_idle
    assert leases.next_deadline() is None
    assert leases.counters.expired == 1
    assert not leases.release(lease_id)
    assert leases.counters.repeated == 1


def test_an_ended_or_unknown_lease_cannot_be_extended() -> None:
    leases, cache, clock = make(ttl_s=10.0)
    cache.open(1, 16)
    blocks = cache.block_table(1, FULL_GROUP)
    over = leases.open("r1")
    clock.time += 10.0
    with pytest.raises(LeaseLostError):
        leases.extend(over, FULL_GROUP, blocks)
    leases.expire()
    with pytest.raises(LeaseLostError):
        leases.renew(over)
    assert leases.counters.lost == 0
    with pytest.raises(LeaseLostError):
        leases.extend(over ^ 1, FULL_GROUP, blocks)
    assert leases.counters.lost == 1
    assert not cache.pins


def test_renewal_reorders_expiry() -> None:
    leases, _, clock = make(ttl_s=10.0)
    first, second = leases.open("a"), leases.open("b")
    clock.time += 5.0
    leases.renew(first)
    clock.time += 5.0
    assert leases.expire() == [second]
    assert leases.next_deadline() == clock.now() + 5.0
    clock.time += 5.0
    assert leases.expire() == [first]


def test_ids_are_never_zero_and_never_reused() -> None:
    clock, cache = FakeClock(), FakeCache(small_layout())
    ids = iter([0, 5, 5, 5, 6])
    leases = Leases(cache, clock, 1.0, random64=lambda: next(ids))
    assert leases.open("a") == 5
    assert leases.release(5)
    assert leases.open("b") == 6


def test_a_lease_needs_a_time() -> None:
    with pytest.raises(ValueError, match="ttl_s"):
        make(ttl_s=0.0)


class LeaseMachine(RuleBasedStateMachine):
    """Blocks are pinned exactly as long as their lease is open."""

    open_ids = Bundle("open_ids")

    def __init__(self) -> None:
        super().__init__()
        self.leases, self.cache, self.clock = make(ttl_s=10.0)
        self.seqs = itertools.count(1)
        self.model: dict[int, float] = {}

    @rule(target=open_ids)
    def open(self) -> int:
        lease_id = self.leases.open("x")
        self.model[lease_id] = self.clock.now() + 10.0
        return lease_id

    @rule(lease_id=open_ids)
    def extend(self, lease_id: int) -> None:
        seq_id = next(self.seqs)
        if self.cache.state[FULL_GROUP].count("free") < 2 or self.cache.state["tail"].count("free") < 1:
            return
        self.cache.open(seq_id, 32)
        try:
            self.leases.extend(lease_id, FULL_GROUP, self.cache.block_table(seq_id, FULL_GROUP))
            assert self.model[lease_id] > self.clock.now()
            self.model[lease_id] = self.clock.now() + 10.0
        except LeaseLostError:
            assert self.model.get(lease_id, 0.0) <= self.clock.now()
        self.cache.close(seq_id)

    @rule(lease_id=consumes(open_ids))
    def release(self, lease_id: int) -> None:
        assert self.leases.release(lease_id) == (lease_id in self.model)
        self.model.pop(lease_id, None)

    @rule(seconds=st.floats(0.0, 12.0))
    def expire(self, seconds: float) -> None:
        self.clock.time += seconds
        gone = self.leases.expire()
        assert set(gone) == {i for i, t in self.model.items() if t <= self.clock.now()}
        for lease_id in gone:
            del self.model[lease_id]

    @invariant()
    def pins_belong_to_open_leases(self) -> None:
        assert set(self.cache.pins) <= set(self.model)
        assert self.leases.num_active == len(self.model)
        assert self.cache.count("leased") == sum(len(p) for p in self.cache.pins.values())
        assert self.leases.next_deadline() == min(self.model.values(), default=None)


TestLeaseMachine = LeaseMachine.TestCase
TestLeaseMachine.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
