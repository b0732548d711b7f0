"""Groups with one block a sequence: states, copies of them that make prefix hits, tails."""

from __future__ import annotations

from kvcache_support import A, B, chain_of, full, manager, run, snapshots, states, tail

from common.kvcache.manager import NO_HIT
from common.kvcache.tables import BlockCopy


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
