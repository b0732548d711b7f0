"""A GPU's memory between processes, over a stand-in for CUDA's driver: mapped, copied, let go when its owner dies."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from fake_gpu import FakeGpu, build_driver
from ucx_support import Owner, make_transport, random_bytes, wait_for

from common.engine.gpus import has_driver
from common.kvtransfer import ucx
from common.kvtransfer.transport import Endpoint, PeerDown, ReadResult, ReadStatus

MIB = 2**20
GROUPS = {"full": 40 * MIB, "tail": 1000}
pytestmark = pytest.mark.skipif(
    has_driver() or not shutil.which("cc"),
    reason="CUDA's own driver, or no compiler",
)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_driver(tmp_path_factory.mktemp("driver"))


@pytest.fixture(scope="module")
def owner(driver: Path) -> Iterator[FakeGpu]:
    """Shared by the tests that only read."""
    owner = FakeGpu(driver, GROUPS, 1)
    yield owner
    owner.stop()


@pytest.fixture
def reader(driver: Path, tmp_path: Path) -> Iterator[FakeGpu]:
    reader = FakeGpu(driver, GROUPS, 100, environ={"FAKE_CUDA_MAPPED": str(tmp_path / "mapped")})
    yield reader
    reader.stop()


def num_mapped(tmp_path: Path) -> int:
    return int((tmp_path / "mapped").read_text())


def only(events: list[ReadResult | PeerDown]) -> ReadResult:
    assert len(events) == 1, events
    assert isinstance(events[0], ReadResult), events
    return events[0]


def connect(reader: FakeGpu, owner: FakeGpu) -> int:
    peer: int = reader.call("connect", owner.call("endpoint"))
    return peer


def test_pieces_of_all_sizes_land_where_they_should(owner: FakeGpu, reader: FakeGpu) -> None:
    rng = np.random.default_rng()
    local, cursor, pieces = random_bytes(100, GROUPS["full"]).copy(), 0, []
    remote_bytes = {"full": random_bytes(1, GROUPS["full"]), "tail": random_bytes(2, GROUPS["tail"])}
    sizes = [*rng.integers(1, 5000, 600).tolist(), 33 * MIB + 5]  # the last one is cut
    for nbytes in sizes:
        cursor += int(rng.integers(0, 50))
        group = "tail" if nbytes < 900 and rng.random() < 0.5 else "full"
        remote = int(rng.integers(0, GROUPS[group] - nbytes))
        pieces.append((group, remote, cursor, nbytes))
        local[cursor : cursor + nbytes] = remote_bytes[group][remote : remote + nbytes]
        cursor += nbytes
    rng.shuffle(pieces)
    peer = connect(reader, owner)
    reader.read(7, "full", [(str(g), int(r), int(at), int(n)) for g, r, at, n in pieces])
    result = only(reader.events(1))
    assert (result.read_id, result.status, result.message) == (7, ReadStatus.OK, "")
    assert result.nbytes == sum(sizes)
    assert 0 < result.read_seconds <= result.seconds
    assert reader.call("describe", peer) == "ucx/cuda_ipc"
    np.testing.assert_array_equal(np.frombuffer(reader.call("bytes", "full"), np.uint8), local)


def test_reads_take_turns(driver: Path, owner: FakeGpu) -> None:
    """A small read passes large ones that came before it: these take a second, and to ask for all a moment of it."""
    reader = FakeGpu(driver, GROUPS, 100, environ={"FAKE_CUDA_COPY_US": "10000"})
    connect(reader, owner)
    for i in range(30):
        reader.read(i, "full", [("full", 0, 0, 40 * MIB)])
    reader.read(99, "tail", [("tail", 0, 0, 1000)])
    order = [e.read_id for e in reader.events(31) if isinstance(e, ReadResult)]
    assert len(order) == 31
    assert order.index(99) < 15
    reader.stop()


def test_what_is_mapped_is_given_back(owner: FakeGpu, reader: FakeGpu, tmp_path: Path) -> None:
    peer = connect(reader, owner)
    reader.read(1, "tail", [("tail", 0, 0, 1000)])
    assert only(reader.events(1)).status is ReadStatus.OK
    assert num_mapped(tmp_path) == 2
    again = connect(reader, owner)
    reader.read(2, "tail", [("tail", 0, 0, 1000)])
    assert only(reader.events(1)).status is ReadStatus.OK
    assert num_mapped(tmp_path) == 2
    reader.call("disconnect", peer)
    reader.read(3, "tail", [("tail", 0, 0, 1000)])
    assert only(reader.events(1)).status is ReadStatus.OK
    assert num_mapped(tmp_path) == 2
    reader.call("disconnect", again)
    deadline = time.monotonic() + 5
    while num_mapped(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert num_mapped(tmp_path) == 0


def test_a_killed_owner_fails_its_reads_and_its_memory_is_given_back(driver: Path, tmp_path: Path) -> None:
    """No read ends before the copies under way have: afterwards the reader's memory is its own."""
    environ = {"FAKE_CUDA_COPY_US": "20000", "FAKE_CUDA_MAPPED": str(tmp_path / "mapped")}
    owner = FakeGpu(driver, GROUPS, 1)
    reader = FakeGpu(driver, GROUPS, 100, environ=environ)
    connect(reader, owner)
    for i in range(50):
        reader.read(i, "full", [("full", 0, 0, 40 * MIB)])
    first = reader.events(1)
    assert only(first[:1]).status is ReadStatus.OK
    killed_at = time.monotonic()
    os.kill(owner.process.pid or 0, signal.SIGKILL)
    events = first
    while not any(isinstance(e, PeerDown) for e in events):
        assert time.monotonic() - killed_at < 3
        events += reader.events(1, 1.0)
    assert isinstance(events[-1], PeerDown)
    failed = [e for e in events if isinstance(e, ReadResult) and e.status is ReadStatus.FAILED]
    assert len(failed) > 20
    assert all(e.message for e in failed)
    assert len(events) == 51
    assert num_mapped(tmp_path) == 0
    reader.call("fill", "full", 7)
    time.sleep(0.2)
    assert set(reader.call("bytes", "full")) == {7}
    reader.read(1000, "full", [("full", 0, 0, 1)])
    assert only(reader.events(1)).status is ReadStatus.FAILED
    owner.kill()
    reader.stop()


def test_what_is_held_stays_mapped_though_its_owner_dies(driver: Path, reader: FakeGpu, tmp_path: Path) -> None:
    """A kernel may be reading it."""
    owner = FakeGpu(driver, GROUPS, 1)
    peer = connect(reader, owner)
    reader.read(1, "tail", [("tail", 0, 0, 1000)])
    assert only(reader.events(1)).status is ReadStatus.OK
    assert reader.call("hold outside", peer) is None
    assert reader.call("hold", peer) == 3
    owner.kill()
    assert reader.events(1, 0.3) == []
    assert reader.call("hold", peer) is None
    assert num_mapped(tmp_path) == 2
    reader.call("release", peer)
    (down,) = reader.events(1)
    assert isinstance(down, PeerDown)
    assert num_mapped(tmp_path) == 0
    assert reader.call("hold", peer) is None


def test_who_holds_a_peer_does_not_wait_for_a_slow_driver(driver: Path, owner: FakeGpu, tmp_path: Path) -> None:
    """The engine's loop asks. What it no longer waits for is not held, or the peer would never be let go."""
    environ = {"FAKE_CUDA_MAPPED": str(tmp_path / "mapped"), "FAKE_CUDA_SLOW_OPEN": str(len(GROUPS))}
    reader, other = FakeGpu(driver, GROUPS, 100, environ=environ), FakeGpu(driver, GROUPS, 1)
    peer = connect(reader, owner)
    reader.read(1, "tail", [("tail", 0, 0, 1000)])
    assert only(reader.events(1)).status is ReadStatus.OK
    second = reader.call("connect", other.call("endpoint"))
    began = time.monotonic()
    assert reader.call("hold", peer) is None
    assert 0.5 < time.monotonic() - began < 2.5
    reader.read(2, "tail", [("tail", 0, 0, 1000)])
    assert only(reader.events(1)).status is ReadStatus.OK
    assert reader.call("hold", second) == 3
    assert num_mapped(tmp_path) == 2 * len(GROUPS)
    reader.call("disconnect", peer)
    deadline = time.monotonic() + 10
    while num_mapped(tmp_path) > len(GROUPS):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    reader.call("release", second)
    reader.stop()
    other.stop()


def test_a_stopped_owner_is_read_all_the_same(driver: Path, reader: FakeGpu) -> None:
    owner = FakeGpu(driver, GROUPS, 1)
    connect(reader, owner)
    reader.read(1, "full", [("full", 0, 0, MIB)])
    assert only(reader.events(1)).status is ReadStatus.OK
    os.kill(owner.process.pid or 0, signal.SIGSTOP)
    reader.read(2, "full", [("full", MIB, 0, MIB)])
    assert only(reader.events(1)).status is ReadStatus.OK
    owner.kill()


def test_a_disconnected_peer_is_fenced(driver: Path, owner: FakeGpu) -> None:
    reader = FakeGpu(driver, GROUPS, 100, environ={"FAKE_CUDA_COPY_US": "5000"})
    peer = connect(reader, owner)
    for i in range(40):
        reader.read(i, "full", [("full", 0, 0, 40 * MIB)])
    reader.events(1)
    reader.call("disconnect", peer)
    results = reader.events(39)
    assert {r.status for r in results if isinstance(r, ReadResult)} == {ReadStatus.OK, ReadStatus.FENCED} or {
        r.status for r in results if isinstance(r, ReadResult)
    } == {ReadStatus.FENCED}
    connect(reader, owner)
    reader.read(100, "full", [("full", 0, 0, MIB)])
    assert only(reader.events(1)).status is ReadStatus.OK
    reader.stop()


@pytest.mark.parametrize("what", ["FAKE_CUDA_COPIES", "FAKE_CUDA_EVENTS"])
def test_copies_that_fail_lose_the_peer_and_no_more(driver: Path, owner: FakeGpu, tmp_path: Path, what: str) -> None:
    """Each read ends once, after the copies under way; what was mapped is given back, and can be again."""
    environ = {"FAKE_CUDA_COPY_US": "20000", "FAKE_CUDA_MAPPED": str(tmp_path / "mapped"), what: "7"}
    reader = FakeGpu(driver, GROUPS, 100, environ=environ)
    connect(reader, owner)
    for i in range(20):
        reader.read(i, "full", [("full", 0, 0, 40 * MIB)])
    events = reader.events(21)
    assert isinstance(events[-1], PeerDown)
    assert "copying of GPU 0: invalid argument" in events[-1].message
    reads = [e for e in events if isinstance(e, ReadResult)]
    assert sorted(e.read_id for e in reads) == list(range(20))
    assert {e.status for e in reads} >= {ReadStatus.FAILED}
    assert num_mapped(tmp_path) == 0
    reader.call("fill", "full", 7)
    time.sleep(0.2)
    assert set(reader.call("bytes", "full")) == {7}
    connect(reader, owner)
    reader.read(100, "full", [("full", 0, 0, MIB)])
    assert only(reader.events(1)).status is ReadStatus.OK
    reader.stop()


def test_a_process_reads_its_own_memory(owner: FakeGpu) -> None:
    """As the self-test of an engine does."""
    peer = connect(owner, owner)
    owner.read(1, "full", [("full", MIB, 0, 0x1000)])
    assert only(owner.events(1)).status is ReadStatus.OK
    assert owner.call("describe", peer) == "ucx/cuda_ipc"
    got = np.frombuffer(owner.call("bytes", "full"), np.uint8)[:0x1000]
    np.testing.assert_array_equal(got, random_bytes(1, GROUPS["full"])[MIB : MIB + 0x1000])
    owner.call("disconnect", peer)


def test_memory_of_a_gpu_and_of_the_host_do_not_meet(owner: FakeGpu, reader: FakeGpu) -> None:
    """Rather than copied by way of the host, without a word."""
    transport = make_transport("tcp")
    (down,) = [wait_for(transport, 1) for _ in [transport.connect(owner.call("endpoint"))]]
    assert [e.message for e in down if isinstance(e, PeerDown)] == ["its memory is a GPU's and ours is the host's"]
    transport.close()
    host = Owner("tcp", {"full": 1000})
    reader.call("connect", host.endpoint)
    (lost,) = reader.events(1)
    assert isinstance(lost, PeerDown)
    assert lost.message == "its memory is the host's and ours is a GPU's"
    host.stop()


def bent(endpoint: Endpoint, how: str) -> Endpoint:
    memory = endpoint.memory[0]
    payload = bytearray(ucx._unseal(memory.remote_key, "key"))
    at = ucx._KEY.size  # nd::DeviceKey: handle 64, offset 8, guard 8, process 16, machine 16, size of the host's key 8
    match how:
        case "cut":
            del payload[at + 50 :]
        case "another handle":
            payload[at : at + 64] = os.urandom(64)
        case "another handle beside a key of UCX":
            payload[at : at + 64] = os.urandom(64)
            payload += payload[at + 120 :]
        case "another place in the allocation":
            payload[at + 64] ^= 1
        case "another machine":
            payload[at + 96] ^= 1
        case "a host key longer than all":
            payload[at + 112 : at + 120] = (2**40).to_bytes(8, "little")
    forged = msgspec.structs.replace(memory, remote_key=ucx._seal(bytes(payload)))
    return msgspec.structs.replace(endpoint, memory=(forged, *endpoint.memory[1:]))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cut", "too short"),
        ("another handle", "mapping a peer's memory of GPU 0: invalid argument"),
        ("another handle beside a key of UCX", "mapping a peer's memory of GPU 0: invalid argument, and UCX would"),
        ("another place in the allocation", "does not lead to the memory it claims"),
        ("another machine", "on another machine"),
        ("a host key longer than all", "cut"),
    ],
)
def test_keys_that_are_not_what_they_seem_are_refused(owner: FakeGpu, reader: FakeGpu, how: str, message: str) -> None:
    reader.call("connect", bent(owner.call("endpoint"), how))
    (down,) = reader.events(1)
    assert isinstance(down, PeerDown)
    assert message in down.message
    connect(reader, owner)
    reader.read(1, "tail", [("tail", 0, 0, 1000)])
    assert only(reader.events(1)).status is ReadStatus.OK


def test_at_rest_nothing_is_done(owner: FakeGpu, reader: FakeGpu) -> None:
    connect(reader, owner)
    reader.read(1, "full", [("full", 0, 0, MIB)])
    assert only(reader.events(1)).status is ReadStatus.OK
    time.sleep(0.1)
    before = reader.call("cpu"), owner.call("cpu")
    time.sleep(1.0)
    assert reader.call("cpu") - before[0] < 0.1
    assert owner.call("cpu") - before[1] < 0.1
