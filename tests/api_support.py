"""A router with controllers behind it, for what it stores: real HTTP, real gRPC, a real storage."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import anthropic
from redis_support import RedisServer, fresh_namespace
from router_support import Cluster, Script, cluster
from rpc_support import eventually

from common.config import ControllerConfig
from common.types import GenerationRequest
from services.controller.app import Controller

T = TypeVar("T")

PARSERS = {"tool_call_parser": "hermes", "reasoning_parser": "qwen3"}


@dataclasses.dataclass
class Stored:
    cluster: Cluster
    controller: Controller

    def anthropic(self) -> anthropic.AsyncAnthropic:
        return anthropic_client(self.cluster)


def anthropic_client(cluster: Cluster) -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(base_url=cluster.url, api_key="none", max_retries=0)


def controller(server: RedisServer, namespace: str, port: int = 0, **config: Any) -> Controller:
    return Controller(ControllerConfig(port=port, http_port=0, redis_url=server.url, namespace=namespace, **config))


@asynccontextmanager
async def stored_cluster(
    server: RedisServer, folder: Path, script: Callable[[GenerationRequest], Script], **config: Any
) -> AsyncIterator[Stored]:
    made = controller(server, fresh_namespace())
    await made.start()
    try:
        await eventually(lambda: made.hub.synced)
        address = f"127.0.0.1:{made.port}"
        async with cluster(folder, script, controllers=(address,), **config) as running:
            yield Stored(running, made)
    finally:
        await made.stop(0.1)


async def ended(ask: Callable[[], Awaitable[T]], timeout_s: float = 20.0) -> T:
    """What is asked for, once it is no longer under way."""
    until_s = time.monotonic() + timeout_s
    while True:
        found: Any = await ask()
        if found.status not in ("queued", "validating", "in_progress", "finalizing", "cancelling"):
            return found
        assert time.monotonic() < until_s, f"still {found.status}"
        await asyncio.sleep(0.05)


def typed_events(text: str) -> list[tuple[str, str]]:
    """Name and data of each event of a stream."""
    blocks = [block.split("\n") for block in text.split("\n\n") if block]
    assert all(len(block) == 2 for block in blocks), "every event has a name and one line of data"
    return [(name.removeprefix("event: "), data.removeprefix("data: ")) for name, data in blocks]
