"""A process that owns memory for the tests of the UCX transport, driven over a pipe, and what they read from it."""

from __future__ import annotations

import ctypes
import multiprocessing as mp
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import pytest
from kvtransfer_support import is_readable
from numpy.typing import NDArray

from common.config.schema import UcxConfig
from common.kvcache.digest import digest_reference
from common.kvtransfer.transport import DigestCheck, Endpoint, PeerDown, ReadPiece, ReadResult
from common.kvtransfer.ucx import UcxTransport

Bytes = NDArray[np.uint8]

LANES = {"posix": "posix,cma,self,tcp", "cma": "cma,self,tcp", "tcp": "self,tcp"}
MIB = 2**20
SHAPE_LPUTB = (6, 2, 4, 16, 128)  # layers, parts, units, tokens, bytes: one block
BLOCK = int(np.prod(SHAPE_LPUTB))
NUM_BLOCKS = 32


def make_transport(lane: str) -> UcxTransport:
    return UcxTransport(UcxConfig(tls=LANES[lane], net_devices="lo"))


def bytes_at(address: int, nbytes: int) -> Bytes:
    return np.frombuffer(memoryview((ctypes.c_uint8 * nbytes).from_address(address)), np.uint8)


def random_bytes(seed: int, nbytes: int) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)


def wait_for(transport: UcxTransport, count: int, timeout_s: float = 20.0) -> list[ReadResult | PeerDown]:
    """The next `count` events; fewer if they do not come in time."""
    deadline = time.monotonic() + timeout_s
    events: list[ReadResult | PeerDown] = []
    while len(events) < count and (left := deadline - time.monotonic()) > 0:
        if is_readable(transport.wakeup_fd, left):
            events += transport.poll()
    return events


def _serve(pipe: Connection, lane: str, groups: dict[str, int], seed: int) -> None:
    transport = make_transport(lane)
    memory: dict[str, Bytes] = {}
    for i, (group, nbytes) in enumerate(groups.items()):
        memory[group] = bytes_at(transport.allocate(group, nbytes), nbytes)
        memory[group][:] = random_bytes(seed + i, nbytes)
    pipe.send(transport.endpoint())
    while True:
        match pipe.recv():
            case "flip", str(group), int(offset):
                memory[group][offset] ^= 0xFF
                pipe.send(None)
            case "read", Endpoint() as endpoint, str(group), int(nbytes):
                peer = transport.connect(endpoint)
                local = bytes_at(transport.allocate("inbox", nbytes), nbytes)
                transport.read(peer, 1, [ReadPiece(group, 0, local.ctypes.data, nbytes)], [])
                pipe.send((wait_for(transport, 1), local.tobytes()))
            case "events", int(count), float(timeout_s):
                pipe.send(wait_for(transport, count, timeout_s))
            case "connect", Endpoint() as endpoint:
                pipe.send(transport.connect(endpoint))
            case ("cpu",):
                pipe.send(time.process_time())
            case "stop":
                transport.close()
                pipe.send(None)
                return


class Owner:
    """A child process with a transport and one random memory per group (seeds: seed, seed + 1, ...)."""

    def __init__(self, lane: str, groups: dict[str, int]) -> None:
        self.seed = int(np.random.default_rng().integers(2**31))
        context = mp.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, lane, groups, self.seed), daemon=True)
        self.process.start()
        theirs.close()
        self.endpoint: Endpoint = self._receive()
        self.memory = {g: random_bytes(self.seed + i, n) for i, (g, n) in enumerate(groups.items())}

    def _receive(self) -> Any:
        assert self._pipe.poll(60), "the owner process did not answer"
        return self._pipe.recv()

    def call(self, *command: object) -> Any:
        self._pipe.send(command)
        return self._receive()

    def stop(self) -> None:
        if self.process.is_alive():
            self._pipe.send("stop")
            self._receive()
        self.process.join(10)
        assert self.process.exitcode in (0, -9)

    def kill(self) -> None:
        self.process.kill()
        self.process.join(10)


@pytest.fixture(scope="module", params=list(LANES))
def owner(request: pytest.FixtureRequest) -> Iterator[Owner]:
    """One per lane, shared by the tests that only read."""
    owner = Owner(request.param, {"full": NUM_BLOCKS * BLOCK, "tail": 1000})
    yield owner
    owner.stop()


@pytest.fixture
def transport(request: pytest.FixtureRequest) -> Iterator[UcxTransport]:
    """On the same lane as `owner`, if the test uses it."""
    params = getattr(request.node, "callspec", None)
    transport = make_transport(params.params.get("owner", "posix") if params else "posix")
    yield transport
    transport.close()


@contextmanager
def running(lane: str, groups: dict[str, int]) -> Iterator[Owner]:
    owner = Owner(lane, groups)
    try:
        yield owner
    finally:
        owner.stop()


def allocate(transport: UcxTransport, group: str, nbytes: int) -> Bytes:
    return bytes_at(transport.allocate(group, nbytes), nbytes)


def piece(local: Bytes, group: str, remote: int, at: int, nbytes: int) -> ReadPiece:
    return ReadPiece(group, remote, local.ctypes.data + at, nbytes)


def block_of(owner: Owner, index: int) -> Bytes:
    return owner.memory["full"][index * BLOCK : (index + 1) * BLOCK]


def checks_of_block(source: Bytes, local_address: int, first_position: int, num_tokens: int = 16) -> list[DigestCheck]:
    """One check per unit of a block that will lie at `local_address`."""
    layers, parts, units, tokens, nbytes = SHAPE_LPUTB
    token, unit = nbytes, nbytes * tokens
    checks = []
    for u in range(units):
        rows = np.ascontiguousarray(source.reshape(SHAPE_LPUTB)[:, :, u, :num_tokens]).view(np.uint64)
        segments = ((local_address + u * unit, first_position, num_tokens),)
        expected = digest_reference(rows, first_position)
        checks.append(DigestCheck(segments, layers, parts, unit * units * parts, unit * units, token, nbytes, expected))
    return checks


def only(events: list[ReadResult | PeerDown]) -> ReadResult:
    assert len(events) == 1
    assert isinstance(events[0], ReadResult)
    return events[0]
