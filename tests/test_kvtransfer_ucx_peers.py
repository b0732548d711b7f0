"""The UCX transport and its peers: those that die, stop or leave, and what a malicious one may send."""

from __future__ import annotations

import os
import signal
import time
from contextlib import closing

import msgspec
import numpy as np
import pytest
from ucx_support import (
    BLOCK,
    LANES,
    MIB,
    NUM_BLOCKS,
    Bytes,
    Owner,
    allocate,
    make_transport,
    only,
    owner,
    piece,
    running,
    transport,
    wait_for,
)

from common.config.schema import UcxConfig
from common.errors import ConfigError
from common.kvtransfer import ucx
from common.kvtransfer.transport import Endpoint, PeerDown, ReadPiece, ReadResult, ReadStatus
from common.kvtransfer.ucx import UcxTransport

__all__ = ["owner", "transport"]


# -- peers that go ------------------------------------------------------------------------------------


@pytest.mark.parametrize("lane", LANES)
def test_a_killed_peer_fails_its_reads_at_once(lane: str) -> None:
    transport = make_transport(lane)
    owner = Owner(lane, {"full": 8 * MIB})
    local = allocate(transport, "full", 8 * MIB)
    peer = transport.connect(owner.endpoint)
    for i in range(1000):
        transport.read(peer, i, [piece(local, "full", 0, 0, 8 * MIB)], [])
    while not local.any():
        time.sleep(0.001)
    killed_at = time.monotonic()
    os.kill(owner.process.pid or 0, 9)
    events: list[ReadResult | PeerDown] = []
    while not any(isinstance(e, PeerDown) for e in events):
        assert time.monotonic() - killed_at < 1.0
        events += wait_for(transport, 1, timeout_s=1.0)
    assert isinstance(events[-1], PeerDown)
    assert events[-1].peer_id == peer
    failed = [e for e in events if isinstance(e, ReadResult) and e.status is ReadStatus.FAILED]
    assert len(failed) > 100
    assert all(e.message for e in failed)
    local[:] = 7  # the memory is ours again
    time.sleep(0.1)
    assert (local == 7).all()
    transport.read(peer, 1001, [piece(local, "full", 0, 0, 1)], [])
    assert only(wait_for(transport, 1)).status is ReadStatus.FAILED
    transport.disconnect(peer)
    transport.close()
    owner.stop()


@pytest.mark.parametrize("lane", ["posix", "tcp"])
def test_an_idle_peer_that_dies_is_reported(lane: str, transport: UcxTransport) -> None:
    with running(lane, {"full": MIB}) as other:
        peer = transport.connect(other.endpoint)
        transport.read(peer, 1, [], [])
        assert only(wait_for(transport, 1)).status is ReadStatus.OK
        other.kill()
        down = wait_for(transport, 1, timeout_s=1.0)
        assert [type(e) for e in down] == [PeerDown]


def test_an_endpoint_of_a_dead_process_is_down(transport: UcxTransport) -> None:
    owner = Owner("posix", {"full": MIB})
    owner.kill()
    peer = transport.connect(owner.endpoint)
    transport.read(peer, 1, [ReadPiece("full", 0, transport.allocate("full", 64), 64)], [])
    events = wait_for(transport, 2, timeout_s=5.0)
    assert [e.status for e in events if isinstance(e, ReadResult)] == [ReadStatus.FAILED]
    assert [e.peer_id for e in events if isinstance(e, PeerDown)] == [peer]


def test_an_owner_outlives_its_readers(transport: UcxTransport) -> None:
    with running("posix", {"full": MIB}) as owner:
        for _ in range(2):
            reader = Owner("posix", {"full": 64})
            assert only(reader.call("read", owner.endpoint, "full", MIB)[0]).status is ReadStatus.OK
            reader.kill()
        local = allocate(transport, "full", MIB)
        peer = transport.connect(owner.endpoint)
        transport.read(peer, 1, [piece(local, "full", 0, 0, MIB)], [])
        assert only(wait_for(transport, 1)).status is ReadStatus.OK
        np.testing.assert_array_equal(local, owner.memory["full"])


def cut_off(owner: Owner, transport: UcxTransport, local: Bytes) -> list[ReadResult]:
    """A thousand reads, and the end of the connection when the first has brought something: those that were fenced."""
    local[:] = 0
    peer = transport.connect(owner.endpoint)
    for i in range(1000):
        transport.read(peer, i, [piece(local, "full", 0, 0, len(local))], [])
    deadline = time.monotonic() + 20
    while not local[2 * MIB - 64 : 2 * MIB].any():  # the end of a first chunk
        assert time.monotonic() < deadline
        time.sleep(0.001)
    began = time.monotonic()
    transport.disconnect(peer)
    assert time.monotonic() - began < 0.1
    results = [e for e in wait_for(transport, 1000, timeout_s=2.0) if isinstance(e, ReadResult)]
    assert sorted(r.read_id for r in results) == list(range(1000))
    assert {r.status for r in results} <= {ReadStatus.OK, ReadStatus.FENCED}
    fenced = [r for r in results if r.status is ReadStatus.FENCED]
    assert len(fenced) > 100
    transport.disconnect(peer)
    return fenced


def test_disconnect_fences_outstanding_reads(owner: Owner, transport: UcxTransport) -> None:
    size = owner.memory["full"].size
    local = allocate(transport, "full", size)
    for _ in range(5):  # the end may fall between two reads
        if partly := any(r.nbytes > 0 for r in cut_off(owner, transport, local)):
            break
    assert partly
    local[:] = 9
    time.sleep(0.1)
    assert (local == 9).all()
    assert transport.poll() == []
    again = transport.connect(owner.endpoint)
    transport.read(again, 1, [piece(local, "full", 0, 0, size)], [])
    assert only(wait_for(transport, 1)).status is ReadStatus.OK
    np.testing.assert_array_equal(local, owner.memory["full"])


def test_a_read_from_a_peer_that_was_stopped_ends_by_disconnect() -> None:
    """The owner's part in a read over TCP is its own thread: stopped, it neither answers nor dies."""
    with running("tcp", {"full": 8 * MIB}) as owner, closing(make_transport("tcp")) as transport:
        local = allocate(transport, "full", 8 * MIB)
        peer = transport.connect(owner.endpoint)
        transport.read(peer, 1, [piece(local, "full", 0, 0, 8 * MIB)], [])
        assert only(wait_for(transport, 1)).status is ReadStatus.OK
        os.kill(owner.process.pid, signal.SIGSTOP)
        transport.read(peer, 2, [piece(local, "full", 0, 0, 8 * MIB)], [])
        assert wait_for(transport, 1, timeout_s=0.5) == []
        before = time.monotonic()
        transport.disconnect(peer)
        assert only(wait_for(transport, 1)).status is ReadStatus.FENCED
        assert time.monotonic() - before < 5
        owner.kill()


# -- what peers may send ------------------------------------------------------------------------------


def corrupt(endpoint: Endpoint, how: str) -> Endpoint:
    """`endpoint` with one fault. What is resealed passes the checksum, so that deeper guards are reached."""
    memory = endpoint.memory[0]
    key = ucx._unseal(memory.remote_key, "key")

    def with_memory(**changes: object) -> Endpoint:
        return msgspec.structs.replace(endpoint, memory=(msgspec.structs.replace(memory, **changes),))

    match how:
        case "random address":
            return msgspec.structs.replace(endpoint, address=os.urandom(len(endpoint.address)))
        case "empty address":
            return msgspec.structs.replace(endpoint, address=b"")
        case "cut address":
            return msgspec.structs.replace(endpoint, address=endpoint.address[:-1])
        case "random key":
            return with_memory(remote_key=os.urandom(len(memory.remote_key)))
        case "short key":
            return with_memory(remote_key=ucx._seal(b"x"))
        case "longer memory":
            return with_memory(nbytes=memory.nbytes + 4096)
        case "other cookie":
            return with_memory(remote_key=ucx._seal(key[:16] + os.urandom(16) + key[32:]))
        case "memory of a GPU":
            on_device = ucx._KEY.pack(*ucx._KEY.unpack_from(key)[:-1], True) + key[ucx._KEY.size :]
            return with_memory(remote_key=ucx._seal(on_device))
        case "unmapped memory":
            forged = ucx._KEY.pack(4096, memory.nbytes, key[16:32], 4096 + memory.nbytes, False) + key[ucx._KEY.size :]
            return with_memory(base=4096, remote_key=ucx._seal(forged))
    raise AssertionError(how)


FAULTS = ["random address", "empty address", "cut address", "random key", "short key", "longer memory", "other cookie"]
FAULTS += ["memory of a GPU"]


@pytest.mark.parametrize("fault", FAULTS)
def test_malformed_endpoints_are_peers_that_are_down(owner: Owner, transport: UcxTransport, fault: str) -> None:
    peer = transport.connect(corrupt(owner.endpoint, fault))
    down = wait_for(transport, 1, timeout_s=5.0)
    assert [(type(e), e.peer_id) for e in down if isinstance(e, PeerDown)] == [(PeerDown, peer)]
    target = transport.allocate("full", 64)
    transport.read(peer, 3, [ReadPiece("full", 0, target, 64)], [])
    assert only(wait_for(transport, 1)).status is ReadStatus.FAILED
    good = transport.connect(owner.endpoint)
    transport.read(good, 4, [ReadPiece("full", 0, target, 64)], [])
    assert only(wait_for(transport, 1)).status is ReadStatus.OK


@pytest.mark.parametrize(
    ("group", "offset", "nbytes"), [("full", NUM_BLOCKS * BLOCK - 10, 11), ("none", 0, 1), ("tail", -1, 4)]
)
def test_pieces_outside_of_the_peers_memory_fail(
    owner: Owner, transport: UcxTransport, group: str, offset: int, nbytes: int
) -> None:
    peer = transport.connect(owner.endpoint)
    transport.read(peer, 1, [ReadPiece(group, offset, transport.allocate("full", 64), nbytes)], [])
    assert only(wait_for(transport, 1)).status is ReadStatus.FAILED


def test_a_gpu_that_is_not_there_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"libcuda|GPU 99"):
        UcxTransport(UcxConfig(), device=99)


def test_bad_settings_are_config_errors() -> None:
    with pytest.raises(ConfigError, match="no_such_transport"):
        UcxTransport(UcxConfig(tls="no_such_transport"))
    with pytest.raises(ConfigError, match="libnone"):
        UcxTransport(UcxConfig(library="/nonexistent/libnone.so"))
