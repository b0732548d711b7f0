"""Fakes and small worlds for the tests of common/kvtransfer."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from common.config.schema import HandoffConfig
from common.kvcache.layout import (
    DTYPE_NBYTES,
    FULL_GROUP,
    TAIL_GROUP,
    GroupSpec,
    KVLayout,
    RegionSpec,
    Retention,
    Sharding,
)
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
from common.types.prefix import extend_chain, root_hash

MODEL = b"m" * 16


class FakeClock:
    def __init__(self) -> None:
        self.time = 1000.0

    def now(self) -> float:
        return self.time


def region(name: str = "kv", group: str = FULL_GROUP, **changes: object) -> RegionSpec:
    fields: dict[str, object] = {
        "name": name,
        "group": group,
        "dtype": "bfloat16",
        "num_layers": 2,
        "num_parts": 2,
        "num_units": 2,
        "width": 8,
        "sharding": Sharding.SPLIT,
    }
    return RegionSpec(**(fields | changes))  # type: ignore[arg-type]


def tail_region(**changes: object) -> RegionSpec:
    fields = {"num_layers": 1, "num_parts": 1, "num_units": 1, "width": 32, "sharding": Sharding.REPLICATED}
    return region("hidden", TAIL_GROUP, **(fields | changes))


def small_layout(block_size: int = 16, num_blocks: int = 24, window: int = 0, **changes: object) -> KVLayout:
    """A full group and a tail, with a window group where `window` says so."""
    groups = [
        GroupSpec(name=FULL_GROUP, retention=Retention.FULL, block_size=block_size, num_blocks=num_blocks),
        GroupSpec(name=TAIL_GROUP, retention=Retention.SNAPSHOT, block_size=1, num_blocks=8),
    ]
    regions = [region(), tail_region()]
    if window:
        groups.append(
            GroupSpec(
                name="local", retention=Retention.WINDOW, block_size=block_size, num_blocks=num_blocks, window=window
            )
        )
        regions.append(region("local_kv", "local"))
    fields: dict[str, object] = {"model_hash": MODEL, "groups": tuple(groups), "regions": tuple(regions)}
    return KVLayout(**(fields | changes))  # type: ignore[arg-type]


def memory_view(address: int, nbytes: int) -> NDArray[np.uint8]:
    """Writable bytes at an address."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))


def rows_of(
    layout: KVLayout, name: str, base: int, block_id: int, layer: int, part: int, unit: int
) -> NDArray[np.uint8]:
    """[block_size, token bytes] view of one unit of a block; `unit` counts over all ranks."""
    spec = next(r for r in layout.regions if r.name == name)
    place = layout.place(name)
    size = layout.group(spec.group).block_size
    address = base + block_id * layout.block_nbytes(spec.group) + place.offset
    address += layer * place.layer_stride + part * place.part_stride + (unit - place.first_unit) * place.unit_stride
    return memory_view(address, size * place.token_stride).reshape(size, place.token_stride)


def token_nbytes(spec: RegionSpec) -> int:
    return spec.width * DTYPE_NBYTES[spec.dtype]


class FakeCache:
    """A CacheView that holds every block in exactly one state and asserts each change of it."""

    def __init__(self, layout: KVLayout) -> None:
        self.layout = layout
        self.state = {g.name: ["free"] * g.num_blocks for g in layout.groups}
        self.tables: dict[int, dict[str, list[int]]] = {}
        self.reads: dict[int, tuple[str, tuple[int, ...]]] = {}
        self.pins: dict[int, list[tuple[str, int]]] = {}
        self.digests: dict[tuple[str, int], tuple[int, ...]] = {}

    def open(self, seq_id: int, num_tokens: int, first_held: int = 0) -> None:
        """Hold blocks for positions [0, num_tokens) and a tail; window groups none before `first_held`."""
        assert seq_id not in self.tables
        tables: dict[str, list[int]] = {}
        for g in self.layout.groups:
            count = 1 if g.retention is Retention.SNAPSHOT else -(-num_tokens // g.block_size)
            skip = first_held // g.block_size if g.retention is Retention.WINDOW else 0
            tables[g.name] = [-1] * skip + [self._take(g.name) for _ in range(count - skip)]
        self.tables[seq_id] = tables

    def _take(self, group: str) -> int:
        block = self.state[group].index("free")
        self.state[group][block] = "live"
        return block

    def close(self, seq_id: int) -> None:
        for group, table in self.tables.pop(seq_id).items():
            for block in table:
                if block >= 0:
                    self._settle(group, block)

    def _settle(self, group: str, block: int) -> None:
        held = any(block in t[group] for t in self.tables.values())
        pinned = any((group, block) in p for p in self.pins.values())
        reading = any(group == g and block in ids for g, ids in self.reads.values())
        self.state[group][block] = "in flight" if reading else "live" if held else "leased" if pinned else "free"
        if self.state[group][block] == "free":
            self.digests.pop((group, block), None)

    def block_table(self, seq_id: int, group: str) -> list[int]:
        return self.tables[seq_id][group]

    def begin_read(self, read_id: int, group: str, block_ids: Sequence[int]) -> None:
        assert read_id not in self.reads
        assert block_ids
        assert len(set(block_ids)) == len(block_ids)
        for block in block_ids:
            assert self.state[group][block] == "live", "only a live block may be read into"
            self.state[group][block] = "in flight"
        self.reads[read_id] = (group, tuple(block_ids))

    def end_read(self, read_id: int) -> None:
        group, block_ids = self.reads.pop(read_id)
        for block in block_ids:
            assert self.state[group][block] == "in flight"
            self._settle(group, block)

    def lease_pin(self, lease_id: int, group: str, block_ids: Sequence[int]) -> None:
        for block in block_ids:
            assert self.state[group][block] in ("live", "leased")
            self.pins.setdefault(lease_id, []).append((group, block))

    def lease_unpin(self, lease_id: int) -> None:
        for group, block in self.pins.pop(lease_id, []):
            self._settle(group, block)

    def block_digests(self, group: str, block_id: int) -> tuple[int, ...] | None:
        return self.digests.get((group, block_id))

    def set_block_digests(self, group: str, block_id: int, digests: tuple[int, ...]) -> None:
        assert self.state[group][block_id] == "live"
        assert (group, block_id) not in self.digests, "digested once"
        self.digests[group, block_id] = digests

    def count(self, state: str) -> int:
        return sum(s.count(state) for s in self.state.values())

    @property
    def is_idle(self) -> bool:
        return self.count("free") == sum(g.num_blocks for g in self.layout.groups) and not self.reads


def allocate(transport: MemoryTransport, layout: KVLayout, seed: int) -> dict[str, int]:
    """Register every group's pool, filled with random bytes."""
    rng = np.random.default_rng(seed)
    bases = {}
    for g in layout.groups:
        nbytes = layout.block_nbytes(g.name) * g.num_blocks
        bases[g.name] = transport.allocate(g.name, nbytes)
        memory_view(bases[g.name], nbytes)[:] = rng.integers(0, 256, nbytes, dtype=np.uint8)
    return bases


def prompt(num_tokens: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(int(t) for t in np.random.default_rng(seed).integers(0, 50000, num_tokens))


def chain_of(token_ids: Sequence[int], media: Sequence[tuple[int, bytes]] = ()) -> list[bytes]:
    chain = [root_hash(MODEL)]
    extend_chain(chain, token_ids, media)
    return chain


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
        self.cache.open(self._seq_ids, len(place.token_ids))
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
        return [OrderAccepted(place.order_id, len(place.token_ids), 0), OrderStarted(place.order_id, lease_id, 0)]

    def _write(self, place: PlaceOrder, seq_id: int) -> None:
        total = len(place.token_ids)
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
