"""One controller, assembled: store, hub, sweeper, gRPC server, HTTP endpoint.

start: HTTP and gRPC listen (not ready) -> storage reached: ready -> stop: watches end, calls drain
"""

from __future__ import annotations

import asyncio
import random

from common.config import ControllerConfig
from common.errors import ConfigError
from common.rpc.codec import PING_INTERVAL_S
from common.rpc.server import HttpEndpoint, RpcServer, Service, Verdict, serve_http
from common.rpc.tasks import end_tasks
from common.telemetry import Metrics, get_logger
from common.types import Clock, MonotonicClock, Role
from services.controller.limit_servicer import SERVICE as LIMITS_SERVICE
from services.controller.limit_servicer import LimitsServicer
from services.controller.limits import Limits
from services.controller.object_servicer import SERVICE as OBJECT_SERVICE
from services.controller.object_servicer import ObjectServicer
from services.controller.objects import Objects
from services.controller.servicer import SERVICE, ControllerServicer
from services.controller.store import Store
from services.controller.sweeper import Sweeper
from services.controller.watch import WatchHub

_log = get_logger(__name__)

STALLED_S = 15.0  # the hub comes round every few seconds, storage or not


class Controller:
    """Controllers on one storage and namespace are interchangeable."""

    def __init__(
        self,
        config: ControllerConfig,
        *,
        clock: Clock = MonotonicClock(),
        rng: random.Random | None = None,
        ping_s: float = PING_INTERVAL_S,
        op_timeout_s: float = 2.0,
    ) -> None:
        rng = rng or random.SystemRandom()
        self._config = config
        self._metrics = Metrics()
        self._store = Store(config.redis_url, config.namespace, op_timeout_s=op_timeout_s)
        self._sweeper = Sweeper(self._store, config.lease_ttl_s, self._metrics, rng)
        self.hub = WatchHub(self._store, clock=clock, rng=rng, ping_s=ping_s, on_lost=self._sweeper.forgive)
        self._servicer = ControllerServicer(config, self._store, self.hub, self._metrics)
        objects = ObjectServicer(config.admin_token, Objects(config, self._store))
        limits = LimitsServicer(config.admin_token, Limits(self._store))
        self._server = RpcServer(
            [
                Service(SERVICE, self._servicer.add_to, lambda: self.hub.synced),
                Service(LIMITS_SERVICE, limits.add_to, lambda: self.hub.synced),
                Service(OBJECT_SERVICE, objects.add_to, lambda: self.hub.synced),
            ],
            host=config.host,
            port=config.port,
            on_drain=[self._end_watches],
        )
        self._http: HttpEndpoint | None = None
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def port(self) -> int:
        return self._server.port

    @property
    def http_port(self) -> int:
        assert self._http is not None, "not started"
        return self._http.port

    async def start(self) -> None:
        """Raises ConfigError when an address cannot be had; a missing storage is no error."""
        await self._server.start()
        try:
            self._http = await serve_http(
                self._config.host, self._config.http_port, metrics=self._render, alive=self._alive, ready=self._ready
            )
        except ConfigError:
            await self._server.drain(0)
            raise
        for name, work in (("hub", self.hub.run()), ("sweeper", self._sweeper.run())):
            self._tasks.append(asyncio.create_task(work, name=name))
        _log.info("controller listens", port=self.port, http_port=self.http_port, namespace=self._config.namespace)

    async def stop(self, grace_s: float = 2.0) -> None:
        await self._server.drain(grace_s)
        await end_tasks(self._tasks)
        self._tasks.clear()
        if self._http is not None:
            await self._http.stop()
        await self._store.close()

    async def _end_watches(self) -> None:
        self.hub.close()

    def _alive(self) -> Verdict:
        dead = [task.get_name() for task in self._tasks if task.done()]
        if dead:
            return Verdict(False, f"ended: {', '.join(dead)}")
        stalled_s = self.hub.stalled_s()
        return Verdict(stalled_s < STALLED_S, "" if stalled_s < STALLED_S else f"no progress for {stalled_s:.0f} s")

    def _ready(self) -> Verdict:
        return Verdict(self.hub.synced, self.hub.reason, {"workers": len(self.hub.workers)})

    def _render(self) -> bytes:
        workers = self._metrics.gauge("controller_workers", "Registered workers", ("role", "state"))
        workers.clear()
        for role in Role:
            workers.labels(role.value, "ready").set(0)
        for worker in self.hub.workers:
            workers.labels(worker.role.value, worker.state.value).inc()
        self._metrics.gauge("controller_watchers", "Watches being served").set(self.hub.num_watchers)
        self._metrics.gauge("controller_storage_up", "1 while the storage is followed").set(self.hub.synced)
        return self._metrics.render()
