"""Hand-offs that fail: reads gone wrong, orders given up and owners lost in every state."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from handoff_support import CHUNK, NUM_EVENTS, N, Worlds, finish_up, worlds
from kvtransfer_support import chain_of, prompt, small_layout

from common.errors import OverloadedError, PeerLostError
from common.kvcache.manager import KVCacheManager
from common.kvtransfer.memory import Fault
from common.kvtransfer.orders import DropOrder, OrderAccepted, OrderFailed, PeerVerdict, ReleaseLease
from common.kvtransfer.reads import RankReads
from common.kvtransfer.session import Done, Failed, HandoffReader, OrderSpec, Progress, TailRead
from common.types import Failure

__all__ = ["worlds"]


def total_reads(worlds: Worlds, **fields: Any) -> int:
    world = worlds(**fields)
    world.ready()
    world.send(world.supply(world.place(1, N)))
    world.settle()
    return world.reader.counters.reads


@pytest.mark.parametrize("fault", [Fault.FAIL, Fault.CORRUPT, Fault.SHORT, Fault.MISPLACE, Fault.EARLY])
@pytest.mark.parametrize("blocks", [(16, 16), (16, 64), (64, 16)])
def test_any_fault_at_any_extent_fails_and_keeps_what_was_verified(
    worlds: Worlds, fault: Fault, blocks: tuple[int, int]
) -> None:
    layouts = {"source": small_layout(blocks[0], window=40), "layout": small_layout(blocks[1], window=40)}
    reads = total_reads(worlds, **layouts)
    assert reads >= 5
    for bad in range(1, reads + 1):
        world = worlds(**layouts, held=True, fault_for=lambda i, pieces, bad=bad: fault if i == bad else Fault.NONE)
        world.ready()
        place = world.place(1, N)
        world.send(world.supply(place))
        world.settle()
        (failed,) = world.ends()
        assert isinstance(failed, Failed)
        mismatch = fault is not Fault.FAIL and failed.reason == "digest_mismatch"
        assert mismatch or failed.reason == "read_failed"
        assert world.reader.counters.mismatches == mismatch
        assert world.reader.counters.failed == {failed.reason: 1}
        assert failed.num_verified in (0, 16, 32, 48, 64, 80, N)
        assert world.same_bytes(1, 0, failed.num_verified)
        finish_up(world, 1)


def test_a_read_that_never_ends_is_fenced_and_its_peer_lost(worlds: Worlds) -> None:
    reads = total_reads(worlds)
    for stuck in range(1, reads + 1):
        world = worlds(held=True, fault_for=lambda i, pieces, stuck=stuck: Fault.STUCK if i == stuck else Fault.NONE)
        world.ready()
        world.send(world.supply(world.place(1, N)))
        bystander = world.place(2, N)
        world.send([OrderAccepted(bystander.order_id, N, 0)])
        world.settle()
        assert not world.ends()
        deadline = world.reader.next_deadline()
        assert deadline == world.clock.now() + world.config.read_timeout_s
        world.clock.time = deadline - 0.1
        world.updates += world.reader.poll()
        assert not world.ends()
        in_flight = world.cache.count("in flight")
        world.clock.time = deadline
        world.updates += world.reader.poll()
        assert [(u.seq_id, getattr(u, "reason", "")) for u in world.ends()] == [(1, "read_timeout"), (2, "peer_lost")]
        verified = world.ends()[0]
        assert isinstance(verified, Failed)
        assert verified.num_verified == (0, CHUNK, N, 2 * CHUNK)[stuck - 1], "the third is the tail's"
        assert world.cache.count("in flight") == in_flight > 0, "a timer frees nothing"
        assert not world.sent(ReleaseLease)
        verdict = world.sent(PeerVerdict)[-1]
        assert isinstance(verdict, PeerVerdict)
        assert verdict.state == "lost"
        assert not world.reader.usable(1)
        with pytest.raises(PeerLostError):
            world.reader.place(
                OrderSpec(seq_id=3, peer=1, request_id="", token_ids=(1,), chain=chain_of(()), start_position=0)
            )
        assert world.reader.poll() == [], "now the transport has ended the read"
        assert world.cache.count("in flight") == 0
        assert len(world.sent(ReleaseLease)) == 1
        assert world.reader.counters.fences == 1
        finish_up(world, 1, 2)
        assert world.ready().state == "ready"
        world.network.fault_for = lambda i, pieces: Fault.NONE
        world.send(world.supply(world.place(4, N)))
        world.settle()
        assert isinstance(world.updates[-1], Done)
        finish_up(world, 4)


@pytest.mark.parametrize("then", ["wait", "gone", "announced again"])
def test_fencing_may_take_its_time(worlds: Worlds, then: str) -> None:
    world = worlds(held=True, fault_for=lambda i, pieces: Fault.STUCK if i == 1 else Fault.NONE)
    world.network.slow_fences = True
    world.ready()
    world.send(world.supply(world.place(1, N)))
    world.clock.time = world.reader.next_deadline()
    assert [u.reason for u in world.reader.poll() if isinstance(u, Failed)] == ["read_timeout"]
    world.cache.close(1)
    in_flight = world.cache.count("in flight")
    assert in_flight > 0
    if then == "gone":
        world.reader.peer_gone(1, "gone")
    elif then == "announced again":
        assert world.ready().state == "ready"
    world.clock.time += 3600.0
    assert world.reader.next_deadline() == float("inf")
    assert world.reader.poll() == []
    assert world.cache.count("in flight") == in_flight, "only the transport ends a read"
    assert world.reader.usable(1) == (then == "announced again")
    assert world.reader.counters.fences == 1
    world.settle()
    assert world.reader.num_reads == 0
    assert world.cache.is_idle
    assert len(world.sent(ReleaseLease)) == (then != "gone")


def test_a_read_that_cannot_even_be_queued_fails_the_order(worlds: Worlds) -> None:
    world = worlds(held=True)
    world.ready()
    place = world.place(1, N)
    world.send(world.owner.start(place))
    world.transport.disconnect(1)
    world.send(world.owner.compute(1, 40))
    assert [u.reason for u in world.reader.poll() if isinstance(u, Failed)] == ["peer_lost"]
    assert world.cache.count("in flight") == 0
    finish_up(world, 1)


def test_a_sequence_closed_without_a_cancel_ends_its_order_and_nothing_else(worlds: Worlds) -> None:
    world = worlds(held=True)
    world.ready()
    place = world.place(1, N)
    world.send(world.owner.start(place))
    world.send(world.owner.compute(1, 40))
    world.cache.close(1)
    world.send(world.owner.compute(1, 40))
    assert [u.reason for u in world.reader.poll() if isinstance(u, Failed)] == ["closed"]
    world.settle()
    finish_up(world)


def test_an_order_that_starts_after_it_was_dropped_gives_its_lease_back_once(worlds: Worlds) -> None:
    world = worlds()
    world.ready()
    place = world.place(1, N)
    accepted, started = world.owner.start(place)
    world.send([accepted])
    world.reader.cancel(1)
    world.send([started, started])
    assert world.reader.counters.late_events == 2
    finish_up(world, 1)


def test_own_tokens_in_a_block_that_is_in_flight_are_not_counted_on(worlds: Worlds) -> None:
    for stuck, num_verified in ((1, 0), (2, 32)):
        world = worlds(held=True, fault_for=lambda i, pieces, stuck=stuck: Fault.STUCK if i == stuck else Fault.NONE)
        world.ready()
        place = world.place(1, N, start=24)
        world.send(world.supply(place, chunk=8))
        world.settle()
        world.reader.peer_gone(1, "gone")
        failed = world.reader.poll()[-1]
        assert isinstance(failed, Failed)
        assert failed.num_verified == num_verified


def test_a_cancelled_orders_stuck_read_is_fenced_too(worlds: Worlds) -> None:
    world = worlds(held=True, fault_for=lambda i, pieces: Fault.STUCK)
    world.ready()
    world.send(world.owner.start(world.place(1, N)))
    world.send(world.owner.compute(1, 40))
    world.reader.cancel(1)
    world.cache.close(1)
    assert world.cache.count("in flight") == 2
    world.clock.time = world.reader.next_deadline()
    assert world.reader.poll() == []
    assert world.cache.count("in flight") == 2
    assert world.reader.poll() == []
    finish_up(world)


@pytest.mark.parametrize("upto", range(NUM_EVENTS + 1))
@pytest.mark.parametrize("delivered", [0, 1, 9])
def test_cancel_in_every_state_leaves_nothing(worlds: Worlds, upto: int, delivered: int) -> None:
    world = worlds(held=True)
    world.ready()
    place = world.place(1, N)
    events = world.supply(place, chunk=CHUNK)
    assert len(events) == NUM_EVENTS
    world.send(events[:upto])
    for _ in range(delivered):
        world.network.step()
    world.updates += world.reader.poll()
    ended = bool(world.ends())
    assert ended == (upto == NUM_EVENTS and delivered == 9)
    world.reader.cancel(1)
    world.reader.cancel(1)
    assert len(world.sent(DropOrder)) == (0 if upto == NUM_EVENTS else 1)
    waiting = world.network.num_waiting
    assert len(world.sent(ReleaseLease)) == (upto >= 2 and not waiting)
    world.cache.close(1)
    assert world.cache.count("in flight") == sum(len(b) for _, b in world.cache.reads.values())
    late = len(events[upto:])
    world.send(events[upto:])
    world.settle()
    assert world.reader.counters.late_events == late
    assert not [u for u in world.updates if not isinstance(u, Progress | TailRead)] or ended
    assert len(world.sent(ReleaseLease)) == 1
    assert world.reader.counters.cancelled == (not ended)
    finish_up(world)


@pytest.mark.parametrize("upto", range(NUM_EVENTS + 1))
@pytest.mark.parametrize("how", ["kill", "gone"])
def test_a_lost_owner_fails_its_orders_in_every_state(worlds: Worlds, upto: int, how: str) -> None:
    world = worlds(held=True)
    world.ready()
    place = world.place(1, N)
    world.send(world.supply(place, chunk=CHUNK)[:upto])
    world.network.step()
    world.updates += world.reader.poll()
    verified = world.updates[-1].num_verified if world.updates else 0
    if how == "kill":
        world.network.kill(world.owner.transport)
    else:
        world.reader.peer_gone(1, "stream broke")
    world.updates += world.reader.poll()
    (failed,) = world.ends()
    assert isinstance(failed, Failed)
    reasons = {"peer_gone"} if how == "gone" else {"peer_lost", "read_failed"}
    assert failed.reason in reasons
    assert failed.num_verified == verified
    assert world.same_bytes(1, 0, verified)
    world.updates += world.reader.poll()
    assert len(world.ends()) == 1
    assert not world.reader.usable(1)
    world.cache.close(1)
    assert world.cache.is_idle
    assert world.reader.num_reads == world.reader.num_orders == 0
    if how == "gone":
        assert not world.sent(ReleaseLease)
        assert not world.sent(DropOrder)
        assert world.reader.traffic() == []
        world.clock.time += 31.0
        world.owner.leases.expire()
        assert world.owner.cache.is_idle or world.owner.orders
    else:
        assert len(world.sent(ReleaseLease)) == (upto >= 2)
    world.reader.peer_gone(1, "again")


def test_an_owners_refusal_is_passed_on(worlds: Worlds) -> None:
    world = worlds()
    world.ready()
    place = world.place(1, N)
    failure = Failure.of(OverloadedError("no room"))
    world.send([OrderFailed(place.order_id, failure)])
    assert world.reader.poll() == [Failed(1, "rejected", 0, "no room", failure)]
    assert not world.sent(DropOrder)
    finish_up(world, 1)


def test_an_owner_that_fails_midway_gets_its_lease_back(worlds: Worlds) -> None:
    world = worlds(held=True)
    world.ready()
    place = world.place(1, N)
    world.send(world.owner.start(place))
    world.send(world.owner.compute(1, 40))
    world.send([OrderFailed(place.order_id, Failure.of(OverloadedError("lost it")))])
    assert [u.reason for u in world.reader.poll() if isinstance(u, Failed)] == ["rejected"]
    assert not world.sent(ReleaseLease), "a read is under way"
    world.settle()
    assert len(world.sent(ReleaseLease)) == 1
    assert not world.sent(DropOrder)
    world.owner.handle(DropOrder(1, place.order_id))
    finish_up(world, 1)


@pytest.mark.parametrize("fault", [Fault.NONE, Fault.FAIL, Fault.CORRUPT, Fault.STUCK])
@pytest.mark.parametrize("blocks", [(16, 16), (16, 32), (32, 16)])
def test_the_real_block_manager_agrees_at_every_step(worlds: Worlds, fault: Fault, blocks: tuple[int, int]) -> None:
    layouts = {"source": small_layout(blocks[0], window=40), "layout": small_layout(blocks[1], window=40)}
    reads = total_reads(worlds, **layouts)
    for bad in range(1, reads + 1):
        world = worlds(**layouts, held=True, fault_for=lambda i, pieces, bad=bad: fault if i == bad else Fault.NONE)
        cache = KVCacheManager(world.layout, world.clock)
        world.reader = HandoffReader(
            world.layout,
            RankReads(world.layout, world.bases, world.transport),
            cache,
            world.clock,
            world.config,
            world.commands.append,
        )
        world.ready()
        token_ids = prompt(N, seed=1)
        chain = chain_of(token_ids)
        cache.open(1, "r1")
        assert cache.reserve(1, N, fetch_to=N)
        assert cache.snapshots.reserve_tail(1) is not None
        world.reader.place(
            OrderSpec(seq_id=1, peer=1, request_id="r1", token_ids=token_ids, chain=chain, start_position=0)
        )
        for event in world.supply(world.commands[-1]):
            world.send([event])
            cache.check()
            world.network.step()
            world.updates += world.reader.poll()
            cache.check()
        if world.reader.num_orders:
            world.clock.time = world.reader.next_deadline()
            world.updates += world.reader.poll()
        (end,) = world.ends()
        assert isinstance(end, Done) == (fault is Fault.NONE)
        num_verified = N if isinstance(end, Done) else end.num_verified
        cache.advance(1, chain, num_verified)
        world.cache = SimpleNamespace(tables={1: {g.name: cache.block_table(1, g.name) for g in world.layout.groups}})
        assert world.same_bytes(1, 0, num_verified, tail=isinstance(end, Done))
        cache.close(1)
        world.reader.poll()
        cache.check_idle()
        world.deliver()
        assert world.owner.leases.num_active == 0
