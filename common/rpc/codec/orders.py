"""The messages of a prefill Session: hello, welcome, orders out, order events back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from common.kvcache.layout import KVLayout
from common.kvtransfer.orders import (
    OrderAccepted,
    OrderEvent,
    OrderExtent,
    OrderFailed,
    OrderFinished,
    OrderStarted,
    PlaceOrder,
)
from common.kvtransfer.transport import Endpoint
from common.rpc.codec import checks
from common.rpc.codec.errors import failure_from_proto, failure_to_proto
from common.rpc.codec.layout import endpoint_to_proto, endpoints_from_proto, layout_from_proto, layout_to_proto
from common.rpc.codec.request import embedding_to_proto, embeddings_from_proto, remaining_ms
from common.rpc.codec.worker import ref_from_proto, ref_to_proto
from common.types import WorkerRef
from nanodeploy.v1 import prefill_pb2 as pb


class Hello(NamedTuple):
    """What the reader says first. `transports` best first; `expected_epoch` is the owner's."""

    reader: WorkerRef
    layout: KVLayout
    transports: tuple[str, ...]
    expected_epoch: int


class Welcome(NamedTuple):
    """The owner's answer."""

    owner: WorkerRef
    layout: KVLayout
    endpoints: tuple[Endpoint, ...]
    lease_ttl_s: float


def hello_to_proto(hello: Hello) -> pb.SessionRequest:
    return pb.SessionRequest(
        hello=pb.SessionHello(
            reader=ref_to_proto(hello.reader),
            layout=layout_to_proto(hello.layout),
            transports=hello.transports,
            expected_epoch=hello.expected_epoch,
        )
    )


def hello_from_proto(hello: pb.SessionHello) -> Hello:
    return Hello(
        reader=ref_from_proto(hello.reader, "hello.reader"),
        layout=layout_from_proto(hello.layout, "hello.layout"),
        transports=tuple(checks.identifier(t, "hello.transports") for t in hello.transports),
        expected_epoch=hello.expected_epoch,
    )


def welcome_to_proto(welcome: Welcome) -> pb.SessionResponse:
    return pb.SessionResponse(
        welcome=pb.SessionWelcome(
            owner=ref_to_proto(welcome.owner),
            layout=layout_to_proto(welcome.layout),
            endpoints=[endpoint_to_proto(e) for e in welcome.endpoints],
            lease_ttl_ms=remaining_ms(welcome.lease_ttl_s),
        )
    )


def welcome_from_proto(welcome: pb.SessionWelcome) -> Welcome:
    layout = layout_from_proto(welcome.layout, "welcome.layout")
    return Welcome(
        owner=ref_from_proto(welcome.owner, "welcome.owner"),
        layout=layout,
        endpoints=endpoints_from_proto(welcome.endpoints, layout),
        lease_ttl_s=checks.at_least(welcome.lease_ttl_ms, 1, "welcome.lease_ttl_ms") / 1000,
    )


def order_to_proto(order: PlaceOrder) -> pb.SessionRequest:
    return pb.SessionRequest(
        prefill=pb.PrefillOrder(
            order_id=order.order_id,
            request_id=order.request_id,
            adapter_id=order.adapter_id,
            cache_salt=order.cache_salt,
            packed_tokens=order.packed_tokens,
            start_position=order.start_position,
            embeddings=[embedding_to_proto(e) for e in order.embeddings],
            priority=order.priority,
            remaining_ms=remaining_ms(order.remaining_s),
            traceparent=order.traceparent,
        )
    )


def order_from_proto(order: pb.PrefillOrder, peer: int) -> PlaceOrder:
    """The order as its reader placed it; `peer` is the key that this side gave the session."""
    num_tokens = checks.packed_tokens(order.packed_tokens, "prefill.packed_tokens")
    if order.start_position >= num_tokens:
        raise checks.fail("prefill.start_position", f"{order.start_position} is not below {num_tokens} tokens")
    return PlaceOrder(
        peer=peer,
        order_id=order.order_id,
        request_id=checks.identifier(order.request_id, "prefill.request_id"),
        packed_tokens=order.packed_tokens,
        start_position=order.start_position,
        adapter_id=checks.short_text(order.adapter_id, "prefill.adapter_id"),
        cache_salt=checks.short_text(order.cache_salt, "prefill.cache_salt"),
        embeddings=embeddings_from_proto(order.embeddings, num_tokens, "prefill.embeddings"),
        priority=order.priority,
        remaining_s=order.remaining_ms / 1000,
        traceparent=checks.traceparent(order.traceparent),
    )


def order_event_to_proto(event: OrderEvent) -> pb.SessionResponse:
    match event:
        case OrderAccepted():
            return pb.SessionResponse(
                accepted=pb.PrefillAccepted(
                    order_id=event.order_id,
                    promised_tokens=event.promised_tokens,
                    queue_tokens=event.queue_tokens,
                )
            )
        case OrderStarted():
            return pb.SessionResponse(
                started=pb.PrefillStarted(
                    order_id=event.order_id, lease_id=event.lease_id, cached_tokens=event.cached_tokens
                )
            )
        case OrderExtent():
            return pb.SessionResponse(extent=_extent_to_proto(event))
        case OrderFinished():
            return pb.SessionResponse(
                finished=pb.PrefillFinished(
                    order_id=event.order_id,
                    lease_id=event.lease_id,
                    num_tokens=event.num_tokens,
                    queue_ms=event.queue_ms,
                    compute_ms=event.compute_ms,
                )
            )
        case OrderFailed():
            return pb.SessionResponse(
                failed=pb.PrefillFailed(order_id=event.order_id, error=failure_to_proto(event.failure))
            )


def order_event_from_proto(response: pb.SessionResponse, layout: KVLayout) -> OrderEvent:
    """An order event of the owner of `layout`; anything else is refused (field 'message')."""
    match response.WhichOneof("message"):
        case "accepted":
            a = response.accepted
            return OrderAccepted(a.order_id, a.promised_tokens, a.queue_tokens)
        case "started":
            s = response.started
            return OrderStarted(s.order_id, s.lease_id, s.cached_tokens)
        case "extent":
            return _extent_from_proto(response.extent, layout)
        case "finished":
            f = response.finished
            return OrderFinished(f.order_id, f.lease_id, f.num_tokens, f.queue_ms, f.compute_ms)
        case "failed":
            return OrderFailed(response.failed.order_id, failure_from_proto(response.failed.error))
        case other:
            raise checks.fail("message", f"must be an order event, got {other or 'nothing'}")


def _extent_to_proto(extent: OrderExtent) -> pb.PrefillExtent:
    return pb.PrefillExtent(
        order_id=extent.order_id,
        lease_id=extent.lease_id,
        group=extent.group,
        start_position=extent.start_position,
        num_tokens=extent.num_tokens,
        block_ids=extent.block_ids,
        prefix_hash=extent.prefix_hash,
        digests=extent.digests,
    )


def _extent_from_proto(extent: pb.PrefillExtent, layout: KVLayout) -> OrderExtent:
    spec = next((g for g in layout.groups if g.name == extent.group), None)
    if spec is None:
        raise checks.fail("extent.group", f"{extent.group!r} is not in the owner's layout")
    checks.at_least(extent.num_tokens, 1, "extent.num_tokens")
    if extent.start_position % spec.block_size:
        raise checks.fail("extent.start_position", f"{extent.start_position} is not the start of a block")
    _check_blocks(extent.block_ids, -(-extent.num_tokens // spec.block_size), spec.num_blocks)
    want = len(extent.block_ids) * layout.num_digests(spec.name)
    if len(extent.digests) != want:
        raise checks.fail("extent.digests", f"has {len(extent.digests)} entries, not {want}")
    return OrderExtent(
        order_id=extent.order_id,
        lease_id=extent.lease_id,
        group=extent.group,
        start_position=extent.start_position,
        num_tokens=extent.num_tokens,
        block_ids=tuple(extent.block_ids),
        prefix_hash=checks.hash_bytes(extent.prefix_hash, "extent.prefix_hash"),
        digests=tuple(extent.digests),
    )


def _check_blocks(block_ids: Sequence[int], want: int, num_blocks: int) -> None:
    if len(block_ids) != want:
        raise checks.fail("extent.block_ids", f"has {len(block_ids)} entries, the tokens need {want}")
    if len(set(block_ids)) != len(block_ids):
        raise checks.fail("extent.block_ids", "names a block twice")
    if max(block_ids) >= num_blocks:
        raise checks.fail("extent.block_ids", f"names block {max(block_ids)} of {num_blocks}")
