"""A decode worker over gRPC: the stubs end here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import grpc

from common.errors import NanoDeployError, UnavailableError
from common.rpc import codec
from common.rpc.client import open_channel, stream
from common.rpc.status import error_from_rpc
from common.types import Clock, GenerationRequest, WorkerRef
from nanodeploy.v1 import decode_pb2 as pb
from nanodeploy.v1 import decode_pb2_grpc
from services.router.outbox import Cancels, Positions
from services.router.submits import Submission, Submits


def _broken(error: BaseException | None = None) -> NanoDeployError:
    """Whatever ends a stream, the worker may still be there: reattaching will tell."""
    if isinstance(error, grpc.RpcError):
        return UnavailableError(error_from_rpc(error).message)
    return UnavailableError(f"the stream ended: {error}" if error else "the stream ended")


class GrpcDecodeStream:
    def __init__(self, stub: Any, router_id: str) -> None:
        self._call: Any = stub.Stream()
        self._router_id = router_id
        self._closed = False

    async def attach(self, epoch: int, positions: Positions) -> tuple[int, Sequence[int]]:
        attach = pb.StreamAttach(
            router_id=self._router_id,
            epoch=epoch,
            slots=[slot for slot, _, _ in positions],
            choices=[choice for _, choice, _ in positions],
            next_positions=[position for _, _, position in positions],
        )
        await self._write(pb.StreamRequest(attach=attach))
        answer = await self._read()
        if answer.WhichOneof("message") != "attached":
            raise UnavailableError("the worker did not answer attach")
        return answer.attached.epoch, list(answer.attached.unknown_slots)

    async def read(self) -> codec.StepRows:
        return codec.deltas_from_proto((await self._read()).deltas)

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
        self._call.cancel()

    async def _read(self) -> pb.StreamResponse:
        response = await self._guard(self._call.read)
        if not isinstance(response, pb.StreamResponse):  # grpc.aio.EOF
            raise _broken()
        return response

    async def _write(self, request: pb.StreamRequest) -> None:
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
        self._stub = decode_pb2_grpc.DecodeServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._submits = Submits(self._send)

    async def submit(self, request: GenerationRequest, prefill: WorkerRef | None, timeout_s: float) -> int:
        return await self._submits.submit(request, prefill, timeout_s)

    async def _send(self, submissions: list[Submission]) -> AsyncIterator[list[tuple[int, int | NanoDeployError]]]:
        now = self._clock.now()
        items = [
            pb.SubmitItem(
                request=codec.request_to_proto(submission.request, now),
                prefill=codec.ref_to_proto(submission.prefill) if submission.prefill else None,
            )
            for submission in submissions
        ]
        wire = pb.SubmitManyRequest(router_id=self._router_id, items=items)
        timeout_s = max(submission.timeout_s for submission in submissions)
        async for response in stream(self._stub.SubmitMany, wire, timeout_s=timeout_s):
            yield [
                (r.index, r.slot if r.WhichOneof("outcome") == "slot" else codec.error_from_proto(r.error))
                for r in response.results
            ]

    def open_stream(self) -> GrpcDecodeStream:
        return GrpcDecodeStream(self._stub, self._router_id)

    async def close(self) -> None:
        await self._submits.close()
        await self._channel.close(None)
