"""Ranks as threads of the test's process: the code of rank processes, without the seconds that those take to start."""

from __future__ import annotations

import os
import socket
import threading

import msgspec
from torch.distributed import Store

from common.engine.rank import SETUP, RankSetup, serve_rank
from common.kvtransfer.digester import digest
from common.kvtransfer.memory import MemoryNetwork, MemoryTransport
from common.parallel.link import Link
from common.parallel.store import thread_store
from common.types import Clock


class ThreadRanks:
    path = ""

    def __init__(self, network: MemoryNetwork, clock: Clock) -> None:
        self._network = network
        self._clock = clock
        self._store = thread_store()

    def store(self, size: int) -> Store:
        return self._store

    def start(self, setup: RankSetup, sock: socket.socket) -> RankThread:
        return RankThread(self, socket.socket(fileno=os.dup(sock.fileno())))

    def serve(self, sock: socket.socket) -> None:
        link = Link(sock, 30.0)
        kind, payload = link.receive()
        assert kind == SETUP
        setup = msgspec.msgpack.decode(payload, type=RankSetup)
        try:
            serve_rank(setup, link, self._store, self._clock, MemoryTransport(self._network, digest))
        finally:
            link.close()

    def close(self) -> None:
        pass


class RankThread:
    def __init__(self, ranks: ThreadRanks, sock: socket.socket) -> None:
        self._thread = threading.Thread(target=ranks.serve, args=(sock,), daemon=True)
        self._thread.start()

    def end(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)
        assert not self._thread.is_alive()
