"""A transport inside one process: tests and the simulator read "remote" memory by copying it.

    read -> queued --deliver--> pieces copied, digests checked -> ReadResult
                  `--disconnect--> FENCED        `--kill--> FAILED, PeerDown

A `MemoryNetwork` joins the transports of one process and decides when reads are delivered: at once, when
`step()` says so (`held`), or when their time on the clock has come (`latency_s`, `bytes_per_s`). `fault_for`
may bend any read, so that every failure of a real network can be made on purpose.
"""

from __future__ import annotations

import ctypes
import enum
import itertools
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from common.errors import PeerLostError
from common.kvcache.digest import digest_reference
from common.kvcache.layout import ALIGN
from common.kvtransfer.publish import Digester
from common.kvtransfer.transport import (
    DigestCheck,
    Endpoint,
    MemoryHandle,
    PeerDown,
    ReadPiece,
    ReadResult,
    ReadStatus,
)
from common.types import Clock


def numpy_digest(check: DigestCheck) -> int:
    """Digest of local memory at raw addresses. Rows that end in half a word are filled with zeros."""
    total = 0
    words = -(-check.token_nbytes // 8)
    for address, position, num_tokens in check.segments:
        span = (check.num_layers - 1) * check.layer_stride + (check.num_parts - 1) * check.part_stride
        span += (num_tokens - 1) * check.token_stride + check.token_nbytes
        raw = np.ctypeslib.as_array((ctypes.c_uint8 * span).from_address(address))
        rows = np.lib.stride_tricks.as_strided(
            raw,
            (check.num_layers, check.num_parts, num_tokens, check.token_nbytes),
            (check.layer_stride, check.part_stride, check.token_stride, 1),
        )
        padded = np.zeros((*rows.shape[:3], words * 8), dtype=np.uint8)
        padded[..., : check.token_nbytes] = rows
        total += digest_reference(padded.view("<u8"), position)
    return total % 2**64


class Fault(enum.Enum):
    """What the network does to one read."""

    NONE = "none"
    FAIL = "fail"  # ends as FAILED, half of its bytes written
    CORRUPT = "corrupt"  # one byte of the first piece arrives flipped
    SHORT = "short"  # completes although its last piece never arrives
    MISPLACE = "misplace"  # every piece is read `piece.nbytes` away from where it should be
    EARLY = "early"  # completes before its bytes are there; they land at the next delivery
    REPEAT = "repeat"  # completes rightly, and the same bytes land again at the next delivery
    STUCK = "stuck"  # never completes; its bytes would land when fencing were forgotten


@dataclass
class _Read:
    reader: MemoryTransport
    peer_id: int
    read_id: int
    pieces: Sequence[ReadPiece]
    checks: Sequence[DigestCheck]
    fault: Fault
    queued_at: float
    due: float


@dataclass
class MemoryNetwork:
    """The transports of one process by address, and the reads under way between them."""

    clock: Clock
    latency_s: float = 0.0
    bytes_per_s: float = math.inf
    held: bool = False
    slow_fences: bool = False  # reads of a destroyed endpoint end at the next delivery, not at once
    fault_for: Callable[[int, Sequence[ReadPiece]], Fault] = lambda read_id, pieces: Fault.NONE
    transports: dict[bytes, MemoryTransport] = field(default_factory=dict)
    delivered: int = 0
    slow_connects: bool = False  # what a peer is reached over is known at the next delivery, not at once
    _connecting: set[tuple[bytes, int]] = field(default_factory=set)
    _queue: list[_Read] = field(default_factory=list)
    _late: list[tuple[_Read, list[tuple[int, bytes]]]] = field(default_factory=list)
    _fenced: list[_Read] = field(default_factory=list)
    _names: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    @property
    def num_waiting(self) -> int:
        """Reads that have not been delivered, stuck ones included."""
        return len(self._queue)

    def next_due(self) -> float:
        """When `advance` will next deliver something, inf if nothing moves."""
        return min((r.due for r in self._queue if r.fault is not Fault.STUCK), default=math.inf)

    def step(self, index: int = 0) -> bool:
        """Deliver one waiting read, whatever its time; False if none can be. Late bytes land first."""
        self._land()
        ready = [r for r in self._queue if r.fault is not Fault.STUCK]
        if not ready:
            return False
        self._deliver(ready[index % len(ready)])
        return True

    def advance(self) -> int:
        """Deliver all reads whose time has come; returns their number."""
        self._land()
        now = self.clock.now()
        ready = [r for r in self._queue if r.due <= now and r.fault is not Fault.STUCK]
        for read in ready:
            self._deliver(read)
        return len(ready)

    def kill(self, transport: MemoryTransport) -> None:
        """The process behind `transport` dies: reads from it fail, then its peers see it go."""
        self.transports.pop(transport.address, None)
        for other in list(self.transports.values()):
            other.lose(transport.address)

    def _new_address(self) -> bytes:
        return b"memory:%d" % next(self._names)

    def _queue_read(self, read: _Read) -> None:
        self._queue.append(read)
        if not self.held:
            self.advance()

    def _drop(self, reader: MemoryTransport, peer_id: int) -> list[_Read]:
        gone = [r for r in self._queue if r.reader is reader and r.peer_id == peer_id]
        self._queue = [r for r in self._queue if not (r.reader is reader and r.peer_id == peer_id)]
        self._late = [x for x in self._late if not (x[0].reader is reader and x[0].peer_id == peer_id)]
        return gone

    def _fence(self, read: _Read) -> None:
        self._fenced.append(read)
        if not self.slow_fences:
            self._land()

    def _land(self) -> None:
        self._connecting.clear()
        fenced, self._fenced = self._fenced, []
        for read in fenced:
            read.reader.finish(read, ReadStatus.FENCED, "disconnected")
        late, self._late = self._late, []
        for _, writes in late:
            for address, data in writes:
                ctypes.memmove(address, data, len(data))

    def _deliver(self, read: _Read) -> None:
        self._queue.remove(read)
        self.delivered += 1
        source = self.transports.get(read.reader.address_of(read.peer_id))
        fault = read.fault
        writes = None if source is None else source.serve(read.pieces, fault)
        if writes is None:
            read.reader.finish(read, ReadStatus.FAILED, "peer refused the read")
            return
        if fault is Fault.EARLY:
            self._late.append((read, writes))
            writes = []
        elif fault is Fault.REPEAT:
            self._late.append((read, writes))
        elif fault is Fault.FAIL:
            writes = writes[: len(writes) // 2]
        elif fault is Fault.SHORT:
            writes = writes[:-1]
        for address, data in writes:
            ctypes.memmove(address, data, len(data))
        if fault is Fault.FAIL:
            read.reader.finish(read, ReadStatus.FAILED, "injected failure")
            return
        good = all(read.reader.digest(c) == c.expected for c in read.checks)
        read.reader.finish(read, ReadStatus.OK if good else ReadStatus.MISMATCH, "" if good else "digest mismatch")


class MemoryTransport:
    """One process's end of a `MemoryNetwork`. Implements `common.kvtransfer.transport.Transport`."""

    name = "memory"

    def __init__(self, network: MemoryNetwork, digest: Digester = numpy_digest) -> None:
        self.network = network
        self.digest = digest
        self.address = network._new_address()
        network.transports[self.address] = self
        self._memory: dict[str, tuple[np.ndarray[tuple[int], np.dtype[np.uint8]], MemoryHandle]] = {}
        self._peers: dict[int, bytes] = {}
        self._peer_ids = itertools.count(1)
        self._results: list[ReadResult | PeerDown] = []
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._closed = False

    @property
    def wakeup_fd(self) -> int:
        return self._fd

    def allocate(self, group: str, nbytes: int) -> int:
        if group in self._memory:
            raise ValueError(f"group {group} is allocated already")
        array = np.zeros(nbytes + ALIGN, dtype=np.uint8)
        base = -(-array.ctypes.data // ALIGN) * ALIGN
        self._memory[group] = (array, MemoryHandle(group, base, nbytes, self.address))
        return base

    def register(self, group: str, address: int, nbytes: int, guard: int, guard_nbytes: int) -> None:
        if group in self._memory:
            raise ValueError(f"group {group} is allocated already")
        array = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))
        self._memory[group] = (array, MemoryHandle(group, address, nbytes, self.address))

    def endpoint(self) -> Endpoint:
        return Endpoint(self.name, self.address, tuple(h for _, h in self._memory.values()), hint="copy")

    def connect(self, endpoint: Endpoint) -> int:
        if endpoint.transport != self.name:
            raise ValueError(f"endpoint of transport {endpoint.transport!r}, expected {self.name!r}")
        peer_id = next(self._peer_ids)
        self._peers[peer_id] = endpoint.address
        if endpoint.address not in self.network.transports:
            self._lose(peer_id)
        elif self.network.slow_connects:
            self.network._connecting.add((self.address, peer_id))
        return peer_id

    def disconnect(self, peer_id: int) -> None:
        if self._peers.pop(peer_id, None) is not None:
            for read in self.network._drop(self, peer_id):
                self.network._fence(read)

    def read(self, peer_id: int, read_id: int, pieces: Sequence[ReadPiece], checks: Sequence[DigestCheck]) -> None:
        if peer_id not in self._peers:
            raise PeerLostError(f"transport peer {peer_id} is not connected")
        now = self.network.clock.now()
        nbytes = sum(p.nbytes for p in pieces)
        due = now + self.network.latency_s + nbytes / self.network.bytes_per_s
        fault = self.network.fault_for(read_id, pieces)
        self.network._queue_read(_Read(self, peer_id, read_id, pieces, checks, fault, now, due))

    def poll(self) -> list[ReadResult | PeerDown]:
        if self._results:
            os.eventfd_read(self._fd)
        results, self._results = self._results, []
        return results

    def describe(self, peer_id: int) -> str:
        if peer_id not in self._peers:
            return "memory/gone"
        return "memory/connecting" if (self.address, peer_id) in self.network._connecting else "memory/copy"

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self.network.kill(self)
        for peer_id in list(self._peers):
            self.disconnect(peer_id)
        os.close(self._fd)

    def address_of(self, peer_id: int) -> bytes:
        """Network address behind a peer id; empty if it is not connected."""
        return self._peers.get(peer_id, b"")

    def lose(self, address: bytes) -> None:
        """The process at `address` is gone."""
        for peer_id in [i for i, a in self._peers.items() if a == address]:
            self._lose(peer_id)

    def serve(self, pieces: Sequence[ReadPiece], fault: Fault = Fault.NONE) -> list[tuple[int, bytes]] | None:
        """(address at the reader, bytes) of each piece; None if one lies outside the registered memory."""
        writes = []
        for index, piece in enumerate(pieces):
            held = self._memory.get(piece.group)
            if held is None:
                return None
            handle, offset = held[1], piece.remote_offset
            if fault is Fault.MISPLACE:
                offset += piece.nbytes if offset + 2 * piece.nbytes <= handle.nbytes else -piece.nbytes
            if offset < 0 or offset + piece.nbytes > handle.nbytes:
                return None
            data = ctypes.string_at(handle.base + offset, piece.nbytes)
            if fault is Fault.CORRUPT and index == 0:
                data = bytes([data[0] ^ 1]) + data[1:]
            writes.append((piece.local_address, data))
        return writes

    def finish(self, read: _Read, status: ReadStatus, message: str) -> None:
        """Report the one result of a read."""
        seconds = self.network.clock.now() - read.queued_at
        nbytes = sum(p.nbytes for p in read.pieces) if status is ReadStatus.OK else 0
        self._report(ReadResult(read.read_id, status, nbytes, seconds, seconds, message))

    def _lose(self, peer_id: int) -> None:
        del self._peers[peer_id]
        for read in self.network._drop(self, peer_id):
            self.finish(read, ReadStatus.FAILED, "peer died")
        self._report(PeerDown(peer_id, "peer died"))

    def _report(self, result: ReadResult | PeerDown) -> None:
        self._results.append(result)
        if not self._closed:
            os.eventfd_write(self._fd, 1)
