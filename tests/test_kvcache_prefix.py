"""The prefix index: the longest hit against a search of all positions, and the KV events."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from kvcache_support import chain_of, full, manager, run, snapshots, tail, window

from common.kvcache.layout import TAIL_GROUP, GroupSpec, Retention
from common.kvcache.prefix import MAX_EVENTS, EventLog, PrefixIndex, block_hash, is_current, longest_hit

TOKENS = list(range(16 * 24))
CHAIN = chain_of(TOKENS)

GROUPS = st.lists(
    st.one_of(
        st.builds(lambda units: full(100, 16 * units), st.integers(1, 3)),
        st.builds(
            lambda units, w, name: window(100, w, 16 * units, name),
            st.integers(1, 3),
            st.integers(1, 120),
            st.sampled_from(["near", "far"]),
        ),
        st.just(snapshots(100)),
        st.just(tail(100)),
    ),
    unique_by=lambda g: g.name,
    max_size=4,
)


def _supplies(g: GroupSpec, held: set[bytes], position: int) -> bool:
    """Position by position: does the group have all that a query at `position` sees before it?"""
    if g.name == TAIL_GROUP:
        return True
    if g.retention is Retention.SNAPSHOT:
        return CHAIN[position // 16] in held
    if position % g.block_size:
        return False
    first = max(0, position - g.window + 1) if g.retention is Retention.WINDOW else 0
    return all(block_hash(CHAIN, p // g.block_size, g.block_size) in held for p in range(first, position))


@settings(max_examples=200, deadline=None, database=None)
@given(GROUPS, st.data(), st.integers(0, 400))
def test_the_longest_hit_is_the_longest(groups: list[GroupSpec], data: st.DataObject, limit: int) -> None:
    indexes = []
    held: dict[str, set[bytes]] = {}
    for g in groups:
        index = PrefixIndex(g)
        missing = data.draw(st.sets(st.integers(1, 24), max_size=4 if g.retention is not Retention.SNAPSHOT else 24))
        names = [CHAIN[u] for u in range(1, 25) if u not in missing and not u * 16 % g.block_size]
        for block_id, name in enumerate(names):
            assert index.add(name, block_id)
        held[g.name] = set(names)
        indexes.append((g, index))
    matched = [g for g in groups if g.name != TAIL_GROUP]
    positions = range(0, min(limit, 384) + 1, 16) if matched else [0]
    best = max(p for p in positions if not p or all(_supplies(g, held[g.name], p) for g in matched))
    hit = longest_hit(indexes, CHAIN, limit)
    assert hit.num_tokens == best
    assert is_current(hit, indexes)
    for g, index in indexes if hit else []:
        if g.name == TAIL_GROUP:
            assert g.name not in hit.blocks
        elif g.retention is Retention.SNAPSHOT:
            assert hit.blocks[g.name] == (index.get(CHAIN[best // 16]),)
        else:
            first = max(0, best - g.window + 1) // g.block_size if g.window else 0
            names = [block_hash(CHAIN, i, g.block_size) for i in range(first, best // g.block_size)]
            assert hit.blocks[g.name] == (*[-1] * first, *map(index.get, names))


def test_a_hit_is_limited_by_the_chain() -> None:
    m = manager(full(8))
    run(m, 1, TOKENS[:64])
    assert m.match_prefix(CHAIN[:3], 64).num_tokens == 32
    assert m.match_prefix(CHAIN[:1], 64).num_tokens == 0
    assert m.match_prefix(CHAIN, 0).num_tokens == 0


def test_the_first_block_with_a_prefix_wins() -> None:
    index = PrefixIndex(full(4))
    assert index.add(b"h", 3)
    assert not index.add(b"h", 1)
    assert index.get(b"h") == 3
    index.remove(b"h")
    assert index.get(b"h") is None
    assert index.add(b"h", 1)


def test_events_tell_what_the_index_holds() -> None:
    m = manager(full(4), snapshots(2), events=True)
    run(m, 1, TOKENS[:32])
    m.snapshots.reserve_states(1)
    m.snapshots.checkpoint(1, CHAIN[2])
    m.reserve(1, 48)
    m.advance(1, CHAIN, 48)
    assert m.drain_events() == [
        ("stored", "full", b"", (CHAIN[1], CHAIN[2]), 16),
        ("stored", "state", b"", (CHAIN[2],), 1),
        ("stored", "full", CHAIN[2], (CHAIN[3],), 16),
    ]
    assert m.drain_events() == []
    m.close(1)
    run(m, 2, list(range(900, 950)))
    other = chain_of(list(range(900, 950)))
    assert m.drain_events() == [
        ("removed", "full", (CHAIN[3], CHAIN[2], CHAIN[1])),
        ("stored", "full", b"", tuple(other[1:4]), 16),
    ]
    m.reset_prefix_cache()
    assert m.drain_events() == [("cleared",)]


def test_chains_are_not_joined_across_prompts() -> None:
    m = manager(full(8), events=True)
    other = chain_of([5] * 32)
    run(m, 1, TOKENS[:16])
    run(m, 2, [5] * 32)
    assert m.drain_events() == [
        ("stored", "full", b"", (CHAIN[1],), 16),
        ("stored", "full", b"", (other[1], other[2]), 16),
    ]


def test_nobody_asking_costs_nothing() -> None:
    m = manager(full(4))
    run(m, 1, TOKENS[:32])
    assert m.drain_events() == []


def test_a_log_that_nobody_drains_starts_over() -> None:
    log = EventLog()
    for _ in range(MAX_EVENTS + 2):
        log.add("removed", "full", prefix_hash=b"h")
    assert log.drain() == [("cleared",), ("removed", "full", (b"h", b"h"))]
