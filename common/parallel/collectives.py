"""What ranks compute together: sums of partial products, and rows put side by side.

All ranks make the same calls in the same order, on equal shapes. On a GPU a call is queued on the current stream, like
a kernel, and can be recorded in a CUDA graph; on the CPU it ends before it returns, or raises once its time is over.
The result of a sum is the same to the bit on every rank.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._C._distributed_c10d import ProcessGroupGloo, Store

from common.parallel.nccl import NcclCollectives
from common.parallel.oneshot import OneShot, make_one_shot
from common.parallel.store import Rendezvous


class Collectives(Protocol):
    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over ranks, in place; `x` is contiguous, and returned."""

    def all_gather(self, x: Tensor) -> Tensor:
        """[ranks, *x.shape]: every rank's `x`, in their order."""

    def abort(self) -> None:
        """End what is under way, from another thread: a rank is lost. Nothing can be computed after it."""

    def close(self) -> None: ...


class GlooCollectives:
    """On the CPU, between processes or threads of one machine."""

    def __init__(self, store: Store, rank: int, size: int, timeout_s: float) -> None:
        gloo: Any = ProcessGroupGloo  # its stub is bare
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname="127.0.0.1")]
        options._timeout = timedelta(seconds=timeout_s)
        options._threads = 1
        self._size = size
        self._group: Any = gloo(store, rank, size, options)

    def all_reduce(self, x: Tensor) -> Tensor:
        self._open().allreduce([x]).wait()
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        out = x.new_empty(self._size, *x.shape)
        self._open().allgather([list(out.unbind())], [x]).wait()
        return out

    def abort(self) -> None:
        """Its waits end by themselves."""

    def close(self) -> None:
        self._group = None

    def _open(self) -> Any:
        if self._group is None:
            raise RuntimeError("the group of ranks is closed")
        return self._group


class GpuCollectives:
    """NCCL, and for sums of few rows the kernel that needs no more than one launch."""

    def __init__(self, nccl: NcclCollectives, small: OneShot | None) -> None:
        self._nccl = nccl
        self._small = small

    def all_reduce(self, x: Tensor) -> Tensor:
        if self._small is not None and self._small.takes(x):
            assert x.is_contiguous(), "a sum over ranks takes contiguous tensors"
            return self._small.all_reduce(x)
        return self._nccl.all_reduce(x)

    def all_gather(self, x: Tensor) -> Tensor:
        return self._nccl.all_gather(x)

    def abort(self) -> None:
        if self._small is not None:  # first: NCCL may wait for what is queued before its own
            self._small.abort()
        self._nccl.abort()

    def close(self) -> None:
        self._nccl.close()


def make_collectives(
    device: torch.device, meeting: Rendezvous, rank: int, size: int, timeout_s: float, *, one_shot: bool = True
) -> Collectives:
    """Those of the device; returns when all ranks are there. `one_shot`: sums of few rows, on a GPU, in one kernel."""
    store = meeting.prefixed("collectives")
    if device.type == "cuda":
        nccl = NcclCollectives(store, rank, size, device)
        return GpuCollectives(nccl, make_one_shot(meeting, rank, size, device) if one_shot else None)
    return GlooCollectives(store, rank, size, timeout_s)
