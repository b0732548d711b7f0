"""A prefill worker's part of a worker process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from common.engine.messages import EngineReady, FromEngine
from common.rpc.server import Service
from nanodeploy.v1 import prefill_pb2 as pb
from nanodeploy.v1 import prefill_pb2_grpc as pb_grpc
from nanodeploy.v1 import worker_pb2
from services.prefill_worker.servicer import PrefillServicer
from services.worker.app import WorkerApp


class PrefillPart:
    def __init__(self, app: WorkerApp) -> None:
        self._app = app
        self._servicer = PrefillServicer(app.host, app.ref, app.clock)

    @property
    def service(self) -> Service:
        stubs: Any = pb_grpc
        return Service(
            pb.DESCRIPTOR.services_by_name["PrefillService"].full_name,
            lambda server: stubs.add_PrefillServiceServicer_to_server(self._servicer, server),
            lambda: self._app.host.serving,
        )

    def on_engine(self, message: FromEngine) -> None:
        self._servicer.on_engine(message)

    def on_engine_ready(self, ready: EngineReady) -> None:
        self._servicer.on_engine_ready(ready)

    def on_engine_lost(self, reason: str) -> None:
        self._servicer.on_engine_lost(reason)

    def peers(self) -> Sequence[worker_pb2.PeerStatus]:
        return ()

    def num_active(self) -> int:
        """Orders under way, and leases of finished ones whose reader has not got everything yet."""
        return self._servicer.num_active

    async def close(self) -> None:
        self._servicer.end_sessions()
