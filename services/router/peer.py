"""A decode worker over gRPC: the stubs end here."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import grpc

from common.errors import NanoDeployError, UnavailableError
from common.rpc import codec
from common.rpc.client import open_channel
from common.rpc.status import error_from_rpc
from common.telemetry import get_logger
from common.types import Clock, GenerationRequest, WorkerRef
from nanodeploy.v1 import decode_pb2 as pb
from services.router.outbox import Cancels, Positions
from services.router.submits import Answer, Submission, Submits

_log = get_logger(__name__)


def _broken(error: BaseException | None = None) -> NanoDeployError:
    """Whatever ends a stream, the worker may still be there: reattaching will tell."""
    if isinstance(error, grpc.RpcError):
        return UnavailableError(error_from_rpc(error).message)
    return UnavailableError(f"the stream ended: {error}" if error else "the stream ended")


def _serialized(message: pb.StreamRequest | bytes) -> bytes:
    return message if isinstance(message, bytes) else message.SerializeToString()


class GrpcDecodeStream:
    """One attempt at a stream. While it is attached, it carries `submits` as well."""

    def __init__(self, start: Callable[[], Any], router_id: str, submits: Submits) -> None:
        self._call = start()
        self._router_id = router_id
        self._submits = submits
        self._submitting: asyncio.Task[None] | None = None
        self._writing = asyncio.Lock()  # grpc takes one message at a time
        self._closed = False

    async def attach(self, epoch: int, positions: Positions) -> tuple[int, Sequence[int]]:
        attach = pb.StreamAttach(
            router_id=self._router_id,
            epoch=epoch,
            slots=[slot for slot, _, _ in positions],
            choices=[choice for _, choice, _ in positions],
            next_positions=[position for _, _, position in positions],
        )
        found = 0
        try:
            await self._write(pb.StreamRequest(attach=attach))
            answer = await self._read()
            if answer.WhichOneof("message") != "attached":
                raise UnavailableError("the worker did not answer attach")
            found = answer.attached.epoch
        finally:
            if found != epoch:  # those who wait for an answer may have better luck elsewhere
                self._submits.fail(UnavailableError("the worker is gone"))
        if found == epoch:
            self._submitting = asyncio.create_task(self._submit())
        return found, list(answer.attached.unknown_slots)

    async def read(self) -> codec.StepRows:
        deltas = (await self._read()).deltas
        for result in deltas.submitted:
            has_slot = result.WhichOneof("outcome") == "slot"
            self._submits.answered(result.index, result.slot if has_slot else codec.error_from_proto(result.error))
        return codec.deltas_from_proto(deltas)

    async def send(self, cancels: Cancels, acks: Positions) -> None:
        if cancels:
            cancel = pb.StreamCancel(
                slots=[slot for slot, _ in cancels],
                choices=[0 if choice is None else choice + 1 for _, choice in cancels],
            )
            await self._write(pb.StreamRequest(cancel=cancel))
        if acks:
            ack = pb.StreamAck(
                slots=[slot for slot, _, _ in acks],
                choices=[choice for _, choice, _ in acks],
                next_positions=[position for _, _, position in acks],
            )
            await self._write(pb.StreamRequest(ack=ack))

    def close(self) -> None:
        self._closed = True
        if self._submitting is not None:
            self._submitting.cancel()
        self._call.cancel()

    async def _submit(self) -> None:
        try:
            await self._submits.write_to(self._send_submissions)
        except NanoDeployError:
            return  # the reader hears of it, too
        except Exception:  # noqa: BLE001 - the edge of a task
            _log.exception("submits stopped")
            self.close()

    async def _send_submissions(self, submissions: list[Submission]) -> None:
        await self._write(codec.submit_message([submission.item for submission in submissions]))

    async def _read(self) -> pb.StreamResponse:
        response = await self._guard(self._call.read)
        if not isinstance(response, pb.StreamResponse):  # grpc.aio.EOF
            raise _broken()
        return response

    async def _write(self, request: pb.StreamRequest | bytes) -> None:
        async with self._writing:
            await self._guard(self._call.write, request)

    async def _guard(self, method: Callable[..., Any], *args: object) -> Any:
        """Grpc raises CancelledError when the call was closed here: that is not the cancelling of this task."""
        try:
            return await method(*args)
        except asyncio.CancelledError:
            if self._closed:
                raise _broken() from None
            raise
        except (grpc.RpcError, asyncio.InvalidStateError) as error:
            raise _broken(error) from error


class GrpcDecodePeer:
    """One connection to one worker process.

    Each process knows the router by a name of its own: when a worker was restarted, the last attempt to reattach
    to the old process reaches the new one and must not end the stream that is already there.
    """

    def __init__(self, ref: WorkerRef, router_id: str, clock: Clock) -> None:
        self._router_id = f"{router_id}-{ref.epoch:016x}"
        self._clock = clock
        self._channel = open_channel(ref.address)
        self._open = self._channel.stream_stream(
            "/nanodeploy.v1.DecodeService/Stream",
            request_serializer=_serialized,
            response_deserializer=pb.StreamResponse.FromString,
        )
        self._submits = Submits(clock)

    def submit(self, request: GenerationRequest, prefill: WorkerRef | None, timeout_s: float, answer: Answer) -> None:
        self._submits.submit(codec.submit_item(request, prefill, self._clock.now()), timeout_s, answer)

    def open_stream(self) -> GrpcDecodeStream:
        return GrpcDecodeStream(self._open, self._router_id, self._submits)

    async def close(self) -> None:
        self._submits.close()
        await self._channel.close(None)
