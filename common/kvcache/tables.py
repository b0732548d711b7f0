"""What one sequence holds: a block table per positional group, a few blocks per snapshot group.

    positions   0 ........ first_needed ........ num_computed ........ num_reserved
    window      -1  ...    held, sealed          held, being written   not reserved
    full        held, sealed ...

With `fetch_to`, a window group holds nothing between the hit and the window before that position: those
entries are -1 and nobody computes there. `num_whole` is the first such hole, or the table's end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from common.kvcache.blocks import BlockPool
from common.kvcache.layout import GroupSpec
from common.kvcache.prefix import PrefixHit, block_hash, first_needed_block
from common.types.prefix import UNIT

NEVER = 1 << 62
FETCH_ALIGN = 128  # tokens: a peer with larger blocks is read in whole blocks, from before the window on


class BlockCopy(NamedTuple):
    """Block `target` of a group becomes what block `source` is; a source of -1 is zeros."""

    group: str
    source: int
    target: int


class GroupTable:
    """Blocks of one positional group in order of position, -1 where none is held."""

    __slots__ = ("block_size", "blocks", "first", "num_sealed", "num_whole", "window")

    def __init__(self, group: GroupSpec) -> None:
        self.block_size = group.block_size
        self.window = group.window
        self.blocks: list[int] = []  # this list, as long as the sequence lives
        self.first = 0  # entries below it were given back or never held
        self.num_whole = 0  # entries in [first, num_whole) are all held
        self.num_sealed = 0  # entries below it are sealed or never will be

    def first_needed(self, position: int) -> int:
        return first_needed_block(position, self.block_size, self.window)

    def start_from(self, blocks: Sequence[int], position: int) -> None:
        """Begin with the blocks of a prefix hit."""
        self.blocks.extend(blocks)
        self.first = self.first_needed(position)
        self.num_whole = self.num_sealed = len(blocks)

    def before(self, position: int) -> list[int]:
        """The blocks that a query at `position` sees of those before it; -1 where one is not held."""
        end = -(-position // self.block_size)
        blocks = self.blocks[self.first_needed(position) : end]
        return blocks if len(self.blocks) >= end else [*blocks, -1]

    def first_fetched(self, position: int) -> int:
        """First block that reads up to `position` may write to."""
        align = math.lcm(self.block_size, FETCH_ALIGN)
        return self.first_needed(position) * self.block_size // align * align // self.block_size

    def first_whole(self, position: int) -> int:
        """First block that reads up to `position` fill from its start: what they bring begins with the hash unit that
        the window begins in, be that amid a block.
        """
        return -(-first_needed_block(position, UNIT, self.window) * UNIT // self.block_size)

    def missing(self, num_tokens: int, num_computed: int, fetch_to: int) -> list[int]:
        """Entries to fill for positions up to `num_tokens`, the ones below `fetch_to` coming from a peer."""
        n = len(self.blocks)
        start = max(self.num_whole, self.first_needed(num_computed))
        if fetch_to:
            start = max(start, self.first_fetched(fetch_to))
        return [i for i in range(start, -(-num_tokens // self.block_size)) if i >= n or self.blocks[i] < 0]

    def fill(self, entries: Sequence[int], block_ids: Sequence[int]) -> None:
        if entries:
            self.blocks.extend([-1] * (entries[-1] + 1 - len(self.blocks)))
        for i, block_id in zip(entries, block_ids, strict=True):
            self.blocks[i] = block_id

    def find_whole(self, num_computed: int) -> None:
        """Move `num_whole` on to the first hole that a query at `num_computed` or later could see."""
        i, n = max(self.num_whole, self.first_needed(num_computed)), len(self.blocks)
        while i < n and self.blocks[i] >= 0:
            i += 1
        self.num_whole = min(i, n)

    def cut(self, num_tokens: int) -> list[int]:
        """Drop the entries past `num_tokens`; returns their blocks, the last position first."""
        keep = -(-num_tokens // self.block_size)
        dropped = [b for b in reversed(self.blocks[keep:]) if b >= 0]
        del self.blocks[keep:]
        self.first = min(self.first, keep)
        self.num_whole = min(self.num_whole, keep)
        self.num_sealed = min(self.num_sealed, keep)
        return dropped

    def drop_before(self, entry: int) -> list[int]:
        """Drop the entries below `entry`; returns their blocks, the first position first."""
        dropped = [b for b in self.blocks[self.first : entry] if b >= 0]
        for i in range(self.first, min(entry, len(self.blocks))):
            self.blocks[i] = -1
        self.first = max(self.first, entry)
        return dropped


class SnapshotSlot:
    """Blocks of one snapshot group: the state a hit started from, the sequence's own, and one kept to go back to."""

    __slots__ = ("backup", "own", "source")

    def __init__(self) -> None:
        self.source = -1
        self.own = -1
        self.backup = -1  # during a step with drafts

    def held(self) -> list[int]:
        return [b for b in (self.source, self.own, self.backup) if b >= 0]


class SequenceBlocks:
    """All that one sequence holds. The manager owns it; `tables` and `slots` are in the layout's order."""

    __slots__ = (
        "fetch_end",
        "fetch_to",
        "lists",
        "num_computed",
        "num_reserved",
        "owner",
        "seals",
        "slots",
        "tables",
        "wake_at",
    )

    def __init__(
        self, owner: str, positional: Sequence[GroupSpec], snapshots: Sequence[GroupSpec], seals: bool
    ) -> None:
        self.owner = owner
        self.seals = seals  # may its blocks enter the prefix index?
        self.tables = [GroupTable(g) for g in positional]
        self.lists = {g.name: table.blocks for g, table in zip(positional, self.tables, strict=True)}
        self.slots = [SnapshotSlot() for _ in snapshots]
        self.num_computed = 0
        self.fetch_to = 0  # positions up to here come from a peer
        self.fetch_end = 0  # end of the last computed block that a read wrote to
        self.num_reserved = 0  # positions a step may write to
        self.wake_at = 0  # computed position at which `advance` has something to do
        self.refresh()

    @property
    def is_empty(self) -> bool:
        return not self.num_computed and not any(t.blocks for t in self.tables)

    def covers(self, num_tokens: int) -> bool:
        return all(len(t.blocks) * t.block_size >= num_tokens for t in self.tables)

    def start_from(self, hit: PrefixHit, positional: Sequence[GroupSpec], snapshots: Sequence[GroupSpec]) -> None:
        """Take the blocks of a hit over; the caller counts the references."""
        for table, group in zip(self.tables, positional, strict=True):
            table.start_from(hit.blocks.get(group.name, ()), hit.num_tokens)
        for slot, group in zip(self.slots, snapshots, strict=True):
            slot.source = next(iter(hit.blocks.get(group.name, ())), -1)
        self.num_computed = hit.num_tokens

    def missing(self, num_tokens: int, fetch_to: int) -> list[list[int]]:
        """Per positional group, the table entries that need a block."""
        return [t.missing(num_tokens, self.num_computed, fetch_to) for t in self.tables]

    def refresh(self) -> None:
        """Derive `num_reserved` and `wake_at` after any change."""
        for t in self.tables:
            t.find_whole(self.num_computed)
        self.num_reserved = min((t.num_whole * t.block_size for t in self.tables), default=NEVER)
        wake = self.num_reserved + 1
        for t in self.tables:
            if self.seals:
                wake = min(wake, (t.num_sealed + 1) * t.block_size)
            if t.window:
                wake = min(wake, (t.first + 1) * t.block_size + t.window - 1)
        if any(s.source >= 0 for s in self.slots):
            wake = min(wake, self.num_computed + 1)
        self.wake_at = wake

    def held(self) -> Iterator[tuple[int, int]]:
        """(index of the group: positional ones first, then snapshots; block) of every block held."""
        for i, table in enumerate(self.tables):
            yield from ((i, b) for b in table.blocks if b >= 0)
        for i, slot in enumerate(self.slots, len(self.tables)):
            yield from ((i, b) for b in slot.held())

    def check(self) -> None:
        """Raises AssertionError when the tables contradict each other."""
        who = f"sequence of {self.owner}"
        assert self.num_computed <= self.num_reserved, f"{who}: computed past what it reserved"
        for t in self.tables:
            first = t.first_needed(self.num_computed)
            assert t.first == min(first, len(t.blocks)), f"{who}: window begins at {t.first}, not {first}"
            assert all(b < 0 for b in t.blocks[: t.first]), f"{who}: holds blocks before its window"
            assert all(b >= 0 for b in t.blocks[t.first : t.num_whole]), f"{who}: has a hole in what it reserved"
            held = [b for b in t.blocks if b >= 0]
            assert len(set(held)) == len(held), f"{who}: has a block twice in one table"
            holes = t.num_whole < len(t.blocks)
            assert not (holes and not t.window), f"{who}: has a hole in a group without a window"


def seal_full_blocks(seq: SequenceBlocks, table: GroupTable, pool: BlockPool, chain: Sequence[bytes]) -> None:
    """Seal the blocks that lie wholly below the computed position.

    In a window group, positions that came from a peer hold nothing but the window before `fetch_to`, which may begin
    amid a block: that one is not sealed. Unless `fetch_to` was said, it is unknown which are whole, and none is.
    """
    size, blocks = table.block_size, table.blocks
    end = seq.num_computed // size
    assert len(chain) > end * size // UNIT, f"sequence of {seq.owner}: the chain ends before position {end * size}"
    needed = table.first_needed(seq.num_computed)
    for i in range(table.num_sealed, end):
        block_id = blocks[i]
        if block_id < 0:
            continue
        if pool.is_in_flight(block_id):
            assert i < needed, f"sequence of {seq.owner}: position {i * size} is not final, a read may write it"
            continue
        if table.window and i * size < seq.fetch_end:
            whole = seq.fetch_to and i >= table.first_whole(seq.fetch_to)
            if not (whole and pool.is_fetched(block_id)):
                continue
        pool.seal(block_id, block_hash(chain, i, size), block_hash(chain, i - 1, size) if i else b"")
    table.num_sealed = max(table.num_sealed, end)
