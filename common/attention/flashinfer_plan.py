"""How a step is cut for the paged kernels: arrays that follow from its lengths, made on the host. No GPU here.

`Pages` says which blocks each sequence's new tokens see: what lies wholly before the window of the first of them is
left out, which changes nothing since lengths are counted from a sequence's end.

`Cut` is the plan of FlashInfer's `fa2` kernel, made by us rather than by its `plan`, because it can then be the same
in each replay of a graph, travels with the pages in one copy, and costs no call that copies by itself. A work item
is (sequence, query tile, chunk of keys); each has one thread block for each key head. A query tile is `tile` packed
rows: row r of a sequence is token r // group, head r % group of a key head's. Keys are split in chunks where there
are too few items to fill the GPU; parts are then put together by a second kernel. Sequences that are not longer than
a chunk can be do not count for its length, so padding changes no result. As `PrefillPlanInfo` and
`BatchPrefillWithPagedKVCacheDevice` of FlashInfer have it:

    requests, q_tiles, kv_tiles  [grid]    of each item; items beyond the last are masked by `valid`
    parts                        [S + 1]   first row of each sequence's partial results, tokens x chunks each
    merges                       [T + 1]   the same by token
    chunk, rows                            tokens in a chunk; T

Shape letters as in `common.attention.context`; also N blocks, T new tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]

CHUNK_UNIT = 128  # tokens: the keys that a thread block takes at once
PADDING = 16  # sequences that a recorded step is padded by, at most, where its keys are still split


@dataclass(frozen=True)
class Heads:
    """Of one rank."""

    num_heads: int
    num_kv_heads: int

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True)
class Pages:
    """`query_starts_S1` and `block_starts_S1` begin with 0. `last_S`: tokens in the last block. `kv_lens_S` follow."""

    query_starts_S1: Ints
    block_starts_S1: Ints
    last_S: Ints
    block_ids_N: Ints
    kv_lens_S: Ints

    @classmethod
    def of(cls, tables_SB: Ints, query_starts_S1: Ints, seq_lens_S: Ints, block_size: int, window: int) -> Pages:
        """`query_starts_S1` may begin anywhere: these sequences' tokens are a part of a step's."""
        counts_S = np.diff(query_starts_S1)
        end_S = (seq_lens_S + (block_size - 1)) // block_size
        before_S = seq_lens_S - counts_S + 1 - window  # of these positions none is seen
        first_S = np.maximum(before_S, 0) // block_size if window else np.zeros_like(end_S)
        block_starts_S1 = np.zeros(len(seq_lens_S) + 1, np.int32)
        np.cumsum(end_S - first_S, out=block_starts_S1[1:])
        lowest, width = int(first_S.min(initial=0)), int(end_S.max(initial=0))
        column_B = np.arange(lowest, width, dtype=np.int32)
        held_SB = (column_B < end_S[:, None]) & (column_B >= first_S[:, None])
        return cls(
            query_starts_S1 - query_starts_S1[0],
            block_starts_S1,
            seq_lens_S - (end_S - 1) * block_size,
            tables_SB[:, lowest:width][held_SB],
            seq_lens_S - first_S * block_size,
        )


@dataclass(frozen=True)
class Cut:
    """`num_parts`: rows of partial results, 0 where keys are not split. `fixed`: grid and offsets follow from the
    number of sequences and of their new tokens alone.
    """

    tile: int
    grid: int
    num_parts: int
    fixed: bool
    requests: Ints
    q_tiles: Ints
    kv_tiles: Ints
    parts: Ints
    merges: Ints
    chunk: int

    @classmethod
    def of(cls, pages: Pages, heads: Heads, head_dim: int, window: int, num_slots: int, fixed: bool) -> Cut:
        """`num_slots`: thread blocks that run at once. `fixed`: for a graph; its sequences have equally many tokens."""
        counts_S = np.diff(pages.query_starts_S1)
        rows_S = counts_S * heads.group
        tile = tile_rows(int(rows_S.sum()) // max(len(rows_S), 1), head_dim)
        q_tiles_S = -(-rows_S // tile)
        seen_S = np.maximum(pages.kv_lens_S, 1)
        if window:
            seen_S = np.minimum(seen_S, window - 1 + tile)
        room, longest = num_slots // heads.num_kv_heads, int(seen_S.max(initial=1))
        long = seen_S > CHUNK_UNIT
        chunk = _chunk(q_tiles_S[long], seen_S[long], longest, room)
        num_tiles = int(q_tiles_S.sum())
        few = room + PADDING * int(q_tiles_S[0])  # with more tiles, keys were not split before padding either
        split = num_tiles < few if fixed else chunk < longest
        chunks_S = -(-seen_S // chunk) if split else np.ones_like(seen_S)
        items_S = q_tiles_S * chunks_S
        order_S = np.argsort(-seen_S, kind="stable")  # the longest first: the last to run are short
        requests = np.repeat(order_S, items_S[order_S]).astype(np.int32)
        begin_S = np.cumsum(items_S[order_S]) - items_S[order_S]
        within = np.arange(len(requests), dtype=np.int32) - np.repeat(begin_S, items_S[order_S]).astype(np.int32)
        of_item = chunks_S[requests]
        parts = np.zeros(len(counts_S) + 1, np.int32)
        np.cumsum(counts_S * chunks_S, out=parts[1:])
        merges = np.zeros(int(counts_S.sum()) + 1, np.int32)
        np.cumsum(np.repeat(chunks_S, counts_S), out=merges[1:])
        grid = room + num_tiles if fixed and split else len(requests)
        num_parts = 0
        if split:
            num_parts = grid * int(counts_S[0]) if fixed else int(parts[-1])
        return cls(tile, grid, num_parts, fixed, requests, within // of_item, within % of_item, parts, merges, chunk)

    @property
    def num_ints(self) -> int:
        """Elements of what `write` writes."""
        return self._offsets()[-1]

    def write(self, out: Ints) -> list[int]:
        """Lay the arrays out in `out` and return FlashInfer's `PrefillPlanInfo`, but for the places of partial results.

        Its offsets are in bytes from `out`.
        """
        requests, q_tiles, kv_tiles, parts, merges, chunk, rows, valid, end = self._offsets()
        used = len(self.requests)
        for start, values in ((requests, self.requests), (q_tiles, self.q_tiles), (kv_tiles, self.kv_tiles)):
            out[start : start + used] = values
            out[start + used : start + self.grid] = 0
        out[parts : parts + len(self.parts)] = self.parts
        out[merges : merges + len(self.merges)] = self.merges
        out[chunk] = self.chunk
        out[rows] = len(self.merges) - 1
        mask = out[valid:end].view(np.uint8)
        mask[:used] = 1
        mask[used:] = 0
        split, num_rows = self.num_parts > 0, len(self.merges) - 1
        masked = split and self.fixed
        return [
            self.grid,
            num_rows,
            4 * rows,
            self.tile,
            4 * requests,
            4 * q_tiles,
            4 * kv_tiles,
            4 * merges,
            4 * parts,
            4 * chunk,
            0,
            0,
            4 * valid,
            int(masked),
            int(split),
        ]

    def _offsets(self) -> list[int]:
        sizes = [self.grid, self.grid, self.grid, len(self.parts), len(self.merges), 1, 1, -(-self.grid // 4)]
        starts = [0]
        for size in sizes:
            starts.append(starts[-1] + (size + 3) // 4 * 4)  # 16 bytes
        return starts


def tile_rows(mean_rows: int, head_dim: int) -> int:
    """Packed rows of a query tile, among those that the kernels are compiled for."""
    if mean_rows > 64 and head_dim < 256:
        return 128
    return 64 if mean_rows > 16 else 16


def _chunk(q_tiles_S: Ints, seen_S: Ints, longest: int, room: int) -> int:
    """The least chunk, in whole units, with which the items of these sequences fit into `room`; `longest` if none."""
    low, high = 1, -(-longest // CHUNK_UNIT)
    if not len(seen_S) or int(q_tiles_S.sum()) >= room:
        return longest
    while low < high:
        middle = (low + high) // 2
        if int((q_tiles_S * -(-seen_S // (middle * CHUNK_UNIT))).sum()) > room:
            low = middle + 1
        else:
            high = middle
    return min(low * CHUNK_UNIT, longest)
