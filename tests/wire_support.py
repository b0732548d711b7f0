"""Bare wire ends for the tests of the workers' RPCs: a router's at a scripted decode worker, and an order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from worker_support import ScriptedWorker, request, scripted

from common.errors import NanoDeployError
from common.kvtransfer.orders import PlaceOrder
from common.rpc import codec
from common.rpc.client import call
from common.types import WorkerRef
from common.types.prefix import pack_tokens
from nanodeploy.v1 import decode_pb2, decode_pb2_grpc, prefill_pb2
from services.decode_worker.part import DecodePart

ROUTER = "router-1"


class Client:
    """A router's end of the wire, bare."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        stub: Any = decode_pb2_grpc.DecodeServiceStub
        self.stub = stub(channel)

    async def submit(self, router_id: str = ROUTER, prefill: WorkerRef | None = None, **fields: Any) -> int:
        wire = decode_pb2.SubmitRequest(
            router_id=router_id,
            request=codec.request_to_proto(request(**fields), 0.0),
            prefill=codec.ref_to_proto(prefill) if prefill else None,
        )
        response: decode_pb2.SubmitResponse = await call(self.stub.Submit, wire, timeout_s=10)
        return response.slot

    @asynccontextmanager
    async def stream(
        self, *positions: tuple[int, int, int], router_id: str = ROUTER, epoch: int = 0
    ) -> AsyncIterator[Stream]:
        stream = Stream(self.stub.Stream())
        slots, choices, at = zip(*positions, strict=True) if positions else ((), (), ())
        attach = decode_pb2.StreamAttach(
            router_id=router_id, epoch=epoch, slots=slots, choices=choices, next_positions=at
        )
        try:
            await stream.write(attach=attach)
            stream.attached = (await stream.read()).attached
            yield stream
        finally:
            stream.call.cancel()


class Stream:
    def __init__(self, wire_call: Any) -> None:
        self.call = wire_call
        self.attached = decode_pb2.StreamAttached()

    async def write(self, **message: Any) -> None:
        await self.call.write(decode_pb2.StreamRequest(**message))

    async def read(self) -> decode_pb2.StreamResponse:
        response: Any = await asyncio.wait_for(self.call.read(), 10)
        if not isinstance(response, decode_pb2.StreamResponse):  # grpc.aio.EOF
            raise EOFError
        return response

    async def read_on(self) -> None:
        while True:
            await self.read()

    async def submitted(self, count: int) -> dict[int, int | NanoDeployError]:
        """Answers by number, until there are so many."""
        found: dict[int, int | NanoDeployError] = {}
        while len(found) < count:
            for r in (await self.read()).deltas.submitted:
                found[r.index] = r.slot if r.WhichOneof("outcome") == "slot" else codec.error_from_proto(r.error)
        return found

    async def rows(self) -> codec.StepRows:
        return codec.deltas_from_proto((await self.read()).deltas)


@pytest.fixture
async def decode() -> AsyncIterator[tuple[ScriptedWorker, Client]]:
    async with scripted(DecodePart) as (worker, channel):
        yield worker, Client(channel)


def order(peer: int, order_id: int = 9) -> PlaceOrder:
    return PlaceOrder(peer, order_id, "r1", pack_tokens((5, 6, 7)), 0, "", "", (), 0, 3.0, "")


def responses_of(message: prefill_pb2.SessionResponse) -> list[prefill_pb2.SessionResponse]:
    """Those of a batch, or the one that it is."""
    return list(message.batch.responses) if message.HasField("batch") else [message]
