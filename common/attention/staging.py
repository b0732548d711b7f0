"""Pinned memory that copies to the GPU read while the host goes on: a piece is used again once its copy is done."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Staging:
    """Pinned memory for copies to the GPU, in turns."""

    def __init__(self, num_pieces: int = 16) -> None:
        self._pieces = [Staged() for _ in range(num_pieces)]
        self._next = 0

    def take(self, num_ints: int) -> Staged:
        piece = self._pieces[self._next]
        self._next = (self._next + 1) % len(self._pieces)
        piece.make_room(num_ints)
        return piece


class Staged:
    """One piece. `array` is its memory."""

    def __init__(self) -> None:
        self._copied: torch.cuda.Event | None = None
        self.tensor = torch.empty(0, dtype=torch.int32)
        self.array: NDArray[np.int32] = self.tensor.numpy()

    def make_room(self, num_ints: int) -> None:
        """Waits for the copy before: it was made many steps ago."""
        if self._copied is not None:
            self._copied.synchronize()
        if self.tensor.numel() < num_ints:
            self.tensor = torch.empty(2 * num_ints, dtype=torch.int32, pin_memory=True)
            self.array = self.tensor.numpy()

    def send(self, target: Tensor) -> None:
        target.copy_(self.tensor[: target.numel()], non_blocking=True)
        self.sent()

    def sent(self) -> None:
        """A copy from here was queued on the current stream."""
        if self._copied is None:
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._copied.record()
