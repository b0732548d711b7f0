from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from kvtransfer_support import FakeClock, is_readable, memory_view

from common.errors import PeerLostError
from common.kvtransfer.memory import Fault, MemoryNetwork, MemoryTransport, numpy_digest
from common.kvtransfer.transport import DigestCheck, Endpoint, PeerDown, ReadPiece, ReadResult, ReadStatus

NBYTES = 4096


class Pair:
    """An owner with random bytes in group "full", and a reader connected to it."""

    def __init__(self, **network: object) -> None:
        self.clock = FakeClock()
        self.network = MemoryNetwork(self.clock, **network)  # type: ignore[arg-type]
        self.owner, self.reader = MemoryTransport(self.network), MemoryTransport(self.network)
        self.source = memory_view(self.owner.allocate("full", NBYTES), NBYTES)
        self.source[:] = np.random.default_rng(0).integers(0, 256, NBYTES, dtype=np.uint8)
        self.base = self.reader.allocate("full", NBYTES)
        self.local = memory_view(self.base, NBYTES)
        self.peer = self.reader.connect(self.owner.endpoint())

    def read(self, read_id: int = 1, offset: int = 0, nbytes: int = 256, expected: int | None = None) -> None:
        piece = ReadPiece("full", offset, self.base + offset, nbytes)
        check = self.check(self.base + offset, nbytes, 0)
        if expected is None:
            expected = numpy_digest(self.check(self.source.ctypes.data + offset, nbytes, 0))
        check = self.check(self.base + offset, nbytes, expected)
        self.reader.read(self.peer, read_id, [piece], [check])

    @staticmethod
    def check(address: int, nbytes: int, expected: int) -> DigestCheck:
        return DigestCheck(
            segments=((address, 0, nbytes // 32),),
            num_layers=1,
            num_parts=1,
            layer_stride=0,
            part_stride=0,
            token_stride=32,
            token_nbytes=32,
            expected=expected,
        )

    def statuses(self) -> list[tuple[int, ReadStatus]]:
        return [(r.read_id, r.status) for r in self.reader.poll() if isinstance(r, ReadResult)]

    def close(self) -> None:
        self.reader.close()
        self.owner.close()


@pytest.fixture
def pairs() -> Iterator[list[Pair]]:
    made: list[Pair] = []
    yield made
    for pair in made:
        pair.close()


def test_a_read_copies_verifies_and_wakes(pairs: list[Pair]) -> None:
    pairs.append(pair := Pair())
    assert pair.base % 64 == 0
    assert not pair.local.any(), "allocated memory is zeroed"
    assert not is_readable(pair.reader.wakeup_fd)
    pair.read(offset=512)
    assert is_readable(pair.reader.wakeup_fd)
    (result,) = pair.reader.poll()
    assert result == ReadResult(1, ReadStatus.OK, 256, 0.0, 0.0)
    assert np.array_equal(pair.local[512:768], pair.source[512:768])
    assert not pair.local[:512].any()
    assert not pair.local[768:].any()
    assert not is_readable(pair.reader.wakeup_fd)
    assert pair.reader.poll() == []


def test_reads_take_their_time_on_the_clock(pairs: list[Pair]) -> None:
    pairs.append(pair := Pair(latency_s=1.0, bytes_per_s=256.0))
    pair.read()
    assert pair.network.next_due() == pair.clock.now() + 2.0
    pair.clock.time += 1.9
    assert pair.network.advance() == 0
    assert not pair.local.any()
    pair.clock.time += 0.1
    assert pair.network.advance() == 1
    (result,) = pair.reader.poll()
    assert isinstance(result, ReadResult)
    assert result.seconds == pytest.approx(2.0)
    assert pair.network.next_due() == float("inf")


@pytest.mark.parametrize("fault", [Fault.CORRUPT, Fault.SHORT, Fault.MISPLACE, Fault.EARLY])
def test_wrong_bytes_are_a_mismatch(pairs: list[Pair], fault: Fault) -> None:
    pairs.append(pair := Pair(fault_for=lambda read_id, pieces: fault))
    pair.read()
    assert pair.statuses() == [(1, ReadStatus.MISMATCH)]


def test_a_failed_read_may_have_written_a_part(pairs: list[Pair]) -> None:
    pairs.append(pair := Pair(fault_for=lambda read_id, pieces: Fault.FAIL))
    pieces = [ReadPiece("full", i * 64, pair.base + i * 64, 64) for i in range(4)]
    pair.reader.read(pair.peer, 9, pieces, [])
    assert pair.statuses() == [(9, ReadStatus.FAILED)]
    assert np.array_equal(pair.local[:128], pair.source[:128])
    assert not pair.local[128:].any()


def test_late_and_repeated_bytes_land_unless_fenced(pairs: list[Pair]) -> None:
    for fence in (False, True):
        pairs.append(pair := Pair(held=True, fault_for=lambda read_id, pieces: Fault.REPEAT))
        pair.read()
        assert pair.network.step()
        assert pair.statuses() == [(1, ReadStatus.OK)]
        pair.local[:256] = 0
        if fence:
            pair.reader.disconnect(pair.peer)
        pair.network.step()
        assert np.array_equal(pair.local[:256], pair.source[:256]) != fence


def test_disconnect_fences_what_is_under_way(pairs: list[Pair]) -> None:
    pairs.append(pair := Pair(held=True, fault_for=lambda i, pieces: Fault.STUCK if i == 2 else Fault.NONE))
    pair.read(1)
    pair.read(2)
    pair.reader.disconnect(pair.peer)
    assert pair.statuses() == [(1, ReadStatus.FENCED), (2, ReadStatus.FENCED)]
    assert not pair.network.step()
    assert not pair.local.any()
    pair.reader.disconnect(pair.peer)
    with pytest.raises(PeerLostError):
        pair.read(3)
    pair.peer = pair.reader.connect(pair.owner.endpoint())
    pair.read(4)
    assert pair.network.step()
    assert pair.statuses() == [(4, ReadStatus.OK)]


def test_death_of_a_peer_fails_its_reads_first(pairs: list[Pair]) -> None:
    pairs.append(pair := Pair(held=True))
    pair.read(1)
    pair.network.kill(pair.owner)
    first, second = pair.reader.poll()
    assert isinstance(first, ReadResult)
    assert (first.read_id, first.status) == (1, ReadStatus.FAILED)
    assert isinstance(second, PeerDown)
    assert second.peer_id == pair.peer
    assert not pair.network.step()
    late = pair.reader.connect(pair.owner.endpoint())
    assert pair.reader.poll() == [PeerDown(late, "peer died")]


@pytest.mark.parametrize(("group", "offset"), [("full", NBYTES - 255), ("full", -1), ("other", 0)])
def test_reads_outside_registered_memory_are_refused(pairs: list[Pair], group: str, offset: int) -> None:
    pairs.append(pair := Pair())
    pair.reader.read(pair.peer, 1, [ReadPiece(group, offset, pair.base, 256)], [])
    assert pair.statuses() == [(1, ReadStatus.FAILED)]
    assert not pair.local.any()


def test_the_network_picks_the_order_of_delivery(pairs: list[Pair]) -> None:
    pairs.append(pair := Pair(held=True))
    for read_id in (1, 2, 3):
        pair.read(read_id, offset=read_id * 256)
    assert pair.network.num_waiting == 3
    for index in (2, 0, 0):
        assert pair.network.step(index)
    assert [i for i, _ in pair.statuses()] == [3, 1, 2]
    assert pair.network.delivered == 3


def test_endpoints_describe_memory_and_refuse_strangers(pairs: list[Pair]) -> None:
    pairs.append(pair := Pair())
    endpoint = pair.owner.endpoint()
    assert endpoint.transport == pair.owner.name == "memory"
    assert [(h.group, h.nbytes) for h in endpoint.memory] == [("full", NBYTES)]
    assert pair.reader.describe(pair.peer) == "memory/copy"
    with pytest.raises(ValueError, match="ucx"):
        pair.reader.connect(Endpoint("ucx", b"", ()))
    with pytest.raises(ValueError, match="full"):
        pair.owner.allocate("full", 64)
    pair.owner.close()
    pair.owner.close()
