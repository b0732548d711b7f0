"""One worker process: engine host, gRPC and HTTP servers, membership; from start to drained.

bind ports -> engine starts -> READY, registered -> (SIGTERM or drain) DRAINING -> idle or grace over -> ended
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec

from common.config import LogConfig, WorkerConfig
from common.engine.client import ProcessEngine
from common.engine.messages import Drain, EngineLoad, EngineReady, FromEngine, KvChanges
from common.errors import ConfigError, UnavailableError
from common.rpc.registry import RegistryClient
from common.rpc.server import HttpEndpoint, RpcServer, Service, Verdict, serve_http
from common.telemetry import Metrics, get_logger
from common.types import ModelInfo, MonotonicClock, Role, WorkerInfo, WorkerLoad, WorkerRef, WorkerState
from nanodeploy import __version__
from nanodeploy.v1 import worker_pb2 as pb
from nanodeploy.v1 import worker_pb2_grpc as pb_grpc
from services.worker.host import EngineHost, EngineOwner
from services.worker.kv_feed import KvFeed
from services.worker.servicer import WorkerServicer

log = get_logger(__name__)

STOP_ENGINE_S = 5.0


class RolePart(EngineOwner, Protocol):
    """What makes a worker a prefill or a decode worker."""

    @property
    def service(self) -> Service: ...

    def peers(self) -> Sequence[pb.PeerStatus]: ...

    def num_active(self) -> int:
        """Requests or orders that a drain waits for."""

    async def close(self) -> None: ...


class WorkerApp:
    """`make_part` builds the role's part around this app (its host, its identity)."""

    def __init__(
        self,
        role: Role,
        config: WorkerConfig,
        log_config: LogConfig,
        environ: Mapping[str, str],
        make_part: Callable[[WorkerApp], RolePart],
    ) -> None:
        self.role = role
        self.config = config
        self.clock = MonotonicClock()
        self.metrics = Metrics()
        self.host = EngineHost(config, lambda: ProcessEngine(role, config, log_config, environ), self.clock)
        self.kv_feed = KvFeed()
        self.port = 0
        self._hostname = socket.gethostname()
        self._described: EngineReady | None = None  # whose facts `_info` has
        self._info = WorkerInfo(
            ref=self.ref(),
            role=role,
            state=WorkerState.STARTING,
            model=_unknown_model(self._model_name, config.engine.model),
        )
        self._draining = asyncio.Event()
        self._activity = asyncio.Event()
        self._grace_s = config.drain_grace_s
        self._part = make_part(self)
        self._rpc = RpcServer([self._part.service, self._worker_service()], host=config.host, port=config.port)
        self._http: HttpEndpoint | None = None
        self._registry = RegistryClient(config.controllers, self.info, on_drain=self._draining.set)
        self._registered = False
        self._gauges = _Gauges(self.metrics)

    # -- identity --

    @property
    def worker_id(self) -> str:
        return self.config.worker_id or f"{self.role.value}-{self._hostname}-{self.port}"

    @property
    def served_names(self) -> frozenset[str]:
        return frozenset((self._model_name, self.config.engine.model))

    @property
    def _model_name(self) -> str:
        return self.config.engine.served_model_name or Path(self.config.engine.model).name

    def ref(self) -> WorkerRef:
        """Our identity, with the running engine's epoch."""
        advertised = self.config.advertise_host or self.config.host
        return WorkerRef(self.worker_id, self.host.epoch, f"{advertised}:{self.port}")

    def info(self) -> WorkerInfo:
        """What the cluster is told. Before the first engine was ready, the model's facts are lacking."""
        ready = self.host.ready
        if ready is not None and ready is not self._described:
            self._info, self._described = self._describe(ready), ready
        load = self.host.load.load if self.host.load is not None else WorkerLoad()
        return msgspec.structs.replace(self._info, ref=self.ref(), state=self._state(), load=load)

    def _describe(self, ready: EngineReady) -> WorkerInfo:
        engine = self.config.engine
        return WorkerInfo(
            ref=self.ref(),
            role=self.role,
            state=self._state(),
            model=ModelInfo(
                name=self._model_name,
                served_names=tuple(sorted(self.served_names - {self._model_name})),
                architecture=ready.architecture,
                model_hash=ready.layout.model_hash,
                max_model_len=ready.max_model_len,
                vocab_size=ready.vocab_size,
                dtype=ready.dtype,
                path=str(Path(engine.model).resolve()),
                embedding_size=ready.embedding_size,
            ),
            http_address=f"{self.config.advertise_host or self.config.host}:{self._http_port}",
            host=self._hostname,
            pid=os.getpid(),
            version=__version__,
            device=ready.device,
            transports=tuple(e.transport for e in ready.endpoints),
            layout_fingerprint=ready.layout.fingerprint(),
            max_num_seqs=engine.max_num_seqs,
            max_num_batched_tokens=engine.max_num_batched_tokens,
            kv_block_size=ready.layout.groups[0].block_size,
            min_remote_tokens=self.config.handoff.min_remote_tokens if self.role is Role.DECODE else 0,
        )

    def _state(self) -> WorkerState:
        if self._draining.is_set():
            return WorkerState.DRAINING
        if self.host.serving:
            return WorkerState.READY
        return WorkerState.STARTING if not self._registered else WorkerState.UNREADY

    # -- engine --

    def on_engine(self, message: FromEngine) -> None:
        if isinstance(message, KvChanges):
            self.kv_feed.take(message)
            return
        if isinstance(message, EngineLoad):
            self._gauges.apply(message)
            labelled = [(c.name, c.label, c.values) for c in message.labelled]
            self.metrics.apply_engine(message.counters, message.histograms, labelled)
        self._part.on_engine(message)
        self._activity.set()

    def on_engine_ready(self, ready: EngineReady) -> None:
        self.kv_feed.begin(self.host.epoch, ready.layout)
        self._part.on_engine_ready(ready)
        if self._draining.is_set():
            self.host.send(Drain())
        if not self._registered:
            self._registered = True
            self._registry.start()
        self._registry.poke()

    def on_engine_lost(self, reason: str) -> None:
        self.kv_feed.end()
        self._part.on_engine_lost(reason)
        self._activity.set()
        self._registry.poke()

    # -- life --

    async def run(self) -> None:
        """Serve until told to stop; returns when drained.

        Raises ConfigError when a port is taken, what the very first engine said when it cannot start, and
        UnavailableError when engines died too often: another try is the business of who runs this process.
        """
        loop = asyncio.get_running_loop()
        for sig in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(sig, self._draining.set)
        self.port = await self._rpc.start()
        try:
            self._http = await serve_http(
                self.config.host,
                self.config.http_port,
                metrics=self.metrics.render,
                alive=lambda: Verdict(*self.host.health()),
                ready=self._ready,
            )
        except ConfigError:
            await self._rpc.drain(0)
            raise
        log.info("listening", port=self.port, http_port=self._http.port, worker_id=self.worker_id)
        self.host.on_change = self._registry.poke
        await self.host.start(self)
        ends = [asyncio.ensure_future(event.wait()) for event in (self._draining, self.host.failed)]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for task in ends:
            task.cancel()
        failure, reason = self.host.failure, self.host.reason
        failed = self.host.failed.is_set()
        await self._drain(0.0 if failed else self._grace_s)
        if failed:
            raise failure.to_error() if failure is not None else UnavailableError(f"the engine is given up: {reason}")

    def drain(self, grace_s: float) -> None:
        self._grace_s = grace_s
        self._draining.set()

    async def _drain(self, grace_s: float) -> None:
        self._draining.set()
        log.info("draining", active=self._part.num_active(), grace_s=grace_s)
        self.host.send(Drain())
        self._registry.poke()
        deadline = self.clock.now() + grace_s
        while self._part.num_active() and (left := deadline - self.clock.now()) > 0:
            self._activity.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._activity.wait(), left)
        cut_off = self._part.num_active()
        await self._registry.stop()
        self.kv_feed.end()
        await self._part.close()
        await self._rpc.drain(1.0)
        await self.host.stop(STOP_ENGINE_S)
        if self._http is not None:
            await self._http.stop()
        log.info("ended", cut_off=cut_off)

    def _ready(self) -> Verdict:
        alive, reason = self.host.health()
        if self._draining.is_set():
            return Verdict(False, "draining")
        if not alive or not self.host.serving:
            return Verdict(False, reason)
        return Verdict(True, "ready", {"registered": self._registry.registered, "engine_pid": self.host.engine_pid})

    @property
    def _http_port(self) -> int:
        return self._http.port if self._http is not None else 0

    def _worker_service(self) -> Service:
        servicer = WorkerServicer(self.host, self.info, lambda: self._part.peers(), self.drain, self.kv_feed)
        stubs: Any = pb_grpc

        return Service(
            pb.DESCRIPTOR.services_by_name["WorkerService"].full_name,
            lambda server: stubs.add_WorkerServiceServicer_to_server(servicer, server),
            lambda: True,
        )


class _Gauges:
    """Engine load as Prometheus gauges, under vLLM's names where it has them."""

    def __init__(self, metrics: Metrics) -> None:
        self._running = metrics.gauge("num_requests_running", "Sequences in the running batch")
        self._waiting = metrics.gauge("num_requests_waiting", "Sequences queued or waiting for KV")
        self._usage = metrics.gauge("kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1")
        self._blocks = metrics.gauge("kv_blocks", "KV ledger: blocks by state", ("group", "state"))
        self._steps = metrics.gauge("engine_steps", "Engine steps since its start")
        self._peer_bytes = metrics.gauge("kv_transfer_peer_bytes", "Bytes read from a peer", ("peer", "transport"))

    def apply(self, message: EngineLoad) -> None:
        load = message.load
        self._running.set(load.running)
        self._waiting.set(load.waiting)
        self._steps.set(load.steps)
        if load.kv_blocks_total:
            self._usage.set(1 - load.kv_blocks_available / load.kv_blocks_total)
        for group in load.kv_states:
            for state in ("free", "live", "cached", "leased", "in_flight"):
                self._blocks.labels(group.group, state).set(getattr(group, state))
        self._peer_bytes.clear()  # peers are numbered anew at each session
        for peer in message.peers:
            self._peer_bytes.labels(str(peer.peer), peer.transport).set(peer.bytes_read)


def _unknown_model(name: str, path: str) -> ModelInfo:
    return ModelInfo(
        name=name, architecture="", model_hash=bytes(16), max_model_len=1, vocab_size=1, dtype="", path=path
    )
