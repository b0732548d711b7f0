"""The rules of the block manager, one by one."""

from __future__ import annotations

import pytest
from kvcache_support import A, B, HandClock, chain_of, full, layout, manager, run, states, tail, window

from common.kvcache.layout import GroupSpec
from common.kvcache.manager import NO_HIT, KVCacheManager


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


def test_one_prefix_is_forgotten_and_the_others_are_not() -> None:
    m, other = manager(full(12), window(8, 20)), list(range(500, 532))
    run(m, 1, A[:32])
    m.close(1)
    run(m, 2, A[:48])
    run(m, 3, other)
    m.close(3)
    hit = m.match_prefix(chain_of(A), 32)
    assert hit.num_tokens == 32
    m.forget_prefix(chain_of(A))
    m.check()
    assert not m.match_prefix(chain_of(A), 48)
    assert m.match_prefix(chain_of(other), 32).num_tokens == 32
    m.open(4, "d")
    assert not m.reserve(4, 48, hit), "it was found before"
    assert m.reserve(2, 64)
    m.advance(2, chain_of(A), 64)
    for seq_id in (2, 4):
        m.close(seq_id)
    m.check_idle()
    assert not m.match_prefix(chain_of(A), 64)
    assert run(m, 5, A[:48]) == 0
    m.close(5)
    assert m.match_prefix(chain_of(A), 48).num_tokens == 48


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
