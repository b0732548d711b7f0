"""Digests where the memory is a GPU's: computed there, beside everything else, and only small results reach the host.

    owner   step launched --launch--> digests of what it completes, right behind it on its stream -> publish takes them
    reader  read asked for -> bytes on their way, --prepare--> tables on the GPU meanwhile; read ended by UCX --compare,
            on a stream of its own--> what it differs by -> ReadResult

Pieces that are large enough are UCX's business. Many small ones (another tensor-parallel degree or block size) are one
launch of copies where the peer's memory is mapped, straight from where they lie to where they belong: the link is kept
full, and nothing has to be staged on either side.

The engine's thread waits for none of this but, on the owner's side, for a step that has not ended yet. A reader's
comparisons are prepared, launched and waited for by a thread, so that a read does not have to wait for the engine to
look.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from common.errors import InternalError
from common.kvtransfer.device_digests import DeviceDigests, DeviceGather
from common.kvtransfer.transport import DigestCheck, Endpoint, PeerDown, ReadPiece, ReadResult, ReadStatus, Transport
from common.kvtransfer.ucx import UcxTransport
from common.telemetry import get_logger

log = get_logger(__name__)

MANY_PIECES = 64
SMALL_NBYTES = 1 << 20  # a copy engine takes microseconds for any piece; a link between GPUs moves 0.4 MB in one


class Comparer(Protocol):
    def prepare(self, checks: Sequence[DigestCheck], /) -> Any:
        """What `compare` needs of checks, made beforehand."""

    def compare(self, prepared: Any, /) -> Comparison:
        """Begin to compare the digests of memory as it is now with what is expected."""


class Comparison(Protocol):
    def values(self) -> list[int]:
        """For each check, 0 if its digest is what was expected. Waits."""


class Gatherer(Protocol):
    """Reads mapped memory of peers with kernels."""

    def hold(self, peer_id: int, pieces: Sequence[ReadPiece], /) -> NDArray[np.int64] | None:
        """int64 [pieces, 3]: address in our address space, until `release`, local address, bytes. None: not there."""

    def release(self, peer_id: int, /) -> None:
        """Undo one `hold`."""

    def gather(self, pieces_N3: NDArray[np.int64], /) -> Comparison:
        """Begin to copy, before whatever is compared next. `values`, empty, waits for the end."""


@dataclass(frozen=True)
class _Gathering:
    """A read that a kernel makes, of a peer that is held."""

    peer_id: int
    read_id: int
    pieces_N3: NDArray[np.int64]
    asked: float


@dataclass
class _Checks:
    """Of one read. `prepared`: the thread's, once it is not None."""

    checks: Sequence[DigestCheck]
    prepared: Any = None

    def prepare(self, digests: Comparer) -> Any:
        if self.prepared is None:
            self.prepared = digests.prepare(self.checks)
        return self.prepared


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
        self._checks: dict[int, _Checks] = {}  # by read
        self._unprepared: deque[_Checks] = deque()
        self._ended: list[ReadResult | PeerDown] = []
        self._lock = threading.Lock()
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._stop_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._begin = begin
        self._broken: Exception | None = None  # what ended the thread
        self._closed = False
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
            self._checks[read_id] = _Checks(checks)
        if self._gatherer is not None and _are_small(pieces):
            pieces_N3 = self._gatherer.hold(peer_id, pieces)
            if pieces_N3 is not None:
                self._asked.append(_Gathering(peer_id, read_id, pieces_N3, time.perf_counter()))
                os.eventfd_write(self._asked_fd, 1)
                return
        try:
            asked = self._checks.get(read_id)  # the thread takes it when the read has ended, which may be at once
            self._inner.read(peer_id, read_id, pieces, ())
        except BaseException:
            self._checks.pop(read_id, None)
            raise
        if asked is not None:
            self._unprepared.append(asked)
            os.eventfd_write(self._asked_fd, 1)

    def poll(self) -> list[ReadResult | PeerDown]:
        if self._broken is not None:  # no read would end any more, and their blocks never be free
            raise InternalError(f"the thread that compares digests has ended: {self._broken}")
        with self._lock:
            ended, self._ended = self._ended, []
            if ended:
                os.eventfd_read(self._fd)
        return ended

    def describe(self, peer_id: int) -> str:
        return self._inner.describe(peer_id)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        os.eventfd_write(self._stop_fd, 1)
        self._thread.join()
        self._inner.close()
        for fd in (self._fd, self._stop_fd, self._asked_fd):
            os.close(fd)

    # -- the thread --

    def _run(self) -> None:
        try:
            self._begin()
            self._serve()
        except Exception as error:
            log.exception("the thread that compares digests has ended")
            self._broken = error
            os.eventfd_write(self._fd, 1)

    def _serve(self) -> None:
        poll = select.poll()
        for fd in (self._inner.wakeup_fd, self._stop_fd, self._asked_fd):
            poll.register(fd, select.POLLIN)
        stopped = False
        while not stopped:
            ready = {fd for fd, _ in poll.poll(0 if self._asked or self._unprepared else None)}
            stopped = self._stop_fd in ready
            if self._asked_fd in ready:
                os.eventfd_read(self._asked_fd)
            for event in self._inner.poll():  # a small read does not wait for the preparation of a large one behind it
                self._report(self._verified(event))
            if self._unprepared:
                self._prepare(self._unprepared.popleft())
            if self._asked and not stopped:
                self._report(self._gather(self._asked.popleft()))
        for asked in self._asked:  # nobody waits for it any more
            assert self._gatherer is not None
            self._gatherer.release(asked.peer_id)

    def _prepare(self, asked: _Checks) -> None:
        """What will be compared, while its bytes are on their way."""
        try:
            asked.prepare(self._digests)
        except Exception:  # tried again, and told, when the read has ended
            log.exception("digests could not be prepared")

    def _gather(self, asked: _Gathering) -> ReadResult:
        assert self._gatherer is not None
        checks = self._checks.pop(asked.read_id, None)
        began, nbytes = time.perf_counter(), int(asked.pieces_N3[:, 2].sum())
        try:
            copies = self._gatherer.gather(asked.pieces_N3)
            try:
                outcome: _Outcome = copies, 0
                if checks is not None:
                    outcome = self._digests.compare(checks.prepare(self._digests)), len(checks.checks)
            finally:
                copies.values()  # they write, whatever becomes of the comparison
        except Exception as error:  # noqa: BLE001 - edge of the thread: fails that read
            outcome = error
        ended = time.perf_counter()
        result = ReadResult(asked.read_id, ReadStatus.OK, nbytes, ended - asked.asked, ended - began)
        result = _verdict(result, outcome, ended)
        self._gatherer.release(asked.peer_id)
        return result

    def _verified(self, event: ReadResult | PeerDown) -> ReadResult | PeerDown:
        """What the transport says, and of bytes that it has read, whether they are right. Waits for that."""
        if not isinstance(event, ReadResult):
            return event
        checks = self._checks.pop(event.read_id, None)
        if event.status is not ReadStatus.OK or checks is None:
            return event
        began = time.perf_counter()
        try:
            outcome: _Outcome = self._digests.compare(checks.prepare(self._digests)), len(checks.checks)
        except Exception as error:  # noqa: BLE001 - edge of the thread: fails that read
            outcome = error
        return _verdict(event, outcome, began)

    def _report(self, event: ReadResult | PeerDown) -> None:
        with self._lock:
            self._ended.append(event)
            if len(self._ended) == 1:
                os.eventfd_write(self._fd, 1)


_Outcome = tuple[Comparison, int] | Exception


def _verdict(event: ReadResult, outcome: _Outcome, began: float) -> ReadResult:
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
