"""The snapshot groups of one engine's cache: a sequence's states and the last hidden row of its prompt.

A *state* is a snapshot group other than the tail: a sequence owns one block of it, which every step updates in
place. It is found by others only through copies, made where `checkpoint` is called:

    reserve_states -> state_origin, copied or zeroed before the first step -> (steps) -> checkpoint, copied and cached

A step whose drafts may turn out wrong has a backup: reserve_backup -> state_backup, copied -> (step) -> release_backup.
"""

from __future__ import annotations

from collections.abc import Mapping

from common.kvcache.blocks import BlockPool
from common.kvcache.layout import TAIL_GROUP, Retention
from common.kvcache.tables import BlockCopy, SequenceBlocks, SnapshotSlot

_NO_STATES: Mapping[str, int] = {}


class SnapshotBlocks:
    """Which of `pools` the open sequences `seqs` hold single blocks of. `KVCacheManager` opens and closes them."""

    def __init__(
        self, pools: Mapping[str, BlockPool], seqs: Mapping[int, SequenceBlocks], checkpoint_step: int
    ) -> None:
        """`checkpoint_step`: positions at which prefix hits can end; 0: nothing is cached."""
        self.groups = [p.spec for p in pools.values() if p.spec.retention is Retention.SNAPSHOT]
        self._pools = [pools[g.name] for g in self.groups]
        self._at = {g.name: i for i, g in enumerate(self.groups)}
        self._states = tuple(g.name for g in self.groups if g.name != TAIL_GROUP)
        self._seqs = seqs
        self.checkpoint_step = checkpoint_step if self._states else 0
        """Prefix hits want a copy of the state at a multiple of this; 0 where nobody does."""
        self.checkpoints_made = self.checkpoints_skipped = 0

    @property
    def has_states(self) -> bool:
        """Is there something that cannot be cut back to an earlier position?"""
        return bool(self._states)

    def reserve_states(self, seq_id: int) -> bool:
        """A block of each state, to be updated in place. False: no room; what it got stays the sequence's."""
        return all(self._hold_own(seq_id, name) is not None for name in self._states)

    def state_blocks(self, seq_id: int) -> Mapping[str, int]:
        """The sequence's block of each state."""
        if not self._states:
            return _NO_STATES
        return {name: self._slot(seq_id, name)[0].own for name in self._states}

    def state_origin(self, seq_id: int) -> list[BlockCopy]:
        """What to do before the next step computes, so that the states are those of the computed position.

        Empty when the step before left them so: only a start, from a hit or from nothing, has an origin.
        """
        slots = [(name, self._slot(seq_id, name)[0]) for name in self._states]
        begins = not self._seqs[seq_id].num_computed
        return [BlockCopy(name, s.source, s.own) for name, s in slots if begins or s.source >= 0]

    def reserve_backup(self, seq_id: int) -> bool:
        """Keep room for the states as they are, so that a step's drafts may turn out wrong. False: there is none.

        True at once where nothing is a state: what lies behind the computed position is written over.
        """
        slots = [self._slot(seq_id, name) for name in self._states]
        if not all(pool.num_available for _, pool in slots):
            return False
        for slot, pool in slots:
            assert slot.backup < 0, f"sequence {seq_id} keeps an earlier state already"
            (slot.backup,) = pool.allocate(1)
        return True

    def state_backup(self, seq_id: int) -> list[BlockCopy]:
        """What to do before a step that may have to go back."""
        slots = [(name, self._slot(seq_id, name)[0]) for name in self._states]
        return [BlockCopy(name, s.own, s.backup) for name, s in slots if s.backup >= 0]

    def release_backup(self, seq_id: int, *, go_back: bool) -> None:
        """After a step that had one: the states are those that the step has left, or again those from before it."""
        for name in self._states:
            slot, pool = self._slot(seq_id, name)
            if go_back:
                slot.own, slot.backup = slot.backup, slot.own
            pool.release((slot.backup,))
            slot.backup = -1

    def checkpoint(self, seq_id: int, prefix_hash: bytes) -> list[BlockCopy]:
        """Cache the states at the computed position, `prefix_hash` being that of the tokens before it.

        Returns the copies to make before the next step; empty if they are cached already or there is no room.
        """
        slots = [self._slot(seq_id, name) for name in self._states]
        missing = [(slot, pool) for slot, pool in slots if pool.index.get(prefix_hash) is None]
        if not self._seqs[seq_id].seals or not all(pool.num_available for _, pool in missing):
            self.checkpoints_skipped += 1
            return []
        self.checkpoints_made += bool(missing)
        copies = []
        for slot, pool in missing:
            (block_id,) = pool.allocate(1)
            pool.seal(block_id, prefix_hash)
            pool.release((block_id,))
            copies.append(BlockCopy(pool.spec.name, slot.own, block_id))
        return copies

    def reserve_tail(self, seq_id: int) -> int | None:
        """The sequence's block for the last hidden row of its prompt. None: no room."""
        return self._hold_own(seq_id, TAIL_GROUP)

    def tail_block(self, seq_id: int) -> int | None:
        own = self._slot(seq_id, TAIL_GROUP)[0].own
        return own if own >= 0 else None

    def free_tail(self, seq_id: int) -> None:
        """Let go of it. Idempotent."""
        self._free_own(*self._slot(seq_id, TAIL_GROUP))

    def held(self, seq_id: int, group: str) -> list[int]:
        """The state a hit started from, until the sequence computes, then the sequence's own."""
        slot, _ = self._slot(seq_id, group)
        return [b for b in (slot.source, slot.own) if b >= 0]

    def close(self, seq: SequenceBlocks) -> None:
        """Let go of all that it holds."""
        for slot, pool in zip(seq.slots, self._pools, strict=True):
            pool.release(slot.held())

    def drop_sources(self, seq: SequenceBlocks) -> None:
        """Let go of the snapshots that a hit started from."""
        for slot, pool in zip(seq.slots, self._pools, strict=True):
            if slot.source >= 0:
                pool.release((slot.source,))
                slot.source = -1

    def detach_in_flight(self, seq: SequenceBlocks) -> bool:
        """Let go of a tail that a read may still write, and of states that one writes or has written.

        True if such a state has no other origin, so that the sequence begins again.
        """
        lost = False
        for name, slot, pool in zip(self._at, seq.slots, self._pools, strict=True):
            is_state = name != TAIL_GROUP
            if slot.own >= 0 and (pool.is_fetched(slot.own) if is_state else pool.is_in_flight(slot.own)):
                lost |= is_state and slot.source < 0
                self._free_own(slot, pool)
        return lost

    def _slot(self, seq_id: int, group: str) -> tuple[SnapshotSlot, BlockPool]:
        at = self._at[group]
        return self._seqs[seq_id].slots[at], self._pools[at]

    def _hold_own(self, seq_id: int, group: str) -> int | None:
        """The sequence's own block of a snapshot group. None: no room."""
        slot, pool = self._slot(seq_id, group)
        if slot.own < 0 and pool.num_available:
            (slot.own,) = pool.allocate(1)
        return slot.own if slot.own >= 0 else None

    @staticmethod
    def _free_own(slot: SnapshotSlot, pool: BlockPool) -> None:
        if slot.own >= 0:
            pool.release((slot.own,))
        slot.own = -1
