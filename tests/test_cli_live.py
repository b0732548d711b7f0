"""The live table's look at a cluster: real controllers and worker servers, asked only when something happens."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager

import msgspec
import pytest
from redis_support import RedisServer, fresh_namespace, server
from rpc_support import eventually, make_worker

from common.config import ControllerConfig
from common.errors import UnavailableError
from common.rpc import codec
from common.rpc.controller import GrpcController
from common.rpc.server import RpcServer, Service
from common.types import WorkerInfo, WorkerLoad, WorkerRef, WorkerState
from nanodeploy.v1 import worker_pb2, worker_pb2_grpc
from services.cli import cluster as cluster_module
from services.cli.cluster import WorkerView, follow_cluster
from services.controller.app import Controller

__all__ = ["server"]

REFRESH_S = 0.1


class Statuses(worker_pb2_grpc.WorkerServiceServicer):
    """Answers GetStatus and remembers over which connections it was asked."""

    def __init__(self) -> None:
        self.info: WorkerInfo | None = None
        self.askers: list[str] = []

    async def GetStatus(self, request, context) -> worker_pb2.GetStatusResponse:  # type: ignore[no-untyped-def]  # noqa: N802
        assert self.info is not None
        self.askers.append(context.peer())
        return worker_pb2.GetStatusResponse(worker=codec.worker_to_proto(self.info))


class Rig:
    """One controller, one worker that is a member, and what a follower has shown."""

    def __init__(self, controller: Controller, peer: GrpcController, statuses: Statuses) -> None:
        self.controller = controller
        self.peer = peer
        self.statuses = statuses
        self.shown: list[list[WorkerView]] = []
        self.error: Exception | None = None

    async def follow(self) -> None:
        try:
            async with aclosing(follow_cluster(f"127.0.0.1:{self.controller.port}", REFRESH_S)) as looks:
                async for views in looks:
                    self.shown.append(views)
        except UnavailableError as error:
            self.error = error

    async def say(self, load: WorkerLoad) -> None:
        assert self.statuses.info is not None
        info = self.statuses.info = msgspec.structs.replace(self.statuses.info, load=load)
        await self.peer.heartbeat(info.ref.worker_id, info.ref.epoch, WorkerState.READY, load, timeout_s=10)


@asynccontextmanager
async def rig(server: RedisServer) -> AsyncIterator[Rig]:
    config = ControllerConfig(
        port=0, http_port=0, redis_url=server.url, namespace=fresh_namespace(), lease_ttl_s=60, heartbeat_s=1
    )
    controller = Controller(config, ping_s=0.1)
    await controller.start()
    await eventually(lambda: controller.hub.synced)
    statuses = Statuses()
    add: Callable[..., None] = worker_pb2_grpc.add_WorkerServiceServicer_to_server
    name = worker_pb2.DESCRIPTOR.services_by_name["WorkerService"].full_name
    rpc = RpcServer([Service(name, lambda s: add(statuses, s), lambda: True)], host="127.0.0.1", port=0)
    worker = make_worker("decode-0")
    ref = WorkerRef("decode-0", worker.ref.epoch, f"127.0.0.1:{await rpc.start()}")
    statuses.info = msgspec.structs.replace(worker, ref=ref, state=WorkerState.READY)
    peer = GrpcController(f"127.0.0.1:{controller.port}")
    await peer.register(statuses.info, timeout_s=10)
    made = Rig(controller, peer, statuses)
    task = asyncio.create_task(made.follow())
    try:
        yield made
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await peer.close()
        await rpc.drain(0.0)
        await controller.stop(0.1)


async def test_a_cluster_at_rest_is_not_asked_and_a_change_shows(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_module, "SETTLE_S", 0.3)
    async with rig(server) as r:
        await eventually(lambda: bool(r.shown))
        assert [v.info.ref.worker_id for v in r.shown[0]] == ["decode-0"]
        await asyncio.sleep(0.8)  # settled
        looks = len(r.shown)
        await asyncio.sleep(0.6)
        assert len(r.shown) == len(r.statuses.askers) == looks
        await r.say(WorkerLoad(running=3, steps=7))
        await eventually(lambda: len(r.shown) > looks)
        assert r.shown[-1][0].status is not None
        assert r.shown[-1][0].status.worker.load.running == 3
        await r.peer.deregister("decode-0", 0, timeout_s=10)
        await eventually(lambda: r.shown[-1] == [])
        assert len(set(r.statuses.askers)) == 1  # one connection for all of it


async def test_what_nobody_told_is_seen_in_a_while(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_module, "SETTLE_S", 0.0)
    monkeypatch.setattr(cluster_module, "QUIET_S", 0.5)
    async with rig(server) as r:
        await eventually(lambda: len(r.shown) >= 3)
        assert len(r.shown) < 10


async def test_a_controller_that_goes_is_an_error(server: RedisServer) -> None:
    async with rig(server) as r:
        await eventually(lambda: bool(r.shown))
        await r.controller.stop(0.0)
        await eventually(lambda: r.error is not None)
        assert isinstance(r.error, UnavailableError)


async def test_a_worker_that_does_not_answer_is_shown_with_the_reason(server: RedisServer) -> None:
    async with rig(server) as r:
        assert r.statuses.info is not None
        silent = make_worker("prefill-0")
        ref = WorkerRef("prefill-0", silent.ref.epoch, "127.0.0.1:1")
        await r.peer.register(msgspec.structs.replace(silent, ref=ref), timeout_s=10)
        await eventually(lambda: bool(r.shown) and len(r.shown[-1]) == 2)
        (view,) = [v for v in r.shown[-1] if v.info.ref.worker_id == "prefill-0"]
        assert view.status is None
        assert view.error
