"""Digests that are launched with a step, and compared after a read, by a device that works when it is told to."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import pytest
from kvtransfer_support import FakeCache, FakeClock, allocate, chain_of, is_readable, prompt, small_layout
from numpy.typing import NDArray

from common.errors import InternalError, PeerLostError
from common.kvcache.layout import FULL_GROUP, TAIL_GROUP
from common.kvtransfer import device
from common.kvtransfer.device import DeviceTransport
from common.kvtransfer.memory import MemoryNetwork, MemoryTransport, numpy_digest
from common.kvtransfer.orders import OrderExtent
from common.kvtransfer.plan import plan_extent
from common.kvtransfer.publish import Publisher, PublishOrder
from common.kvtransfer.transport import DigestCheck, PeerDown, ReadPiece, ReadResult, ReadStatus

BROKEN = 12345  # an expected digest that the fake device does not take


@dataclass
class FakeBatch:
    found: list[int]
    done: threading.Event = field(default_factory=threading.Event)

    def values(self) -> list[int]:
        assert self.done.wait(20)
        return self.found


@dataclass
class FakeDevice:
    """Digests right away; says so at once if it is not `held`, else when `batches[i].done` is set."""

    held: bool = False
    full: bool = False  # no memory for tables
    batches: list[FakeBatch] = field(default_factory=list)
    checks: list[list[DigestCheck]] = field(default_factory=list)
    num_prepared: int = 0
    was_prepared: threading.Event = field(default_factory=threading.Event)

    def launch(self, checks: Sequence[DigestCheck]) -> FakeBatch:
        return self._add(checks, [numpy_digest(c) for c in checks])

    def prepare(self, checks: Sequence[DigestCheck]) -> Sequence[DigestCheck]:
        if self.full:
            raise MemoryError
        self.num_prepared += 1
        self.was_prepared.set()
        return checks

    def compare(self, prepared: Sequence[DigestCheck]) -> FakeBatch:
        if any(c.expected == BROKEN for c in prepared):
            raise RuntimeError("no such kernel")
        return self._add(prepared, [numpy_digest(c) != c.expected for c in prepared])

    def _add(self, checks: Sequence[DigestCheck], found: Sequence[int]) -> FakeBatch:
        batch = FakeBatch(list(found))
        if not self.held:
            batch.done.set()
        self.checks.append(list(checks))
        self.batches.append(batch)
        return batch


def never(check: DigestCheck) -> int:
    raise AssertionError("the host looked at the memory")


class Published:
    """A prompt of 40 tokens in blocks 4, 2, 3 and a tail, and who publishes it."""

    def __init__(self) -> None:
        self.layout = small_layout()
        self.network = MemoryNetwork(FakeClock())
        self.transport = MemoryTransport(self.network)
        self.bases = allocate(self.transport, self.layout, seed=3)
        self.cache = FakeCache(self.layout)
        self.cache.tables[1] = {FULL_GROUP: [4, 2, 3], TAIL_GROUP: [1]}
        for group, blocks in self.cache.tables[1].items():
            for block in blocks:
                self.cache.state[group][block] = "live"
        self.device = FakeDevice()
        token_ids = prompt(40)
        self.order = PublishOrder(1, 11, 21, token_ids, chain_of(token_ids), 0)

    def publisher(self, *, on_device: bool) -> Publisher:
        self.cache.digests.clear()
        if on_device:
            return Publisher(self.layout, self.bases, self.cache, never, self.device)
        return Publisher(self.layout, self.bases, self.cache, numpy_digest)

    def in_steps(self, publisher: Publisher) -> list[OrderExtent]:
        return publisher.publish(self.order, 0, 20) + publisher.publish(self.order, 20, 40)


def test_launched_with_their_step_and_taken_when_published() -> None:
    """Two steps are launched before the first is published; each launch digests what its step completes, once."""
    world = Published()
    expected = world.in_steps(world.publisher(on_device=False))
    publisher = world.publisher(on_device=True)
    publisher.launch(world.order, 0, 20)
    publisher.launch(world.order, 20, 40)
    assert [len(checks) for checks in world.device.checks] == [2, 2 + 2 + 1]
    assert world.in_steps(publisher) == expected
    assert len(world.device.batches) == 2


def test_what_no_step_computed_is_launched_when_published() -> None:
    world = Published()
    expected = world.in_steps(world.publisher(on_device=False))
    publisher = world.publisher(on_device=True)
    publisher.launch(world.order, 20, 40)
    assert world.in_steps(publisher) == expected
    assert [len(checks) for checks in world.device.checks] == [2 + 2 + 1, 2]


def test_a_forgotten_sequence_takes_nothing_of_old_steps() -> None:
    world = Published()
    publisher = world.publisher(on_device=True)
    publisher.launch(world.order, 0, 40)
    publisher.forget(1)
    publisher.publish(world.order, 0, 40)
    assert len(world.device.batches) == 2


def test_a_step_that_computes_a_block_again_has_it_digested_again() -> None:
    world = Published()
    publisher = world.publisher(on_device=True)
    publisher.launch(world.order, 0, 40)
    publisher.launch(world.order, 0, 40)
    assert len(world.device.batches) == 2


class Reading:
    """A reader on a device that reads what `Published` has published."""

    def __init__(self) -> None:
        self.owner = Published()
        self.extent = self.owner.publisher(on_device=False).publish(self.owner.order, 0, 40)[1]
        self.inner = MemoryTransport(self.owner.network)
        self.bases = allocate(self.inner, self.owner.layout, seed=4)
        self.device = FakeDevice()
        self.transport = DeviceTransport(self.inner, self.device)
        self.peer = self.transport.connect(self.owner.transport.endpoint())

    def read(self, read_id: int, extent: OrderExtent | None = None) -> None:
        layout = self.owner.layout
        plan = plan_extent(layout, layout, extent or self.extent, [0, 1, 2], self.bases[FULL_GROUP], 40)
        self.transport.read(self.peer, read_id, plan.pieces, plan.checks)

    def events(self, count: int, timeout_s: float = 10.0) -> list[ReadResult | PeerDown]:
        deadline = time.monotonic() + timeout_s
        events = self.transport.poll()
        while len(events) < count and (left := deadline - time.monotonic()) > 0:
            if is_readable(self.transport.wakeup_fd, left):
                events += self.transport.poll()
        return events


@pytest.fixture
def reading() -> Iterator[Reading]:
    reading = Reading()
    yield reading
    for batch in reading.device.batches:
        batch.done.set()
    reading.transport.close()


def only(events: list[ReadResult | PeerDown]) -> ReadResult:
    (event,) = events
    assert isinstance(event, ReadResult)
    return event


def with_digest(extent: OrderExtent, index: int, value: int) -> OrderExtent:
    return msgspec.structs.replace(extent, digests=(*extent.digests[:index], value, *extent.digests[index + 1 :]))


def test_a_read_ends_when_its_digests_are_compared(reading: Reading) -> None:
    reading.device.held = True
    reading.read(7)
    assert reading.events(1, 0.1) == []
    assert len(reading.device.batches) == 1
    reading.device.batches[0].done.set()
    result = only(reading.events(1))
    assert (result.read_id, result.status, result.message) == (7, ReadStatus.OK, "")
    assert result.seconds >= result.read_seconds
    assert not is_readable(reading.transport.wakeup_fd)


def test_wrong_bytes_are_a_mismatch_with_the_digest_named(reading: Reading) -> None:
    count = len(reading.extent.digests)
    reading.read(7, with_digest(reading.extent, 3, reading.extent.digests[3] ^ 1))
    result = only(reading.events(1))
    assert result.status is ReadStatus.MISMATCH
    assert result.message == f"digest 3 of {count} does not match the bytes read"


def test_what_cannot_be_compared_has_failed_and_the_next_read_has_not(reading: Reading) -> None:
    reading.read(1, with_digest(reading.extent, 0, BROKEN))
    result = only(reading.events(1))
    assert (result.status, result.message) == (ReadStatus.FAILED, "its digests could not be compared: RuntimeError")
    reading.read(2)
    assert only(reading.events(1)).status is ReadStatus.OK


def test_a_read_that_cannot_be_prepared_has_failed_when_it_has_ended(reading: Reading) -> None:
    reading.owner.network.held = True
    reading.device.full = True
    reading.read(1)
    assert reading.events(1, 0.1) == []
    reading.owner.network.held = False
    reading.owner.network.advance()
    result = only(reading.events(1))
    assert (result.status, result.message) == (ReadStatus.FAILED, "its digests could not be compared: MemoryError")
    reading.device.full = False
    reading.read(2)
    assert only(reading.events(1)).status is ReadStatus.OK


def test_checks_are_prepared_while_the_bytes_are_on_their_way(reading: Reading) -> None:
    reading.owner.network.held = True
    reading.read(1)
    assert reading.device.was_prepared.wait(10)
    assert reading.events(1, 0.05) == []
    assert not reading.device.batches
    reading.owner.network.held = False
    reading.owner.network.advance()
    assert only(reading.events(1)).status is ReadStatus.OK
    assert reading.device.num_prepared == 1


def test_a_read_that_has_ended_waits_for_no_other(reading: Reading) -> None:
    """Two have ended, a third is asked for: each is told before anything is done for the next."""
    device, order = reading.device, list[tuple[str, int]]()  # what is done, and how many reads were told since
    reading.owner.network.held = True
    begun, go_on = threading.Event(), threading.Event()

    def begin() -> None:
        begun.set()
        assert go_on.wait(10)

    def noting(what: str, did: Callable[[Sequence[DigestCheck]], Any]) -> Callable[[Sequence[DigestCheck]], Any]:
        def noted(checks: Sequence[DigestCheck]) -> Any:
            order.append((what, len(reading.transport.poll())))
            return did(checks)

        return noted

    reading.transport.close()
    reading.inner = MemoryTransport(reading.owner.network)
    reading.bases = allocate(reading.inner, reading.owner.layout, seed=4)
    device.prepare = noting("prepare", device.prepare)  # type: ignore[method-assign]
    device.compare = noting("compare", device.compare)  # type: ignore[method-assign]
    reading.transport = DeviceTransport(reading.inner, device, begin=begin)
    reading.peer = reading.transport.connect(reading.owner.transport.endpoint())
    assert begun.wait(10)
    reading.read(1)
    reading.read(2)
    reading.owner.network.advance()
    reading.read(3)
    go_on.set()
    deadline = time.monotonic() + 10
    while len(order) < 5 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert order == [("prepare", 0), ("compare", 0), ("prepare", 1), ("compare", 0), ("prepare", 1)]


def test_a_thread_that_ends_is_no_silence(reading: Reading, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits for a read learns that none will end any more."""

    def poll() -> list[ReadResult | PeerDown]:
        raise RuntimeError("out of order")

    monkeypatch.setattr(reading.inner, "poll", poll)
    reading.read(1)
    with pytest.raises(InternalError, match="out of order"):
        reading.events(1)
    reading.transport.close()
    assert reading.inner.address not in reading.owner.network.transports


def test_reads_that_fail_or_have_nothing_to_compare_end_by_themselves(reading: Reading) -> None:
    target = reading.bases[FULL_GROUP]
    reading.transport.read(reading.peer, 1, [ReadPiece(FULL_GROUP, 0, target, 64)], [])
    assert only(reading.events(1)).status is ReadStatus.OK
    reading.owner.network.held = True
    reading.read(2)
    reading.transport.disconnect(reading.peer)
    assert only(reading.events(1)).status is ReadStatus.FENCED
    with pytest.raises(PeerLostError):
        reading.read(3)
    assert not reading.device.batches


def test_a_peer_that_goes_is_reported(reading: Reading) -> None:
    reading.owner.network.kill(reading.owner.transport)
    (down,) = reading.events(1)
    assert isinstance(down, PeerDown)
    assert down.peer_id == reading.peer


class FakeGatherer:
    """Copies at once; `holds` counts peers that are held."""

    def __init__(self, owner: Published) -> None:
        self.bases = owner.bases
        self.holds = self.copied = 0
        self.refuses = self.breaks = self.held = False
        self.batches: list[FakeBatch] = []

    def batch(self, number: int) -> FakeBatch:
        """That launch, when it is made."""
        deadline = time.monotonic() + 10
        while len(self.batches) <= number and time.monotonic() < deadline:
            time.sleep(0.001)
        return self.batches[number]

    def hold(self, peer_id: int, pieces: Sequence[ReadPiece]) -> NDArray[np.int64] | None:
        if self.refuses:
            return None
        self.holds += 1
        return np.array([(self.bases[p.group] + p.remote_offset, p.local_address, p.nbytes) for p in pieces])

    def release(self, peer_id: int) -> None:
        self.holds -= 1

    def gather(self, pieces_N3: NDArray[np.int64]) -> FakeBatch:
        if self.breaks:
            raise RuntimeError("no such kernel")
        for source, target, nbytes in pieces_N3.tolist():
            ctypes.memmove(target, source, nbytes)
            self.copied += 1
        batch = FakeBatch([])
        if not self.held:
            batch.done.set()
        self.batches.append(batch)
        return batch


class SmallPieces(Reading):
    """The reader's blocks are of 48 tokens, the owner's of 16: no piece is longer than a row of a unit."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        monkeypatch.setattr(device, "MANY_PIECES", 4)
        self.transport.close()
        self.inner = MemoryTransport(self.owner.network)
        self.layout = small_layout(block_size=48)
        self.bases = allocate(self.inner, self.layout, seed=4)
        self.gatherer = FakeGatherer(self.owner)
        self.transport = DeviceTransport(self.inner, self.device, self.gatherer)
        self.peer = self.transport.connect(self.owner.transport.endpoint())

    def read(self, read_id: int, extent: OrderExtent | None = None) -> None:
        plan = plan_extent(self.owner.layout, self.layout, extent or self.extent, [2], self.bases[FULL_GROUP], 40)
        self.pieces = plan.pieces
        self.transport.read(self.peer, read_id, plan.pieces, plan.checks)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallPieces]:
    small = SmallPieces(monkeypatch)
    yield small
    small.gatherer.held = False
    for batch in small.gatherer.batches:
        batch.done.set()
    small.transport.close()


def test_many_small_pieces_are_one_launch(small: SmallPieces) -> None:
    small.read(1)
    result = only(small.events(1))
    assert (result.read_id, result.status) == (1, ReadStatus.OK)
    assert result.nbytes == sum(p.nbytes for p in small.pieces)
    assert 0 <= result.read_seconds <= result.seconds
    assert (small.gatherer.copied, small.gatherer.holds) == (len(small.pieces), 0)
    small.read(2, with_digest(small.extent, 0, 1))
    assert only(small.events(1)).status is ReadStatus.MISMATCH


def test_what_is_not_mapped_is_read_piece_by_piece(small: SmallPieces) -> None:
    small.gatherer.refuses = True
    small.read(1)
    assert only(small.events(1)).status is ReadStatus.OK
    assert small.gatherer.copied == 0
    assert small.owner.network.delivered == 1


def test_a_launch_that_fails_lets_the_peer_go(small: SmallPieces) -> None:
    small.gatherer.breaks = True
    small.read(1)
    assert only(small.events(1)).status is ReadStatus.FAILED
    assert small.gatherer.holds == 0


def test_copies_under_way_end_before_their_read_has_failed(small: SmallPieces) -> None:
    """What is compared behind them cannot be launched: they write all the same."""
    small.gatherer.held = True
    small.read(1, with_digest(small.extent, 0, BROKEN))
    assert small.events(1, 0.1) == []
    assert small.gatherer.holds == 1
    small.gatherer.batch(0).done.set()
    assert only(small.events(1)).status is ReadStatus.FAILED
    assert small.gatherer.holds == 0


def test_reads_that_ended_by_themselves_do_not_wait_for_all_launches(small: SmallPieces) -> None:
    small.gatherer.held = True
    small.read(1)
    small.read(2)
    first = small.gatherer.batch(0)
    tail = small.bases[FULL_GROUP]
    small.transport.read(small.peer, 3, [ReadPiece(FULL_GROUP, 0, tail, 64)], [])
    first.done.set()
    assert [e.read_id for e in small.events(2) if isinstance(e, ReadResult)] == [1, 3]
    small.gatherer.batch(1).done.set()
    assert only(small.events(1)).read_id == 2


def test_launches_that_have_not_begun_let_their_peers_go_when_all_ends(small: SmallPieces) -> None:
    small.gatherer.held = True
    for read_id in range(3):
        small.read(read_id)
    batch = small.gatherer.batch(0)
    threading.Timer(0.2, batch.done.set).start()
    small.transport.close()
    assert (small.gatherer.holds, len(small.gatherer.batches)) == (0, 1)
