"""A reader and the owner it takes KV from, in one small world with a network of memory."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from kvtransfer_support import FakeCache, FakeClock, allocate, chain_of, prompt, rows_of, small_layout, token_nbytes
from numpy.typing import NDArray

from common.config.schema import HandoffConfig
from common.kvcache.layout import KVLayout, Retention
from common.kvtransfer.leases import Leases
from common.kvtransfer.memory import Fault, MemoryNetwork, MemoryTransport, numpy_digest
from common.kvtransfer.orders import (
    DropOrder,
    OrderAccepted,
    OrderEvent,
    OrderFinished,
    OrderStarted,
    PeerVerdict,
    PlaceOrder,
    ReaderCommand,
    ReleaseLease,
)
from common.kvtransfer.plan import window_start
from common.kvtransfer.publish import Publisher, PublishOrder
from common.kvtransfer.reads import RankReads
from common.kvtransfer.session import Done, Failed, HandoffReader, HandoffUpdate, OrderSpec
from common.types import WorkerRef

N = 90  # tokens of most prompts: five whole blocks of 16 and a part
CHUNK = 32
NUM_EVENTS = 2 + 3 + 1 + 1  # accepted, started, three extents, the tail, finished


@dataclass
class OwnerOrder:
    order: PublishOrder
    done: int
    dropped: bool = False


class Owner:
    """A prefill worker without a model: fresh random bytes stand for computed KV.

    `truth[request_id]` keeps them: (region, layer, part, unit) -> [num_tokens, token bytes].
    """

    def __init__(self, network: MemoryNetwork, layout: KVLayout, clock: FakeClock, ttl_s: float = 30.0) -> None:
        self.layout = layout
        self.clock = clock
        self.transport = MemoryTransport(network)
        self.bases = allocate(self.transport, layout, seed=1)
        self.cache = FakeCache(layout)
        self.leases = Leases(self.cache, clock, ttl_s)
        self.publisher = Publisher(layout, self.bases, self.cache, numpy_digest)
        self.ref = WorkerRef("prefill-1", 77, "127.0.0.1:1")
        self.orders: dict[int, OwnerOrder] = {}
        self.truth: dict[str, dict[tuple[str, int, int, int], NDArray[np.uint8]]] = {}
        self._rng = np.random.default_rng(11)
        self._seq_ids = 0

    def start(self, place: PlaceOrder) -> list[OrderEvent]:
        """Accept and start an order: its blocks are held and its lease is open."""
        self._seq_ids += 1
        self.cache.open(self._seq_ids, place.num_tokens)
        lease_id = self.leases.open(place.request_id)
        order = PublishOrder(
            self._seq_ids,
            place.order_id,
            lease_id,
            place.token_ids,
            chain_of(place.token_ids),
            place.start_position,
        )
        self.orders[place.order_id] = OwnerOrder(order, place.start_position)
        self._write(place, self._seq_ids)
        return [OrderAccepted(place.order_id, place.num_tokens, 0), OrderStarted(place.order_id, lease_id, 0)]

    def _write(self, place: PlaceOrder, seq_id: int) -> None:
        total = place.num_tokens
        truth = self.truth[place.request_id] = {}
        for spec in self.layout.regions:
            group, table = self.layout.group(spec.group), self.cache.tables[seq_id][spec.group]
            count = 1 if group.retention is Retention.SNAPSHOT else total
            for at in itertools.product(range(spec.num_layers), range(spec.num_parts), range(spec.num_units)):
                data = self._rng.integers(0, 256, (count, token_nbytes(spec)), dtype=np.uint8)
                truth[spec.name, *at] = data
                for i, block in enumerate(table):
                    rows = rows_of(self.layout, spec.name, self.bases[spec.group], block, *at)
                    part = data[i * group.block_size : (i + 1) * group.block_size]
                    rows[: len(part)] = part

    def compute(self, order_id: int, num_tokens: int) -> list[OrderEvent]:
        """Compute up to `num_tokens` more positions: extents, and OrderFinished at the end."""
        state = self.orders[order_id]
        order, total = state.order, len(state.order.token_ids)
        end = min(state.done + num_tokens, total)
        events: list[OrderEvent] = []
        for extent in self.publisher.publish(order, state.done, end):
            self.leases.extend(order.lease_id, extent.group, extent.block_ids)
            events.append(extent)
        state.done = end
        if end == total:
            events.append(OrderFinished(order_id, order.lease_id, total - order.start_position, 1.0, 2.0))
            self._close(order_id)
        return events

    def _close(self, order_id: int) -> None:
        state = self.orders.pop(order_id)
        self.cache.close(state.order.seq_id)

    def handle(self, command: ReaderCommand) -> None:
        if isinstance(command, DropOrder) and command.order_id in self.orders:
            lease_id = self.orders[command.order_id].order.lease_id
            self._close(command.order_id)
            self.leases.release(lease_id)
        elif isinstance(command, ReleaseLease):
            self.leases.release(command.lease_id)


@dataclass
class World:
    """One owner, one reader, and the commands between them. `deliver` hands commands to the owner."""

    source: KVLayout = field(default_factory=small_layout)
    layout: KVLayout = field(default_factory=small_layout)
    config: HandoffConfig = field(default_factory=lambda: HandoffConfig(transports=("memory",)))
    held: bool = False
    fault_for: Callable[[int, object], Fault] | None = None

    def __post_init__(self) -> None:
        self.clock = FakeClock()
        self.network = MemoryNetwork(self.clock, held=self.held)
        if self.fault_for is not None:
            self.network.fault_for = self.fault_for
        self.owner = Owner(self.network, self.source, self.clock)
        self.transport = MemoryTransport(self.network)
        self.bases = allocate(self.transport, self.layout, seed=2)
        self.cache = FakeCache(self.layout)
        self.commands: list[ReaderCommand] = []
        self.reader = HandoffReader(
            self.layout,
            RankReads(self.layout, self.bases, self.transport),
            self.cache,
            self.clock,
            self.config,
            self.commands.append,
        )
        self.updates: list[HandoffUpdate] = []

    def close(self) -> None:
        self.transport.close()
        self.owner.transport.close()

    def ready(self, peer: int = 1) -> PeerVerdict:
        owner = self.owner
        self.reader.peer_ready(peer, owner.ref, owner.layout, (owner.transport.endpoint(),), 30.0)
        verdict = self.commands[-1]
        assert isinstance(verdict, PeerVerdict)
        return verdict

    def place(self, seq_id: int, num_tokens: int, start: int = 0, peer: int = 1, **changes: object) -> PlaceOrder:
        token_ids = prompt(num_tokens, seed=seq_id)
        self.cache.open(seq_id, num_tokens)
        fields: dict[str, object] = {
            "seq_id": seq_id,
            "peer": peer,
            "request_id": f"r{seq_id}",
            "token_ids": token_ids,
            "chain": chain_of(token_ids),
            "start_position": start,
        }
        self.reader.place(OrderSpec(**(fields | changes)))  # type: ignore[arg-type]
        command = self.commands[-1]
        assert isinstance(command, PlaceOrder)
        return command

    def send(self, events: Sequence[OrderEvent], peer: int = 1) -> None:
        for event in events:
            self.reader.on_event(peer, event)

    def supply(self, place: PlaceOrder, chunk: int = 32) -> list[OrderEvent]:
        """All events of an order, its prompt computed in chunks."""
        events = self.owner.start(place)
        while place.order_id in self.owner.orders:
            events += self.owner.compute(place.order_id, chunk)
        return events

    def deliver(self) -> None:
        """The owner hears all that was emitted."""
        for command in self.commands:
            self.owner.handle(command)
        self.commands.clear()

    def settle(self) -> None:
        """Deliver reads and poll until nothing moves."""
        while True:
            moved = self.network.step()
            updates = self.reader.poll()
            self.updates += updates
            if not moved and not updates:
                return

    def sent(self, kind: type[ReaderCommand]) -> list[ReaderCommand]:
        return [c for c in self.commands if isinstance(c, kind)]

    def ends(self) -> list[Done | Failed]:
        return [u for u in self.updates if isinstance(u, Done | Failed)]

    def same_bytes(self, seq_id: int, start: int, end: int, *, tail: bool = False) -> bool:
        """Does the reader hold the owner's bytes at positions [start, end), where its tables hold blocks?"""
        truth = self.owner.truth[f"r{seq_id}"]
        for spec in self.layout.regions:
            group, table = self.layout.group(spec.group), self.cache.tables[seq_id][spec.group]
            snapshot = group.retention is Retention.SNAPSHOT
            if snapshot and not tail:
                continue
            for at in itertools.product(range(spec.num_layers), range(spec.num_parts), range(spec.num_units)):
                data = truth[spec.name, *at]
                for i, block in enumerate(table):
                    first, size = i * group.block_size, group.block_size
                    low, high = (0, 1) if snapshot else (max(start, first), min(end, first + size))
                    if group.retention is Retention.WINDOW:
                        low = max(low, window_start(group, end))
                    if low >= high:
                        continue
                    assert block >= 0, f"position {low} of {spec.group} is not held"
                    rows = rows_of(self.layout, spec.name, self.bases[spec.group], block, *at)
                    if not np.array_equal(rows[low - first : high - first] if not snapshot else rows, data[low:high]):
                        return False
        return True


Worlds = Callable[..., World]


@pytest.fixture
def worlds() -> Iterator[Worlds]:
    made: list[World] = []

    def make(**fields: Any) -> World:
        made.append(World(**fields))
        return made[-1]

    yield make
    for world in made:
        world.close()


def finish_up(world: World, *seq_ids: int) -> None:
    """The engine closes its sequences, the owner hears all: nothing may be left anywhere."""
    for seq_id in seq_ids:
        world.cache.close(seq_id)
    released = Counter(c.lease_id for c in world.commands if isinstance(c, ReleaseLease))
    dropped = Counter(c.order_id for c in world.commands if isinstance(c, DropOrder))
    assert all(n == 1 for n in (released | dropped).values())
    world.deliver()
    assert world.reader.num_orders == world.reader.num_reads == 0
    assert world.cache.is_idle
    assert world.owner.leases.num_active == 0
    assert world.owner.cache.is_idle
    assert world.owner.leases.counters.lost == 0
    assert world.reader.next_deadline() == float("inf")
