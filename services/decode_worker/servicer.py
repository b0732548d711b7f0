"""DecodeService: translates between the wire and the streams, sessions and engine of one decode worker."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import msgspec

from common.engine.messages import Deltas, EngineLoad, EngineReady, FromEngine, Submit
from common.errors import InternalError, InvalidRequestError, NanoDeployError, NotFoundError
from common.kvtransfer.orders import DropOrder, PeerVerdict, PlaceOrder, ReleaseLease
from common.rpc import codec
from common.telemetry import get_logger
from common.types import Clock, Failure, GenerationRequest, WorkerRef
from nanodeploy.v1 import decode_pb2 as pb
from nanodeploy.v1 import decode_pb2_grpc as pb_grpc
from nanodeploy.v1 import types_pb2
from services.decode_worker.sessions import PrefillSessions
from services.decode_worker.streams import GENERATE_PREFIX, Link, Rows, Streams
from services.decode_worker.tokenlog import RequestLog
from services.worker.calls import first_message
from services.worker.host import EngineHost
from services.worker.trace import record_decode, trace_fields

log = get_logger(__name__)


class DecodeServicer(pb_grpc.DecodeServiceServicer):
    def __init__(
        self, host: EngineHost, streams: Streams, sessions: PrefillSessions, served: frozenset[str], clock: Clock
    ) -> None:
        self._host = host
        self._streams = streams
        self._sessions = sessions
        self._served = served
        self._clock = clock

    # -- RPCs --

    async def Submit(self, request: pb.SubmitRequest, context: grpc.aio.ServicerContext[Any, Any]) -> pb.SubmitResponse:
        entry = await self._submit(_router_of(request), request.request, _prefill_of(request))
        return pb.SubmitResponse(slot=entry.slot)

    async def SubmitMany(
        self, request: pb.SubmitManyRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.SubmitManyResponse]:
        router_id = _router_of(request)
        going = {asyncio.create_task(self._numbered(router_id, i, item)) for i, item in enumerate(request.items)}
        try:
            while going:
                done, going = await asyncio.wait(going, return_when=asyncio.FIRST_COMPLETED)
                yield pb.SubmitManyResponse(results=[_result(*task.result()) for task in done])
        finally:
            for task in going:
                task.cancel()

    async def Stream(
        self, request_iterator: AsyncIterator[pb.StreamRequest], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.StreamResponse]:
        attach = _attach_of(await first_message(request_iterator))
        if attach.epoch not in (0, self._host.epoch):
            yield _attached(self._host.epoch, sorted(set(attach.slots)))
            return
        positions = zip(attach.slots, attach.choices, attach.next_positions, strict=True)
        link, generation, unknown = self._streams.attach(attach.router_id, positions)
        reader = asyncio.create_task(self._read(request_iterator, link, generation))
        try:
            yield _attached(self._host.epoch, unknown)
            async for deltas in self._rows(link, generation, reader):
                yield pb.StreamResponse(deltas=deltas)
        finally:
            reader.cancel()
            self._streams.detach(link, generation)

    async def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.GenerateResponse]:
        link = self._streams.private_link(GENERATE_PREFIX + uuid.uuid4().hex)
        try:
            entry = await self._submit(link.router_id, request.request, _prefill_of(request))
            while True:
                rows = await link.take(link.generation)
                if rows:
                    yield pb.GenerateResponse(deltas=_rows_to_proto(rows))
                if entry.ended_at and not link.rows:
                    return
        finally:
            self._streams.close_private(link)

    # -- engine --

    def on_engine(self, message: FromEngine) -> None:
        match message:
            case Deltas():
                for entry in self._streams.deliver(message):
                    _log_end(entry)
            case PlaceOrder() | DropOrder() | ReleaseLease():
                self._sessions.place(message)
            case PeerVerdict():
                self._sessions.verdict(message)
            case EngineLoad():
                self._streams.sweep()

    def on_engine_ready(self, ready: EngineReady) -> None:
        log.info("engine ready", max_model_len=ready.max_model_len, device=ready.device, dtype=ready.dtype)

    def on_engine_lost(self, reason: str) -> None:
        self._streams.fail_all(Failure("unavailable", f"the worker's engine died: {reason}"))

    # -- helpers --

    async def _numbered(self, router_id: str, number: int, item: pb.SubmitItem) -> tuple[int, int | Failure]:
        return number, await self._submit_item(router_id, item)

    async def _submit_item(self, router_id: str, item: pb.SubmitItem) -> int | Failure:
        """The slot, or why not."""
        try:
            return (await self._submit(router_id, item.request, _prefill_of(item))).slot
        except NanoDeployError as error:
            return Failure.of(error)
        except Exception:
            log.exception("request not admitted", request_id=item.request.request_id)
            return Failure.of(InternalError("internal error"))

    async def _submit(self, router_id: str, wire: types_pb2.GenerationRequest, prefill: WorkerRef | None) -> RequestLog:
        self._host.require_ready()
        request = codec.request_from_proto(wire, self._clock.now())
        if request.model not in self._served:
            raise NotFoundError(f"this worker serves {sorted(self._served)}, not {request.model!r}", param="model")
        peer = await self._sessions.ensure(prefill) if prefill is not None else 0
        self._host.require_ready()  # from here on the engine's end is the request's: nothing waits in between
        entry = self._streams.open(router_id, request.request_id, _open_choices(request), request.traceparent)
        remaining_s = request.deadline_s - self._clock.now() if request.deadline_s else 0.0
        self._host.send(Submit(entry.slot, request, max(remaining_s, 1e-3) if request.deadline_s else 0.0, peer))
        log.info(
            "request admitted",
            **trace_fields(request.request_id, request.traceparent),
            slot=entry.slot,
            prompt_tokens=len(request.prompt_token_ids),
            choices=request.sampling.n,
            prefill=prefill.worker_id if peer and prefill is not None else "",
        )
        return entry

    async def _read(self, requests: AsyncIterator[pb.StreamRequest], link: Link, generation: int) -> None:
        """Submits, cancels and acknowledgements; its end is the end of the stream."""
        number = 0
        going: set[asyncio.Task[None]] = set()

        async def submit(item: pb.SubmitItem, number: int) -> None:
            self._streams.submitted(link, generation, number, await self._submit_item(link.router_id, item))

        try:
            async for request in requests:
                match request.WhichOneof("message"):
                    case "submit":
                        for item in request.submit.items:
                            task = asyncio.create_task(submit(item, number))
                            going.add(task)
                            task.add_done_callback(going.discard)
                            number = (number + 1) % 2**32
                    case "cancel":
                        self._cancel(link, request.cancel)
                    case "ack":
                        ack = request.ack
                        _check_columns("ack", ack)
                        self._streams.ack(link, zip(ack.slots, ack.choices, ack.next_positions, strict=True))
                    case _:
                        raise InvalidRequestError("only submit, cancel and ack may follow attach", param="message")
        finally:
            for task in going:
                task.cancel()
            link.wake()

    def _cancel(self, link: Link, cancel: pb.StreamCancel) -> None:
        choices = list(cancel.choices) or [0] * len(cancel.slots)
        if len(choices) != len(cancel.slots):
            raise InvalidRequestError("cancel: choices and slots have unequal lengths", param="cancel.choices")
        for slot, choice in zip(cancel.slots, choices, strict=True):
            self._streams.cancel(link, slot, choice - 1 if choice else None)

    async def _rows(self, link: Link, generation: int, reader: asyncio.Task[None]) -> AsyncIterator[pb.StepDeltas]:
        while (rows := await link.take(generation)) is not None:
            if rows:
                yield _rows_to_proto(rows)
            if reader.done():
                with contextlib.suppress(asyncio.CancelledError):
                    reader.result()
                return


def _attach_of(first: pb.StreamRequest | None) -> pb.StreamAttach:
    if first is None or first.WhichOneof("message") != "attach" or not first.attach.router_id:
        raise InvalidRequestError("the first message of a stream must be attach, with a router_id", param="attach")
    _check_columns("attach", first.attach)
    return first.attach


def _check_columns(name: str, message: pb.StreamAttach | pb.StreamAck) -> None:
    if not len(message.slots) == len(message.choices) == len(message.next_positions):
        raise InvalidRequestError(f"{name}: its columns have unequal lengths", param=name)


def _attached(epoch: int, unknown: Sequence[int]) -> pb.StreamResponse:
    return pb.StreamResponse(attached=pb.StreamAttached(epoch=epoch, unknown_slots=unknown))


def _log_end(entry: RequestLog) -> None:
    """The request's waterfall, once, when it has ended."""
    stats = {} if entry.stats is None else msgspec.structs.asdict(entry.stats)
    shown = {k: round(v, 3) if isinstance(v, float) else v for k, v in stats.items() if v}
    ended = {"error": entry.failure.message} if entry.failure is not None else {}
    seconds = max(entry.ended_at - entry.created_at, 0.0)
    record_decode(entry.traceparent, entry.request_id, entry.stats, seconds, str(ended.get("error", "")))
    log.info("request ended", **trace_fields(entry.request_id, entry.traceparent), slot=entry.slot, **ended, **shown)


def _result(number: int, outcome: int | Failure) -> pb.SubmitResult:
    if isinstance(outcome, Failure):
        return pb.SubmitResult(index=number, error=codec.failure_to_proto(outcome))
    return pb.SubmitResult(index=number, slot=outcome)


def _rows_to_proto(rows: Rows) -> pb.StepDeltas:
    out = codec.deltas_to_proto(rows.deltas, rows.failures, rows.stats, rows.prompt_logprobs)
    if rows.submitted:
        out.submitted.extend([_result(number, outcome) for number, outcome in rows.submitted])
    return out


def _router_of(request: pb.SubmitRequest | pb.SubmitManyRequest) -> str:
    if not request.router_id or request.router_id.startswith(GENERATE_PREFIX):
        raise InvalidRequestError("router_id must be set", param="router_id")
    return request.router_id


def _prefill_of(request: pb.SubmitRequest | pb.SubmitItem | pb.GenerateRequest) -> WorkerRef | None:
    return codec.ref_from_proto(request.prefill, "prefill") if request.HasField("prefill") else None


def _open_choices(request: GenerationRequest) -> set[int]:
    return set(range(request.sampling.n)).difference(request.ended_choices)
