"""One pool: states, order of reuse, counts."""

from __future__ import annotations

import random

import pytest
from kvcache_support import HandClock, full

from common.kvcache.blocks import BlockPool, BlockState
from common.kvcache.prefix import PrefixIndex


def pool(num_blocks: int) -> tuple[BlockPool, HandClock]:
    clock, spec = HandClock(), full(num_blocks)
    return BlockPool(spec, PrefixIndex(spec), clock), clock


def test_the_strongest_claim_is_the_state() -> None:
    p, clock = pool(2)
    (b,) = p.allocate(1)
    seen = []

    def note() -> None:
        seen.append(p.state(b))
        clock.time += 1.0

    note()
    p.begin_read([b])
    note()
    p.end_read([b])
    p.seal(b, b"h")
    p.pin([b])
    note()
    p.release([b])
    note()
    p.acquire([b])
    note()
    p.release([b])
    p.unpin([b])
    note()
    p.reset_prefixes()
    note()
    names = ["LIVE", "IN_FLIGHT", "LIVE", "LEASED", "LIVE", "CACHED", "FREE"]
    assert seen == [BlockState[n] for n in names]
    p.check([0, 0], [0, 0], [0, 0])


def test_age_counts_from_the_last_change_of_state() -> None:
    p, clock = pool(2)
    (b,) = p.allocate(1)
    clock.time += 5.0
    p.acquire([b])
    assert list(p.held()) == [(b, BlockState.LIVE, 5.0)]
    p.pin([b])
    p.release([b, b])
    clock.time += 2.0
    assert list(p.held()) == [(b, BlockState.LEASED, 2.0)]


def test_new_blocks_come_in_order_and_return_in_order() -> None:
    p, _ = pool(6)
    assert p.allocate(4) == [0, 1, 2, 3]
    p.release([3, 2, 1])
    assert p.allocate(5) == [1, 2, 3, 4, 5], "neighbours stay together, which makes long reads"


def test_free_blocks_go_before_cached_ones() -> None:
    p, _ = pool(4)
    blocks = p.allocate(3)
    for b in blocks:
        p.seal(b, bytes([b]))
    p.release([2, 0, 1])
    assert p.num_available == 4
    assert p.allocate(3) == [3, 2, 0]
    assert [p.index.get(bytes([b])) for b in range(3)] == [None, 1, None]
    with pytest.raises(AssertionError, match="2 blocks of 1"):
        p.allocate(2)


@pytest.mark.parametrize("misuse", ["release", "unpin", "end_read", "acquire", "seal"])
def test_what_is_not_held_cannot_be_given_back(misuse: str) -> None:
    p, _ = pool(1)
    call = getattr(p, misuse)
    with pytest.raises(AssertionError, match="block 0 of group full"):
        call(0, b"h") if misuse == "seal" else call([0])
    p.check([0], [0], [0])


def test_a_block_is_sealed_once() -> None:
    p, _ = pool(1)
    p.allocate(1)
    p.seal(0, b"h")
    with pytest.raises(AssertionError, match="sealed twice"):
        p.seal(0, b"i")
    assert p.prefix_hash(0) == b"h"


def test_check_compares_with_the_holders() -> None:
    p, _ = pool(3)
    p.allocate(2)
    p.check([1, 1, 0], [0] * 3, [0] * 3)
    for refs, pins, reads in (([1, 2, 0], [0] * 3, [0] * 3), ([1, 1, 0], [1, 0, 0], [0] * 3)):
        with pytest.raises(AssertionError, match="differ from the holders'"):
            p.check(refs, pins, reads)


def test_the_cost_does_not_grow_with_the_pool() -> None:
    """A large pool in full use: the LRU list hands out and takes back in order."""
    n = 20_000
    p, _ = pool(n)
    for b in p.allocate(n):
        p.seal(b, b.to_bytes(4, "little"))
    order = list(range(n))
    random.Random(7).shuffle(order)
    p.release(order)
    for start in range(0, n, 100):
        assert p.allocate(100) == order[start : start + 100]
    p.check([1] * n, [0] * n, [0] * n)
