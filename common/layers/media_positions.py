"""Rotary positions of a sequence with images in it (Qwen2-VL; Wang et al. 2024, section 2.1). No torch.

Text counts on by one, the same for time, height and width. The tokens of an image stand at its start plus their
place in its grid, and the text behind it goes on from its longer side:

    tokens   a b [image, 2 x 3 .....] c d        position of c: 2 + max(2, 3)
    time     0 1  2  2  2  2  2  2    5 6
    height   0 1  2  2  2  3  3  3    5 6
    width    0 1  2  3  4  2  3  4    5 6

They depend on the request alone, so chunks, workers and retries agree. No position exceeds the token's index.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Placed(Protocol):
    """Tokens [position, position + num_tokens) are one image or frame. `grid`: rows by time, height and width."""

    @property
    def position(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def grid(self) -> tuple[int, int, int]: ...


def rope_positions(media: Sequence[Placed], start: int, end: int) -> NDArray[np.int64]:
    """int64 [3, end - start]: (time, height, width) of tokens [start, end). `media` in order, not overlapping."""
    out_3T = np.empty((3, end - start), np.int64)
    index = shift = 0  # text from token `index` on has position token - shift
    for item in media:
        if item.position >= end:
            break
        _text(out_3T, index, item.position, start, shift)
        index = item.position + item.num_tokens
        first, last = max(item.position, start), min(index, end)
        if first < last:
            place_3N = np.unravel_index(np.arange(first - item.position, last - item.position), item.grid)
            out_3T[:, first - start : last - start] = np.stack(place_3N) + (item.position - shift)
        shift += item.num_tokens - max(item.grid[1:])
    _text(out_3T, index, end, start, shift)
    return out_3T


def _text(out_3T: NDArray[np.int64], first: int, last: int, start: int, shift: int) -> None:
    """Fill in those of tokens [first, last) that lie from `start` on."""
    first = max(first, start)
    if first < last:
        out_3T[:, first - start : last - start] = np.arange(first - shift, last - shift)
