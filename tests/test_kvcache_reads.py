"""Blocks that others read or write: leases, remote reads, and windows that come from a peer."""

from __future__ import annotations

import pytest
from kvcache_support import A, chain_of, full, manager, run, states, tail, window


def test_leased_blocks_survive_their_sequence() -> None:
    m = manager(full(4))
    run(m, 1, A[:40])
    blocks = list(m.block_table(1, "full"))
    m.lease_pin(7, "full", blocks[:2])
    m.lease_pin(7, "full", blocks[2:])
    m.lease_pin(8, "full", blocks[:1])
    assert states(m) == (1, 3, 0, 0, 0)
    m.close(1)
    assert states(m) == (1, 0, 0, 3, 0)
    m.open(2, "b")
    assert not m.reserve(2, 32), "leased blocks are not evicted"
    m.lease_unpin(7)
    m.lease_unpin(7)
    assert states(m) == (2, 0, 1, 1, 0)
    m.lease_unpin(8)
    assert states(m) == (2, 0, 2, 0, 0)


def test_leased_blocks_are_found_as_a_prefix() -> None:
    m = manager(full(4))
    run(m, 1, A[:32])
    m.lease_pin(7, "full", m.block_table(1, "full"))
    m.close(1)
    assert run(m, 2, A[:40]) == 32
    m.lease_unpin(7)
    assert states(m) == (1, 3, 0, 0, 0)


def test_free_or_unread_blocks_cannot_be_leased() -> None:
    m = manager(full(4))
    with pytest.raises(AssertionError, match="cannot be leased"):
        m.lease_pin(1, "full", [0])
    m.open(1, "a")
    assert m.reserve(1, 16)
    m.begin_read(1, "full", m.block_table(1, "full"))
    with pytest.raises(AssertionError, match="cannot be leased"):
        m.lease_pin(1, "full", m.block_table(1, "full"))
    m.check()


def test_blocks_stay_in_flight_until_the_read_ends() -> None:
    m = manager(full(6), tail(1))
    m.open(1, "a")
    assert m.reserve(1, 48)
    m.snapshots.reserve_tail(1)
    m.begin_read(5, "full", m.block_table(1, "full")[1:])
    m.begin_read(5, "tail", [m.snapshots.tail_block(1) or 0])
    assert states(m) == (3, 1, 0, 0, 2)
    m.close(1)
    assert states(m) == (4, 0, 0, 0, 2)
    assert states(m, "tail") == (0, 0, 0, 0, 1)
    m.open(2, "b")
    assert not m.reserve(2, 80)
    m.close(2)
    with pytest.raises(AssertionError, match="open reads"):
        m.check_idle()
    m.end_read(5)
    assert states(m) == (6, 0, 0, 0, 0)
    assert states(m, "tail") == (1, 0, 0, 0, 0)


def test_a_read_that_succeeds_makes_a_prefix() -> None:
    m = manager(full(6))
    m.open(1, "a")
    assert m.reserve(1, 40)
    m.begin_read(5, "full", m.block_table(1, "full"))
    with pytest.raises(AssertionError, match="not final"):
        m.advance(1, chain_of(A), 40)
    m = manager(full(6))
    m.open(1, "a")
    assert m.reserve(1, 40)
    m.begin_read(5, "full", m.block_table(1, "full"))
    m.end_read(5)
    m.advance(1, chain_of(A), 40)
    assert m.match_prefix(chain_of(A), 40).num_tokens == 32


def test_shared_sealed_or_leased_blocks_are_not_written() -> None:
    m = manager(full(6))
    run(m, 1, A[:40])
    sealed, _, partial = m.block_table(1, "full")
    with pytest.raises(AssertionError, match="not one sequence's own"):
        m.begin_read(1, "full", [sealed])
    m.lease_pin(1, "full", [partial])
    with pytest.raises(AssertionError, match="not one sequence's own"):
        m.begin_read(1, "full", [partial])
    m.check()


def test_a_block_may_be_written_by_two_reads() -> None:
    m = manager(full(2, block_size=64))
    m.open(1, "a")
    assert m.reserve(1, 64)
    m.begin_read(1, "full", m.block_table(1, "full"))
    m.begin_read(2, "full", m.block_table(1, "full"))
    m.end_read(1)
    assert states(m) == (1, 0, 0, 0, 1)
    m.end_read(2)
    assert states(m) == (1, 1, 0, 0, 0)


def test_detach_lets_the_sequence_go_on_in_other_blocks() -> None:
    m = manager(full(8), window(8, 32), tail(2))
    chain = chain_of(A)
    m.open(1, "a")
    assert m.reserve(1, 64)
    m.advance(1, chain, 20)
    tail_block = m.snapshots.reserve_tail(1)
    assert tail_block is not None
    read = {g: m.block_table(1, g)[2:] for g in ("full", "window")}
    for group, blocks in read.items():
        m.begin_read(1, group, blocks)
    m.begin_read(1, "tail", [tail_block])
    m.detach_in_flight(1)
    assert m.num_computed(1) == 20
    assert m.snapshots.tail_block(1) is None
    assert [len(m.block_table(1, g)) for g in read] == [2, 2]
    assert m.reserve(1, 64)
    assert not set(read["full"]) & set(m.block_table(1, "full"))
    assert states(m) == (2, 4, 0, 0, 2)
    m.advance(1, chain, 64)
    m.end_read(1)
    m.close(1)
    m.check_idle()
    assert m.match_prefix(chain, 64).num_tokens == 64


def test_detach_goes_back_where_a_computed_block_is_being_written() -> None:
    m = manager(full(4, block_size=64), full(16, name="fine"))
    chain = chain_of([*A, *A])
    m.open(1, "a")
    assert m.reserve(1, 128)
    m.advance(1, chain, 100)
    m.begin_read(1, "full", m.block_table(1, "full")[1:])
    m.detach_in_flight(1)
    assert m.num_computed(1) == 64
    assert [len(m.block_table(1, g)) for g in ("full", "fine")] == [1, 4]
    assert states(m, "fine") == (10, 4, 2, 0, 0)
    assert m.reserve(1, 128)
    m.advance(1, chain, 128)
    m.end_read(1)
    m.close(1)
    m.check_idle()


def test_a_fetched_window_is_held_alone_and_sealed() -> None:
    """With 256 positions from a peer, a window of 32 holds what reads may write, and seals what it sees."""
    tokens = list(range(256))
    chain = chain_of(tokens)
    m = manager(full(20), window(20, 32))
    m.open(1, "a")
    assert m.blocks_needed(1, 256, fetch_to=256) == {"full": 16, "window": 8}
    assert m.reserve(1, 256, fetch_to=256)
    table = m.block_table(1, "window")
    assert [b >= 0 for b in table] == [False] * 8 + [True] * 8
    m.begin_read(1, "full", m.block_table(1, "full"))
    m.begin_read(1, "window", table[13:])
    m.end_read(1)
    m.advance(1, chain, 256)
    assert m.reserve(1, 257)
    assert [b >= 0 for b in table] == [False] * 14 + [True] * 3
    m.close(1)
    m.check_idle()
    assert states(m, "window") == (18, 0, 2, 0, 0), "blocks that nobody wrote are not cached"
    assert m.match_prefix(chain, 256).num_tokens == 256
    assert m.match_prefix(chain, 255).num_tokens == 0


@pytest.mark.parametrize(("num_tokens", "begin"), [(256, 176), (270, 176), (271, 192), (335, 256)])
def test_a_block_that_a_window_begins_amid_is_not_sealed(num_tokens: int, begin: int) -> None:
    """What reads bring of a window of 80 begins at token `begin`: blocks of 64 are whole from there on."""
    m = manager(full(24), window(8, 80, block_size=64))
    m.open(1, "a")
    assert m.reserve(1, num_tokens, fetch_to=num_tokens)
    table = list(m.block_table(1, "window"))
    m.begin_read(1, "full", m.block_table(1, "full"))
    m.begin_read(1, "window", table[begin // 64 :])
    m.end_read(1)
    m.advance(1, chain_of(range(num_tokens)), num_tokens)
    m.close(1)
    whole = [b for b in range(num_tokens // 64) if b * 64 >= begin]
    assert len(whole) == 1
    assert states(m, "window") == (7, 0, 1, 0, 0)
    assert [entry.block_id for entry in m.ledger_blocks() if entry.group == "window"] == [table[whole[0]]]


def test_a_fetched_window_without_a_plan_is_not_sealed() -> None:
    m = manager(full(20), window(20, 32))
    chain = chain_of(A)
    m.open(1, "a")
    assert m.reserve(1, 96)
    m.begin_read(1, "full", m.block_table(1, "full"))
    m.end_read(1)
    m.advance(1, chain, 96)
    m.close(1)
    assert states(m, "window") == (20, 0, 0, 0, 0), "the manager cannot know what they hold"
    assert states(m, "full") == (14, 0, 6, 0, 0)


def test_a_failed_fetch_fills_its_holes() -> None:
    tokens = list(range(300))
    chain = chain_of(tokens)
    m = manager(full(20), window(20, 32))
    m.open(1, "a")
    assert m.reserve(1, 256, fetch_to=256)
    m.begin_read(1, "full", m.block_table(1, "full")[3:])
    m.detach_in_flight(1)
    assert m.block_table(1, "window") == []
    m.close(1)
    m.end_read(1)

    m.open(2, "b")
    assert m.reserve(2, 256, fetch_to=256)
    assert m.reserve(2, 200), "computed here after all, though no read had begun"
    assert min(m.block_table(2, "window")[:13]) >= 0
    m.advance(2, chain, 200)
    m.check()
