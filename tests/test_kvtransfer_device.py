"""Digests that are launched with a step, and compared after a read, by a device that works when it is told to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
from kvtransfer_support import FakeCache, FakeClock, allocate, chain_of, prompt, small_layout

from common.kvcache.layout import FULL_GROUP, TAIL_GROUP
from common.kvtransfer.device import DeviceTransport
from common.kvtransfer.memory import MemoryNetwork, MemoryTransport, numpy_digest
from common.kvtransfer.orders import OrderExtent
from common.kvtransfer.plan import plan_extent
from common.kvtransfer.publish import Publisher, PublishOrder
from common.kvtransfer.transport import DigestCheck, PeerDown, ReadPiece, ReadResult, ReadStatus


@dataclass
class FakeBatch:
    found: list[int]
    done: bool = False

    def is_done(self) -> bool:
        return self.done

    def values(self) -> list[int]:
        return self.found


@dataclass
class FakeDevice:
    """Digests right away and says so when `batches[i].done` is set."""

    batches: list[FakeBatch] = field(default_factory=list)
    checks: list[list[DigestCheck]] = field(default_factory=list)

    def launch(self, checks: Sequence[DigestCheck]) -> FakeBatch:
        return self._add(checks, [numpy_digest(c) for c in checks])

    def compare(self, checks: Sequence[DigestCheck]) -> FakeBatch:
        return self._add(checks, [numpy_digest(c) != c.expected for c in checks])

    def _add(self, checks: Sequence[DigestCheck], found: Sequence[int]) -> FakeBatch:
        self.checks.append(list(checks))
        self.batches.append(FakeBatch(list(found)))
        return self.batches[-1]


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
        self.extent = self.owner.publisher(on_device=False).publish(self.owner.order, 0, 40)[0]
        self.inner = MemoryTransport(self.owner.network)
        self.bases = allocate(self.inner, self.owner.layout, seed=4)
        self.device = FakeDevice()
        self.wakes = 0
        self.transport = DeviceTransport(self.inner, self.device, self.woken)
        self.peer = self.transport.connect(self.owner.transport.endpoint())

    def woken(self) -> None:
        self.wakes += 1

    def read(self, read_id: int, extent: OrderExtent | None = None) -> None:
        layout = self.owner.layout
        plan = plan_extent(layout, layout, extent or self.extent, [0, 1, 2], self.bases[FULL_GROUP], 40)
        self.transport.read(self.peer, read_id, plan.pieces, plan.checks)


def only(events: list[ReadResult | PeerDown]) -> ReadResult:
    (event,) = events
    assert isinstance(event, ReadResult)
    return event


def test_a_read_ends_when_its_digests_are_compared() -> None:
    reading = Reading()
    reading.read(7)
    assert reading.transport.poll() == []
    assert (len(reading.device.batches), reading.wakes) == (1, 1)
    assert reading.transport.poll() == []
    reading.device.batches[0].done = True
    result = only(reading.transport.poll())
    assert (result.read_id, result.status, result.message) == (7, ReadStatus.OK, "")
    assert reading.transport.poll() == []


def test_wrong_bytes_are_a_mismatch_with_the_digest_named() -> None:
    reading = Reading()
    wrong = [*reading.extent.digests]
    wrong[3] ^= 1
    reading.read(7, msgspec.structs.replace(reading.extent, digests=tuple(wrong)))
    reading.transport.poll()
    reading.device.batches[0].done = True
    result = only(reading.transport.poll())
    assert result.status is ReadStatus.MISMATCH
    assert result.message == f"digest 3 of {len(wrong)} does not match the bytes read"


def test_reads_that_fail_or_have_nothing_to_compare_end_at_once() -> None:
    reading = Reading()
    target = reading.bases[FULL_GROUP]
    reading.transport.read(reading.peer, 1, [ReadPiece(FULL_GROUP, 0, target, 64)], [])
    assert only(reading.transport.poll()).status is ReadStatus.OK
    reading.owner.network.held = True
    reading.read(2)
    reading.transport.disconnect(reading.peer)
    assert only(reading.transport.poll()).status is ReadStatus.FENCED
    assert not reading.device.batches


def test_reads_end_in_the_order_in_which_they_came() -> None:
    reading = Reading()
    reading.read(1)
    reading.read(2)
    assert reading.transport.poll() == []
    reading.device.batches[1].done = True
    assert reading.transport.poll() == []
    reading.device.batches[0].done = True
    assert [e.read_id for e in reading.transport.poll() if isinstance(e, ReadResult)] == [1, 2]
