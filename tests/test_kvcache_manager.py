"""The rules of the block manager, one by one."""

from __future__ import annotations

import pytest
from kvcache_support import HandClock, chain_of, full, layout, manager, run, snapshots, states, tail, window

from common.kvcache.layout import GroupSpec
from common.kvcache.manager import NO_HIT, KVCacheManager
from common.kvcache.tables import BlockCopy

A, B = list(range(100)), [*range(40), *range(500, 560)]


def test_blocks_go_from_free_to_live_to_cached_and_back() -> None:
    m = manager(full(8))
    run(m, 1, A[:40])
    assert states(m) == (5, 3, 0, 0, 0)
    m.close(1)
    assert states(m) == (6, 0, 2, 0, 0), "two full blocks are cached, the partial one is free"
    m.close(1)
    m.check_idle()
    assert run(m, 2, A[:100]) == 32
    assert states(m) == (1, 7, 0, 0, 0)


def test_reserve_is_all_or_nothing() -> None:
    m = manager(full(4), window(2, 64))
    m.open(1, "a")
    assert not m.can_reserve(1, 48)
    assert not m.reserve(1, 48), "the window group has two blocks only"
    assert states(m) == (4, 0, 0, 0, 0)
    assert m.block_table(1, "full") == []
    assert m.blocks_needed(1, 32) == {"full": 2, "window": 2}
    assert m.reserve(1, 32)
    assert m.blocks_needed(1, 33) == {"full": 1, "window": 1}
    assert m.blocks_needed(None, 33) == {"full": 3, "window": 3}
    assert m.can_reserve(1, 32)
    assert not m.can_reserve(None, 16)


def test_sequences_share_a_prefix_at_once() -> None:
    m = manager(full(10))
    run(m, 1, A[:48])
    assert run(m, 2, A[:60]) == 48
    assert m.block_table(2, "full")[:3] == m.block_table(1, "full")
    assert states(m) == (6, 4, 0, 0, 0)
    m.close(1)
    assert states(m) == (6, 4, 0, 0, 0), "the second sequence still holds them"
    m.close(2)
    assert states(m) == (7, 0, 3, 0, 0)


@pytest.mark.parametrize(
    "groups", [(full(8),), (full(8), full(8, 32, "wide")), (full(8), window(8, 32)), (window(8, 32),)]
)
def test_a_beginning_says_whether_there_may_be_a_hit(groups: tuple[GroupSpec, ...]) -> None:
    m = manager(*groups)
    run(m, 1, A[:80])
    for tokens in (A, B, A[32:], A[:16], A[:40], A[:1]):
        chain = chain_of(tokens)
        start = chain[: m.shortest_hit // 16 + 1]
        found = m.match_prefix(chain, len(tokens))
        assert m.may_hit(start) or found == NO_HIT
    assert m.may_hit(chain_of(A)[: m.shortest_hit // 16 + 1])
    if all(g.name != "window" or len(groups) > 1 for g in groups):
        assert not m.may_hit(chain_of(A[32:]))
    assert not manager(*groups, caching=False).may_hit(chain_of(A))


def test_an_equal_block_computed_twice_stays_a_copy() -> None:
    m = manager(full(8))
    chain = chain_of(A)
    for seq_id in (1, 2):
        m.open(seq_id, "x")
        assert m.reserve(seq_id, 32)
    m.advance(1, chain, 32)
    m.advance(2, chain, 32)
    first = list(m.block_table(1, "full"))
    assert m.match_prefix(chain, 32).blocks["full"] == tuple(first)
    m.close(2)
    assert states(m) == (6, 2, 0, 0, 0), "copies that nobody can find are free"
    m.close(1)
    assert m.match_prefix(chain, 32).blocks["full"] == tuple(first)


def test_the_end_of_a_sequence_is_evicted_before_its_beginning() -> None:
    m = manager(full(4))
    run(m, 1, A[:64])
    m.close(1)
    m.open(2, "b")
    assert m.reserve(2, 32)
    assert m.match_prefix(chain_of(A), 64).num_tokens == 32
    assert m.reserve(2, 48)
    assert m.match_prefix(chain_of(A), 64).num_tokens == 16


def test_the_least_recently_used_sequence_is_evicted_first() -> None:
    m = manager(full(4))
    old, new = A[:32], [*range(900, 932)]
    run(m, 1, old)
    m.close(1)
    run(m, 2, new)
    m.close(2)
    run(m, 3, [*old, 7])  # a hit makes it recent
    m.close(3)
    m.open(4, "d")
    assert m.reserve(4, 32)
    assert m.match_prefix(chain_of(old), 32).num_tokens == 32
    assert m.match_prefix(chain_of(new), 32).num_tokens == 0


def test_the_blocks_of_a_hit_do_not_count_as_room() -> None:
    m = manager(full(4))
    run(m, 1, A[:48])
    m.close(1)
    hit = m.match_prefix(chain_of(A), 48)
    assert m.num_available("full") == 4
    assert not m.can_reserve(None, 80, hit)
    assert m.can_reserve(None, 64, hit)
    m.open(2, "b")
    assert not m.reserve(2, 80, hit)
    assert states(m) == (1, 0, 3, 0, 0)
    assert m.reserve(2, 64, hit)
    assert states(m) == (0, 4, 0, 0, 0)


def test_a_hit_that_was_evicted_is_refused() -> None:
    m = manager(full(4))
    run(m, 1, A[:48])
    m.close(1)
    hit = m.match_prefix(chain_of(A), 48)
    run(m, 2, list(range(700, 764)))
    m.close(2)
    m.open(3, "c")
    assert not m.reserve(3, 48, hit)
    assert states(m) == (0, 0, 4, 0, 0)
    assert m.reserve(3, 48, NO_HIT)


def test_without_prefix_caching_nothing_is_kept() -> None:
    m = manager(full(8), window(8, 32), caching=False)
    run(m, 1, A, chunk=16)
    assert not m.match_prefix(chain_of(A), 100)
    m.close(1)
    assert states(m) == (8, 0, 0, 0, 0)
    m.check_idle()


def test_truncate_gives_back_what_is_past_the_end() -> None:
    m = manager(full(8), window(8, 32))
    m.open(1, "a")
    assert m.reserve(1, 100)
    m.advance(1, chain_of(A), 20)
    m.truncate(1, 33)
    assert [len(m.block_table(1, g)) for g in ("full", "window")] == [3, 3]
    assert states(m) == (5, 3, 0, 0, 0)
    assert m.reserve(1, 48)
    assert states(m) == (5, 3, 0, 0, 0)
    with pytest.raises(AssertionError, match="20 positions are final"):
        m.truncate(1, 19)


def test_advance_refuses_positions_without_blocks_or_hashes() -> None:
    m = manager(full(8))
    m.open(1, "a")
    assert m.reserve(1, 30)
    with pytest.raises(AssertionError, match="more than it reserved"):
        m.advance(1, chain_of(A), 33)
    with pytest.raises(AssertionError, match="the chain ends"):
        m.advance(1, chain_of(A[:15]), 16)


def test_advance_never_goes_back() -> None:
    m = manager(full(8))
    run(m, 1, A[:40])
    m.advance(1, chain_of(A), 5)
    assert m.num_computed(1) == 40
    m.check()


def test_a_window_group_gives_blocks_back_as_the_window_moves() -> None:
    m = manager(full(8), window(8, 32))
    m.open(1, "a")
    chain = chain_of(A)
    assert m.reserve(1, 96)
    table = m.block_table(1, "window")
    m.advance(1, chain, 46)
    assert table.count(-1) == 0, "position 15 is still seen from 46"
    m.advance(1, chain, 47)
    assert table[0] == -1
    assert states(m, "window") == (2, 5, 1, 0, 0)
    m.advance(1, chain, 96)
    assert [b >= 0 for b in table] == [False] * 4 + [True] * 2
    assert states(m, "window") == (2, 2, 4, 0, 0)
    assert states(m, "full") == (2, 6, 0, 0, 0)


def test_a_window_may_fit_where_the_whole_prompt_does_not() -> None:
    m = manager(full(8), window(4, 32))
    run(m, 1, A, chunk=16)
    assert sum(b >= 0 for b in m.block_table(1, "window")) == 3
    m.close(1)
    m.check_idle()


def test_a_hit_needs_every_group() -> None:
    m = manager(full(16), window(4, 32))
    run(m, 1, A, chunk=16)
    m.close(1)
    chain = chain_of(A)
    hit = m.match_prefix(chain, 96)
    assert hit.num_tokens == 96
    assert [b >= 0 for b in hit.blocks["window"]] == [False] * 4 + [True] * 2
    assert m.match_prefix(chain, 79).num_tokens == 0, "earlier windows are evicted"
    m.open(2, "b")
    assert m.reserve(2, 97, hit)
    assert m.block_table(2, "window")[:6] == list(hit.blocks["window"])
    assert m.num_computed(2) == 96
    m.check()


def test_a_hit_ends_at_whole_blocks_of_all_groups() -> None:
    m = manager(full(16), window(8, 32, block_size=48))
    run(m, 1, A)
    assert m.match_prefix(chain_of(A), 95).num_tokens == 48
    assert m.match_prefix(chain_of(A), 96).num_tokens == 96


def test_a_snapshot_supplies_exactly_its_position() -> None:
    m = manager(full(16), snapshots(3))
    chain = chain_of(A)
    m.open(1, "a")
    assert m.reserve(1, 100)
    assert m.snapshots.reserve_states(1)
    own = m.snapshots.state_blocks(1)["state"]
    assert m.snapshots.state_origin(1) == [BlockCopy("state", -1, own)], "begins with zeros"
    m.advance(1, chain, 64)
    assert m.snapshots.state_origin(1) == [], "goes on from where the step before left it"
    hit = m.match_prefix(chain, 64)
    assert (hit.num_tokens, hit.reach) == (0, 64)
    (copy,) = m.snapshots.checkpoint(1, chain[4])
    assert copy == BlockCopy("state", own, copy.target)
    assert copy.target != own
    assert m.snapshots.checkpoint(1, chain[4]) == [], "cached already"
    hit = m.match_prefix(chain, 96)
    assert (hit.num_tokens, hit.reach) == (64, 64)
    assert m.block_table(1, "state") == [own]
    assert states(m, "state") == (1, 1, 1, 0, 0)

    m.open(2, "b")
    assert hit.blocks["state"] == (copy.target,)
    assert m.reserve(2, 80, hit)
    assert m.snapshots.reserve_states(2)
    second = m.snapshots.state_blocks(2)["state"]
    assert m.block_table(2, "state") == [copy.target, second]
    assert m.snapshots.state_origin(2) == [BlockCopy("state", copy.target, second)]
    assert m.snapshots.checkpoint(1, chain[5]) == [], "all blocks are held"
    assert (m.snapshots.checkpoints_made, m.snapshots.checkpoints_skipped) == (1, 1)
    m.advance(2, chain, 65)
    assert m.block_table(2, "state") == [second], "the state was taken over in the first step"
    assert m.snapshots.state_origin(2) == []
    m.open(3, "c")
    assert m.reserve(3, 16)
    assert m.snapshots.reserve_states(3)
    assert m.match_prefix(chain, 96).num_tokens == 0, "evicted for the new one"
    m.open(4, "d")
    assert not m.snapshots.reserve_states(4)
    for seq_id in (1, 2, 3, 4):
        m.close(seq_id)
    m.check_idle()
    assert states(m, "state") == (3, 0, 0, 0, 0)


def test_a_state_that_a_read_may_have_written_is_not_gone_on_from() -> None:
    """After a failed hand-off it comes from the snapshot or from zeros, read to its end or not."""
    for ended in (False, True):
        m = manager(full(16), snapshots(4), tail(1))
        chain = chain_of(A)
        run(m, 1, A[:64])
        m.snapshots.reserve_states(1)
        m.snapshots.checkpoint(1, chain[4])
        for seq_id, hit, start in ((2, m.match_prefix(chain, 90), 64), (3, NO_HIT, 0)):
            m.open(seq_id, "b")
            assert m.reserve(seq_id, 90, hit, fetch_to=90)
            assert m.snapshots.reserve_states(seq_id)
            m.begin_read(seq_id, "state", list(m.snapshots.state_blocks(seq_id).values()))
            if ended:
                m.end_read(seq_id)
            m.detach_in_flight(seq_id)
            assert m.num_computed(seq_id) == start
            assert m.snapshots.reserve_states(seq_id)
            source = next(iter(hit.blocks.get("state", ())), -1)
            assert m.snapshots.state_origin(seq_id) == [
                BlockCopy("state", source, m.snapshots.state_blocks(seq_id)["state"])
            ]
            if not ended:
                m.end_read(seq_id)
            m.close(seq_id)
        m.close(1)
        m.check_idle()


def test_a_state_with_no_other_origin_takes_the_sequence_back_to_its_start() -> None:
    m = manager(full(16), snapshots(2))
    chain = chain_of(A)
    run(m, 1, A[:32])
    m.snapshots.reserve_states(1)
    assert m.reserve(1, 64, fetch_to=64)
    m.begin_read(1, "state", list(m.snapshots.state_blocks(1).values()))
    m.detach_in_flight(1)
    assert m.num_computed(1) == 0
    m.end_read(1)
    assert m.snapshots.reserve_states(1)
    assert m.snapshots.state_origin(1) == [BlockCopy("state", -1, m.snapshots.state_blocks(1)["state"])]
    assert m.reserve(1, 32)
    m.advance(1, chain, 32)
    m.close(1)
    m.check_idle()


def test_no_checkpoints_without_a_prefix_cache_or_states() -> None:
    assert manager(full(4), tail(1)).snapshots.checkpoint_step == 0
    assert manager(full(4), snapshots(2), caching=False).snapshots.checkpoint_step == 0
    assert manager(full(4, 32), snapshots(2)).snapshots.checkpoint_step == 32
    m = manager(full(4), snapshots(2))
    run(m, 1, A[:16])
    m.snapshots.reserve_states(1)
    m.reset_prefix_cache()
    assert m.snapshots.checkpoint(1, chain_of(A)[1]) == [], "of a sequence that began before the reset"


def test_only_snapshots() -> None:
    m = manager(snapshots(4), tail(1))
    chain = chain_of(A)
    m.open(1, "a")
    assert m.reserve(1, 10_000)
    assert m.snapshots.reserve_states(1)
    for position in (32, 80):
        m.advance(1, chain, position)
        assert m.snapshots.checkpoint(1, chain[position // 16])
    assert m.match_prefix(chain, 96).num_tokens == 80
    assert m.match_prefix(chain, 79).num_tokens == 32
    assert m.match_prefix(chain_of(B), 96).num_tokens == 32
    assert not m.match_prefix(chain, 31)


def test_only_a_tail_group_never_hits() -> None:
    assert not manager(tail(4)).match_prefix(chain_of(A), 96)


def test_tail_blocks_are_never_cached() -> None:
    m = manager(full(4), tail(1))
    m.open(1, "a")
    m.open(2, "b")
    block = m.snapshots.reserve_tail(1)
    assert block is not None
    assert (m.snapshots.tail_block(1), m.snapshots.tail_block(2), m.snapshots.reserve_tail(2)) == (block, None, None)
    assert m.snapshots.checkpoint(1, b"x" * 16) == []
    m.snapshots.free_tail(1)
    m.snapshots.free_tail(1)
    assert m.snapshots.reserve_tail(2) == block
    m.close(2)
    assert states(m, "tail") == (1, 0, 0, 0, 0)


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


def test_detach_begins_anew_where_a_snapshot_cannot_go_back() -> None:
    m = manager(full(4, block_size=64), snapshots(1))
    m.open(1, "a")
    assert m.reserve(1, 128)
    m.advance(1, chain_of([*A, *A]), 100)
    m.begin_read(1, "full", m.block_table(1, "full")[1:])
    m.detach_in_flight(1)
    assert m.num_computed(1) == 0
    assert m.block_table(1, "full") == []
    assert states(m) == (2, 0, 1, 0, 1)


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


def test_the_ledger_names_owner_age_and_tier() -> None:
    clock = HandClock()
    m = KVCacheManager(layout(full(8), tail(2)), clock)
    run(m, 1, A[:40])
    run(m, 2, A[:40])
    m.lease_pin(9, "full", m.block_table(1, "full")[:1])
    m.open(3, "reader")
    assert m.reserve(3, 16)
    m.begin_read(4, "full", m.block_table(3, "full"))
    clock.time += 2.0
    assert {(e.state, e.owner) for e in m.ledger_blocks()} == {
        ("live", "request-1"),
        ("live", "request-2"),
        ("in_flight", "reader"),
    }
    m.close(1)
    assert {e.owner for e in m.ledger_blocks() if e.state == "live"} == {"request-2"}
    m.close(2)
    m.close(3)
    clock.time += 1.5
    entries = {(e.state, e.owner): e for e in m.ledger_blocks()}
    assert set(entries) == {("leased", "lease:9"), ("cached", "cache"), ("in_flight", "read:4")}
    assert entries["leased", "lease:9"].age_s == 1.5
    assert entries["in_flight", "read:4"].age_s == 3.5
    assert {e.tier for e in m.ledger_blocks()} == {"device"}


def test_digests_go_with_the_contents() -> None:
    m = manager(full(2))
    run(m, 1, A[:32])
    block = m.block_table(1, "full")[1]
    m.set_block_digests("full", block, (1, 2))
    m.close(1)
    assert m.block_digests("full", block) == (1, 2)
    m.open(2, "b")
    assert m.reserve(2, 16)
    assert m.block_table(2, "full") == [block]
    assert m.block_digests("full", block) is None
    m.set_block_digests("full", block, (3,))
    m.begin_read(1, "full", [block])
    assert m.block_digests("full", block) is None
    m.end_read(1)
    m.close(2)
    with pytest.raises(AssertionError, match="takes no digests"):
        m.set_block_digests("full", block, (4,))


def test_reset_forgets_what_open_sequences_hold_and_add() -> None:
    m = manager(full(8))
    run(m, 1, A[:32])
    m.close(1)
    run(m, 2, B[:48])
    hit = m.match_prefix(chain_of(B), 48)
    m.reset_prefix_cache()
    assert states(m) == (5, 3, 0, 0, 0)
    assert not m.match_prefix(chain_of(A), 32)
    m.open(3, "c")
    assert not m.reserve(3, 48, hit)
    assert m.reserve(2, 64)
    m.advance(2, chain_of(B), 64)
    for seq_id in (2, 3):
        m.close(seq_id)
    assert states(m) == (8, 0, 0, 0, 0)
    assert run(m, 4, B[:48]) == 0
    assert run(m, 5, B[:50]) == 48


def test_usage_is_that_of_the_fullest_group() -> None:
    m = manager(full(8), tail(2))
    assert m.usage() == 0.0
    run(m, 1, A[:32])
    assert m.usage() == 0.25
    m.snapshots.reserve_tail(1)
    assert m.usage() == 0.5
    m.close(1)
    assert (m.usage(), m.num_available("full")) == (0.0, 8)


def test_an_owner_must_open_once() -> None:
    m = manager(full(1))
    m.open(1, "a")
    with pytest.raises(AssertionError, match="is open"):
        m.open(1, "b")
    with pytest.raises(KeyError):
        m.reserve(2, 1)


def test_check_finds_a_wrong_count() -> None:
    m = manager(full(4))
    run(m, 1, A[:20])
    m.block_table(1, "full").pop()
    with pytest.raises(AssertionError):
        m.check()
