"""ControllerService: from protobuf to the store and back, nothing else."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc

from common.config import ControllerConfig
from common.rpc import codec
from common.rpc.codec import checks
from common.telemetry import Metrics, get_logger
from nanodeploy.v1 import controller_pb2 as pb
from nanodeploy.v1 import controller_pb2_grpc
from services.controller.store import Store
from services.controller.watch import WatchHub

_log = get_logger(__name__)


SERVICE = pb.DESCRIPTOR.services_by_name["ControllerService"].full_name


class ControllerServicer(controller_pb2_grpc.ControllerServiceServicer):
    def __init__(self, config: ControllerConfig, store: Store, hub: WatchHub, metrics: Metrics) -> None:
        self._config = config
        self._store = store
        self._hub = hub
        self._replaced = metrics.counter("controller_workers_replaced", "Registrations that replaced another epoch")

    def add_to(self, server: grpc.aio.Server) -> None:
        controller_pb2_grpc.add_ControllerServiceServicer_to_server(self, server)  # type: ignore[no-untyped-call]

    async def Register(self, request: pb.RegisterRequest, context: Any) -> pb.RegisterResponse:
        worker = codec.worker_from_proto(request.worker)
        if await self._store.register(worker, self._config.lease_ttl_s):
            self._replaced.inc()
            _log.warning("worker replaced by another process", worker_id=worker.ref.worker_id, host=worker.host)
        return pb.RegisterResponse(
            lease_ttl_ms=round(self._config.lease_ttl_s * 1000), heartbeat_ms=round(self._config.heartbeat_s * 1000)
        )

    async def Heartbeat(self, request: pb.HeartbeatRequest, context: Any) -> pb.HeartbeatResponse:
        worker_id = checks.identifier(request.worker_id, "worker_id")
        state = codec.state_from_proto(request.state)
        load = codec.load_from_proto(request.load)
        draining = await self._store.heartbeat(worker_id, request.epoch, state, load, self._config.lease_ttl_s)
        return pb.HeartbeatResponse(draining=draining)

    async def Watch(self, request: pb.WatchRequest, context: Any) -> AsyncIterator[pb.WatchResponse]:
        _log.info("watch begins", watcher_id=request.watcher_id[:128], peer=context.peer())
        async for event in self._hub.watch():
            yield codec.watch_event_to_proto(event)

    async def Drain(self, request: pb.DrainRequest, context: Any) -> pb.DrainResponse:
        await self._store.drain(checks.identifier(request.worker_id, "worker_id"), request.epoch)
        return pb.DrainResponse()

    async def Deregister(self, request: pb.DeregisterRequest, context: Any) -> pb.DeregisterResponse:
        await self._store.deregister(checks.identifier(request.worker_id, "worker_id"), request.epoch)
        return pb.DeregisterResponse()
