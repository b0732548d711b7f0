"""Which blocks hold which prefix: one index per group, the longest hit over all groups, and KV events.

A block enters its group's index when it is sealed: full, final, and named by the prefix hash at its end (a
snapshot: by the prefix hash at its position). It leaves when it is evicted. The first block with a hash wins;
a second one stays an un-indexed copy of the sequence that made it. A hash names every token before it, so
blocks of one chain are looked up one by one and need no tree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from common.kvcache.layout import TAIL_GROUP, GroupSpec, Retention
from common.types.prefix import UNIT

MAX_EVENTS = 65_536

StoredEvent = tuple[str, str, bytes, tuple[bytes, ...], int]
RemovedEvent = tuple[str, str, tuple[bytes, ...]]
ClearedEvent = tuple[str]
KVEvent = StoredEvent | RemovedEvent | ClearedEvent


class EventLog:
    """What entered and left the indexes, in order, until somebody drains it.

    Nobody draining it costs no more than `MAX_EVENTS`: the log then starts over with "cleared", which says
    less than the cache holds and never more.
    """

    def __init__(self) -> None:
        self._events: list[tuple[str, str, bytes, bytes, int]] = []

    def add(self, kind: str, group: str = "", parent: bytes = b"", prefix_hash: bytes = b"", size: int = 0) -> None:
        if len(self._events) >= MAX_EVENTS:
            self._events = [("cleared", "", b"", b"", 0)]
        self._events.append((kind, group, parent, prefix_hash, size))

    def drain(self) -> list[KVEvent]:
        """("stored", group, parent hash, hashes, block size), ("removed", group, hashes) or ("cleared",).

        Neighbouring blocks of one chain are one event. The parent is empty at a prompt's start and for snapshots.
        """
        drained: list[KVEvent] = []
        run: list[bytes] = []
        events, self._events = self._events, []
        for i, (kind, group, _, prefix_hash, size) in enumerate(events):
            if kind == "cleared":
                drained.append((kind,))
                continue
            run.append(prefix_hash)
            if i + 1 < len(events):
                next_kind, next_group, next_parent, _, _ = events[i + 1]
                follows = kind == "removed" or next_parent == prefix_hash
                if next_kind == kind and next_group == group and follows:
                    continue
            if kind == "removed":
                drained.append((kind, group, tuple(run)))
            else:
                first = events[i + 1 - len(run)]
                drained.append((kind, group, first[2], tuple(run), size))
            run = []
        return drained


class PrefixIndex:
    """Prefix hash -> block of one group."""

    def __init__(self, group: GroupSpec, log: EventLog | None = None) -> None:
        self._group = group
        self._log = log
        self._blocks: dict[bytes, int] = {}
        self.get = self._blocks.get

    def __len__(self) -> int:
        return len(self._blocks)

    def items(self) -> Mapping[bytes, int]:
        return self._blocks

    def add(self, prefix_hash: bytes, block_id: int, parent: bytes = b"") -> bool:
        """False when another block has this prefix already; nothing changes then."""
        if self._blocks.setdefault(prefix_hash, block_id) != block_id:
            return False
        if self._log is not None:
            self._log.add("stored", self._group.name, parent, prefix_hash, self._group.block_size)
        return True

    def remove(self, prefix_hash: bytes) -> None:
        del self._blocks[prefix_hash]
        if self._log is not None:
            self._log.add("removed", self._group.name, prefix_hash=prefix_hash)

    def clear(self) -> None:
        """Forget all. The caller logs one "cleared" for all groups."""
        self._blocks.clear()


@dataclass(frozen=True)
class PrefixHit:
    """The first `num_tokens` positions are in the cache. A look-up, not a pin: good until the next allocation.

    `blocks[group][i]` is the block of positions [i * block_size, (i + 1) * block_size), -1 where a window does
    not reach; of a snapshot group it is the one snapshot at `num_tokens`. `chain` is the prefix that was found.
    `reach` is what the positional groups alone could supply: with a snapshot there, the hit would be that long.
    """

    num_tokens: int = 0
    blocks: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    chain: tuple[bytes, ...] = ()
    reach: int = 0

    def __bool__(self) -> bool:
        return self.num_tokens > 0


NO_HIT = PrefixHit()


def first_needed_block(position: int, block_size: int, window: int) -> int:
    """First block that a query at `position` or later sees: itself and the `window` - 1 positions before it.

    0 where there is no window.
    """
    return max(position - window + 1, 0) // block_size if window else 0


def block_hash(chain: Sequence[bytes], block_idx: int, block_size: int) -> bytes:
    return chain[(block_idx + 1) * block_size // UNIT]


def match_step(groups: Sequence[GroupSpec]) -> int:
    """Hits end at multiples of this: whole blocks in every positional group."""
    return math.lcm(UNIT, *(g.block_size for g in groups if g.retention is not Retention.SNAPSHOT))


def longest_hit(groups: Sequence[tuple[GroupSpec, PrefixIndex]], chain: Sequence[bytes], num_tokens: int) -> PrefixHit:
    """Longest position <= `num_tokens` that every group (the tail group aside) can supply.

    Each block is looked up at most twice: positions only go down, and a block missing from a window takes the
    position below that block at once.
    """
    groups = [(g, index) for g, index in groups if g.name != TAIL_GROUP]
    step = match_step([g for g, _ in groups])
    position = min(num_tokens, (len(chain) - 1) * UNIT) if groups else 0
    for g, index in groups:
        if g.retention is Retention.FULL:
            position = _full_run(index, chain, g.block_size, position)
    windows = [(g, index) for g, index in groups if g.retention is Retention.WINDOW]
    snapshots = [(g, index) for g, index in groups if g.retention is Retention.SNAPSHOT]
    reach = _settle(windows, chain, position - position % step, step)
    position = _settle([*windows, *snapshots], chain, reach, step) if snapshots else reach
    if position <= 0:
        return PrefixHit(reach=reach) if reach else NO_HIT
    blocks = {g.name: _blocks_before(g, index, chain, position) for g, index in groups}
    return PrefixHit(position, blocks, tuple(chain[: position // UNIT + 1]), reach)


def _settle(groups: Sequence[tuple[GroupSpec, PrefixIndex]], chain: Sequence[bytes], position: int, step: int) -> int:
    """Longest multiple of `step` up to `position` that all these groups can supply; 0 for none."""
    while position > 0:
        limit = min((_supplied(g, index, chain, position) for g, index in groups), default=position)
        if limit == position:
            return position
        position = limit - limit % step
    return 0


def is_current(hit: PrefixHit, groups: Sequence[tuple[GroupSpec, PrefixIndex]]) -> bool:
    """Do the blocks of `hit` still hold what they held when it was made?"""
    for g, index in groups:
        blocks = hit.blocks.get(g.name, ())
        if g.retention is Retention.SNAPSHOT:
            if blocks and index.get(hit.chain[hit.num_tokens // UNIT]) != blocks[0]:
                return False
        elif any(b >= 0 and index.get(block_hash(hit.chain, i, g.block_size)) != b for i, b in enumerate(blocks)):
            return False
    return True


def _full_run(index: PrefixIndex, chain: Sequence[bytes], block_size: int, limit: int) -> int:
    """Positions held from the start on, in whole blocks, at most `limit`."""
    stride, get = block_size // UNIT, index.get
    for i in range(limit // block_size):
        if get(chain[(i + 1) * stride]) is None:
            return i * block_size
    return limit - limit % block_size


def _supplied(g: GroupSpec, index: PrefixIndex, chain: Sequence[bytes], position: int) -> int:
    """`position` if a window or snapshot group has all it takes, else a bound for the next try below it."""
    if g.retention is Retention.SNAPSHOT:
        return position if index.get(chain[position // UNIT]) is not None else position - 1
    size = g.block_size
    for i in range(position // size - 1, first_needed_block(position, size, g.window) - 1, -1):
        if index.get(block_hash(chain, i, size)) is None:
            return i * size
    return position


def _blocks_before(g: GroupSpec, index: PrefixIndex, chain: Sequence[bytes], position: int) -> tuple[int, ...]:
    blocks = index.items()
    if g.retention is Retention.SNAPSHOT:
        return (blocks[chain[position // UNIT]],)
    first = first_needed_block(position, g.block_size, g.window)
    stride = g.block_size // UNIT
    held = (blocks[chain[(i + 1) * stride]] for i in range(first, position // g.block_size))
    return (*(-1 for _ in range(first)), *held)
