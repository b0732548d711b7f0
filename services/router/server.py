"""The router process: members, relay, gateway and HTTP server put together.

start -> serving -> stop: no new requests (503), those running finish within a grace, connections closed
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
from collections.abc import Callable, Iterator
from typing import Final

import uvicorn

from common.config.schema import RouterConfig
from common.errors import NanoDeployError, UnavailableError
from common.rpc.codec import ChangeKind
from common.rpc.limits import LimitsClient
from common.rpc.membership import MembershipChange
from common.rpc.tls import warn_if_exposed
from common.telemetry import Metrics, get_logger
from common.types import Clock, MonotonicClock, Role, WorkerRef
from services.router.admission.limiter import Ledger
from services.router.api.apis import Apis
from services.router.app import make_app
from services.router.console.access import AccessLog
from services.router.contract import DecodePeer
from services.router.cors import Cors
from services.router.gateway import Gateway
from services.router.https import Renewal, check_files
from services.router.metrics import RouterMetrics
from services.router.peer import GrpcDecodePeer
from services.router.protocol import App, BoundedHttpProtocol
from services.router.randomness import PooledRandom
from services.router.relay import Relay
from services.router.routing.board import Board, Members
from services.router.routing.feed import Feeds, KvPeer
from services.router.routing.peer import GrpcKvPeer
from services.router.workers import Shared, listen

KEEP_ALIVE_S: Final = 75
KEYS_WAIT_S: Final = 2.0  # for the controller to tell of API keys, before the first request is heard

_log = get_logger(__name__)


class _Server(uvicorn.Server):
    """Signals belong to `__main__`; at rest it wakes up once a second, to date its answers, instead of ten times."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        self.should_exit = True
        self._stopping.set()

    async def main_loop(self) -> None:
        renewed = Renewal(self.config)
        while not await self.on_tick(0):
            renewed.look()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await self._stopping.wait()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Router:
    """One router. `members` is lent: whoever made it starts and stops it."""

    def __init__(
        self,
        config: RouterConfig,
        members: Members,
        *,
        connect: Callable[[WorkerRef], DecodePeer] | None = None,
        ledger: Ledger | None = None,
        connect_kv: Callable[[WorkerRef], KvPeer] = GrpcKvPeer,
        clock: Clock = MonotonicClock(),
        rng: random.Random | None = None,
        shared: Shared | None = None,
    ) -> None:
        self._shared = shared
        self.router_id = f"router-{secrets.token_hex(8)}"
        self._config = config
        self._members = members
        self._clock = clock
        self._rng = rng or PooledRandom()
        self._connect = connect or (lambda ref: GrpcDecodePeer(ref, self.router_id, clock))
        self._ledger: Ledger | None = None
        if config.admin_token:
            self._ledger = ledger or LimitsClient(config.controllers, config.admin_token)
        self._connect_kv = connect_kv
        self._feeds: Feeds | None = None
        self._loads: set[asyncio.Task[None]] = set()
        self._server: _Server | None = None
        self._serving: asyncio.Task[None] | None = None
        self.gateway: Gateway | None = None
        self._apis: Apis | None = None
        self.port = 0

    async def start(self) -> int:
        """Listen (port 0 takes a free one); returns the port. Raises `ConfigError` if it is taken."""
        check_files(self._config)
        host, port, shared = self._config.host, self._config.port, self._shared
        listener = listen(host, port if shared is None else shared.port, shared=shared is not None)
        self.port = listener.getsockname()[1]
        listeners = [listener]
        if shared is not None and self._config.worker_port:
            own = self._config.worker_port + shared.number
            listeners.append(listen(host, own, "router.worker_port", shared=False))
        board = Board(self._members, self._config, clock=self._clock, rng=self._rng)
        relay = Relay(
            self._members,
            self._connect,
            board,
            clock=self._clock,
            rng=self._rng,
            connect_timeout_s=self._config.connect_timeout_s,
            resume_wait_s=self._config.resume_wait_s,
        )
        self.gateway = Gateway(
            self._config,
            self._members,
            relay,
            metrics=RouterMetrics(Metrics()),
            clock=self._clock,
            rng=self._rng,
            ledger=self._ledger,
            router_id=self.router_id,
        )
        await self.gateway.limiter.start(KEYS_WAIT_S)
        self._members.subscribe(self._on_change)
        self._apis = Apis(self._config, self.gateway, clock=self._clock, rng=self._rng)
        self._feeds = Feeds(self._members, board, self._connect_kv, self._rng)
        if board.by_prefix:
            self._feeds.start()
        app = make_app(self.gateway, self._rng, self._apis.routes())
        direct = {path.encode(): self._wrapped(endpoint) for path, endpoint in app.raw.items()}
        self._apis.start({path: endpoint.of_router for path, endpoint in app.raw.items()})
        if not self._config.ssl_certfile:
            warn_if_exposed(self._config.host, "API")
        self._server = _Server(
            uvicorn.Config(
                self._wrapped(app),
                http=BoundedHttpProtocol.with_direct(direct),
                ws="none",
                lifespan="off",
                access_log=False,
                log_config=None,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=1,
                reset_contextvars=True,  # a pipelined request is started by the task of the one before
                ssl_certfile=self._config.ssl_certfile or None,
                ssl_keyfile=self._config.ssl_keyfile or None,
            )
        )
        self._serving = asyncio.create_task(self._server.serve(sockets=listeners), name="http")
        _log.info("router listens", host=self._config.host, port=self.port, router_id=self.router_id)
        return self.port

    async def stop(self, grace_s: float | None = None) -> None:
        """Let running requests finish for `grace_s` (the config's `drain_grace_s`), then end."""
        if self.gateway is None or self._apis is None or self._server is None or self._serving is None:
            return
        self.gateway.draining = True
        await self._apis.drain()
        await self.gateway.drain(self._config.drain_grace_s if grace_s is None else grace_s)
        await self._apis.close()
        self.gateway.places.close(UnavailableError("the router is stopping"))
        await self.gateway.relay.close()
        if self._feeds is not None:
            await self._feeds.stop()
        self._server.stop()
        await self._serving
        for task in list(self._loads):
            task.cancel()
        await self.gateway.limiter.stop()
        self.gateway.texts.close()
        _log.info("router stopped")

    def _wrapped(self, app: App) -> App:
        """What comes before routes. A browser's preflight is in the access log, too."""
        app = Cors(app, self._config.allowed_origins) if self._config.allowed_origins else app
        return AccessLog(app, self._clock) if self._config.access_log else app

    def _on_change(self, change: MembershipChange) -> None:
        """Load a new model's tokenizer before the first request needs it."""
        if change.kind is ChangeKind.ADDED and change.worker.role is Role.DECODE:
            task = asyncio.create_task(self._load(change))
            self._loads.add(task)
            task.add_done_callback(self._loads.discard)

    async def _load(self, change: MembershipChange) -> None:
        assert self.gateway is not None
        with contextlib.suppress(NanoDeployError):  # logged there; the first request tries again and says so
            await self.gateway.texts.get(change.worker.model)
