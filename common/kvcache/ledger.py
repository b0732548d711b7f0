"""The ledger block by block, and the proof that it adds up (architecture, decision 17).

Owners are read off the holders when somebody asks, so that they are never out of date: a live block belongs to
the sequence that was opened first of those that share it, a leased one to its lease, one in flight to its
sequence or, when that has left, to the read; a cached one to the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from common.kvcache.blocks import BlockPool, BlockState
from common.kvcache.layout import Retention
from common.kvcache.tables import SequenceBlocks

TIER = "device"


class BlockEntry(NamedTuple):
    """One block that is not free; `age_s` is the time in its state, in seconds."""

    group: str
    block_id: int
    state: str
    owner: str
    age_s: float
    tier: str


Pools = Mapping[str, BlockPool]
Sequences = Mapping[int, SequenceBlocks]
Holds = Mapping[int, Sequence[tuple[str, tuple[int, ...]]]]
_Owners = dict[tuple[str, int], str]


def ledger_entries(pools: Pools, seqs: Sequences, leases: Holds, reads: Holds) -> Iterator[BlockEntry]:
    """All blocks that are not free, group by group."""
    of_seqs: _Owners = {}
    names = _group_names(pools)
    for seq in seqs.values():
        for i, block_id in seq.held():
            of_seqs.setdefault((names[i], block_id), seq.owner)
    of_leases, of_reads = _owners("lease", leases), _owners("read", reads)
    for name, pool in pools.items():
        for block_id, state, age_s in pool.held():
            key = (name, block_id)
            if state is BlockState.CACHED:
                owner = "cache"
            elif state is BlockState.LEASED:
                owner = of_leases[key]
            else:
                owner = of_seqs.get(key) or of_reads[key]
            yield BlockEntry(name, block_id, state.name.lower(), owner, age_s, TIER)


def check_ledger(pools: Pools, seqs: Sequences, leases: Holds, reads: Holds) -> None:
    """Recount every block from its holders. Raises AssertionError."""
    names = _group_names(pools)
    refs, pins, flights = ({n: [0] * p.spec.num_blocks for n, p in pools.items()} for _ in range(3))
    for seq in seqs.values():
        seq.check()
        for i, block_id in seq.held():
            refs[names[i]][block_id] += 1
    for counts, holds in ((pins, leases), (flights, reads)):
        for held in holds.values():
            for group, block_ids in held:
                for block_id in block_ids:
                    counts[group][block_id] += 1
    for name, pool in pools.items():
        pool.check(refs[name], pins[name], flights[name])


def check_idle(pools: Pools, seqs: Sequences, leases: Holds, reads: Holds) -> None:
    """No sequence, lease or read is left, and every block is free or cached. Raises AssertionError."""
    check_ledger(pools, seqs, leases, reads)
    for what, holders in (("sequences", seqs), ("leases", leases), ("reads", reads)):
        assert not holders, f"open {what}: {sorted(holders)}"
    for pool in pools.values():
        states = pool.states()
        assert states.free + states.cached == states.total, f"not idle: {states}"


def _group_names(pools: Pools) -> list[str]:
    """Group names in the order of `SequenceBlocks.held`."""
    positional = [n for n, p in pools.items() if p.spec.retention is not Retention.SNAPSHOT]
    return positional + [n for n, p in pools.items() if p.spec.retention is Retention.SNAPSHOT]


def _owners(kind: str, holds: Holds) -> _Owners:
    return {(g, b): f"{kind}:{key}" for key, held in reversed(list(holds.items())) for g, ids in held for b in ids}
