"""What a hand-off's sessions carry (layouts, endpoints, orders, what becomes of them): as `test_rpc_codec`."""

from __future__ import annotations

from typing import Any

import rpc_support as s
from codec_support import quick, refused, through_bytes
from hypothesis import given
from hypothesis import strategies as st

from common.rpc import codec
from nanodeploy.v1 import controller_pb2, prefill_pb2


@quick
@given(st.data())
def test_layout_and_endpoint_round_trip(data):
    layout = data.draw(s.layouts())
    assert codec.layout_from_proto(through_bytes(codec.layout_to_proto(layout))) == layout
    endpoint = data.draw(s.endpoints_of(layout))
    message = through_bytes(codec.endpoint_to_proto(endpoint))
    assert codec.endpoint_from_proto(message) == endpoint
    assert codec.endpoints_from_proto([message], layout) == (endpoint,)


@quick
@given(st.data())
def test_session_round_trip(data):
    layout = data.draw(s.layouts())
    hello = codec.Hello(data.draw(s.refs), layout, ("ucx", "memory"), data.draw(s.u64))
    assert codec.hello_from_proto(through_bytes(codec.hello_to_proto(hello)).hello) == hello
    welcome = codec.Welcome(data.draw(s.refs), layout, (data.draw(s.endpoints_of(layout)),), 30.0)
    assert codec.welcome_from_proto(through_bytes(codec.welcome_to_proto(welcome)).welcome) == welcome
    event = data.draw(s.order_events(layout))
    assert codec.order_event_from_proto(through_bytes(codec.order_event_to_proto(event)), layout) == event
    order = data.draw(s.orders(peer=7))
    assert codec.order_from_proto(through_bytes(codec.order_to_proto(order)).prefill, peer=7) == order


@quick
@given(st.data())
def test_bad_layouts(data):
    message = codec.layout_to_proto(data.draw(s.layouts()))
    cases = {
        "layout.fingerprint": lambda m: setattr(m, "fingerprint", b"x" * 16),
        "layout.tp_size": lambda m: setattr(m, "tp_size", 0),
        "layout.tp_rank": lambda m: setattr(m, "tp_rank", m.tp_size),
        "layout.model_hash": lambda m: setattr(m, "model_hash", b""),
        "layout.groups[0].block_size": lambda m: setattr(m.groups[0], "block_size", 0),
        "layout.groups[0].retention": lambda m: setattr(m.groups[0], "retention", 0),
        "layout.regions[0].num_units": lambda m: setattr(m.regions[0], "num_units", 0),
        "layout.regions[0].sharding": lambda m: setattr(m.regions[0], "sharding", 9),
        "layout": lambda m: setattr(m.regions[0], "group", "absent"),
    }
    for param, spoil in cases.items():
        spoiled = through_bytes(message)
        spoil(spoiled)
        refused(param, codec.layout_from_proto, spoiled)
    newer = through_bytes(message)
    newer.schema_version += 1
    newer.fingerprint = b"y" * 16
    assert codec.layout_from_proto(newer).schema_version == newer.schema_version


@quick
@given(st.data())
def test_bad_orders(data):
    message = codec.order_to_proto(data.draw(s.orders(7))).prefill
    packed = message.packed_tokens

    def spoil(param: str, change: Any) -> None:
        spoiled = through_bytes(message)
        change(spoiled)
        refused(param, codec.order_from_proto, spoiled, 7)

    spoil("prefill.packed_tokens", lambda o: setattr(o, "packed_tokens", packed[:-1]))
    spoil("prefill.packed_tokens", lambda o: setattr(o, "packed_tokens", packed + (2**31).to_bytes(4, "little")))
    spoil("prefill.start_position", lambda o: setattr(o, "packed_tokens", packed[: 4 * o.start_position]))
    spoil("prefill.start_position", lambda o: setattr(o, "start_position", len(packed) // 4))


@quick
@given(st.data())
def test_bad_extents(data):
    layout = data.draw(s.layouts())
    event = data.draw(s.order_events(layout).filter(lambda e: hasattr(e, "block_ids")))
    message = codec.order_event_to_proto(event)
    group = layout.group(event.group)

    def spoil(param: str, change: Any) -> None:
        spoiled = through_bytes(message)
        change(spoiled.extent)
        refused(param, codec.order_event_from_proto, spoiled, layout)

    spoil("extent.group", lambda e: setattr(e, "group", "absent"))
    spoil("extent.num_tokens", lambda e: setattr(e, "num_tokens", 0))
    spoil("extent.prefix_hash", lambda e: setattr(e, "prefix_hash", b"1"))
    spoil("extent.block_ids", lambda e: e.block_ids.append(0))
    spoil("extent.block_ids", lambda e: e.block_ids.__setitem__(0, group.num_blocks))
    spoil("extent.digests", lambda e: e.digests.append(1))
    if group.block_size > 1:
        spoil("extent.start_position", lambda e: setattr(e, "start_position", 1))
    if len(event.block_ids) > 1:
        spoil("extent.block_ids", lambda e: e.block_ids.__setitem__(0, e.block_ids[1]))


@quick
@given(st.data())
def test_bad_endpoints(data):
    layout = data.draw(s.layouts())
    message = codec.endpoint_to_proto(data.draw(s.endpoints_of(layout)))
    short = through_bytes(message)
    short.memory[0].nbytes -= 1
    refused("endpoints[0].memory", codec.endpoints_from_proto, [short], layout)
    strange = through_bytes(message)
    strange.memory[0].group = "absent"
    refused("endpoints[0].memory", codec.endpoints_from_proto, [strange], layout)
    twice = through_bytes(message)
    twice.memory.append(twice.memory[0])
    refused("endpoint.memory", codec.endpoint_from_proto, twice)


def test_not_an_order_event():
    layout_free = prefill_pb2.SessionResponse(pong=prefill_pb2.SessionPong(nonce=1))
    for message in (layout_free, prefill_pb2.SessionResponse()):
        refused("message", codec.order_event_from_proto, message, None)
    refused("event", codec.watch_event_from_proto, controller_pb2.WatchResponse())
