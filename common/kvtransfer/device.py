"""Digests where the memory is a GPU's: computed there, beside everything else, and only small results reach the host.

    owner   step launched --launch--> digests of what it completes, right behind it on its stream -> publish takes them
    reader  read ended by UCX --launch on a stream of its own--> compared on the GPU -> one flag a check -> ReadResult

Nothing here waits but `DigestBatch.values`, and that only where the step before it has not ended yet. The transport's
descriptor wakes the engine when a comparison is done.
"""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.kernels import gpu
from common.kernels.native import DigestGeometry
from common.kvtransfer.transport import DigestCheck, Endpoint, PeerDown, ReadPiece, ReadResult, ReadStatus, Transport
from common.kvtransfer.ucx import UcxTransport

_WORD = 8


@dataclass
class DigestBatch:
    """Digests under way. `result_N`: pinned, int64 sums, or bool: does the digest differ from what is expected?"""

    result_N: Tensor
    event: torch.cuda.Event | None
    _values: list[int] = field(default_factory=list)

    def is_done(self) -> bool:
        return self.event is None or bool(self.event.query())  # type: ignore[no-untyped-call]

    def values(self) -> list[int]:
        """Waits."""
        if not self._values:
            if self.event is not None:
                self.event.synchronize()
            self._values = [value % 2**64 for value in self.result_N.tolist()]
        return self._values


class Comparison(Protocol):
    def is_done(self) -> bool:
        """Without waiting."""

    def values(self) -> list[int]:
        """For each check, 1 if its digest is not what was expected."""


class Comparer(Protocol):
    def compare(self, checks: Sequence[DigestCheck], /) -> Comparison:
        """Begin to compare digests with what is expected."""


class DeviceDigests:
    """Launches digests of memory of `device`. `stream`: None for the caller's current one."""

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None = None) -> None:
        self._device = device
        self._stream = stream
        self._anchor = torch.zeros(2, dtype=torch.int64, device=device)

    def launch(self, checks: Sequence[DigestCheck]) -> DigestBatch:
        """Digests of `checks`, in their order; `expected` is not looked at."""
        return self._launch(checks, compare=False)

    def compare(self, checks: Sequence[DigestCheck]) -> DigestBatch:
        """Do they differ from what is expected?"""
        return self._launch(checks, compare=True)

    @torch.inference_mode()
    def _launch(self, checks: Sequence[DigestCheck], *, compare: bool) -> DigestBatch:
        stream = self._stream
        with torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext():
            result = torch.zeros(len(checks), dtype=torch.int64, device=self._device)
            for geometry, numbers in _by_geometry(checks).items():
                self._add(result, geometry, _table(checks, numbers))
            if compare:
                expected = np.array([c.expected for c in checks], np.uint64).view(np.int64)
                result = result != _to_device(expected, self._device)
            if self._device.type != "cuda":
                return DigestBatch(result, None)
            pinned = torch.empty(result.shape, dtype=result.dtype, pin_memory=True)
            pinned.copy_(result, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        return DigestBatch(pinned, event)

    def _add(self, sums: Tensor, geometry: DigestGeometry, table_N4: NDArray[np.int64]) -> None:
        places = table_N4[:, 0] - self._anchor.data_ptr()
        assert not (places % _WORD).any(), "digests count whole words"
        table_N4[:, 0] = places // _WORD
        table = _to_device(table_N4, self._device)
        aligned = not (places % (2 * _WORD)).any()
        gpu.digest.add_digests(sums, self._anchor, table, geometry, int(table_N4[:, 2].max()), aligned)


def _by_geometry(checks: Sequence[DigestCheck]) -> dict[DigestGeometry, list[int]]:
    """Numbers of the checks of each shape: those are one launch."""
    found: dict[tuple[int, ...], list[int]] = {}
    for i, c in enumerate(checks):
        shape = (c.num_layers, c.num_parts, c.layer_stride, c.part_stride, c.token_stride, c.token_nbytes)
        found.setdefault(shape, []).append(i)
    return {DigestGeometry(*shape): numbers for shape, numbers in found.items()}


def _table(checks: Sequence[DigestCheck], numbers: Sequence[int]) -> NDArray[np.int64]:
    """int64 [segments, 4]: address, first position, tokens, number of the check."""
    return np.array([(*segment, i) for i in numbers for segment in checks[i].segments], np.int64)


def _to_device(x: NDArray[np.int64], device: torch.device) -> Tensor:
    """A copy that nobody waits for: torch keeps the pinned memory until it is made."""
    tensor = torch.from_numpy(x)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


@dataclass
class _Verifying:
    result: ReadResult
    batch: Comparison
    num_checks: int
    began: float


class DeviceTransport:
    """A transport of a GPU's memory over one that moves bytes only: reads end once their digests are compared.

    `wake` makes the descriptor readable after what was launched so far.
    """

    def __init__(self, inner: Transport, digests: Comparer, wake: Callable[[], None]) -> None:
        self.name = inner.name
        self._inner = inner
        self._digests = digests
        self._wake = wake
        self._checks: dict[int, Sequence[DigestCheck]] = {}
        self._verifying: deque[_Verifying] = deque()

    @property
    def wakeup_fd(self) -> int:
        return self._inner.wakeup_fd

    def allocate(self, group: str, nbytes: int) -> int:
        return self._inner.allocate(group, nbytes)

    def register(self, group: str, address: int, nbytes: int, guard: int, guard_nbytes: int) -> None:
        self._inner.register(group, address, nbytes, guard, guard_nbytes)

    def endpoint(self) -> Endpoint:
        return self._inner.endpoint()

    def connect(self, endpoint: Endpoint) -> int:
        return self._inner.connect(endpoint)

    def disconnect(self, peer_id: int) -> None:
        self._inner.disconnect(peer_id)

    def read(self, peer_id: int, read_id: int, pieces: Sequence[ReadPiece], checks: Sequence[DigestCheck]) -> None:
        self._inner.read(peer_id, read_id, pieces, ())
        if checks:
            self._checks[read_id] = checks

    def poll(self) -> list[ReadResult | PeerDown]:
        ended: list[ReadResult | PeerDown] = []
        for event in self._inner.poll():
            checks = self._checks.pop(event.read_id, ()) if isinstance(event, ReadResult) else ()
            if isinstance(event, ReadResult) and event.status is ReadStatus.OK and checks:
                began = time.perf_counter()
                self._verifying.append(_Verifying(event, self._digests.compare(checks), len(checks), began))
                self._wake()
            else:
                ended.append(event)
        while self._verifying and self._verifying[0].batch.is_done():
            ended.append(_verdict(self._verifying.popleft()))
        return ended

    def describe(self, peer_id: int) -> str:
        return self._inner.describe(peer_id)

    def close(self) -> None:
        for verifying in self._verifying:
            verifying.batch.values()
        self._verifying.clear()
        self._inner.close()


def _verdict(verifying: _Verifying) -> ReadResult:
    result = msgspec.structs.replace(
        verifying.result, seconds=verifying.result.seconds + time.perf_counter() - verifying.began
    )
    wrong = [i for i, differs in enumerate(verifying.batch.values()) if differs]
    if not wrong:
        return result
    message = f"digest {wrong[0]} of {verifying.num_checks} does not match the bytes read"
    return msgspec.structs.replace(result, status=ReadStatus.MISMATCH, message=message)


def over_ucx(transport: UcxTransport, device: torch.device) -> DeviceTransport:
    """`transport` moves memory of `device`, a GPU."""
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return DeviceTransport(
        transport, DeviceDigests(device, stream), lambda: transport.wake_after(ctypes.c_void_p(stream.cuda_stream))
    )
