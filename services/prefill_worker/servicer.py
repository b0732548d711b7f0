"""PrefillService: one session per decode worker, orders in, order events out."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from typing import Any, NamedTuple

import grpc

from common.engine.messages import EngineReady, FromEngine, ReaderEvent, ReaderGone
from common.errors import InvalidRequestError, LayoutMismatchError, OverloadedError, UnavailableError
from common.kvcache.layout import compare
from common.kvtransfer.orders import DropOrder, OrderEvent, OrderFailed, OrderFinished, OrderStarted, ReleaseLease
from common.rpc import codec
from common.telemetry import get_logger
from common.types import Clock, Failure, WorkerRef
from nanodeploy.v1 import prefill_pb2 as pb
from nanodeploy.v1 import prefill_pb2_grpc as pb_grpc
from services.worker.calls import first_message
from services.worker.host import EngineHost
from services.worker.trace import record_prefill, trace_fields

log = get_logger(__name__)

MAX_BACKLOG = 16384  # answers that a reader has not read when it is heard no longer
MAX_BATCH_NBYTES = 1 << 20


class _Began(NamedTuple):
    at_s: float
    traceparent: str
    request_id: str


class PrefillServicer(pb_grpc.PrefillServiceServicer):
    """`ref` is this worker with the running engine's epoch."""

    def __init__(self, host: EngineHost, ref: Callable[[], WorkerRef], clock: Clock) -> None:
        self._host = host
        self._ref = ref
        self._clock = clock
        self._keys = itertools.count(1)
        self._readers: dict[int, asyncio.Queue[pb.SessionResponse | None]] = {}
        self._orders: dict[tuple[int, int], _Began] = {}  # (reader, order id) of those under way
        self._leases: dict[tuple[int, int], tuple[int, float]] = {}  # the same -> lease id, when it ends by itself

    @property
    def num_active(self) -> int:
        """Orders that have neither finished nor failed nor been dropped, or whose reader may still be reading.

        It may until it has released the lease, the lease has run out, or the session has ended.
        """
        now = self._clock.now()
        self._leases = {order: lease for order, lease in self._leases.items() if lease[1] > now}
        return len(self._orders.keys() | self._leases.keys())

    async def Session(
        self, request_iterator: AsyncIterator[pb.SessionRequest], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.SessionResponse]:
        first = await first_message(request_iterator)
        if first is None or first.WhichOneof("message") != "hello":
            raise InvalidRequestError("the first message of a session must be hello", param="hello")
        welcome = self._welcome(codec.hello_from_proto(first.hello))
        key = next(self._keys)
        queue: asyncio.Queue[pb.SessionResponse | None] = asyncio.Queue()
        self._readers[key] = queue
        reader = asyncio.create_task(self._read(request_iterator, key, queue))
        try:
            yield codec.welcome_to_proto(welcome)
            ended = False
            while not ended and (response := await queue.get()) is not None:
                together, ended = _with_ready(response, queue)
                yield together
            if reader.done() and not reader.cancelled():
                reader.result()
        finally:
            reader.cancel()
            del self._readers[key]
            self._orders = {o: began for o, began in self._orders.items() if o[0] != key}
            self._leases = {o: lease for o, lease in self._leases.items() if o[0] != key}
            self._host.send(ReaderGone(key))

    def _welcome(self, hello: codec.Hello) -> codec.Welcome:
        ready = self._host.require_ready()
        if hello.expected_epoch != self._host.epoch:
            raise UnavailableError("this is another epoch of the worker: ask the controller again")
        verdict = compare(ready.layout, hello.layout)
        if not verdict.ok:
            raise LayoutMismatchError(f"the layouts do not convert: {verdict.reason}")
        log.info("session opened", reader=hello.reader.worker_id, equal_layout=verdict.equal)
        return codec.Welcome(self._ref(), ready.layout, ready.endpoints, ready.lease_ttl_s)

    async def _read(
        self,
        requests: AsyncIterator[pb.SessionRequest],
        key: int,
        queue: asyncio.Queue[pb.SessionResponse | None],
    ) -> None:
        try:
            async for request in requests:
                self._take(request, key, queue)
        finally:
            queue.put_nowait(None)

    def _take(self, request: pb.SessionRequest, key: int, queue: asyncio.Queue[pb.SessionResponse | None]) -> None:
        if queue.qsize() > MAX_BACKLOG:
            raise OverloadedError(f"the reader has left {queue.qsize()} answers unread")
        match request.WhichOneof("message"):
            case "prefill":
                self._order(request.prefill, key, queue)
            case "cancel":
                self._orders.pop((key, request.cancel.order_id), None)
                self._leases.pop((key, request.cancel.order_id), None)
                self._host.send(DropOrder(key, request.cancel.order_id))
            case "release":
                ended = (key, request.release.lease_id)
                self._leases = {o: lease for o, lease in self._leases.items() if (o[0], lease[0]) != ended}
                self._host.send(ReleaseLease(key, request.release.lease_id))
            case "ping":
                pong = pb.SessionPong(nonce=request.ping.nonce, steps=self._host.steps)
                queue.put_nowait(pb.SessionResponse(pong=pong))
            case _:
                raise InvalidRequestError("hello may come only once", param="message")

    def _order(self, wire: pb.PrefillOrder, key: int, queue: asyncio.Queue[pb.SessionResponse | None]) -> None:
        """Pass an order on. One that is malformed is refused by itself: the session's others are not its business."""
        try:
            order = codec.order_from_proto(wire, key)
        except InvalidRequestError as error:
            log.warning("order refused", reader=key, order_id=wire.order_id, error=error.message)
            queue.put_nowait(codec.order_event_to_proto(OrderFailed(wire.order_id, Failure.of(error))))
            return
        self._orders[key, order.order_id] = _Began(self._clock.now(), order.traceparent, order.request_id)
        self._host.send(order)
        log.info(
            "order received",
            **trace_fields(order.request_id, order.traceparent),
            reader=key,
            order_id=order.order_id,
            prompt_tokens=order.num_tokens,
            start_position=order.start_position,
        )

    # -- engine --

    def on_engine(self, message: FromEngine) -> None:
        if isinstance(message, ReaderEvent):
            key = (message.reader, message.event.order_id)
            if isinstance(message.event, OrderFinished | OrderFailed):
                began = self._orders.pop(key, None)
                if began is not None:
                    error = message.event.failure.message if isinstance(message.event, OrderFailed) else ""
                    record_prefill(began.traceparent, began.request_id, self._clock.now() - began.at_s, error)
            self._note_lease(key, message.event)
            queue = self._readers.get(message.reader)
            if queue is not None:
                queue.put_nowait(codec.order_event_to_proto(message.event))

    def _note_lease(self, key: tuple[int, int], event: OrderEvent) -> None:
        ready = self._host.ready
        if isinstance(event, OrderFailed) or ready is None or key[0] not in self._readers:
            self._leases.pop(key, None)
        elif isinstance(event, OrderStarted):
            self._leases[key] = (event.lease_id, self._clock.now() + ready.lease_ttl_s)
        elif key in self._leases:  # an extent renews it
            self._leases[key] = (self._leases[key][0], self._clock.now() + ready.lease_ttl_s)

    def on_engine_ready(self, ready: EngineReady) -> None:
        log.info("engine ready", max_model_len=ready.max_model_len, device=ready.device, dtype=ready.dtype)

    def on_engine_lost(self, reason: str) -> None:
        """Its memory is gone: every session ends, readers prefill elsewhere."""
        self._leases.clear()
        self.end_sessions()

    def end_sessions(self) -> None:
        for queue in self._readers.values():
            queue.put_nowait(None)


def _with_ready(
    first: pb.SessionResponse, queue: asyncio.Queue[pb.SessionResponse | None]
) -> tuple[pb.SessionResponse, bool]:
    """`first`, and with it what else is ready; is that the end?"""
    together, nbytes, ended = [first], first.ByteSize(), False
    while not ended and not queue.empty() and nbytes < MAX_BATCH_NBYTES:
        response = queue.get_nowait()
        if response is None:
            ended = True
        else:
            together.append(response)
            nbytes += response.ByteSize()
    return first if len(together) == 1 else pb.SessionResponse(batch=pb.SessionBatch(responses=together)), ended
