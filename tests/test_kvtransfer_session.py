"""Hand-offs that go well, what their time limits end, and which pairs of workers there are."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from handoff_support import N, World, Worlds, finish_up, worlds
from kvtransfer_support import MODEL, chain_of, prompt, region, small_layout, tail_region

from common.config.schema import HandoffConfig
from common.errors import PeerLostError
from common.kvcache.layout import FULL_GROUP, TAIL_GROUP
from common.kvtransfer.memory import Fault
from common.kvtransfer.orders import (
    DropOrder,
    OrderAccepted,
    OrderFinished,
    OrderStarted,
    PeerVerdict,
    PlaceOrder,
    ReleaseLease,
)
from common.kvtransfer.session import LONGEST_TURN_S, Done, Failed, OrderSpec, Progress
from common.kvtransfer.transport import Endpoint
from common.types import EmbeddingHandle
from common.types.prefix import pack_tokens

__all__ = ["worlds"]


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


def test_a_worker_that_computes_others_is_waited_for(worlds: Worlds) -> None:
    """By orders that were not taken yet, that queue, and that are computed in a long step; by none of other peers."""
    world = worlds()
    world.ready()
    begin = world.clock.now()
    unheard, queued, started = (world.place(i, N) for i in (1, 2, 3))
    world.send([OrderAccepted(queued.order_id, N, 0)])
    world.send(world.owner.start(started))
    assert unheard.peer != 999
    while world.clock.now() - begin < 200:
        world.clock.time += world.config.accept_timeout_s - 0.1
        world.reader.peer_computes(unheard.peer)
        assert world.reader.poll() == []
    world.reader.peer_computes(999)
    world.clock.time += world.config.progress_timeout_s
    failed = {u.seq_id: u.reason for u in world.reader.poll() if isinstance(u, Failed)}
    assert failed == {1: "accept_timeout", 2: "progress_timeout", 3: "progress_timeout"}
    finish_up(world, 1, 2, 3)


def test_a_turn_that_never_comes_ends(worlds: Worlds) -> None:
    world = worlds()
    world.ready()
    peer = world.place(1, N).peer
    waited_s = 0.0
    while world.reader.num_orders:
        world.clock.time += 2.0
        waited_s += 2.0
        world.reader.peer_computes(peer)
        world.reader.poll()
        assert waited_s <= LONGEST_TURN_S + world.config.accept_timeout_s
    assert waited_s >= LONGEST_TURN_S
    finish_up(world, 1)


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
    assert place == PlaceOrder(1, 1, "r1", pack_tokens(prompt(N, seed=1)), 16, "a", "s", (), 3, 4.5, "00-1")
    assert world.layout.model_hash == MODEL
    started = OrderStarted(1, 8, 70)
    world.send([OrderAccepted(1, N, 0), started])
    world.reader.cancel(1)
    assert world.sent(DropOrder) == [DropOrder(1, 1)]
    assert world.sent(ReleaseLease) == [ReleaseLease(1, 8)]
    assert isinstance(OrderFinished(1, 8, N, 0.0, 0.0), OrderFinished)
