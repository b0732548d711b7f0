"""Brings results of a step to the host while the device goes on.

start (copies are queued behind the step, an event behind them) -> get: waits for that event, and for nothing later
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Fetched:
    """Tensors on their way to the host."""

    def __init__(self, tensors: Sequence[Tensor], copied: torch.cuda.Event | None) -> None:
        self._tensors = tensors
        self._copied = copied

    @classmethod
    def start(cls, tensors: Sequence[Tensor]) -> Fetched:
        """`tensors` may change behind what is queued now. On the CPU they are there already."""
        if not tensors or not tensors[0].is_cuda:
            return cls(tensors, None)
        host = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors]
        for target, tensor in zip(host, tensors, strict=True):
            target.copy_(tensor, non_blocking=True)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record()
        return cls(host, copied)

    @property
    def ready(self) -> bool:
        """Does `get` not wait?"""
        return self._copied is None or bool(self._copied.query())  # type: ignore[no-untyped-call]

    def get(self) -> Sequence[Tensor]:
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None
        return self._tensors
