"""WorkerService: what every worker answers beside its own service."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from typing import Any

import grpc

from common.rpc import codec
from common.types import WorkerInfo
from nanodeploy.v1 import types_pb2
from nanodeploy.v1 import worker_pb2 as pb
from nanodeploy.v1 import worker_pb2_grpc as pb_grpc
from services.worker.host import EngineHost
from services.worker.kv_feed import KvFeed


class WorkerServicer(pb_grpc.WorkerServiceServicer):
    def __init__(
        self,
        host: EngineHost,
        info: Callable[[], WorkerInfo],
        peers: Callable[[], Sequence[pb.PeerStatus]],
        drain: Callable[[float], None],
        kv_feed: KvFeed,
    ) -> None:
        self._host = host
        self._info = info
        self._peers = peers
        self._drain = drain
        self._kv_feed = kv_feed

    async def GetStatus(
        self, request: pb.GetStatusRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.GetStatusResponse:
        return pb.GetStatusResponse(
            worker=codec.worker_to_proto(self._info()), engine_restarts=self._host.restarts, peers=self._peers()
        )

    async def DrainWorker(
        self, request: pb.DrainWorkerRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.DrainWorkerResponse:
        self._drain(request.grace_ms / 1e3)
        return pb.DrainWorkerResponse()

    async def WatchKv(
        self, request: pb.WatchKvRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.WatchKvResponse]:
        known = request.digest if request.has_digest else None
        async with aclosing(self._kv_feed.follow(request.epoch, known)) as batches:
            async for batch in batches:
                yield pb.WatchKvResponse(batch=codec.kv_batch_to_proto(self._info().ref, batch))

    async def GetLedger(
        self, request: pb.GetLedgerRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.GetLedgerResponse:
        ledger = await self._host.ledger(with_blocks=request.with_blocks)
        return pb.GetLedgerResponse(
            groups=[
                types_pb2.KvBlockStates(
                    group=g.group,
                    total=g.total,
                    free=g.free,
                    live=g.live,
                    cached=g.cached,
                    leased=g.leased,
                    in_flight=g.in_flight,
                )
                for g in ledger.groups
            ],
            blocks=[
                pb.LedgerBlock(
                    group=b.group, block_id=b.block_id, state=b.state, owner=b.owner, age_ms=b.age_ms, tier=b.tier
                )
                for b in ledger.blocks
            ],
        )
