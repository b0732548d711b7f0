"""A worker's prefix cache over gRPC: the stubs end here."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Final

from common.rpc import codec
from common.rpc.client import open_channel, read_stream
from common.types import WorkerRef
from nanodeploy.v1 import worker_pb2 as pb
from nanodeploy.v1 import worker_pb2_grpc

SILENCE_S: Final = 16.0  # three signs of life missed


class GrpcKvPeer:
    def __init__(self, ref: WorkerRef) -> None:
        self._channel = open_channel(ref.address)
        self._stub = worker_pb2_grpc.WorkerServiceStub(self._channel)  # type: ignore[no-untyped-call]

    async def watch(self, epoch: int, digest: int | None) -> AsyncGenerator[codec.KvBatch, None]:
        request = pb.WatchKvRequest(epoch=epoch, has_digest=digest is not None, digest=digest or 0)
        async with aclosing(read_stream(self._stub.WatchKv(request), silence_s=SILENCE_S)) as messages:
            async for message in messages:
                yield codec.kv_batch_from_proto(message.batch)

    async def close(self) -> None:
        await self._channel.close(None)
