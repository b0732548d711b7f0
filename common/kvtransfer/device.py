"""Digests where the memory is a GPU's: computed there, beside everything else, and only small results reach the host.

    owner   step launched --launch--> digests of what it completes, right behind it on its stream -> publish takes them
    reader  read asked for --prepare--> tables on the GPU; read ended by UCX --compare, on a stream of its own-->
            one flag a check -> ReadResult

Pieces that are large enough are UCX's business. Many small ones (another tensor-parallel degree or block size) are one
launch of copies where the peer's memory is mapped, straight from where they lie to where they belong: the link is kept
full, and nothing has to be staged on either side.

The engine's thread waits for none of this but, on the owner's side, for a step that has not ended yet. A reader's
comparisons are launched and waited for by a thread, so that a read does not have to wait for the engine to look.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.kernels import gpu
from common.kernels.native import DigestGeometry
from common.kvtransfer.transport import DigestCheck, Endpoint, PeerDown, ReadPiece, ReadResult, ReadStatus, Transport
from common.kvtransfer.ucx import UcxTransport
from common.telemetry import get_logger

log = get_logger(__name__)

MANY_PIECES = 64
SMALL_NBYTES = 1 << 20  # a copy engine takes 2 us for any piece, in which a link between two GPUs moves 0.8 MB
_WORD = 8


@dataclass
class DigestBatch:
    """Digests under way. `result_N`: pinned, int64 sums, or bool: does the digest differ from what is expected?"""

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
    """Checks on the device: by shape a table of segments (see `add_digests`), its tokens at most, are places even?"""

    tables: Sequence[tuple[DigestGeometry, Tensor, int, bool]]
    expected_N: Tensor


class Comparer(Protocol):
    def prepare(self, checks: Sequence[DigestCheck], /) -> Any:
        """What `compare` needs of checks, made beforehand."""

    def compare(self, prepared: Any, /) -> Comparison:
        """Begin to compare the digests of memory as it is now with what is expected."""


class Comparison(Protocol):
    def values(self) -> list[int]:
        """For each check, 1 if its digest is not what was expected. Waits."""


class DeviceDigests:
    """Launches digests of memory of `device`. `stream`: None for the caller's current one."""

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None = None) -> None:
        self._device = device
        self._stream = stream
        self._anchor = torch.zeros(2, dtype=torch.int64, device=device)

    @torch.inference_mode()
    def launch(self, checks: Sequence[DigestCheck]) -> DigestBatch:
        """Digests of `checks`, in their order; `expected` is not looked at."""
        with _on(self._stream):
            return _fetch(self._sums(self.prepare(checks)))

    @torch.inference_mode()
    def prepare(self, checks: Sequence[DigestCheck]) -> PreparedChecks:
        with _on(self._stream):
            tables = [self._table(shape, checks, found) for shape, found in _by_shape(checks).items()]
            expected = np.array([c.expected for c in checks], np.uint64).view(np.int64)
            return PreparedChecks(tables, _to_device(expected, self._device))

    @torch.inference_mode()
    def compare(self, prepared: PreparedChecks) -> DigestBatch:
        with _on(self._stream):
            return _fetch(self._sums(prepared) != prepared.expected_N)

    def _sums(self, prepared: PreparedChecks) -> Tensor:
        sums = torch.zeros_like(prepared.expected_N)
        for geometry, table_N4, max_tokens, aligned in prepared.tables:
            gpu.digest.add_digests(sums, self._anchor, table_N4, geometry, max_tokens, aligned)
        return sums

    def _table(
        self, shape: tuple[int, ...], checks: Sequence[DigestCheck], numbers: Sequence[int]
    ) -> tuple[DigestGeometry, Tensor, int, bool]:
        rows = [(*segment, i) for i in numbers for segment in checks[i].segments]
        table_N4 = np.array(rows, np.int64)
        places = table_N4[:, 0] - self._anchor.data_ptr()
        assert not (places % _WORD).any(), "digests count whole words"
        table_N4[:, 0] = places // _WORD
        *geometry, max_tokens = shape  # what is compiled depends on these alone
        aligned = not (places % (2 * _WORD)).any()
        table = _to_device(table_N4, self._device)
        return DigestGeometry(*geometry), table, max_tokens or int(table_N4[:, 2].max()), aligned


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


def _by_shape(checks: Sequence[DigestCheck]) -> dict[tuple[int, ...], list[int]]:
    """Numbers of the checks of each geometry and most tokens: those are one launch."""
    found: dict[tuple[int, ...], list[int]] = {}
    for i, c in enumerate(checks):
        strides = (c.layer_stride, c.part_stride, c.token_stride)
        found.setdefault((c.num_layers, c.num_parts, *strides, c.token_nbytes, c.max_tokens), []).append(i)
    return found


def _to_device(x: NDArray[np.int64], device: torch.device) -> Tensor:
    """A copy that nobody waits for: torch keeps the pinned memory until it is made."""
    tensor = torch.from_numpy(x)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class Gatherer(Protocol):
    """Reads mapped memory of peers with kernels."""

    def hold(self, peer_id: int, pieces: Sequence[ReadPiece], /) -> Sequence[int] | None:
        """Where the pieces lie in our address space, until `release`; None if they do not."""

    def release(self, peer_id: int, /) -> None:
        """Undo one `hold`."""

    def gather(self, sources: Sequence[int], pieces: Sequence[ReadPiece], /) -> Comparison:
        """Begin to copy, before whatever is compared next. `values`, empty, waits for the end."""


class DeviceGather:
    """Over a `UcxTransport`, on the stream of the comparisons."""

    def __init__(self, transport: UcxTransport, device: torch.device, stream: torch.cuda.Stream | None) -> None:
        self.hold = transport.hold
        self.release = transport.release
        self._device = device
        self._stream = stream
        self._anchor = torch.zeros(2, dtype=torch.int64, device=device)

    @torch.inference_mode()
    def gather(self, sources: Sequence[int], pieces: Sequence[ReadPiece]) -> DigestBatch:
        base = self._anchor.data_ptr()
        table = np.array([(s - base, p.local_address - base, p.nbytes) for s, p in zip(sources, pieces, strict=True)])
        assert not (table % _WORD).any(), "rows are whole words"
        with _on(self._stream):
            items = _to_device(gpu.gather.cut(table // _WORD), self._device)
            gpu.gather.gather(self._anchor, items, not (table % (2 * _WORD)).any())
            return _fetch(items[:0, 0])


@dataclass(frozen=True)
class _Gathering:
    """A read that a kernel makes, of a peer that is held."""

    peer_id: int
    read_id: int
    sources: Sequence[int]
    pieces: Sequence[ReadPiece]
    asked: float


def _are_small(pieces: Sequence[ReadPiece]) -> bool:
    return len(pieces) >= MANY_PIECES and sum(p.nbytes for p in pieces) < SMALL_NBYTES * len(pieces)


class DeviceTransport:
    """A transport of a GPU's memory over one that moves bytes only: reads end once their digests are compared.

    `begin` is called once by the thread that compares, and copies with `gatherer` where there are many small pieces.
    """

    def __init__(
        self,
        inner: Transport,
        digests: Comparer,
        gatherer: Gatherer | None = None,
        begin: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = inner.name
        self._inner = inner
        self._digests = digests
        self._gatherer = gatherer
        self._asked: deque[_Gathering] = deque()
        self._asked_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._checks: dict[int, tuple[Any, int]] = {}  # by read: what was prepared, and how many
        self._ended: list[ReadResult | PeerDown] = []
        self._lock = threading.Lock()
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._stop_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._begin = begin
        self._thread = threading.Thread(target=self._run, name="nd-compare", daemon=True)
        self._thread.start()

    @property
    def wakeup_fd(self) -> int:
        return self._fd

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
        if checks:
            self._checks[read_id] = self._digests.prepare(checks), len(checks)
        if self._gatherer is not None and _are_small(pieces):
            sources = self._gatherer.hold(peer_id, pieces)
            if sources is not None:
                self._asked.append(_Gathering(peer_id, read_id, sources, pieces, time.perf_counter()))
                os.eventfd_write(self._asked_fd, 1)
                return
        try:
            self._inner.read(peer_id, read_id, pieces, ())
        except BaseException:
            self._checks.pop(read_id, None)
            raise

    def poll(self) -> list[ReadResult | PeerDown]:
        with self._lock:
            ended, self._ended = self._ended, []
            if ended:
                os.eventfd_read(self._fd)
        return ended

    def describe(self, peer_id: int) -> str:
        return self._inner.describe(peer_id)

    def close(self) -> None:
        if not self._thread.is_alive():
            return
        os.eventfd_write(self._stop_fd, 1)
        self._thread.join()
        self._inner.close()
        for fd in (self._fd, self._stop_fd, self._asked_fd):
            os.close(fd)

    # -- the thread --

    def _run(self) -> None:
        self._begin()
        poll = select.poll()
        for fd in (self._inner.wakeup_fd, self._stop_fd, self._asked_fd):
            poll.register(fd, select.POLLIN)
        stopped = False
        while not stopped:
            ready = {fd for fd, _ in poll.poll()}
            stopped = self._stop_fd in ready
            if self._asked_fd in ready:
                os.eventfd_read(self._asked_fd)
            while self._asked:
                self._report(self._gather(self._asked.popleft()))
            began = time.perf_counter()
            launched = [(event, self._launch(event)) for event in self._inner.poll()]
            for event, outcome in launched:
                self._report(event if outcome is None else _verdict(event, outcome, began))

    def _gather(self, asked: _Gathering) -> ReadResult:
        assert self._gatherer is not None
        prepared, count = self._checks.pop(asked.read_id, (None, 0))
        began, nbytes = time.perf_counter(), sum(p.nbytes for p in asked.pieces)
        try:
            copies = self._gatherer.gather(asked.sources, asked.pieces)
            outcome: _Outcome = (self._digests.compare(prepared) if count else copies), count
            copies.values()
        except Exception as error:  # noqa: BLE001 - edge of the thread: fails that read
            outcome = error
        ended = time.perf_counter()
        result = ReadResult(asked.read_id, ReadStatus.OK, nbytes, ended - asked.asked, ended - began)
        result = _verdict(result, outcome, ended)
        self._gatherer.release(asked.peer_id)
        return result

    def _launch(self, event: ReadResult | PeerDown) -> _Outcome | None:
        if not isinstance(event, ReadResult):
            return None
        prepared, count = self._checks.pop(event.read_id, (None, 0))
        if event.status is not ReadStatus.OK or not count:
            return None
        try:
            return self._digests.compare(prepared), count
        except Exception as error:  # noqa: BLE001 - edge of the thread: fails that read
            return error

    def _report(self, event: ReadResult | PeerDown) -> None:
        with self._lock:
            self._ended.append(event)
            if len(self._ended) == 1:
                os.eventfd_write(self._fd, 1)


_Outcome = tuple[Comparison, int] | Exception


def _verdict(event: ReadResult | PeerDown, outcome: _Outcome, began: float) -> ReadResult:
    assert isinstance(event, ReadResult)
    try:
        if isinstance(outcome, Exception):
            raise outcome
        comparison, count = outcome
        wrong = [i for i, differs in enumerate(comparison.values()) if differs]
    except Exception as error:
        log.exception("digests of a read could not be compared")
        message = f"its digests could not be compared: {type(error).__name__}"
        return msgspec.structs.replace(event, status=ReadStatus.FAILED, message=message)
    result = msgspec.structs.replace(event, seconds=event.seconds + time.perf_counter() - began)
    if not wrong:
        return result
    message = f"digest {wrong[0]} of {count} does not match the bytes read"
    return msgspec.structs.replace(result, status=ReadStatus.MISMATCH, message=message)


def over_ucx(transport: UcxTransport, device: torch.device) -> DeviceTransport:
    """`transport` moves memory of `device`, a GPU."""
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    digests, gatherer = DeviceDigests(device, stream), DeviceGather(transport, device, stream)
    return DeviceTransport(transport, digests, gatherer, lambda: torch.cuda.set_device(device))
