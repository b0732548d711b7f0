from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from kvtransfer_support import MODEL, World, chain_of, prompt, region, small_layout, tail_region

from common.config.schema import HandoffConfig
from common.errors import OverloadedError, PeerLostError
from common.kvcache.layout import FULL_GROUP, TAIL_GROUP
from common.kvcache.manager import KVCacheManager
from common.kvtransfer.memory import Fault
from common.kvtransfer.orders import (
    DropOrder,
    OrderAccepted,
    OrderEvent,
    OrderExtent,
    OrderFailed,
    OrderFinished,
    OrderStarted,
    PeerVerdict,
    PlaceOrder,
    ReleaseLease,
)
from common.kvtransfer.reads import RankReads
from common.kvtransfer.session import Done, Failed, HandoffReader, OrderSpec, Progress
from common.kvtransfer.transport import Endpoint
from common.types import EmbeddingHandle, Failure

N = 90  # tokens of most prompts: five whole blocks of 16 and a part
CHUNK = 32
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


# -- what works --


@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize(("source_block", "reader_block"), [(16, 16), (16, 64), (64, 16), (48, 32)])
@pytest.mark.parametrize("start", [0, 32])
def test_a_prompt_is_handed_over(worlds: Worlds, source_block: int, reader_block: int, start: int, window: int) -> None:
    start = start // reader_block * reader_block
    world = worlds(source=small_layout(source_block, window=window), layout=small_layout(reader_block, window=window))
    assert world.ready().state == "ready"
    place = world.place(1, N, start)
    world.send(world.supply(place))
    world.settle()
    done = world.updates[-1]
    assert isinstance(done, Done)
    assert (done.seq_id, done.transport, done.worker_id) == (1, "memory/copy", "prefill-1")
    assert (done.queue_ms, done.compute_ms, done.remote_cached_tokens) == (1.0, 2.0, 0)
    assert done.nbytes > 0
    assert world.same_bytes(1, start, N, tail=True)
    verified = [u.num_verified for u in world.updates if isinstance(u, Progress)]
    assert verified == sorted(verified)
    assert verified[-1] == N
    assert [type(c) for c in world.commands] == [PeerVerdict, PlaceOrder, ReleaseLease]
    (traffic,) = world.reader.traffic()
    assert (traffic.nbytes, traffic.reads, traffic.mismatches) == (done.nbytes, world.reader.counters.reads, 0)
    finish_up(world, 1)


def test_extents_are_read_while_the_rest_is_computed_and_may_end_in_any_order(worlds: Worlds) -> None:
    world = worlds(held=True)
    world.ready()
    place = world.place(1, N)
    world.send(world.owner.start(place))
    world.send(world.owner.compute(1, 40))
    world.send(world.owner.compute(1, 20))
    assert world.network.num_waiting == 2
    assert world.cache.count("in flight") == 3
    assert world.network.step(1)
    assert world.reader.poll() == [Progress(1, 0)], "the second run alone supplies nothing"
    assert world.network.step()
    assert world.reader.poll() == [Progress(1, 48)]
    assert world.cache.count("in flight") == 0
    world.send(world.owner.compute(1, 90))
    assert not world.sent(ReleaseLease)
    world.settle()
    assert isinstance(world.updates[-1], Done)
    assert world.same_bytes(1, 0, N, tail=True)
    finish_up(world, 1)


def test_reads_into_one_block_follow_each_other(worlds: Worlds) -> None:
    world = worlds(layout=small_layout(64), held=True)
    world.ready()
    place = world.place(1, 80)
    world.send(world.supply(place, chunk=16))
    assert world.network.num_waiting == 1 + 1 + 1, "first run, the run past the block, the tail"
    world.settle()
    assert isinstance(world.updates[-1], Done)
    assert world.same_bytes(1, 0, 80, tail=True)
    finish_up(world, 1)


def test_bytes_that_land_again_after_completion_change_nothing(worlds: Worlds) -> None:
    world = worlds(held=True, fault_for=lambda i, pieces: Fault.REPEAT)
    world.ready()
    place = world.place(1, N)
    world.send(world.supply(place))
    world.settle()
    assert isinstance(world.updates[-1], Done)
    world.network.step()
    assert world.same_bytes(1, 0, N, tail=True)
    finish_up(world, 1)


def test_cold_regions_are_named_and_not_waited_for(worlds: Worlds) -> None:
    plain = small_layout()
    draft = msgspec.structs.replace(plain, regions=(*plain.regions, region("draft", required=False)))
    world = worlds(source=plain, layout=draft)
    verdict = world.ready()
    assert (verdict.state, verdict.detail) == ("ready", "cold regions: draft")
    world.send(world.supply(world.place(1, N)))
    world.settle()
    assert isinstance(world.updates[-1], Done)
    world.cache.close(1)
    extra = worlds(source=draft, layout=plain)
    assert extra.ready().state == "ready"
    extra.send(extra.supply(extra.place(1, N)))
    extra.settle()
    assert isinstance(extra.updates[-1], Done)
    assert extra.same_bytes(1, 0, N, tail=True)


def test_media_are_part_of_the_prefix(worlds: Worlds) -> None:
    handle = EmbeddingHandle(
        owner_id="e", owner_epoch=1, owner_address="", lease_id=1, media_hash=b"i" * 16, position=85, num_tokens=1,
        grid=(1, 1, 1), hidden_size=8, dtype="float32", descriptor=b"", digest=0, transport="memory", remaining_ms=1,
    )  # fmt: skip
    world = worlds()
    world.ready()
    chain = chain_of(prompt(N, seed=1), [(85, b"i" * 16)])
    place = world.place(1, N, embeddings=(handle,), chain=chain)
    for event in world.supply(place):
        world.send([event])
        world.settle()
    (failed,) = world.ends()
    assert isinstance(failed, Failed)
    assert failed.reason == "prefix_hash"
    assert failed.num_verified == 64, "the owner did not know the image in the last part"
    finish_up(world, 1)


# -- what fails --


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
        assert verified.num_verified == (0, CHUNK, 2 * CHUNK, N)[stuck - 1]
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


def stages(place: PlaceOrder, world: World) -> list[OrderEvent]:
    return world.supply(place, chunk=CHUNK)


NUM_EVENTS = 2 + 3 + 1 + 1  # accepted, started, three extents, the tail, finished


@pytest.mark.parametrize("upto", range(NUM_EVENTS + 1))
@pytest.mark.parametrize("delivered", [0, 1, 9])
def test_cancel_in_every_state_leaves_nothing(worlds: Worlds, upto: int, delivered: int) -> None:
    world = worlds(held=True)
    world.ready()
    place = world.place(1, N)
    events = stages(place, world)
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
    assert not [u for u in world.updates if not isinstance(u, Progress)] or ended
    assert len(world.sent(ReleaseLease)) == 1
    assert world.reader.counters.cancelled == (not ended)
    finish_up(world)


@pytest.mark.parametrize("upto", range(NUM_EVENTS + 1))
@pytest.mark.parametrize("how", ["kill", "gone"])
def test_a_lost_owner_fails_its_orders_in_every_state(worlds: Worlds, upto: int, how: str) -> None:
    world = worlds(held=True)
    world.ready()
    place = world.place(1, N)
    world.send(stages(place, world)[:upto])
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


# -- time --


def test_silence_ends_orders_on_an_idle_reader(worlds: Worlds) -> None:
    config = HandoffConfig(transports=("memory",), accept_timeout_s=2.0, progress_timeout_s=7.0)
    world = worlds(config=config)
    world.ready()
    begin = world.clock.now()
    silent, queued, started, short = (world.place(i, 20, remaining_s=r) for i, r in ((1, 0), (2, 0), (3, 0), (4, 1.5)))
    world.send([OrderAccepted(queued.order_id, N, 0)])
    world.send(world.owner.start(started))
    ends = []
    while world.reader.num_orders:
        world.clock.time = world.reader.next_deadline()
        ends += [(u.seq_id, u.reason, world.clock.now() - begin) for u in world.reader.poll()]
    assert ends == [
        (short.order_id, "deadline", 1.5),
        (silent.order_id, "accept_timeout", 2.0),
        (queued.order_id, "progress_timeout", 7.0),
        (started.order_id, "progress_timeout", 7.0),
    ]
    assert len(world.sent(DropOrder)) == 4
    assert len(world.sent(ReleaseLease)) == 1
    finish_up(world, 1, 2, 3, 4)


def test_an_order_that_is_over_before_it_is_placed_fails_at_once(worlds: Worlds) -> None:
    world = worlds()
    world.ready()
    world.place(1, N, remaining_s=-0.5)
    assert [u.reason for u in world.reader.poll() if isinstance(u, Failed)] == ["deadline"]
    finish_up(world, 1)


def test_progress_keeps_an_order_alive(worlds: Worlds) -> None:
    world = worlds()
    world.ready()
    world.send(world.owner.start(world.place(1, N)))
    while 1 in world.owner.orders:
        world.clock.time += world.config.progress_timeout_s - 0.1
        world.send(world.owner.compute(1, 16))
        world.settle()
    assert isinstance(world.updates[-1], Done)
    finish_up(world, 1)


def test_wait_seconds_count_from_the_owners_last_event(worlds: Worlds) -> None:
    world = worlds(held=True)
    world.ready()
    world.send(world.supply(world.place(1, 20)))
    world.clock.time += 3.0
    world.settle()
    done = world.updates[-1]
    assert isinstance(done, Done)
    assert done.wait_seconds == 3.0
    assert done.read_seconds == 6.0, "two reads"


# -- forged, doubled and misplaced events --


def tampered(extent: OrderExtent, **changes: Any) -> OrderExtent:
    return msgspec.structs.replace(extent, **changes)


FORGERIES: dict[str, Callable[[OrderExtent], OrderExtent]] = {
    "another lease": lambda e: tampered(e, lease_id=e.lease_id ^ 1),
    "no lease": lambda e: tampered(e, lease_id=0),
    "unknown group": lambda e: tampered(e, group="other"),
    "position before the order": lambda e: tampered(e, start_position=0),
    "position past the end": lambda e: tampered(e, start_position=80),
    "negative position": lambda e: tampered(e, start_position=-32),
    "huge position": lambda e: tampered(e, start_position=2**40),
    "no tokens": lambda e: tampered(e, num_tokens=0),
    "too many tokens": lambda e: tampered(e, num_tokens=2**31),
    "block outside the pool": lambda e: tampered(e, block_ids=(e.block_ids[0], 24)),
    "negative block": lambda e: tampered(e, block_ids=(-1, e.block_ids[1])),
    "huge block": lambda e: tampered(e, block_ids=(2**62, e.block_ids[1])),
    "too few blocks": lambda e: tampered(e, block_ids=e.block_ids[:1]),
    "too many blocks": lambda e: tampered(e, block_ids=(*e.block_ids, 0)),
    "too few digests": lambda e: tampered(e, digests=e.digests[:-1]),
    "no digests": lambda e: tampered(e, digests=()),
    "hash of other tokens": lambda e: tampered(e, prefix_hash=bytes(16)),
    "no hash": lambda e: tampered(e, prefix_hash=b""),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forged_extent_is_never_read(worlds: Worlds, forgery: str) -> None:
    world = worlds()
    world.ready()
    place = world.place(1, N, start=32)
    world.send(world.owner.start(place))
    (extent,) = world.owner.compute(place.order_id, 32)
    assert isinstance(extent, OrderExtent)
    world.send([FORGERIES[forgery](extent)])
    (failed,) = world.reader.poll()
    assert isinstance(failed, Failed)
    assert failed.reason == ("prefix_hash" if "hash" in forgery else "protocol")
    assert failed.num_verified == 32
    assert world.network.delivered == 0
    assert world.reader.counters.failed == {failed.reason: 1}
    finish_up(world, 1)


@pytest.mark.parametrize("forgery", ["block of others", "wrong digest", "swapped blocks"])
def test_forgeries_that_only_bytes_can_show_are_caught_by_the_digest(worlds: Worlds, forgery: str) -> None:
    world = worlds()
    world.ready()
    place = world.place(1, N)
    world.send(world.owner.start(place))
    (extent,) = world.owner.compute(place.order_id, 32)
    assert isinstance(extent, OrderExtent)
    changes: dict[str, Any] = {
        "block of others": {"block_ids": (20, extent.block_ids[1])},
        "wrong digest": {"digests": (*extent.digests[:-1], extent.digests[-1] ^ 1)},
        "swapped blocks": {"block_ids": extent.block_ids[::-1]},
    }[forgery]
    world.send([tampered(extent, **changes)])
    world.settle()
    assert [(u.reason, u.num_verified) for u in world.updates if isinstance(u, Failed)] == [("digest_mismatch", 0)]
    assert world.reader.counters.mismatches == 1
    assert world.reader.traffic()[0].mismatches == 1
    finish_up(world, 1)


def test_events_out_of_turn_fail_the_order(worlds: Worlds) -> None:
    template = worlds()
    template.ready()
    events = stages(template.place(1, N), template)
    accepted, started, first, second, third, tail, finished = events
    for wrong in (
        [started],
        [first],
        [finished],
        [accepted, accepted],
        [accepted, first],
        [accepted, finished],
        [accepted, msgspec.structs.replace(started, lease_id=0)],
        [accepted, started, started],
        [accepted, started, accepted],
        [accepted, started, first, first],
        [accepted, started, second, first],
        [accepted, started, finished],
        [accepted, started, first, third, tail, finished],
        [accepted, started, first, second, third, finished],
        [accepted, started, first, second, third, tail, tail],
        [accepted, started, first, second, third, tail, msgspec.structs.replace(finished, num_tokens=N - 1)],
        [accepted, started, first, second, third, tail, msgspec.structs.replace(finished, lease_id=5)],
    ):
        world = worlds(held=True)
        world.ready()
        world.place(1, N)
        world.send(wrong[:-1])
        assert not world.reader.poll()
        world.send(wrong[-1:])
        assert [u.reason for u in world.reader.poll() if isinstance(u, Failed)] == ["protocol"]
        world.cache.close(1)
        world.settle()
        assert world.cache.is_idle


def test_events_of_no_order_and_of_other_peers_are_counted_and_ignored(worlds: Worlds) -> None:
    world = worlds()
    world.ready(1)
    world.ready(2)
    place = world.place(1, N)
    events = stages(place, world)
    world.send(events, peer=2)
    world.send([msgspec.structs.replace(e, order_id=2**60) for e in events])
    assert world.reader.counters.unknown_events == 2 * NUM_EVENTS
    assert world.network.delivered == 0
    assert not world.sent(ReleaseLease)
    assert world.reader.num_orders == 1
    world.send(events)
    world.settle()
    assert isinstance(world.updates[-1], Done)
    world.send(events)
    assert world.reader.counters.late_events == NUM_EVENTS
    assert len(world.sent(ReleaseLease)) == 1
    finish_up(world, 1)


def test_an_expired_lease_is_a_mismatch_and_never_old_bytes(worlds: Worlds) -> None:
    world = worlds(held=True)
    world.ready()
    place = world.place(1, N)
    world.send(world.supply(place))
    world.clock.time += 9.0
    world.owner.clock.time += 22.0
    world.owner.leases.expire()
    assert world.owner.cache.is_idle
    world.clock.time = world.reader.next_deadline() - 1.0
    other = msgspec.structs.replace(place, order_id=9, request_id="r9", token_ids=prompt(N, seed=9))
    world.owner.start(other)
    world.settle()
    assert [u.reason for u in world.updates if isinstance(u, Failed)] == ["digest_mismatch"]


# -- pairs --


def refusal(world: World, **changes: Any) -> str:
    owner = world.owner
    given: dict[str, Any] = {"layout": owner.layout, "endpoints": (owner.transport.endpoint(),)} | changes
    world.reader.peer_ready(5, owner.ref, given["layout"], given["endpoints"], 30.0)
    verdict = world.commands[-1]
    assert isinstance(verdict, PeerVerdict)
    assert verdict.state == "refused"
    assert not world.reader.usable(5)
    return verdict.detail


def test_a_pair_that_does_not_fit_is_refused_with_the_field_named(worlds: Worlds) -> None:
    world = worlds()
    endpoint = world.owner.transport.endpoint()
    assert "model_hash" in refusal(world, layout=small_layout(model_hash=b"x" * 16))
    assert "region kv.dtype" in refusal(world, layout=small_layout(regions=(region(dtype="float16"), tail_region())))
    fp8 = small_layout(regions=(region(scale_format="e8m0"), tail_region()))
    assert "region kv.scale_format" in refusal(world, layout=fp8)
    assert "region hidden" in refusal(world, layout=small_layout(regions=(region(),)))
    assert "transports: source offers memory for 2 ranks" in refusal(world, layout=small_layout(tp_size=2))
    assert "transports: source offers ucx" in refusal(world, endpoints=(Endpoint("ucx", b"", ()),))
    assert "transports: source offers none" in refusal(world, endpoints=())
    short = Endpoint("memory", endpoint.address, endpoint.memory[:1])
    assert f"endpoint.memory[{TAIL_GROUP}]: 0 bytes" in refusal(world, endpoints=(short,))
    assert f"endpoint.memory[{FULL_GROUP}]" in refusal(world, layout=small_layout(num_blocks=25))


def test_transport_in_use_can_be_demanded(worlds: Worlds) -> None:
    strict = worlds(config=HandoffConfig(transports=("memory",), require_transport="ucx/rc"))
    assert "require_transport: ucx/rc is required, memory/copy" in refusal(strict)
    fine = worlds(config=HandoffConfig(transports=("memory",), require_transport="memory"))
    verdict = fine.ready()
    assert (verdict.state, verdict.transport) == ("ready", "memory/copy")
    none = worlds(config=HandoffConfig(transports=("ucx",)))
    assert "transports" in refusal(none)


@pytest.mark.parametrize("required", ["", "memory/copy", "memory/rdma"])
def test_a_verdict_waits_for_what_the_transport_runs_over(worlds: Worlds, required: str) -> None:
    world = worlds(config=HandoffConfig(transports=("memory",), require_transport=required), held=True)
    world.network.slow_connects = True
    world.reader.peer_ready(1, world.owner.ref, world.source, (world.owner.transport.endpoint(),), 30.0)
    assert world.commands == []
    assert not world.reader.usable(1)
    assert world.reader.poll() == []
    assert world.clock.now() < world.reader.next_deadline() <= world.clock.now() + 0.05
    world.network.step()
    world.reader.poll()
    (verdict,) = world.commands
    assert isinstance(verdict, PeerVerdict)
    assert (verdict.state, verdict.transport) == ("refused" if "rdma" in required else "ready", "memory/copy")
    assert world.reader.usable(1) == (verdict.state == "ready")
    assert world.reader.next_deadline() == float("inf")


@pytest.mark.parametrize("how", ["time", "death", "gone"])
def test_a_peer_that_never_connects_is_lost(worlds: Worlds, how: str) -> None:
    world = worlds(held=True)
    world.network.slow_connects = True
    world.reader.peer_ready(1, world.owner.ref, world.source, (world.owner.transport.endpoint(),), 30.0)
    if how == "time":
        world.clock.time += world.config.accept_timeout_s
    elif how == "death":
        world.network.kill(world.owner.transport)
    else:
        world.reader.peer_gone(1, "gone")
    world.reader.poll()
    assert [c.state for c in world.commands if isinstance(c, PeerVerdict)] == ([] if how == "gone" else ["lost"])
    assert world.reader.next_deadline() == float("inf")
    dead = worlds(held=True)
    dead.network.kill(dead.owner.transport)
    dead.reader.peer_ready(1, dead.owner.ref, dead.source, (dead.owner.transport.endpoint(),), 30.0)
    dead.reader.poll()
    assert [c.state for c in dead.commands if isinstance(c, PeerVerdict)] == ["lost"]


def test_the_first_usable_endpoint_is_taken(worlds: Worlds) -> None:
    world = worlds()
    ucx = Endpoint("ucx", b"?", ())
    world.reader.peer_ready(1, world.owner.ref, world.source, (ucx, world.owner.transport.endpoint()), 30.0)
    assert world.reader.usable(1)


def test_a_peer_announced_again_starts_anew(worlds: Worlds) -> None:
    world = worlds(held=True)
    world.ready()
    world.send(world.owner.start(world.place(1, N)))
    world.send(world.owner.compute(1, 40))
    assert world.ready().state == "ready"
    assert [u.reason for u in world.reader.poll() if isinstance(u, Failed)] == ["peer_lost"]
    assert world.reader.usable(1)
    finish_up(world, 1)
    world.send(world.supply(world.place(2, N)))
    world.settle()
    assert isinstance(world.updates[-1], Done)
    finish_up(world, 2)


def test_place_refuses_what_cannot_be_ordered(worlds: Worlds) -> None:
    world = worlds()
    with pytest.raises(PeerLostError):
        world.place(1, N)
    world.ready()
    world.place(2, N)
    spec = OrderSpec(seq_id=2, peer=1, request_id="", token_ids=(1,), chain=chain_of(()), start_position=0)
    with pytest.raises(ValueError, match="sequence 2"):
        world.reader.place(spec)
    for start in (-1, 1):
        with pytest.raises(ValueError, match="start_position"):
            world.reader.place(msgspec.structs.replace(spec, seq_id=3, start_position=start))
    assert world.reader.num_orders == 1


def test_an_order_carries_what_the_owner_needs(worlds: Worlds) -> None:
    world = worlds()
    world.ready()
    place = world.place(1, N, start=16, adapter_id="a", cache_salt="s", priority=3, remaining_s=4.5, traceparent="00-1")
    assert place == PlaceOrder(1, 1, "r1", prompt(N, seed=1), 16, "a", "s", (), 3, 4.5, "00-1")
    assert world.layout.model_hash == MODEL
    started = OrderStarted(1, 8, 70)
    world.send([OrderAccepted(1, N, 0), started])
    world.reader.cancel(1)
    assert world.sent(DropOrder) == [DropOrder(1, 1)]
    assert world.sent(ReleaseLease) == [ReleaseLease(1, 8)]
    assert isinstance(OrderFinished(1, 8, N, 0.0, 0.0), OrderFinished)
