"""A prefill worker's sessions over a real server and clients; the engine behind it is scripted."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
from kvtransfer_support import region, small_layout, tail_region
from wire_support import order, responses_of
from worker_support import ManualClock, ScriptedWorker, engine_load, scripted

from common.engine.messages import EngineProgress, ReaderEvent, ReaderGone
from common.errors import InvalidRequestError, LayoutMismatchError, NanoDeployError, UnavailableError
from common.kvtransfer.orders import (
    DropOrder,
    OrderAccepted,
    OrderEvent,
    OrderExtent,
    OrderFailed,
    OrderFinished,
    OrderStarted,
    PlaceOrder,
    ReleaseLease,
)
from common.rpc import codec
from common.rpc.status import error_from_rpc
from common.types import Failure, WorkerRef
from common.types.prefix import pack_tokens
from nanodeploy.v1 import prefill_pb2, prefill_pb2_grpc, types_pb2
from services.prefill_worker.part import PrefillPart


class Reader:
    """A decode worker's end of a session, bare."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        stub: Any = prefill_pb2_grpc.PrefillServiceStub
        self.call = stub(channel).Session()
        self.num_messages = 0
        self._arrived: deque[prefill_pb2.SessionResponse] = deque()

    async def hello(self, worker: ScriptedWorker, layout: Any = None, epoch: int | None = None) -> codec.Welcome:
        hello = codec.Hello(
            WorkerRef("decode-0", 3, "127.0.0.1:1"),
            layout or small_layout(),
            ("ucx",),
            worker.host.epoch if epoch is None else epoch,
        )
        await self.call.write(codec.hello_to_proto(hello))
        return codec.welcome_from_proto((await self.read()).welcome)

    async def write(self, **message: Any) -> None:
        await self.call.write(prefill_pb2.SessionRequest(**message))

    async def read(self) -> prefill_pb2.SessionResponse:
        """The next response, batched or not."""
        if not self._arrived:
            message: Any = await asyncio.wait_for(self.call.read(), 10)
            if not isinstance(message, prefill_pb2.SessionResponse):  # grpc.aio.EOF
                raise EOFError
            self.num_messages += 1
            self._arrived.extend(responses_of(message))
        return self._arrived.popleft()

    async def read_on(self) -> None:
        while True:
            await self.read()

    async def failure(self) -> NanoDeployError:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.read()
        return error_from_rpc(caught.value)


@pytest.fixture
async def prefill() -> AsyncIterator[tuple[ScriptedWorker, Callable[[], Reader]]]:
    async with scripted(PrefillPart) as (worker, channel):
        yield worker, lambda: Reader(channel)


Prefill = tuple[ScriptedWorker, Callable[[], Reader]]


async def test_a_session_brings_orders_in_and_events_out(prefill: Prefill) -> None:
    worker, connect = prefill
    reader = connect()
    welcome = await reader.hello(worker)
    assert (welcome.owner.epoch, welcome.layout, welcome.lease_ttl_s) == (worker.host.epoch, small_layout(), 5.0)
    await reader.call.write(codec.order_to_proto(order(0)))
    placed = await worker.engine.got(PlaceOrder)
    assert (placed.order_id, placed.token_ids, placed.remaining_s) == (9, [5, 6, 7], 3.0)
    assert worker.part.num_active() == 1
    digests = tuple(range(small_layout().num_digests("full")))
    events: list[OrderEvent] = [
        OrderAccepted(9, 3, 0),
        OrderStarted(9, 1234, 0),
        OrderExtent(9, 1234, "full", 0, 3, (4,), bytes(16), digests),
        OrderFinished(9, 1234, 3, 0.0, 1.0),
    ]
    for event in events:
        worker.engine.say(ReaderEvent(placed.peer, event))
    worker.engine.say(ReaderEvent(placed.peer + 1, OrderAccepted(9, 3, 0)))
    before = reader.num_messages
    assert [codec.order_event_from_proto(await reader.read(), small_layout()) for _ in events] == events
    assert reader.num_messages == before + 1, "what is ready leaves together"
    assert worker.part.num_active() == 1  # it has yet to read
    await reader.write(release=prefill_pb2.LeaseRelease(lease_id=1234))
    await reader.write(cancel=prefill_pb2.PrefillCancel(order_id=9))
    assert await worker.engine.got(ReleaseLease) == ReleaseLease(placed.peer, 1234)
    assert await worker.engine.got(DropOrder) == DropOrder(placed.peer, 9)
    assert worker.part.num_active() == 0
    worker.engine.say(engine_load(steps=42))
    await reader.write(ping=prefill_pb2.SessionPing(nonce=7))
    pong = (await reader.read()).pong
    assert (pong.nonce, pong.steps) == (7, 42)
    worker.engine.say(EngineProgress("step", 0, 0))  # amid a long one
    await reader.write(ping=prefill_pb2.SessionPing(nonce=8))
    assert (await reader.read()).pong.steps == 43
    reader.call.cancel()
    assert await worker.engine.got(ReaderGone) == ReaderGone(placed.peer)


async def test_orders_under_way_are_counted_until_they_end_whatever_ends_them(prefill: Prefill) -> None:
    worker, connect = prefill
    reader = connect()
    await reader.hello(worker)
    for order_id in range(1, 5):
        await reader.call.write(codec.order_to_proto(order(0, order_id)))
    key = (await worker.engine.got(PlaceOrder, 4)).peer
    assert worker.part.num_active() == 4
    worker.engine.say(ReaderEvent(key, OrderFailed(1, Failure("overloaded", "full"))))
    await reader.write(cancel=prefill_pb2.PrefillCancel(order_id=2))
    await worker.engine.got(DropOrder)
    assert worker.part.num_active() == 2
    reader.call.cancel()
    await worker.engine.got(ReaderGone)
    assert worker.part.num_active() == 0


async def test_a_lease_is_waited_for_until_its_reader_has_read(prefill: Prefill) -> None:
    worker, connect = prefill
    clock = worker.part._servicer._clock = ManualClock()
    reader, other = connect(), connect()
    for one in (reader, other):
        await one.hello(worker)
        await one.call.write(codec.order_to_proto(order(0, 1)))
        await one.call.write(codec.order_to_proto(order(0, 2)))
        await worker.engine.got(PlaceOrder, 2 if one is reader else 4)
    first, _, second, _ = (m.peer for m in worker.engine.sent if isinstance(m, PlaceOrder))

    def computed(peer: int, order_id: int, lease_id: int) -> None:
        worker.engine.say(ReaderEvent(peer, OrderStarted(order_id, lease_id, 0)))
        worker.engine.say(ReaderEvent(peer, OrderFinished(order_id, lease_id, 3, 0.1, 0.2)))

    for lease_id, (peer, order_id) in enumerate([(first, 1), (first, 2), (second, 1), (second, 2)], 50):
        computed(peer, order_id, lease_id)
    assert worker.part.num_active() == 4
    await reader.write(release=prefill_pb2.LeaseRelease(lease_id=50))
    await worker.engine.got(ReleaseLease)
    assert worker.part.num_active() == 3
    await reader.write(cancel=prefill_pb2.PrefillCancel(order_id=2))
    await worker.engine.got(DropOrder)
    assert worker.part.num_active() == 2
    clock.advance(3.0)
    worker.engine.say(ReaderEvent(second, OrderFinished(2, 53, 3, 0.1, 0.2)))  # renewed
    clock.advance(3.0)  # the engine's lease_ttl_s is 5
    assert worker.part.num_active() == 1
    other.call.cancel()
    await worker.engine.got(ReaderGone)
    assert worker.part.num_active() == 0


async def test_a_reader_of_another_epoch_is_sent_away(prefill: Prefill) -> None:
    worker, connect = prefill
    reader = connect()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await reader.hello(worker, epoch=worker.host.epoch ^ 2)
    assert isinstance(error_from_rpc(caught.value), UnavailableError)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_hash": b"x" * 16}, "model_hash"),
        ({"regions": (region(dtype="float32"), tail_region())}, "region kv.dtype"),
        ({"regions": (region(num_layers=3), tail_region())}, "region kv.num_layers"),
        ({"regions": (region(),)}, "region hidden"),
    ],
)
async def test_layouts_that_do_not_convert_are_refused_by_field(
    prefill: Prefill, change: dict[str, Any], words: str
) -> None:
    worker, connect = prefill
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await connect().hello(worker, small_layout(**change))
    error = error_from_rpc(caught.value)
    assert isinstance(error, LayoutMismatchError)
    assert words in error.message


async def test_a_session_that_does_not_begin_with_hello_is_ended(
    prefill: Prefill, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, connect = prefill
    for message in ({"ping": prefill_pb2.SessionPing()}, {}, {"hello": prefill_pb2.SessionHello()}):
        reader = connect()
        await reader.write(**message)
        assert isinstance(await reader.failure(), InvalidRequestError)
    monkeypatch.setattr("services.worker.calls.FIRST_MESSAGE_S", 0.1)
    assert "said nothing" in (await connect().failure()).message


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"packed_tokens": b""}, "start_position"),
        ({"start_position": 1}, "start_position"),
        ({"packed_tokens": bytes(7)}, "packed_tokens"),
        ({"packed_tokens": b"\xff" * 4}, "packed_tokens"),
        ({"request_id": "no spaces"}, "request_id"),
        ({"adapter_id": "a" * 2000}, "adapter_id"),
        ({"embeddings": [types_pb2.EmbeddingHandle(num_tokens=5)]}, "embeddings"),
    ],
)
async def test_a_malformed_order_is_refused_by_itself(prefill: Prefill, fields: dict[str, Any], field: str) -> None:
    worker, connect = prefill
    reader = connect()
    await reader.hello(worker)
    await reader.call.write(codec.order_to_proto(order(0, 1)))
    malformed = {"order_id": 2, "request_id": "r", "packed_tokens": pack_tokens([1])} | fields
    await reader.write(prefill=prefill_pb2.PrefillOrder(**malformed))
    await reader.call.write(codec.order_to_proto(order(0, 3)))
    refused = codec.order_event_from_proto(await reader.read(), small_layout())
    assert isinstance(refused, OrderFailed)
    assert (refused.order_id, refused.failure.code) == (2, InvalidRequestError.code)
    assert refused.failure.param.startswith(f"prefill.{field}")
    last = await worker.engine.got(PlaceOrder, 2)
    assert last.order_id == 3
    assert worker.part.num_active() == 2
    for order_id in (1, 3):
        worker.engine.say(ReaderEvent(last.peer, OrderFinished(order_id, 5, 3, 0.0, 1.0)))
        assert (await reader.read()).finished.order_id == order_id


async def test_a_second_hello_ends_the_session_and_no_other(prefill: Prefill) -> None:
    worker, connect = prefill
    bad, good = connect(), connect()
    await bad.hello(worker)
    await good.hello(worker)
    await bad.write(hello=prefill_pb2.SessionHello())
    assert isinstance(await bad.failure(), InvalidRequestError)
    await worker.engine.got(ReaderGone)
    await good.write(ping=prefill_pb2.SessionPing(nonce=1))
    assert (await good.read()).pong.nonce == 1


async def test_sessions_end_with_the_engine(prefill: Prefill) -> None:
    worker, connect = prefill
    reader = connect()
    await reader.hello(worker)
    worker.engine.die()
    with pytest.raises(EOFError):
        await reader.read()
    late = connect()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await late.hello(worker)
    assert isinstance(error_from_rpc(caught.value), UnavailableError)


async def test_a_session_ends_behind_what_was_ready_before_its_end(prefill: Prefill) -> None:
    """And with it: what comes later does not hold it up."""
    worker, connect = prefill
    reader = connect()
    await reader.hello(worker)
    (queue,) = worker.part._servicer._readers.values()
    for nonce in (1, 2, None, 3):
        queue.put_nowait(nonce and prefill_pb2.SessionResponse(pong=prefill_pb2.SessionPong(nonce=nonce)))
    assert [(await reader.read()).pong.nonce for _ in range(2)] == [1, 2]
    with pytest.raises(EOFError):
        await reader.read()


async def test_a_batch_is_cut_where_it_is_long(prefill: Prefill, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.prefill_worker.servicer.MAX_BATCH_NBYTES", 25)
    worker, connect = prefill
    reader = connect()
    await reader.hello(worker)
    (queue,) = worker.part._servicer._readers.values()
    before = reader.num_messages
    pongs = [prefill_pb2.SessionResponse(pong=prefill_pb2.SessionPong(nonce=2**63 + i)) for i in range(6)]
    assert pongs[0].ByteSize() == 13
    for pong in pongs:
        queue.put_nowait(pong)
    assert [(await reader.read()).pong.nonce for _ in pongs] == [pong.pong.nonce for pong in pongs]
    assert reader.num_messages - before == 3, "two of 13 bytes reach 25"


async def test_a_reader_that_does_not_read_is_not_answered_for_ever(
    prefill: Prefill, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.prefill_worker.servicer.MAX_BACKLOG", 100)
    monkeypatch.setattr("services.prefill_worker.servicer.MAX_BATCH_NBYTES", 0)
    worker, connect = prefill
    reader = connect()
    await reader.hello(worker)
    (queue,) = worker.part._servicer._readers.values()
    for _ in range(200):
        queue.put_nowait(prefill_pb2.SessionResponse(pong=prefill_pb2.SessionPong()))
    await reader.write(ping=prefill_pb2.SessionPing(nonce=1))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await reader.read_on()
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
