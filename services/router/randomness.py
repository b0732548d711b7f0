"""Random numbers of the operating system, a page of them at a time: a system call for each costs more than its use."""

from __future__ import annotations

import os
import random

_PAGE_NBYTES = 4096


class PooledRandom(random.SystemRandom):
    """As good as `SystemRandom`. For one thread."""

    def __init__(self) -> None:
        super().__init__()
        self._page, self._at = b"", 0

    def getrandbits(self, k: int, /) -> int:
        if k < 0:
            raise ValueError("the number of bits must not be negative")
        nbytes = (k + 7) // 8
        return int.from_bytes(self._take(nbytes)) >> (8 * nbytes - k)

    def random(self) -> float:
        return (int.from_bytes(self._take(7)) >> 3) * 2.0**-53

    def _take(self, nbytes: int) -> bytes:
        end = self._at + nbytes
        if end > len(self._page):
            self._page, self._at, end = os.urandom(max(_PAGE_NBYTES, nbytes)), 0, nbytes
        taken = self._page[self._at : end]
        self._at = end
        return taken
