"""Events that an owner should not send: forged, doubled, out of turn, of other orders, or too late."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from handoff_support import CHUNK, NUM_EVENTS, N, Worlds, finish_up, worlds
from kvtransfer_support import prompt

from common.kvtransfer.orders import OrderExtent, ReleaseLease
from common.kvtransfer.session import Done, Failed
from common.types.prefix import pack_tokens

__all__ = ["worlds"]


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
    events = template.supply(template.place(1, N), chunk=CHUNK)
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
    events = world.supply(place, chunk=CHUNK)
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
    other = msgspec.structs.replace(place, order_id=9, request_id="r9", packed_tokens=pack_tokens(prompt(N, seed=9)))
    world.owner.start(other)
    world.settle()
    assert [u.reason for u in world.updates if isinstance(u, Failed)] == ["digest_mismatch"]
