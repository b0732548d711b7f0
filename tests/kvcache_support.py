"""Layouts, a clock to turn by hand and token streams for the tests of the KV cache manager."""

from __future__ import annotations

from collections.abc import Sequence

from common.kvcache.layout import TAIL_GROUP, GroupSpec, KVLayout, Retention
from common.kvcache.manager import KVCacheManager
from common.types.prefix import extend_chain, root_hash

A, B = list(range(100)), [*range(40), *range(500, 560)]  # two prompts that begin alike


class HandClock:
    """A clock that only moves when told to."""

    def __init__(self) -> None:
        self.time = 100.0

    def now(self) -> float:
        return self.time


def full(num_blocks: int, block_size: int = 16, name: str = "full") -> GroupSpec:
    return GroupSpec(name=name, retention=Retention.FULL, block_size=block_size, num_blocks=num_blocks)


def window(num_blocks: int, tokens: int, block_size: int = 16, name: str = "window") -> GroupSpec:
    return GroupSpec(name=name, retention=Retention.WINDOW, block_size=block_size, num_blocks=num_blocks, window=tokens)


def snapshots(num_blocks: int, name: str = "state") -> GroupSpec:
    return GroupSpec(name=name, retention=Retention.SNAPSHOT, block_size=1, num_blocks=num_blocks)


def tail(num_blocks: int) -> GroupSpec:
    return snapshots(num_blocks, TAIL_GROUP)


def layout(*groups: GroupSpec) -> KVLayout:
    return KVLayout(model_hash=b"m" * 16, groups=groups, regions=())


def manager(*groups: GroupSpec, caching: bool = True, events: bool = False) -> KVCacheManager:
    return KVCacheManager(layout(*groups), HandClock(), enable_prefix_caching=caching, record_events=events)


def chain_of(tokens: Sequence[int]) -> list[bytes]:
    chain = [root_hash(b"m" * 16)]
    extend_chain(chain, tokens)
    return chain


def states(m: KVCacheManager, group: str = "full") -> tuple[int, int, int, int, int]:
    """(free, live, cached, leased, in flight) of a group, after a full check."""
    m.check()
    s = next(s for s in m.ledger() if s.group == group)
    assert s.free + s.live + s.cached + s.leased + s.in_flight == s.total
    return s.free, s.live, s.cached, s.leased, s.in_flight


def run(m: KVCacheManager, seq_id: int, tokens: Sequence[int], *, chunk: int = 1 << 30) -> int:
    """Open, take the prefix hit, compute all of `tokens` in chunks. Returns the positions hit."""
    chain = chain_of(tokens)
    hit = m.match_prefix(chain, len(tokens) - 1)
    m.open(seq_id, f"request-{seq_id}")
    done = hit.num_tokens
    assert m.reserve(seq_id, done, hit)
    while done < len(tokens):
        done = min(done + chunk, len(tokens))
        assert m.reserve(seq_id, done)
        m.advance(seq_id, chain, done)
    return hit.num_tokens
