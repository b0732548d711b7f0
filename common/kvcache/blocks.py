"""The blocks of one group: what state each is in and who holds it.

    free -> live -> cached -> free                     reserved, sealed and given back, evicted
            live -> free                               given back before it was sealed
            live -> in flight -> live                  a remote read writes it
                    in flight -> free                  its sequence left before the read ended
            live | cached -> leased -> cached | free   pinned for a reader
            cached | leased -> live                    prefix hit

Several may hold a block at once; its one state is the strongest claim: in flight > live (referenced by
sequences) > leased (pinned) > cached (indexed under its prefix) > free. Cached blocks are evicted in LRU order,
and nothing else ever is. No operation depends on the size of the pool but `check` and `reset_prefixes`.
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence

from common.kvcache.layout import GroupSpec
from common.kvcache.prefix import PrefixIndex
from common.types import BlockStates, Clock


class BlockState(enum.IntEnum):
    FREE = 0
    CACHED = 1
    LEASED = 2
    LIVE = 3
    IN_FLIGHT = 4


FREE, CACHED, LEASED, LIVE, IN_FLIGHT = (int(s) for s in BlockState)


class BlockPool:
    """States, reference counts, pins, reads, hashes and digests of `spec.num_blocks` blocks."""

    def __init__(self, spec: GroupSpec, index: PrefixIndex, clock: Clock) -> None:
        n = spec.num_blocks
        self.spec = spec
        self.index = index
        self._clock = clock
        self._state = bytearray(n)
        self._since = [clock.now()] * n
        self._refs = [0] * n
        self._pins = [0] * n
        self._reads = [0] * n
        self._hashes: list[bytes | None] = [None] * n
        self._digests: list[tuple[int, ...] | None] = [None] * n
        self._fetched = bytearray(n)
        self._counts = [n, 0, 0, 0, 0]
        self._free = list(range(n - 1, -1, -1))
        self._lru: OrderedDict[int, None] = OrderedDict()

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can hand out: free and cached."""
        return len(self._free) + len(self._lru)

    def states(self) -> BlockStates:
        free, cached, leased, live, in_flight = self._counts
        return BlockStates(
            group=self.spec.name,
            total=self.spec.num_blocks,
            free=free,
            live=live,
            cached=cached,
            leased=leased,
            in_flight=in_flight,
        )

    def state(self, block_id: int) -> BlockState:
        return BlockState(self._state[block_id])

    def held(self) -> Iterator[tuple[int, BlockState, float]]:
        """(block, state, seconds in it) of all blocks that are not free."""
        now = self._clock.now()
        for block_id, state in enumerate(self._state):
            if state != FREE:
                yield block_id, BlockState(state), now - self._since[block_id]

    def num_cached(self, block_ids: Iterable[int]) -> int:
        return sum(b >= 0 and self._state[b] == CACHED for b in block_ids)

    def prefix_hash(self, block_id: int) -> bytes | None:
        """The prefix the block is sealed under, indexed or a copy."""
        return self._hashes[block_id]

    def is_in_flight(self, block_id: int) -> bool:
        return self._reads[block_id] > 0

    def is_fetched(self, block_id: int) -> bool:
        """Has a remote read written to the block since it was allocated?"""
        return bool(self._fetched[block_id])

    def digests(self, block_id: int) -> tuple[int, ...] | None:
        return self._digests[block_id]

    def set_digests(self, block_id: int, digests: Sequence[int]) -> None:
        assert self._state[block_id] != FREE, f"{self._name(block_id)} is free and takes no digests"
        self._digests[block_id] = tuple(digests)

    def allocate(self, count: int) -> list[int]:
        """`count` live blocks with one reference each, the free ones first, then the least recently used cached.

        The caller has made sure that `count <= num_available`.
        """
        assert count <= self.num_available, f"group {self.spec.name}: {count} blocks of {self.num_available} asked for"
        now = self._clock.now()
        taken: list[int] = []
        for _ in range(count):
            if self._free:
                block_id = self._free.pop()
                self._counts[FREE] -= 1
            else:
                block_id, _ = self._lru.popitem(last=False)
                self._counts[CACHED] -= 1
                self._forget(block_id)
            self._counts[LIVE] += 1
            self._state[block_id] = LIVE
            self._since[block_id] = now
            self._refs[block_id] = 1
            taken.append(block_id)
        return taken

    def acquire(self, block_ids: Iterable[int]) -> None:
        """One more reference to each block of a prefix hit; entries of -1 are skipped."""
        now = self._clock.now()
        for b in block_ids:
            if b >= 0:
                assert self._holds_data(b), f"{self._name(b)} cannot be shared"
                self._refs[b] += 1
                self._settle(b, now)

    def release(self, block_ids: Iterable[int]) -> None:
        """Drop one reference to each; what is released first is evicted first."""
        now = self._clock.now()
        for b in block_ids:
            assert self._refs[b] > 0, f"{self._name(b)} is released more often than held"
            self._refs[b] -= 1
            self._settle(b, now)

    def pin(self, block_ids: Sequence[int]) -> None:
        now = self._clock.now()
        for b in block_ids:
            assert self._holds_data(b), f"{self._name(b)} cannot be leased"
        for b in block_ids:
            self._pins[b] += 1
            self._settle(b, now)

    def unpin(self, block_ids: Iterable[int]) -> None:
        now = self._clock.now()
        for b in block_ids:
            assert self._pins[b] > 0, f"{self._name(b)} is unpinned more often than pinned"
            self._pins[b] -= 1
            self._settle(b, now)

    def begin_read(self, block_ids: Sequence[int]) -> None:
        """A remote read starts to write these blocks. They belong to one sequence and are not sealed."""
        now = self._clock.now()
        for b in block_ids:
            alone = self._refs[b] == 1 and not self._pins[b] and self._hashes[b] is None
            assert alone, f"{self._name(b)} may not be written: it is not one sequence's own"
        for b in block_ids:
            self._reads[b] += 1
            self._fetched[b] = 1
            self._digests[b] = None
            self._settle(b, now)

    def end_read(self, block_ids: Iterable[int]) -> None:
        now = self._clock.now()
        for b in block_ids:
            assert self._reads[b] > 0, f"{self._name(b)} has no read to end"
            self._reads[b] -= 1
            self._settle(b, now)

    def seal(self, block_id: int, prefix_hash: bytes, parent: bytes = b"") -> None:
        """The block is full and final: find it under `prefix_hash` from now on, unless another block is."""
        assert self._state[block_id] == LIVE, f"{self._name(block_id)} cannot be sealed"
        assert self._hashes[block_id] is None, f"{self._name(block_id)} is sealed twice"
        self._hashes[block_id] = prefix_hash
        self.index.add(prefix_hash, block_id, parent)

    def reset_prefixes(self) -> None:
        """Forget every prefix: cached blocks become free, held ones are no longer sealed."""
        self.index.clear()
        now = self._clock.now()
        self._hashes = [None] * self.spec.num_blocks
        for b in reversed(list(self._lru)):
            self._settle(b, now)

    def forget(self, prefix_hash: bytes) -> None:
        """Forget one prefix, if it is here: a cached block becomes free, a held one is no longer sealed."""
        b = self.index.get(prefix_hash)
        if b is not None:
            self.index.remove(prefix_hash)
            self._hashes[b] = None
            self._settle(b, self._clock.now())

    def _settle(self, b: int, now: float) -> None:
        """Put the block into the state of its strongest claim."""
        if self._reads[b]:
            state = IN_FLIGHT
        elif self._refs[b]:
            state = LIVE
        elif self._pins[b]:
            state = LEASED
        else:
            state = CACHED if self._is_indexed(b) else FREE
        old = self._state[b]
        if state == old:
            return
        if old == CACHED:
            del self._lru[b]
        self._counts[old] -= 1
        self._counts[state] += 1
        self._state[b] = state
        self._since[b] = now
        if state == CACHED:
            self._lru[b] = None
        elif state == FREE:
            self._forget(b)
            self._free.append(b)

    def _is_indexed(self, b: int) -> bool:
        prefix_hash = self._hashes[b]
        return prefix_hash is not None and self.index.get(prefix_hash) == b

    def _holds_data(self, b: int) -> bool:
        return self._state[b] != FREE and not self._reads[b]

    def _forget(self, b: int) -> None:
        """The contents are gone: no prefix, no digests."""
        if self._is_indexed(b):
            self.index.remove(self._hashes[b] or b"")
        self._hashes[b] = None
        self._digests[b] = None
        self._fetched[b] = 0

    def _name(self, b: int) -> str:
        return f"block {b} of group {self.spec.name} ({BlockState(self._state[b]).name.lower()})"

    def check(self, refs: Sequence[int], pins: Sequence[int], reads: Sequence[int]) -> None:
        """Recount everything against the claims the manager knows of. Raises AssertionError."""
        name, n = f"group {self.spec.name}", self.spec.num_blocks
        for what, have, want in (("refs", self._refs, refs), ("pins", self._pins, pins), ("reads", self._reads, reads)):
            wrong = [] if have == want else [b for b in range(n) if have[b] != want[b]]
            assert not wrong, f"{name}: {what} differ from the holders' at {wrong}"
        counts = [0] * len(BlockState)
        for b, state in enumerate(self._state):
            counts[state] += 1
            if reads[b] or refs[b] or pins[b]:
                expected = IN_FLIGHT if reads[b] else LIVE if refs[b] else LEASED
            else:
                expected = CACHED if self._is_indexed(b) else FREE
            assert state == expected, f"{self._name(b)} should be {BlockState(expected).name.lower()}"
            assert state not in (FREE, IN_FLIGHT) or self._hashes[b] is None, f"{self._name(b)} is sealed"
            assert state != FREE or self._digests[b] is None, f"{self._name(b)} has digests"
        assert counts == self._counts, f"{name}: counted {counts}, kept {self._counts}"
        assert sum(counts) == n, f"{name}: {counts} do not add up to {n}"
        assert sorted(self._free) == [b for b in range(n) if self._state[b] == FREE], f"{name}: free list is wrong"
        assert sorted(self._lru) == [b for b in range(n) if self._state[b] == CACHED], f"{name}: LRU list is wrong"
        for prefix_hash, b in self.index.items().items():
            assert self._hashes[b] == prefix_hash, f"{self._name(b)} is indexed under a prefix it does not hold"
