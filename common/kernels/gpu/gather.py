"""Copies of many small pieces in one launch, from anywhere that this GPU can address: another GPU's mapped memory too.

A copy engine takes microseconds for each piece, however small. Here a fixed number of small programs takes turns: few
enough to leave nearly all of the GPU to whatever else runs, enough to keep a link between two GPUs full.
"""

from __future__ import annotations

import numpy as np
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

_PROGRAMS = 264  # two on each multiprocessor of a Hopper GPU
_BLOCK = 1024  # words that a program has under way
_ITEM = 8192  # words at most in an item, so that programs end together


@triton.jit(do_not_specialize=["num_items"])
def _gather(anchor_ptr, items_ptr, num_items, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    for number in range(tl.program_id(0), num_items, tl.num_programs(0)):
        item = items_ptr + (tl.full([], 0, tl.int64) + number) * 3
        source = tl.load(item)
        target = tl.load(item + 1)
        num_words = tl.load(item + 2)
        if ALIGNED:
            source = tl.multiple_of(source, 2)
            target = tl.multiple_of(target, 2)
            num_words = tl.multiple_of(num_words, 2)
        for first in range(0, num_words, BLOCK):
            word = first + tl.arange(0, BLOCK)
            mask = word < num_words
            x = tl.load(anchor_ptr + source + word, mask=mask)
            tl.store(anchor_ptr + target + word, x, mask=mask)


def cut(pieces_N3: NDArray[np.int64]) -> NDArray[np.int64]:
    """Items of pieces (source, target, words): those that are longer than an item become several."""
    counts = -(-pieces_N3[:, 2] // _ITEM)
    first = np.cumsum(counts) - counts
    at = (np.arange(counts.sum()) - np.repeat(first, counts)) * _ITEM
    items = np.repeat(pieces_N3, counts, axis=0)
    items[:, :2] += at[:, None]
    items[:, 2] = np.minimum(items[:, 2] - at, _ITEM)
    return items


def gather(anchor: Tensor, items_N3: Tensor, aligned: bool) -> None:
    """Make the copies of `cut`'s items, in any order.

    `items_N3`: int64, words from `anchor` (int64) to the source and to the target, and how many. `aligned`: all three
    are even. Targets do not overlap one another, nor any source.
    """
    programs = min(_PROGRAMS, len(items_N3))
    _gather[(programs,)](anchor, items_N3, len(items_N3), BLOCK=_BLOCK, ALIGNED=aligned, num_warps=4)
