"""Cutting sequences into items: every key that is seen is in one item, and there is room for all.

Lengths, windows and aims are drawn anew at each run; a failure names the case.
"""

from __future__ import annotations

import random

import pytest
import torch

from common.kernels import gpu

pytestmark = pytest.mark.gpu

WIDTHS = (16, 64, 128, 256)


@pytest.mark.parametrize("turn", range(40))
def test_every_key_is_in_one_item(kernel_device: torch.device, turn: int) -> None:
    own, rng = gpu.paged_attention, random.Random()
    width, slots, num_new = rng.choice(WIDTHS), rng.choice((1, 2, 3, 8, 33, 264)), rng.choice((1, 1, 2, 5, 16))
    window, first = rng.choice((0, 0, 1, 33, 128, 4096)), rng.choice((0, 0, 1, 3, 200))
    longest = rng.choice((1, 130, 300, 5000, 200_000))
    padding = rng.choice((0, 0, 3))  # those of a recorded step have their new tokens alone
    lengths = [num_new + rng.randrange(longest) for _ in range(rng.choice((1, 2, 3, 7, 65, 130)))]
    lengths += [num_new] * padding + [0] * rng.choice((0, 0, 1))
    case = f"{width=} {slots=} {num_new=} {window=} {first=} {lengths=}"
    seen = own.Seen(num_new, window, first)
    units, rows = rng.choice((1, 4)), num_new
    space = own.workspace(len(lengths), units, width, rows, slots, kernel_device)
    places = space.sums.numel() // (max(16, 1 << (rows - 1).bit_length()) * units)  # of partial results
    lens_S = torch.tensor(lengths, dtype=torch.int32, device=kernel_device)
    items = [i for i in own.schedule(lens_S, seen, width, slots).tolist() if i[0] >= 0]
    assert [i[0] for i in items] == sorted(i[0] for i in items), case
    taken: set[int] = set()
    for s, length in enumerate(lengths):
        mine = [i for i in items if i[0] == s]
        lowest = max(first, length - num_new + 1 - window) if window else first
        assert mine, case
        assert all((i[3], i[6], i[7]) == (len(mine), lowest, length) for i in mine), case
        if lowest >= length:  # nothing is seen: keys below the lowest are left out as they are read
            assert len(mine) == 1, case
            assert lowest >= mine[0][2], case
            continue
        keys = sorted((i[1], i[2]) for i in mine)
        assert keys[0][0] <= lowest < keys[0][1], case
        assert all(a < b for a, b in keys), case
        assert [b for _, b in keys[:-1]] == [a for a, _ in keys[1:]], case
        assert keys[-1][1] == length, case
        if len(mine) > 1:
            results = [i[5] for i in mine]
            assert results == list(range(mine[0][4], mine[0][4] + len(mine))), case
            assert not taken.intersection(results), case
            taken.update(results)
            sizes = [b - a for a, b in keys]
            assert max(sizes) == sizes[0], case
            assert sum(sizes) > (len(sizes) - 1) * sizes[0], case  # equal parts, but for what the last one lacks
    assert max(taken, default=0) < places, case


@pytest.mark.parametrize(
    ("sequences", "length", "parts"), [(1, 65536, 49), (8, 1152, 6), (16, 1152, 3), (16, 16384, 3), (32, 1152, 1)]
)
def test_equal_sequences_are_cut_into_as_many_items_as_run_at_once(
    kernel_device: torch.device, sequences: int, length: int, parts: int
) -> None:
    """49 of a key head do, on 132 multiprocessors with 8 key heads; 64 would be a round and a third."""
    own = gpu.paged_attention
    lens_S = torch.full((sequences,), length, dtype=torch.int32, device=kernel_device)
    items = [i for i in own.schedule(lens_S, own.Seen(1), 128, 49).tolist() if i[0] >= 0]
    assert [i[3] for i in items] == [parts] * (sequences * parts)
