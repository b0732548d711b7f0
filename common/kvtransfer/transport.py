"""What moves bytes: registers memory, reads one-sided, flushes, reports peer death. Nothing else.

    open -> allocate or register (group memory) -> endpoint() ... connect(peer) -> read(...) -> completions -> close

A transport runs its own progress thread. It never blocks the caller: `read` queues work, `poll` returns
what has ended since the last call, and `wakeup_fd` becomes readable when there is something to poll.
Two implementations: `memory` (one process, for tests and the simulator) and `ucx`.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Protocol

import msgspec


class MemoryHandle(msgspec.Struct, frozen=True):
    """A registered allocation holding all blocks of one group; valid for the owner's epoch."""

    group: str
    base: int
    nbytes: int
    remote_key: bytes


class Endpoint(msgspec.Struct, frozen=True):
    """How to reach a process's memory: opaque `address`, one handle per group."""

    transport: str
    address: bytes
    memory: tuple[MemoryHandle, ...]
    hint: str = ""


class DigestCheck(msgspec.Struct, frozen=True, gc=False):
    """Bytes to verify in local memory once the read's pieces are there (see `common.kvcache.digest`).

    The [num_layers, num_parts] x tokens x width words of one (region, unit) of one published run:
    `segments` are (local address of layer 0, part 0, first token; first token's absolute position;
    number of tokens) runs that together make up the digested tokens.
    """

    segments: tuple[tuple[int, int, int], ...]
    num_layers: int
    num_parts: int
    layer_stride: int
    part_stride: int
    token_stride: int
    token_nbytes: int  # a multiple of 8: digests count 64-bit words
    expected: int
    max_tokens: int = 0  # of a segment, what a block holds; 0: not said


class ReadPiece(msgspec.Struct, frozen=True, gc=False):
    """One contiguous copy: `nbytes` from (remote group, offset) to a local address."""

    group: str
    remote_offset: int
    local_address: int
    nbytes: int


class ReadStatus(enum.StrEnum):
    OK = "ok"
    MISMATCH = "mismatch"  # bytes arrived, a digest did not match
    FAILED = "failed"  # peer lost, refused key, local error: the memory may be partly written
    FENCED = "fenced"  # given up and the endpoint is destroyed: no late byte can land any more


class ReadResult(msgspec.Struct, frozen=True):
    read_id: int
    status: ReadStatus
    nbytes: int
    seconds: float  # queued -> last byte (digest included)
    read_seconds: float  # of those, moving bytes
    message: str = ""


class PeerDown(msgspec.Struct, frozen=True):
    """The transport saw that the peer is gone. Its reads end as FAILED first, memory is safe to reuse."""

    peer_id: int
    message: str


class Transport(Protocol):
    name: str

    @property
    def wakeup_fd(self) -> int:
        """Readable when `poll` has something to return. Reading it is `poll`'s business."""

    def allocate(self, group: str, nbytes: int) -> int:
        """Allocate and register zeroed memory that peers can read; returns its address (64-byte aligned)."""

    def register(self, group: str, address: int, nbytes: int, guard: int, guard_nbytes: int) -> None:
        """Register the caller's memory, which outlives the transport, in place of `allocate`.

        `guard`: address of `guard_nbytes` behind it, in the same allocation, for the transport's own use.
        """

    def endpoint(self) -> Endpoint:
        """Describe all registered memory to a peer."""

    def connect(self, endpoint: Endpoint) -> int:
        """Begin to reach a peer; returns its peer id. Errors come as `PeerDown`."""

    def disconnect(self, peer_id: int) -> None:
        """Destroy the endpoint, without waiting; outstanding reads end as FENCED once nothing can land."""

    def read(self, peer_id: int, read_id: int, pieces: Sequence[ReadPiece], checks: Sequence[DigestCheck]) -> None:
        """Queue one-sided reads, then verify. Ends in exactly one `ReadResult` with this id."""

    def poll(self) -> list[ReadResult | PeerDown]:
        """What ended since the last call, in order."""

    def describe(self, peer_id: int) -> str:
        """Transport in use towards a peer, e.g. 'ucx/cma'."""

    def close(self) -> None:
        """Stop the progress thread, destroy endpoints, unregister and free memory."""
