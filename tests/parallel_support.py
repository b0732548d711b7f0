"""Ranks as threads of the test's process: the code of rank processes, without the seconds that those take to start."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Sequence

import msgspec
from torch.distributed import Store

from common.engine.rank import SETUP, RankSetup, serve_rank
from common.kvtransfer.digester import digest
from common.kvtransfer.memory import MemoryNetwork, MemoryTransport
from common.kvtransfer.transport import DigestCheck, Endpoint, PeerDown, ReadPiece, ReadResult
from common.parallel.link import Link
from common.parallel.store import thread_store
from common.types import Clock


class LockedTransport(MemoryTransport):
    """Of a network that several threads are on."""

    _lock = threading.RLock()

    def __init__(self, network: MemoryNetwork) -> None:
        with self._lock:
            super().__init__(network, digest)

    def connect(self, endpoint: Endpoint) -> int:
        with self._lock:
            return super().connect(endpoint)

    def disconnect(self, peer_id: int) -> None:
        with self._lock:
            super().disconnect(peer_id)

    def read(self, peer_id: int, read_id: int, pieces: Sequence[ReadPiece], checks: Sequence[DigestCheck]) -> None:
        with self._lock:
            super().read(peer_id, read_id, pieces, checks)

    def poll(self) -> list[ReadResult | PeerDown]:
        with self._lock:
            return super().poll()

    def describe(self, peer_id: int) -> str:
        with self._lock:
            return super().describe(peer_id)

    def close(self) -> None:
        with self._lock:
            super().close()


class ThreadRanks:
    path = ""

    def __init__(self, network: MemoryNetwork, clock: Clock) -> None:
        self._network = network
        self._clock = clock
        self._store = thread_store()

    def store(self, size: int) -> Store:
        return self._store

    def start(self, setup: RankSetup, steps: socket.socket, reads: socket.socket) -> RankThread:
        return RankThread(self, [socket.socket(fileno=os.dup(s.fileno())) for s in (steps, reads)])

    def serve(self, socks: list[socket.socket]) -> None:
        link, reads = (Link(sock, 30.0) for sock in socks)
        kind, payload = link.receive()
        assert kind == SETUP
        setup = msgspec.msgpack.decode(payload, type=RankSetup)
        try:
            serve_rank(setup, link, reads, self._store, self._clock, LockedTransport(self._network))
        finally:
            link.close()

    def close(self) -> None:
        pass


class RankThread:
    def __init__(self, ranks: ThreadRanks, socks: list[socket.socket]) -> None:
        self._thread = threading.Thread(target=ranks.serve, args=(socks,), daemon=True)
        self._thread.start()

    def end(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)
        assert not self._thread.is_alive()
