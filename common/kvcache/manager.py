"""The KV cache of one engine: who may use which block. Plain data; the tensors are the pool's.

    open -> reserve -> (step) -> advance -> reserve ... -> close

`reserve` holds blocks for positions before they are written; `advance` says that positions are final: full
blocks are sealed (found by others from then on), and blocks that left every window are given back. Preemption
is `close` and a later `open`: the sealed blocks are likely prefix hits. Leases pin blocks past `close`; remote
reads keep theirs in flight past `close`. One thread owns a manager; nothing in it waits.

Groups that hold one block a sequence, not one per so many positions, are `snapshots` (`common.kvcache.snapshots`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from common.kvcache.blocks import BlockPool
from common.kvcache.layout import KVLayout, Retention
from common.kvcache.ledger import BlockEntry, check_idle, check_ledger, ledger_entries
from common.kvcache.prefix import (
    NO_HIT,
    EventLog,
    KVEvent,
    PrefixHit,
    PrefixIndex,
    block_hash,
    is_current,
    longest_hit,
    match_step,
)
from common.kvcache.snapshots import SnapshotBlocks
from common.kvcache.tables import SequenceBlocks, seal_full_blocks
from common.types import BlockStates, Clock
from common.types.prefix import UNIT

__all__ = ["NO_HIT", "KVCacheManager", "PrefixHit"]


class KVCacheManager:
    """One pool per group of `layout`. `record_events` keeps what `drain_events` returns."""

    def __init__(
        self,
        layout: KVLayout,
        clock: Clock,
        *,
        enable_prefix_caching: bool = True,
        record_events: bool = False,
    ) -> None:
        self._caching = enable_prefix_caching
        self._log = EventLog() if record_events else None
        self._pools = {g.name: BlockPool(g, PrefixIndex(g, self._log), clock) for g in layout.groups}
        self._positional = [g for g in layout.groups if g.retention is not Retention.SNAPSHOT]
        self._table_pools = [self._pools[g.name] for g in self._positional]
        self._indexes = [(p.spec, p.index) for p in self._pools.values()]
        self._step = match_step(layout.groups)
        self._seqs: dict[int, SequenceBlocks] = {}
        self.snapshots = SnapshotBlocks(self._pools, self._seqs, self._step if enable_prefix_caching else 0)
        self._leases: dict[int, list[tuple[str, tuple[int, ...]]]] = {}
        self._reads: dict[int, list[tuple[str, tuple[int, ...]]]] = {}

    def open(self, seq_id: int, owner: str) -> None:
        """Start a sequence that holds nothing. `owner` is the name its blocks have in the ledger."""
        assert seq_id not in self._seqs, f"sequence {seq_id} is open"
        self._seqs[seq_id] = self._new_sequence(owner)

    def close(self, seq_id: int) -> None:
        """Give everything back: sealed blocks become cached, the end of the sequence to be evicted first.

        In-flight blocks stay so until their read ends; leased ones until the lease does. Idempotent.
        """
        seq = self._seqs.pop(seq_id, None)
        if seq is None:
            return
        for table, pool in zip(seq.tables, self._table_pools, strict=True):
            pool.release(table.cut(0))
        self.snapshots.close(seq)

    def match_prefix(self, chain: Sequence[bytes], num_tokens: int) -> PrefixHit:
        """Longest position <= `num_tokens` that all groups but the tail can supply. Pins nothing.

        `chain[i]` is the prefix hash of the first i * 16 tokens.
        """
        return longest_hit(self._indexes, chain, num_tokens) if self._caching else NO_HIT

    @property
    def shortest_hit(self) -> int:
        """Tokens of which `may_hit` wants the hashes: no hit is shorter."""
        return self._step

    def may_hit(self, chain: Sequence[bytes]) -> bool:
        """False if `match_prefix` finds nothing, by the hashes of the first `shortest_hit` tokens alone."""
        if not self._caching or len(chain) <= self._step // UNIT:
            return False
        full = [(g, index) for g, index in self._indexes if g.retention is Retention.FULL]
        return all(index.get(block_hash(chain, 0, g.block_size)) is not None for g, index in full)

    def blocks_needed(
        self, seq_id: int | None, num_tokens: int, hit: PrefixHit | None = None, *, fetch_to: int = 0
    ) -> dict[str, int]:
        """Blocks per positional group that `reserve` would allocate; `seq_id` None asks for a new sequence."""
        missing = self._draft(seq_id, num_tokens, hit or NO_HIT).missing(num_tokens, fetch_to)
        return {g.name: len(entries) for g, entries in zip(self._positional, missing, strict=True)}

    def can_reserve(
        self, seq_id: int | None, num_tokens: int, hit: PrefixHit | None = None, *, fetch_to: int = 0
    ) -> bool:
        """Would `reserve` succeed now?"""
        hit = hit or NO_HIT
        return self._has_room(self._draft(seq_id, num_tokens, hit).missing(num_tokens, fetch_to), hit)

    def could_reserve(self, num_tokens: int, hit: PrefixHit | None = None, *, fetch_to: int = 0) -> bool:
        """Would `reserve` for a new sequence succeed if nobody else held a block?"""
        hit = hit or NO_HIT
        missing = self._draft(None, num_tokens, hit).missing(num_tokens, fetch_to)
        return all(
            len(entries) + sum(b >= 0 for b in hit.blocks.get(p.spec.name, ())) <= p.spec.num_blocks
            for p, entries in zip(self._table_pools, missing, strict=True)
        )

    def reserve(self, seq_id: int, num_tokens: int, hit: PrefixHit | None = None, *, fetch_to: int = 0) -> bool:
        """Hold blocks for all positions below `num_tokens` in every positional group. All or nothing.

        `hit` (a new sequence only) makes its positions computed and shares its blocks. False when blocks are
        short or `hit` is out of date; nothing has changed then.

        `fetch_to` says that all positions up to there come from a peer. Window groups then hold, besides the
        hit's blocks, only what reads for the window before `fetch_to` may write; those bring whole units.
        """
        seq = self._seqs[seq_id]
        if num_tokens <= seq.num_reserved and not hit:
            return True
        hit = hit or NO_HIT
        missing = self._draft(seq_id, num_tokens, hit).missing(num_tokens, fetch_to)
        if not self._has_room(missing, hit):
            return False
        if hit:
            seq.start_from(hit, self._positional, self.snapshots.groups)
            for name, block_ids in hit.blocks.items():
                self._pools[name].acquire(block_ids)
        for table, pool, entries in zip(seq.tables, self._table_pools, missing, strict=True):
            if entries:
                table.fill(entries, pool.allocate(len(entries)))
        seq.fetch_to = max(seq.fetch_to, fetch_to)
        seq.refresh()
        return True

    def advance(self, seq_id: int, chain: Sequence[bytes], num_computed: int) -> None:
        """Positions below `num_computed` are final in every group. Lower than before changes nothing.

        Seals the blocks that are full now under their hashes in `chain`, gives back blocks that left every
        future query's window, and the snapshot a hit started from. A window block next to positions that came
        from a peer is sealed only if `fetch_to` says that the whole of it was read.
        """
        seq = self._seqs[seq_id]
        if num_computed < seq.wake_at:
            if num_computed > seq.num_computed:
                seq.num_computed = num_computed
            return
        if num_computed <= seq.num_computed:
            return
        assert seq.covers(num_computed), f"sequence {seq_id}: {num_computed} positions are more than it reserved"
        self._find_fetched(seq, num_computed)
        seq.num_computed = num_computed
        for table, pool in zip(seq.tables, self._table_pools, strict=True):
            if seq.seals:
                seal_full_blocks(seq, table, pool, chain)
            pool.release(table.drop_before(table.first_needed(num_computed)))
        self.snapshots.drop_sources(seq)
        seq.refresh()
        assert num_computed <= seq.num_reserved, f"sequence {seq_id}: its window before {num_computed} has a hole"

    def truncate(self, seq_id: int, num_tokens: int) -> None:
        """Give back what is reserved past `num_tokens`, which is not below the computed position."""
        seq = self._seqs[seq_id]
        assert num_tokens >= seq.num_computed, f"sequence {seq_id}: {seq.num_computed} positions are final"
        self._cut(seq, num_tokens)

    def num_computed(self, seq_id: int) -> int:
        """Positions that are final, as `reserve` with a hit, `advance` and `detach_in_flight` left them."""
        return self._seqs[seq_id].num_computed

    def block_table(self, seq_id: int, group: str) -> list[int]:
        """Entry i holds positions [i * block_size, (i + 1) * block_size); -1 where nothing is held.

        The live list: it changes with the sequence, and callers do not change it. For a snapshot group, the
        blocks held: the state a hit started from (until the next `advance`), then the sequence's own.
        """
        blocks = self._seqs[seq_id].lists.get(group)
        return blocks if blocks is not None else self.snapshots.held(seq_id, group)

    def block_tables(self, seq_id: int) -> Mapping[str, list[int]]:
        """`block_table` of every positional group: the live lists."""
        return self._seqs[seq_id].lists

    def begin_read(self, read_id: int, group: str, block_ids: Sequence[int]) -> None:
        """A remote read writes these blocks of one sequence until `end_read`. A read may grow, over groups too."""
        self._pools[group].begin_read(block_ids)
        self._reads.setdefault(read_id, []).append((group, tuple(block_ids)))

    def end_read(self, read_id: int) -> None:
        """The read can write no more: it completed, or its endpoint is destroyed and fenced."""
        for group, block_ids in self._reads.pop(read_id):
            self._pools[group].end_read(block_ids)

    def detach_in_flight(self, seq_id: int) -> None:
        """Let go of blocks that reads may still write, and of all else past the computed position.

        The sequence goes on from `num_computed` after its next `reserve` (and `reserve_states`). That is lower than
        before only where a block was computed in part and is being read as well, or a state has no other origin.
        """
        seq = self._seqs[seq_id]
        seq.fetch_to = 0
        lost = self.snapshots.detach_in_flight(seq)
        position = seq.num_computed
        if lost or not self._is_settled(seq, position):
            position -= position % self._step
            if self.snapshots.has_states or not self._is_settled(seq, position):
                position = 0
            self.snapshots.drop_sources(seq)
        seq.num_computed = position
        self._cut(seq, position)

    def lease_pin(self, lease_id: int, group: str, block_ids: Sequence[int]) -> None:
        """Keep these blocks, held or cached, from reuse until `lease_unpin`. A lease may grow, over groups too."""
        self._pools[group].pin(block_ids)
        self._leases.setdefault(lease_id, []).append((group, tuple(block_ids)))

    def lease_unpin(self, lease_id: int) -> None:
        """End the lease: sealed blocks that nobody holds become cached, others free. Idempotent."""
        for group, block_ids in reversed(self._leases.pop(lease_id, [])):
            self._pools[group].unpin(reversed(block_ids))

    def block_digests(self, group: str, block_id: int) -> tuple[int, ...] | None:
        """What `set_block_digests` gave, until the block is reused or a read writes it."""
        return self._pools[group].digests(block_id)

    def set_block_digests(self, group: str, block_id: int, digests: Sequence[int]) -> None:
        self._pools[group].set_digests(block_id, digests)

    def ledger(self) -> tuple[BlockStates, ...]:
        """Counts by state, one entry per group."""
        return tuple(pool.states() for pool in self._pools.values())

    def ledger_blocks(self) -> Iterator[BlockEntry]:
        """Group, id, state, owner, age in that state and tier of all blocks that are not free."""
        return ledger_entries(self._pools, self._seqs, self._leases, self._reads)

    def num_available(self, group: str) -> int:
        """Blocks that can be had: free and cached."""
        return self._pools[group].num_available

    def usage(self) -> float:
        """Share of blocks that cannot be had, in the fullest group: 0 to 1."""
        return max(
            (1 - p.num_available / p.spec.num_blocks for p in self._pools.values() if p.spec.num_blocks), default=0.0
        )

    def forget_prefix(self, chain: Sequence[bytes]) -> None:
        """Forget what is found under any hash of `chain`, windows and states too. Who holds it goes on holding it."""
        for pool in self._pools.values():
            for prefix_hash in chain[1:]:
                pool.forget(prefix_hash)

    def reset_prefix_cache(self) -> None:
        """Forget every prefix, as after a change of weights. What open sequences hold or add is not found again."""
        for seq in self._seqs.values():
            seq.seals = False
            seq.refresh()
        for pool in self._pools.values():
            pool.reset_prefixes()
        if self._log is not None:
            self._log.add("cleared")

    def drain_events(self) -> list[KVEvent]:
        """What entered and left the prefix indexes since the last call; empty without `record_events`."""
        return self._log.drain() if self._log is not None else []

    def check(self) -> None:
        """Recount everything: each block is in one state and the states add up. Raises AssertionError."""
        check_ledger(self._pools, self._seqs, self._leases, self._reads)

    def check_idle(self) -> None:
        """Nothing is live, leased or in flight. Raises AssertionError."""
        check_idle(self._pools, self._seqs, self._leases, self._reads)

    def _new_sequence(self, owner: str) -> SequenceBlocks:
        return SequenceBlocks(owner, self._positional, self.snapshots.groups, self._caching)

    def _draft(self, seq_id: int | None, num_tokens: int, hit: PrefixHit) -> SequenceBlocks:
        """The sequence as it is, or what it would be after taking the hit."""
        if seq_id is not None and not hit:
            return self._seqs[seq_id]
        assert seq_id is None or self._seqs[seq_id].is_empty, f"sequence {seq_id} has begun: too late for a hit"
        assert num_tokens >= hit.num_tokens, f"{num_tokens} positions asked for, the hit alone has {hit.num_tokens}"
        draft = self._new_sequence("")
        draft.start_from(hit, self._positional, self.snapshots.groups)
        return draft

    def _has_room(self, missing: Sequence[Sequence[int]], hit: PrefixHit) -> bool:
        """Is `hit` up to date, and can the missing entries be filled without its own blocks?"""
        for pool, entries in zip(self._table_pools, missing, strict=True):
            if entries and len(entries) > pool.num_available - pool.num_cached(hit.blocks.get(pool.spec.name, ())):
                return False
        return not hit or is_current(hit, self._indexes)

    def _cut(self, seq: SequenceBlocks, num_tokens: int) -> None:
        for table, pool in zip(seq.tables, self._table_pools, strict=True):
            pool.release(table.cut(num_tokens))
        seq.refresh()

    def _is_settled(self, seq: SequenceBlocks, position: int) -> bool:
        """Can the sequence go on at `position`: is every block before it held, and none being written?"""
        return all(
            block_id >= 0 and not pool.is_in_flight(block_id)
            for table, pool in zip(seq.tables, self._table_pools, strict=True)
            for block_id in table.before(position)
        )

    def _find_fetched(self, seq: SequenceBlocks, num_computed: int) -> None:
        """Note how far reads have written into what has just become final."""
        for table, pool in zip(seq.tables, self._table_pools, strict=True):
            size = table.block_size
            for i in range(seq.num_computed // size, -(-num_computed // size)):
                if table.blocks[i] >= 0 and pool.is_fetched(table.blocks[i]):
                    seq.fetch_end = max(seq.fetch_end, (i + 1) * size)
