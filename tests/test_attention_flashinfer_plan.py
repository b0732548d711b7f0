"""The cut of a step for FlashInfer's paged kernel, against what that kernel does with it, written out in Python."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest

from common.attention.flashinfer_plan import CHUNK_UNIT, Cut, Heads, Ints, Pages, tile_rows


@dataclass
class Made:
    pages: Pages
    cut: Cut
    heads: Heads
    window: int


def make_pages(
    rng: np.random.Generator, counts: list[int], size: int, window: int, longest: int = 400
) -> tuple[Pages, Ints, Ints]:
    counts_S = np.array(counts)
    lens_S = (counts_S + rng.integers(0, longest, len(counts))).astype(np.int32)
    tables_SB = rng.integers(1, 9999, (len(counts), -(-int(lens_S.max()) // size) + 3)).astype(np.int32)
    starts_S1 = np.concatenate([[5], 5 + np.cumsum(counts_S)]).astype(np.int32)
    return Pages.of(tables_SB, starts_S1, lens_S, size, window), tables_SB, lens_S


def cover(made: Made) -> tuple[Counter[tuple[int, int, int]], Counter[tuple[int, int]]]:
    """How often each (sequence, packed row, key) is computed, and each (partial row, head) is written."""
    pages, cut, group = made.pages, made.cut, made.heads.group
    out = np.full(cut.num_ints, -9, np.int32)
    info = cut.write(out)
    grid, num_rows, split, masked = info[0], info[1], info[14], info[13]

    def array(place: int, count: int) -> Ints:
        assert info[place] % 16 == 0
        return out[info[place] // 4 : info[place] // 4 + count]

    requests, q_tiles, kv_tiles = array(4, grid), array(5, grid), array(6, grid)
    merges, parts, chunk = array(7, num_rows + 1), array(8, len(pages.last_S) + 1), int(array(9, 1)[0])
    valid = out[info[12] // 4 :].view(np.uint8)[:grid] if masked else np.ones(grid, np.uint8)
    assert array(2, 1)[0] == num_rows == pages.query_starts_S1[-1]
    keys: Counter[tuple[int, int, int]] = Counter()
    rows: Counter[tuple[int, int]] = Counter()
    for b in np.flatnonzero(valid):
        s, length = requests[b], int(pages.kv_lens_S[requests[b]])
        count = int(pages.query_starts_S1[s + 1] - pages.query_starts_S1[s])
        left = made.window - 1 if made.window else length
        first = max(0, length + q_tiles[b] * cut.tile // group - (count + left))
        begin, end = first, length
        if split:
            begin = min(kv_tiles[b] * chunk + first, length)
            end = min((kv_tiles[b] + 1) * chunk + first, length)
        num_chunks = -(-min(max(length, 1), left + cut.tile) // chunk)
        for row in range(q_tiles[b] * cut.tile, min((q_tiles[b] + 1) * cut.tile, count * group)):
            token = row // group
            own = length - count + token
            keys.update((s, row, key) for key in range(max(begin, own - left), min(end, own + 1)))
            if split:
                part = parts[s] + token * num_chunks + kv_tiles[b]
                rows[part, row % group] += 1
                at = pages.query_starts_S1[s] + token
                assert merges[at] <= part < merges[at + 1]
    if split:
        assert parts[-1] == merges[-1] <= cut.num_parts
        assert len(rows) == parts[-1] * group
    return keys, rows


def expected(made: Made) -> set[tuple[int, int, int]]:
    pages, found = made.pages, set()
    for s, count in enumerate(np.diff(pages.query_starts_S1)):
        for row in range(count * made.heads.group):
            own = int(pages.kv_lens_S[s]) - count + row // made.heads.group
            low = max(0, own + 1 - made.window) if made.window else 0
            found.update((s, row, key) for key in range(low, own + 1))
    return found


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("window", [0, 20, 100, 1000])
@pytest.mark.parametrize("seed", range(6))
def test_every_key_is_seen_once(seed: int, window: int, fixed: bool) -> None:
    rng = np.random.default_rng(seed)
    num_sequences = int(rng.integers(1, 6))
    counts = [int(rng.integers(1, 5))] * num_sequences if fixed else rng.integers(1, 30, num_sequences).tolist()
    pages, _, _ = make_pages(rng, counts, int(rng.choice([16, 64])), window)
    units = int(rng.choice([1, 2]))
    heads = Heads(units * int(rng.choice([1, 3, 4, 7])), units)
    made = Made(pages, Cut.of(pages, heads, 128, window, int(rng.choice([4, 20, 60])), fixed), heads, window)
    keys, rows = cover(made)
    assert set(keys) == expected(made)
    assert set(keys.values()) == {1}
    assert set(rows.values()) <= {1}


@pytest.mark.parametrize("window", [0, 16, 33, 500])
def test_blocks_that_are_seen(window: int) -> None:
    rng = np.random.default_rng(window)
    counts = rng.integers(1, 40, 9)
    pages, tables_SB, lens_S = make_pages(rng, counts.tolist(), 16, window)
    for s, (count, length) in enumerate(zip(counts, lens_S, strict=True)):
        first = max(0, int(length - count) + 1 - window) // 16 if window else 0
        held = pages.block_ids_N[pages.block_starts_S1[s] : pages.block_starts_S1[s + 1]]
        np.testing.assert_array_equal(held, tables_SB[s, first : -(-int(length) // 16)])
        assert pages.kv_lens_S[s] == length - first * 16 == (len(held) - 1) * 16 + pages.last_S[s]


@pytest.mark.parametrize("num_sequences", [1, 3, 40])
@pytest.mark.parametrize("count", [1, 4])
def test_a_recorded_step_keeps_its_shape(num_sequences: int, count: int) -> None:
    """Grid, places and room do not follow from the lengths."""
    heads, infos, rooms = Heads(8, 2), set(), set()
    for seed in range(5):
        rng = np.random.default_rng(seed)
        pages, _, _ = make_pages(rng, [count] * num_sequences, 64, 0, longest=1 + 700 * seed)
        cut = Cut.of(pages, heads, 128, 0, 40, fixed=True)
        infos.add(tuple(cut.write(np.zeros(cut.num_ints, np.int32))))
        rooms.add((cut.num_ints, cut.num_parts))
    assert len(infos) == len(rooms) == 1


@pytest.mark.parametrize("seed", range(8))
def test_padding_changes_no_chunk(seed: int) -> None:
    rng = np.random.default_rng(seed)
    real, size = int(rng.integers(1, 45)), 64
    counts, heads = [1] * 56, Heads(8, 2)
    _, tables_SB, lens_S = make_pages(rng, counts, size, 0, longest=3000)
    lens_S[real:] = 1
    starts_S1 = np.arange(57, dtype=np.int32)

    def cut(num: int, fixed: bool) -> Cut:
        pages = Pages.of(tables_SB[:num], starts_S1[: num + 1], lens_S[:num], size, 0)
        return Cut.of(pages, heads, 128, 0, 80, fixed)

    eager, recorded = cut(real, False), cut(-(-real // 8) * 8, True)
    assert eager.chunk == recorded.chunk
    assert recorded.num_parts or not eager.num_parts


def test_few_sequences_are_split_over_the_gpu() -> None:
    pages, _, _ = make_pages(np.random.default_rng(0), [1], 64, 0, longest=2)
    longer = Pages(
        pages.query_starts_S1, pages.block_starts_S1, pages.last_S, pages.block_ids_N, pages.kv_lens_S + 8192
    )
    cut = Cut.of(longer, Heads(32, 8), 128, 0, 264, fixed=False)
    assert cut.chunk == 2 * CHUNK_UNIT
    assert len(cut.requests) == 33


def test_tiles() -> None:
    assert [tile_rows(n, 128) for n in (1, 16, 17, 64, 65, 4000)] == [16, 16, 64, 64, 128, 128]
    assert tile_rows(4000, 256) == 64
