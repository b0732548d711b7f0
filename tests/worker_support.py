"""For worker and engine tests: a clock that stands still until told, and a worker whose engine is scripted.

`ScriptedWorker` is a worker's gRPC side as it runs (host, part, servicers on a real server); only the engine
behind it does what a test says.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import grpc
from kvtransfer_support import small_layout

from common.config import EngineConfig, HandoffConfig, WorkerConfig
from common.engine.messages import EngineLoad, EngineReady, FromEngine, ToEngine
from common.kvcache.layout import KVLayout
from common.kvtransfer.transport import Endpoint, MemoryHandle
from common.rpc.client import open_channel
from common.rpc.server import RpcServer
from common.types import GenerationRequest, MonotonicClock, SamplingParams, WorkerLoad, WorkerRef
from services.worker.host import EngineHost


class ManualClock:
    def __init__(self, start: float = 100.0) -> None:
        self.instant = start

    def now(self) -> float:
        return self.instant

    def advance(self, seconds: float) -> None:
        self.instant += seconds


def engine_ready(layout: KVLayout | None = None) -> EngineReady:
    layout = layout or small_layout()
    memory = tuple(
        MemoryHandle(g.name, 4096, g.num_blocks * layout.block_nbytes(g.name), b"key") for g in layout.groups
    )
    return EngineReady(
        layout=layout,
        endpoints=(Endpoint("ucx", b"address", memory),),
        max_model_len=256,
        vocab_size=512,
        architecture="llama",
        dtype="float32",
        device="cpu",
        lease_ttl_s=5.0,
        pid=1,
    )


def engine_load(steps: int = 1, running: int = 0) -> EngineLoad:
    return EngineLoad(WorkerLoad(steps=steps, running=running), ())


class ScriptedEngine:
    """An `EngineClient` that remembers what it was sent and says what it is told to."""

    def __init__(self, ready: EngineReady | None) -> None:
        self.sent: list[ToEngine] = []
        self.alive = False
        self.pid = 1
        self._ready = ready
        self._arrived = asyncio.Event()
        self.say: Callable[[FromEngine], None] = lambda message: None
        self._on_death: Callable[[str], None] = lambda reason: None

    async def start(self, on_message: Callable[[FromEngine], None], on_death: Callable[[str], None]) -> None:
        self.alive, self.say, self._on_death = True, on_message, on_death
        if self._ready is not None:
            on_message(self._ready)

    def send(self, message: ToEngine) -> None:
        if self.alive:
            self.sent.append(message)
            self._arrived.set()

    def die(self, reason: str = "SIGKILL") -> None:
        self.alive = False
        self._on_death(reason)

    def kill(self) -> None:
        self.die("SIGKILL")

    async def stop(self, timeout_s: float) -> None:
        if self.alive:
            self.die("stopped")

    async def got(self, kind: type[Any], count: int = 1, timeout_s: float = 10.0) -> Any:
        """The `count`th message of a kind, once it has been sent."""
        async with asyncio.timeout(timeout_s):
            while len(found := [m for m in self.sent if isinstance(m, kind)]) < count:
                self._arrived.clear()
                await self._arrived.wait()
        return found[count - 1]

    def count(self, kind: type[Any]) -> int:
        return sum(isinstance(m, kind) for m in self.sent)


class ScriptedWorker:
    def __init__(self, make_part: Callable[[Any], Any], layout: KVLayout | None = None, max_restarts: int = 5) -> None:
        self.engines: list[ScriptedEngine] = []
        self.ready: EngineReady | None = engine_ready(layout)
        self.config = WorkerConfig(
            engine=EngineConfig(model="tiny", max_restarts=max_restarts),
            handoff=HandoffConfig(transports=("ucx",), min_remote_tokens=1),
        )
        self.host = EngineHost(self.config, self._make_engine, MonotonicClock())
        app = SimpleNamespace(
            host=self.host,
            config=self.config,
            clock=MonotonicClock(),
            served_names=frozenset({"tiny"}),
            ref=self.ref,
        )
        self.part = make_part(app)
        self.rpc = RpcServer([self.part.service], host="127.0.0.1", port=0)

    @property
    def engine(self) -> ScriptedEngine:
        return self.engines[-1]

    def ref(self) -> WorkerRef:
        return WorkerRef("scripted", self.host.epoch, f"127.0.0.1:{self.rpc.port}")

    def _make_engine(self) -> ScriptedEngine:
        self.engines.append(ScriptedEngine(self.ready))
        return self.engines[-1]


@asynccontextmanager
async def scripted(
    make_part: Callable[[Any], Any], layout: KVLayout | None = None, **options: Any
) -> AsyncIterator[tuple[ScriptedWorker, grpc.aio.Channel]]:
    """A running worker and a channel to it."""
    worker = ScriptedWorker(make_part, layout, **options)
    await worker.rpc.start()
    await worker.host.start(worker.part)
    try:
        async with open_channel(worker.ref().address) as channel:
            yield worker, channel
    finally:
        await worker.part.close()
        await worker.rpc.drain(0.0)
        await worker.host.stop(1.0)


def request(request_id: str = "r1", **fields: Any) -> GenerationRequest:
    given = {"model": "tiny", "prompt_token_ids": (5, 6, 7), "sampling": SamplingParams(seed=1, max_tokens=8)}
    return GenerationRequest(**{"request_id": request_id, **given, **fields})
