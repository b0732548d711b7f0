"""Random lives of a reader, its peers and the network: nothing leaks, nothing wrong is ever Done."""

from __future__ import annotations

from collections import Counter, deque
from typing import Any

import msgspec
from handoff_support import Owner, World
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from kvtransfer_support import is_readable, small_layout

from common.kvtransfer.memory import Fault
from common.kvtransfer.orders import DropOrder, OrderEvent, OrderExtent, PeerVerdict, PlaceOrder, ReleaseLease
from common.kvtransfer.session import Done, Failed, Progress, TailRead

# Late writes after a reported completion are left out: a transport that makes them breaks its contract.
FAULTS = (Fault.NONE, Fault.NONE, Fault.NONE, Fault.FAIL, Fault.CORRUPT, Fault.SHORT, Fault.MISPLACE, Fault.STUCK)


class HandoffMachine(RuleBasedStateMachine):
    @initialize(
        source_block=st.sampled_from((16, 32, 48)),
        reader_block=st.sampled_from((16, 32, 48)),
        window=st.sampled_from((0, 24)),
        slow_fences=st.booleans(),
    )
    def start(self, source_block: int, reader_block: int, window: int, slow_fences: bool) -> None:
        self.faults: deque[Fault] = deque()
        self.world = World(
            source=small_layout(source_block, window=window),
            layout=small_layout(reader_block, window=window),
            held=True,
            fault_for=lambda read_id, pieces: self.faults.popleft() if self.faults else Fault.NONE,
        )
        self.world.network.slow_fences = slow_fences
        self.block = reader_block
        self.peer = 0
        self.next_seq = 1
        self.starts: dict[int, int] = {}
        self.sizes: dict[int, int] = {}
        self.wire: deque[tuple[int, OrderEvent]] = deque()
        self.heard = 0
        self.released: Counter[int] = Counter()
        self.dropped: Counter[int] = Counter()
        self.gone: set[int] = set()
        self.log: list[Any] = []
        self.connect()

    # -- the world around --

    def connect(self) -> None:
        self.peer += 1
        self.world.ready(self.peer)

    @rule(kind=st.sampled_from(("announce", "restart", "break")), chance=st.integers(0, 14))
    def disrupt(self, kind: str, chance: int) -> None:
        if chance == 9:
            {"announce": self.announce_again, "restart": self.restart_owner, "break": self.break_session}[kind]()

    def announce_again(self) -> None:
        self.world.ready(self.peer)

    def restart_owner(self) -> None:
        """The owner dies; its replacement comes under a new number, before or after the old one is seen to go."""
        world, old = self.world, self.peer
        self.hear()
        world.owner.transport.close()
        truth = world.owner.truth
        world.owner = Owner(world.network, world.source, world.clock)
        world.owner.truth = truth
        world.reader.peer_gone(old, "restarted")
        self.gone.add(old)
        self.connect()

    def break_session(self) -> None:
        """The control stream breaks; the owner ends the orders it carried, leases run on."""
        world, old = self.world, self.peer
        self.hear()
        for order_id in list(world.owner.orders):
            world.owner._close(order_id)
        world.reader.peer_gone(old, "stream broke")
        self.gone.add(old)
        self.connect()

    def hear(self) -> None:
        """The owner takes what was emitted for it."""
        world = self.world
        for command in world.commands:
            self.log.append(command)
            if isinstance(command, ReleaseLease):
                self.released[command.lease_id] += 1
            if isinstance(command, DropOrder):
                self.dropped[command.order_id] += 1
            if isinstance(command, PeerVerdict) or command.peer != self.peer:
                continue
            if isinstance(command, PlaceOrder):
                if self.has_room(world.owner.cache, command.num_tokens):
                    self.wire.extend((self.peer, e) for e in world.owner.start(command))
            else:
                world.owner.handle(command)
        world.commands.clear()

    @staticmethod
    def has_room(cache: Any, num_tokens: int) -> bool:
        return all(
            cache.state[g.name].count("free") >= (1 if g.block_size == 1 else -(-num_tokens // g.block_size))
            for g in cache.layout.groups
        )

    # -- what may happen --

    @rule(num_tokens=st.integers(1, 150), cached=st.integers(0, 4), remaining_s=st.sampled_from((0.0, 0.0, 4.0)))
    def place(self, num_tokens: int, cached: int, remaining_s: float) -> None:
        world = self.world
        if not world.reader.usable(self.peer) or not self.has_room(world.cache, num_tokens):
            return
        start = min(cached * self.block, (num_tokens - 1) // self.block * self.block)
        seq_id, self.next_seq = self.next_seq, self.next_seq + 1
        self.starts[seq_id], self.sizes[seq_id] = start, num_tokens
        world.place(seq_id, num_tokens, start, peer=self.peer, remaining_s=remaining_s)

    @rule(tokens=st.integers(1, 80), count=st.integers(1, 12), steps=st.integers(0, 4), index=st.integers(0, 5))
    def life_goes_on(self, tokens: int, count: int, steps: int, index: int) -> None:
        """A bit of everything that happens when nothing goes wrong."""
        if self.world.reader.usable(self.peer):
            self.hear()
        for order_id in sorted(self.world.owner.orders):
            self.compute(order_id, tokens)
        self.reader_hears(count)
        for _ in range(steps):
            self.world.network.step(index)
        self.engine_polls()

    @rule()
    def owner_hears(self) -> None:
        self.hear()

    @precondition(lambda self: self.world.owner.orders)
    @rule(data=st.data(), tokens=st.integers(1, 80))
    def owner_computes(self, data: st.DataObject, tokens: int) -> None:
        self.compute(data.draw(st.sampled_from(sorted(self.world.owner.orders))), tokens)

    def compute(self, order_id: int, tokens: int) -> None:
        """An owner whose lease ran out can only give the order up."""
        owner = self.world.owner
        if owner.orders[order_id].order.lease_id in {x.lease_id for x in owner.leases.snapshot()}:
            self.wire.extend((self.peer, e) for e in owner.compute(order_id, tokens))
        else:
            owner._close(order_id)

    @precondition(lambda self: self.wire)
    @rule(count=st.integers(1, 6))
    def reader_hears(self, count: int) -> None:
        for _ in range(min(count, len(self.wire))):
            peer, event = self.wire.popleft()
            self.world.reader.on_event(peer, event)

    @precondition(lambda self: self.wire and isinstance(self.wire[0][1], OrderExtent))
    @rule(
        chance=st.integers(0, 3),
        field=st.sampled_from(("lease_id", "start_position", "num_tokens", "block_ids", "digests", "group")),
    )
    def reader_hears_a_lie(self, chance: int, field: str) -> None:
        if chance != 2:
            return
        peer, event = self.wire.popleft()
        if isinstance(event, OrderExtent):
            lies = {
                "lease_id": event.lease_id ^ 1,
                "start_position": event.start_position + 16,
                "num_tokens": event.num_tokens + 1,
                "block_ids": tuple(b ^ 1 for b in event.block_ids),
                "digests": tuple(d ^ 1 for d in event.digests),
                "group": "tail",
            }
            event = msgspec.structs.replace(event, **{field: lies[field]})
        self.world.reader.on_event(peer, event)

    @precondition(lambda self: len(self.faults) < 4)
    @rule(fault=st.sampled_from(FAULTS))
    def network_misbehaves(self, fault: Fault) -> None:
        self.faults.append(fault)

    @rule(index=st.integers(0, 5))
    def network_delivers(self, index: int) -> None:
        self.world.network.step(index)

    @rule()
    def engine_polls(self) -> None:
        for update in self.world.reader.poll():
            assert update.seq_id in self.world.cache.tables, "no update for a sequence that was cancelled or ended"
            start, total = self.starts[update.seq_id], self.sizes[update.seq_id]
            if isinstance(update, Progress):
                assert start <= update.num_verified <= total or not update.num_verified
            elif isinstance(update, TailRead):
                assert self.world.same_bytes(update.seq_id, total, total, tail=True)
            elif isinstance(update, Done):
                assert self.world.same_bytes(update.seq_id, start, total, tail=True)
                self.world.cache.close(update.seq_id)
            else:
                assert isinstance(update, Failed)
                if update.num_verified > start:
                    assert self.world.same_bytes(update.seq_id, start, update.num_verified)
                self.world.cache.close(update.seq_id)

    @precondition(lambda self: self.world.cache.tables)
    @rule(data=st.data(), chance=st.integers(0, 3))
    def client_leaves(self, data: st.DataObject, chance: int) -> None:
        if chance != 2:
            return
        seq_id = data.draw(st.sampled_from(sorted(self.world.cache.tables)))
        self.world.reader.cancel(seq_id)
        self.world.cache.close(seq_id)

    @rule(seconds=st.sampled_from((0.1, 0.5, 3.0, 3.0, 9.0, 12.0, 31.0)))
    def time_passes(self, seconds: float) -> None:
        self.world.clock.time += seconds
        self.world.owner.leases.expire()

    # -- what must hold --

    @invariant()
    def blocks_in_flight_are_those_of_reads(self) -> None:
        if hasattr(self, "world"):
            cache = self.world.cache
            assert cache.count("in flight") == sum(len(b) for _, b in cache.reads.values())
            assert set(cache.reads) == set(self.world.reader._reads)
            assert cache.count("leased") == 0
            assert self.world.reader.num_orders <= len(cache.tables)

    @invariant()
    def nothing_is_said_twice(self) -> None:
        if hasattr(self, "world"):
            assert all(n == 1 for n in (self.released | self.dropped).values())

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        world = self.world
        self.reader_drains()
        for seq_id in list(world.cache.tables):
            world.reader.cancel(seq_id)
            world.cache.close(seq_id)
        while world.network.step():
            pass
        self.engine_polls()
        world.network.step()  # that poll may have fenced a peer: its reads end at the next delivery
        while (deadline := world.reader.next_deadline()) < float("inf") or is_readable(world.transport.wakeup_fd):
            world.clock.time = max(world.clock.time, min(deadline, world.clock.time + 60.0))
            self.engine_polls()
            world.network.step()
        self.engine_polls()
        assert world.reader.num_orders == world.reader.num_reads == 0
        assert world.cache.is_idle
        self.hear()
        self.reader_drains()
        self.hear()
        self.nothing_is_said_twice()
        for order_id in list(world.owner.orders):
            assert self.gone, "an order the reader has not dropped"
            world.owner._close(order_id)
        if not self.gone:
            assert world.owner.leases.num_active == 0, "released, not expired"
        world.clock.time += 31.0
        world.owner.leases.expire()
        assert world.owner.cache.is_idle
        assert world.owner.leases.counters.lost == 0
        world.close()

    def reader_drains(self) -> None:
        while self.wire:
            self.reader_hears(6)


TestHandoffMachine = HandoffMachine.TestCase
TestHandoffMachine.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
