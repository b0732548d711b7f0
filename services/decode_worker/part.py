"""A decode worker's part of a worker process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from common.engine.messages import EngineLoad, EngineReady, FromEngine, PeerTraffic
from common.kvcache.layout import KVLayout
from common.rpc import codec
from common.rpc.server import Service
from common.types import WorkerRef
from nanodeploy.v1 import decode_pb2 as pb
from nanodeploy.v1 import decode_pb2_grpc as pb_grpc
from nanodeploy.v1 import worker_pb2
from services.decode_worker.servicer import DecodeServicer
from services.decode_worker.sessions import PrefillSessions
from services.decode_worker.streams import Streams
from services.worker.app import WorkerApp


class DecodePart:
    def __init__(self, app: WorkerApp) -> None:
        self._app = app
        self._streams = Streams(app.host.send, app.config.reattach_s, app.clock)
        self._sessions = PrefillSessions(app.config.handoff, self._identity, app.host.send, app.clock)
        self._servicer = DecodeServicer(app.host, self._streams, self._sessions, app.served_names, app.clock)

    @property
    def service(self) -> Service:
        stubs: Any = pb_grpc
        return Service(
            pb.DESCRIPTOR.services_by_name["DecodeService"].full_name,
            lambda server: stubs.add_DecodeServiceServicer_to_server(self._servicer, server),
            lambda: self._app.host.serving,
        )

    def on_engine(self, message: FromEngine) -> None:
        self._servicer.on_engine(message)

    def on_engine_ready(self, ready: EngineReady) -> None:
        self._servicer.on_engine_ready(ready)

    def on_engine_lost(self, reason: str) -> None:
        self._servicer.on_engine_lost(reason)
        self._sessions.reset(reason)

    def peers(self) -> Sequence[worker_pb2.PeerStatus]:
        load = self._app.host.load
        traffic = {t.peer: t for t in load.peers} if isinstance(load, EngineLoad) else {}
        out = []
        for session in self._sessions.statuses():
            t = traffic.get(session.peer, PeerTraffic(session.peer, session.transport, 0, 0, 0))
            out.append(
                worker_pb2.PeerStatus(
                    peer=codec.ref_to_proto(session.ref),
                    state=session.state,
                    transport=session.transport,
                    detail=session.detail,
                    bytes_read=t.bytes_read,
                    reads=t.reads,
                    digest_mismatches=t.digest_mismatches,
                )
            )
        return out

    def num_active(self) -> int:
        return len(self._streams)

    async def close(self) -> None:
        await self._sessions.close()

    def _identity(self) -> tuple[WorkerRef, KVLayout]:
        return self._app.ref(), self._app.host.require_ready().layout
