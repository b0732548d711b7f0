"""An engine in a process of its own, and what it said."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any

from common.config import EngineConfig, HandoffConfig, LogConfig, UcxConfig, WorkerConfig
from common.engine.client import ProcessEngine
from common.engine.messages import EngineFatal, EngineReady, FromEngine, GetLedger, Ledger
from common.types import Role


class Engine:
    """One engine process and what it said."""

    def __init__(self, role: Role, folder: Path, tls: str = UcxConfig().tls, **engine: Any) -> None:
        options = {"dtype": "float32", "num_threads": 1, "kv_cache_memory_bytes": 8 << 20, "check_ledger": True}
        config = WorkerConfig(
            engine=EngineConfig(model=str(folder), **(options | engine)),
            handoff=HandoffConfig(min_remote_tokens=1),
            ucx=UcxConfig(tls=tls),
        )
        self.client = ProcessEngine(role, config, LogConfig(level="warning"), os.environ)
        self.ready: EngineReady | None = None
        self.fatal: EngineFatal | None = None
        self.deaths: list[str] = []
        self.ledgers: list[Ledger] = []
        self.changed = asyncio.Event()
        self.relay: Any = lambda message: None

    async def start(self) -> None:
        await self.client.start(self._on_message, self._on_death)
        await self.until(lambda: self.ready or self.fatal or self.deaths, 60)

    async def until(self, condition: Any, timeout_s: float = 20.0) -> None:
        async with asyncio.timeout(timeout_s):
            while not condition():
                self.changed.clear()
                await self.changed.wait()

    async def idle_ledger(self) -> Ledger:
        """The ledger once nothing is live, leased or in flight; fails after two seconds."""
        deadline = time.monotonic() + 2.0
        while True:
            count = len(self.ledgers)
            self.client.send(GetLedger(count, True))
            await self.until(lambda seen=count: len(self.ledgers) > seen)
            ledger = self.ledgers[-1]
            if all(g.free + g.cached == g.total for g in ledger.groups):
                return ledger
            assert time.monotonic() < deadline, ledger.blocks
            await asyncio.sleep(0.05)

    def _on_message(self, message: FromEngine) -> None:
        if isinstance(message, EngineReady):
            self.ready = message
        elif isinstance(message, EngineFatal):
            self.fatal = message
        elif isinstance(message, Ledger):
            self.ledgers.append(message)
        self.relay(message)
        self.changed.set()

    def _on_death(self, reason: str) -> None:
        self.deaths.append(reason)
        self.changed.set()
