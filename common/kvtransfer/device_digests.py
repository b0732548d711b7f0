"""Digests and copies of many small pieces, launched on a GPU: tables from the transfer layer's words to the kernels'.

Nothing waits but `DigestBatch.values`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.kernels import gpu
from common.kernels.native import DigestGeometry
from common.kvtransfer.checks import Checks
from common.kvtransfer.transport import DigestCheck
from common.kvtransfer.ucx import UcxTransport

_WORD = 8


@dataclass
class DigestBatch:
    """Digests under way, or what they differ by from what is expected. `result_N`: pinned, int64."""

    result_N: Tensor
    event: torch.cuda.Event | None
    _values: list[int] = field(default_factory=list)

    def values(self) -> list[int]:
        """Waits."""
        if not self._values:
            if self.event is not None:
                self.event.synchronize()
            self._values = [value % 2**64 for value in self.result_N.tolist()]
        return self._values


@dataclass(frozen=True)
class PreparedChecks:
    """Checks on the device: by shape a table of segments (see `add_digests`), its tokens at most, are places even?

    `sums_N` begins at what makes a right digest zero. It is added to, so that these are compared once.
    """

    tables: Sequence[tuple[DigestGeometry, Tensor, int, bool]]
    sums_N: Tensor


class DeviceDigests:
    """Launches digests of memory of `device`. `stream`: None for the caller's current one. What `launch` is given lies
    behind what the caller's stream has been given, and beside what it is given later.
    """

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None = None) -> None:
        self._device = device
        self._stream = stream
        self._anchor = torch.zeros(2, dtype=torch.int64, device=device)

    @torch.inference_mode()
    def launch(self, checks: Sequence[DigestCheck]) -> DigestBatch:
        """Digests of `checks`, in their order; `expected` is not looked at."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with _on(self._stream):
            return self._digest(self._on_device(checks, from_zero=True))

    @torch.inference_mode()
    def prepare(self, checks: Sequence[DigestCheck]) -> PreparedChecks:
        with _on(self._stream):
            return self._on_device(checks, from_zero=False)

    @torch.inference_mode()
    def compare(self, prepared: PreparedChecks) -> DigestBatch:
        """0 for each check whose digest is what is expected."""
        with _on(self._stream):
            return self._digest(prepared)

    def _digest(self, prepared: PreparedChecks) -> DigestBatch:
        for geometry, table_N4, max_tokens, aligned in prepared.tables:
            gpu.digest.add_digests(prepared.sums_N, self._anchor, table_N4, geometry, max_tokens, aligned)
        return _fetch(prepared.sums_N)

    def _on_device(self, checks: Sequence[DigestCheck], *, from_zero: bool) -> PreparedChecks:
        """One copy brings all: a reader waits for it, and the interpreter is another thread's as well."""
        columns, places_N = Checks.of(checks)
        count, first = len(places_N), 0
        sums_N = np.zeros(count + count % 2, np.uint64)  # tables begin at 16 bytes: for that kernels are compiled
        placed = []
        for table in columns.tables:
            places_C = places_N[first : first + len(table.expected_C)]
            first += len(places_C)
            if not from_zero:
                sums_N[places_C] = -table.expected_C  # modulo 2^64
            placed.append(self._placed(table.segments_N4, places_C))
        parts = [sums_N.view(np.int64), *(table_N4.reshape(-1) for table_N4, _ in placed)]
        sums, *there = _to_device(np.concatenate(parts), self._device).split_with_sizes([p.size for p in parts])
        tables = []
        for table, (table_N4, aligned), there_W in zip(columns.tables, placed, there, strict=True):
            *geometry, max_tokens = table.shape  # what is compiled depends on these alone
            most = max_tokens or int(table_N4[:, 2].max())
            tables.append((DigestGeometry(*geometry), there_W.view(-1, 4), most, aligned))
        return PreparedChecks(tables, sums[:count])

    def _placed(self, segments_N4: NDArray[np.int64], places_C: NDArray[np.int64]) -> tuple[NDArray[np.int64], bool]:
        """Segments with places in words from the anchor; are they even?"""
        table_N4 = segments_N4.copy()
        table_N4[:, 3] = places_C[table_N4[:, 3]]
        places = table_N4[:, 0] - self._anchor.data_ptr()
        assert not (places % _WORD).any(), "digests count whole words"
        table_N4[:, 0] = places // _WORD
        return table_N4, not (places % (2 * _WORD)).any()


def _on(stream: torch.cuda.Stream | None) -> AbstractContextManager[object]:
    return torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext()


def _fetch(result: Tensor) -> DigestBatch:
    """On its way to the host."""
    if not result.is_cuda:
        return DigestBatch(result, None)
    pinned = torch.empty(result.shape, dtype=result.dtype, pin_memory=True)
    pinned.copy_(result, non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return DigestBatch(pinned, event)


def _to_device(x: NDArray[np.int64], device: torch.device) -> Tensor:
    """A copy that nobody waits for: torch keeps the pinned memory until it is made."""
    tensor = torch.from_numpy(x)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class DeviceGather:
    """Over a `UcxTransport`, on the stream of the comparisons. Its kernels are there once it is made."""

    def __init__(self, transport: UcxTransport, device: torch.device, stream: torch.cuda.Stream | None) -> None:
        self.hold = transport.hold
        self.release = transport.release
        self._device = device
        self._stream = stream
        self._anchor = torch.zeros(2, dtype=torch.int64, device=device)
        with _on(stream):
            nothing = torch.zeros(1, 3, dtype=torch.int64, device=device)
            for aligned in (True, False):
                gpu.gather.gather(self._anchor, nothing, aligned)

    @torch.inference_mode()
    def gather(self, pieces_N3: NDArray[np.int64]) -> DigestBatch:
        table_N3 = pieces_N3 - np.array([self._anchor.data_ptr()] * 2 + [0])
        assert not (table_N3 % _WORD).any(), "rows are whole words"
        with _on(self._stream):
            items = _to_device(gpu.gather.cut(table_N3 // _WORD), self._device)
            gpu.gather.gather(self._anchor, items, not (table_N3 % (2 * _WORD)).any())
            return _fetch(items[:0, 0])
