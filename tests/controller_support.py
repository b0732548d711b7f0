"""Controllers on one real storage, in this process or of their own, and clients that are closed in the end."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from redis_support import RedisServer, fresh_namespace
from rpc_support import eventually

from common.config import ControllerConfig
from common.errors import NanoDeployError
from common.rpc.client import open_channel
from common.rpc.codec import Change, Snapshot, WatchEvent
from common.rpc.controller import GrpcController
from common.rpc.limits import LimitsClient
from common.rpc.membership import Membership, MembershipChange
from common.rpc.objects import ObjectClient
from common.rpc.registry import RegistryClient
from common.rpc.tasks import end_tasks
from common.types import WorkerInfo
from services.controller.app import Controller
from services.controller.servicer import SERVICE

ROOT = Path(__file__).parent.parent
CALL_S = 10.0


class Rig:
    """Controllers on one storage and namespace, with clients that are closed in the end."""

    def __init__(self, url: str, **config: object) -> None:
        self.config = ControllerConfig(
            port=0,
            http_port=0,
            redis_url=url,
            namespace=fresh_namespace(),
            **{"lease_ttl_s": 2.0, "heartbeat_s": 0.1, **config},
        )
        self.controllers: list[Controller] = []
        self._closers: list[object] = []

    async def controller(self, port: int = 0) -> Controller:
        controller = Controller(self.config.model_copy(update={"port": port}), ping_s=0.2, op_timeout_s=1.0)
        await controller.start()
        self.controllers.append(controller)
        await eventually(lambda: controller.hub.synced)
        return controller

    def peer(self, controller: Controller) -> GrpcController:
        peer = GrpcController(f"127.0.0.1:{controller.port}")
        self._closers.append(peer.close)
        return peer

    def keys(self, controller: Controller) -> LimitsClient:
        client = LimitsClient([f"127.0.0.1:{controller.port}"], self.config.admin_token)
        self._closers.append(client.close)
        return client

    def objects(self, controller: Controller) -> ObjectClient:
        client = ObjectClient([f"127.0.0.1:{controller.port}"], self.config.admin_token)
        self._closers.append(client.close)
        return client

    def watch(self, controller: Controller) -> Watched:
        watched = Watched(self.peer(controller))
        self._closers.append(watched.stop)
        return watched

    def worker(self, worker: WorkerInfo, ports: list[int] | None = None, **kwargs) -> RegistryClient:
        addresses = [f"127.0.0.1:{p}" for p in ports or [c.port for c in self.controllers]]
        client = RegistryClient(addresses, lambda: worker, **kwargs)
        client.start()
        self._closers.append(client.stop)
        return client

    def membership(self, changes: list[MembershipChange], **kwargs) -> Membership:
        addresses = [f"127.0.0.1:{c.port}" for c in self.controllers]
        following = Membership(addresses, watcher_id="test", **{"ping_interval_s": 0.5, **kwargs})
        following.subscribe(changes.append)
        following.start()
        self._closers.append(following.stop)
        return following

    async def close(self) -> None:
        for close in reversed(self._closers):
            await close()
        for controller in self.controllers:
            await controller.stop(0.1)


class Watched:
    """Collects one watch until it ends."""

    def __init__(self, peer: GrpcController) -> None:
        self.events: list[WatchEvent] = []
        self.error: Exception | None = None
        self._task = asyncio.ensure_future(self._run(peer))

    async def _run(self, peer: GrpcController) -> None:
        try:
            async with aclosing(peer.watch("test", silence_s=5.0)) as events:
                async for event in events:
                    self.events.append(event)
        except NanoDeployError as error:
            self.error = error

    @property
    def snapshots(self) -> list[Snapshot]:
        return [e for e in self.events if isinstance(e, Snapshot)]

    @property
    def changes(self) -> list[Change]:
        return [e for e in self.events if isinstance(e, Change)]

    def told(self) -> list[tuple[str, str]]:
        return [(c.kind.value, c.reason) for c in self.changes]

    async def stop(self) -> None:
        await end_tasks([self._task])


@asynccontextmanager
async def rig(server: RedisServer, **config) -> AsyncIterator[Rig]:
    made = Rig(server.url, **config)
    try:
        yield made
    finally:
        await made.close()


def start_process(r: Rig, folder: Path, port: int) -> subprocess.Popen[bytes]:
    config = {"controller": r.config.model_dump() | {"port": 1, "http_port": 0}}
    path = folder / "config.json"  # JSON is YAML
    path.write_text(json.dumps(config))
    environ = os.environ | {"NANODEPLOY_CONTROLLER__PORT": str(port)}
    with (folder / "log").open("ab") as log:
        command = [sys.executable, "-m", "services.controller", "--config", str(path)]
        return subprocess.Popen(command, cwd=ROOT, env=environ, stdout=log, stderr=log)


async def serving(port: int) -> None:
    channel = open_channel(f"127.0.0.1:{port}")
    health = health_pb2_grpc.HealthStub(channel)
    async with asyncio.timeout(30):
        while True:
            try:
                answer = await health.Check(health_pb2.HealthCheckRequest(service=SERVICE), timeout=5)
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    break
            except grpc.RpcError:
                pass
            await asyncio.sleep(0.1)
    await channel.close()
