"""Processes whose memory passes for a GPU's: `fake_cuda.c` in place of CUDA's driver, driven over a pipe.

The driver is loaded in children alone, so that nothing else in a test run meets it.
"""

from __future__ import annotations

import ctypes
import multiprocessing as mp
import os
import subprocess
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from kvtransfer_support import is_readable
from ucx_support import LANES, bytes_at, random_bytes

from common.config.schema import UcxConfig
from common.kvtransfer.transport import Endpoint, PeerDown, ReadPiece, ReadResult
from common.kvtransfer.ucx import UcxTransport

GUARD = 4096
PAGE = 4096


def build_driver(folder: Path) -> Path:
    """`libcuda.so.1` in `folder`."""
    library = folder / "libcuda.so.1"
    source = Path(__file__).parent / "fake_cuda.c"
    command = ["cc", "-O1", "-shared", "-fPIC", "-pthread", "-Wl,-soname,libcuda.so.1", "-o", str(library), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    return library


class _Child:
    """Memory of two groups, one behind the other in pages of their own, and a transport of GPU 0."""

    def __init__(self, driver: str, groups: dict[str, int], seed: int, lane: str) -> None:
        ctypes.CDLL(driver, mode=ctypes.RTLD_GLOBAL)
        self.transport = UcxTransport(UcxConfig(tls=LANES[lane], net_devices="lo"), 0)
        self.memory, self._keep = {}, []
        for i, (group, nbytes) in enumerate(groups.items()):
            raw = np.zeros(nbytes + GUARD + PAGE, np.uint8)
            base = -(-raw.ctypes.data // PAGE) * PAGE
            self._keep.append(raw)
            self.memory[group] = bytes_at(base, nbytes)
            self.memory[group][:] = random_bytes(seed + i, nbytes)
            self.transport.register(group, base, nbytes, base + nbytes, GUARD)
        self.peer = 0

    def events(self, count: int, timeout_s: float) -> list[ReadResult | PeerDown]:
        deadline, events = time.monotonic() + timeout_s, self.transport.poll()
        while len(events) < count and (left := deadline - time.monotonic()) > 0:
            if is_readable(self.transport.wakeup_fd, left):
                events += self.transport.poll()
        return events

    def answer(self, command: tuple[Any, ...]) -> Any:
        match command:
            case "endpoint", *_:
                return self.transport.endpoint()
            case "connect", Endpoint() as endpoint:
                self.peer = self.transport.connect(endpoint)
                return self.peer
            case "disconnect", int(peer):
                return self.transport.disconnect(peer)
            case "read", int(read_id), str(group), list(pieces):
                base = self.memory[group].ctypes.data
                made = [ReadPiece(g, remote, base + local, nbytes) for g, remote, local, nbytes in pieces]
                return self.transport.read(self.peer, read_id, made, [])
            case "events", int(count), float(timeout_s):
                return self.events(count, timeout_s)
            case "bytes", str(group):
                return self.memory[group].tobytes()
            case "fill", str(group), int(value):
                self.memory[group][:] = value
            case "hold", int(peer):
                held = self.transport.hold(peer, [ReadPiece("tail", 8 * i, 8 * i, 8) for i in range(3)])
                if held is not None:
                    assert (np.diff(held[:, 0]) == 8).all()
                return None if held is None else len(held)
            case "hold outside", int(peer):
                return self.transport.hold(peer, [ReadPiece("tail", 996, 0, 8)])
            case "release", int(peer):
                return self.transport.release(peer)
            case "describe", int(peer):
                return self.transport.describe(peer)
            case "cpu", *_:
                return time.process_time()
        return None


def _serve(pipe: Connection, environ: dict[str, str], *arguments: Any) -> None:
    os.environ.update(environ)
    child = _Child(*arguments)
    pipe.send(None)
    while (command := pipe.recv()) != ("stop",):
        pipe.send(child.answer(command))
    child.transport.close()
    pipe.send(None)


class FakeGpu:
    """A child process with random numbers on "GPU 0"."""

    def __init__(
        self, driver: Path, groups: dict[str, int], seed: int, lane: str = "tcp", environ: dict[str, str] | None = None
    ) -> None:
        context = mp.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, environ or {}, str(driver), groups, seed, lane)
        self.process = context.Process(target=_serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        self.receive()

    def receive(self) -> Any:
        assert self._pipe.poll(60), "no answer"
        return self._pipe.recv()

    def call(self, *command: object) -> Any:
        self._pipe.send(command)
        return self.receive()

    def events(self, count: int, timeout_s: float = 20.0) -> list[ReadResult | PeerDown]:
        found: list[ReadResult | PeerDown] = self.call("events", count, timeout_s)
        return found

    def read(self, read_id: int, group: str, pieces: Sequence[tuple[str, int, int, int]]) -> None:
        """`pieces`: remote group, remote offset, offset in our `group`, bytes."""
        self.call("read", read_id, group, list(pieces))

    def stop(self) -> None:
        if self.process.is_alive():
            self.call("stop")
        self.process.join(10)
        assert self.process.exitcode in (0, -9)

    def kill(self) -> None:
        self.process.kill()
        self.process.join(10)
