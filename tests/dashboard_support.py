"""A router with a whole cluster in its view, and a real browser to look at its dashboard."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
from router_support import Cluster, Script, cluster, tokenizer

from common.types import (
    BlockStates,
    FinishReason,
    GenerationRequest,
    RequestStats,
    Role,
    WorkerInfo,
    WorkerLoad,
    WorkerRef,
    WorkerState,
)

ANSWER = "Because molecules scatter blue light more than red light: the shorter the wave, the more of it comes to us."


def find_chromium() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def missing_browser() -> str:
    """Why no page can be looked at here; empty if one can."""
    if importlib.util.find_spec("playwright") is None:
        return "playwright is not installed (the extra `browser`)"
    return "" if find_chromium() else "no Chromium is installed"


def load(running: int, total: int, live: int, cached: int, leased: int = 0, in_flight: int = 0) -> WorkerLoad:
    states = BlockStates(
        group="full",
        total=total,
        free=total - live - cached - leased - in_flight,
        live=live,
        cached=cached,
        leased=leased,
        in_flight=in_flight,
    )
    return WorkerLoad(
        running=running,
        waiting=running // 9,
        tokens_per_s=31.5 * running,
        kv_blocks_total=total,
        kv_blocks_available=states.free + cached,
        kv_states=(states,),
    )


def script(request: GenerationRequest) -> Script:
    """Each prompt was handed over by the prefill worker that the request named, or done in place if none."""
    prompt = len(request.prompt_token_ids)
    remote = prompt - 16 if prompt > 40 else 0
    stats = RequestStats(
        cached_tokens=16,
        computed_tokens=prompt - 16 - remote,
        transferred_tokens=remote,
        queue_ms=0.7,
        prefill_ms=9.0 + 0.2 * prompt,
        transfer_ms=2.5 if remote else 0.0,
        transfer_bytes=remote * 65536,
        transfer_gbps=3.1 if remote else 0.0,
        decode_queue_ms=4.0,
        first_token_ms=14.0 + 0.2 * prompt,
        prefill_worker=f"p{prompt % 2}" if remote else "",
        transport="ucx:posix,cma" if remote else "",
    )
    ids = [*tokenizer().encode(ANSWER), 2][: request.sampling.max_tokens]
    return Script(outputs=[ids], delay_s=0.004, finish=FinishReason.STOP, stop_token_id=2, stats=stats)


@asynccontextmanager
async def scene(folder: Path, **config: Any) -> AsyncIterator[Cluster]:
    """Two prefill workers, three decode workers of which two answer and one starts."""
    async with cluster(folder, script, num_workers=2, **config) as made:
        changes = {"device": "NVIDIA H100", "host": "rack1-node2", "transports": ("ucx",)}
        for i, worker in enumerate(made.workers):
            busy = load(9, 4096, (2210, 830)[i], (1200, 640)[i], 0, (96, 0)[i])
            made.members.put(msgspec.structs.replace(worker.info(), load=busy, **changes))
        first = made.workers[0].info()
        others = [
            ("p0", Role.PREFILL, WorkerState.READY, load(3, 2048, 310, 900, 260)),
            ("p1", Role.PREFILL, WorkerState.READY, load(1, 2048, 120, 1400, 90)),
            ("d2", Role.DECODE, WorkerState.STARTING, WorkerLoad()),
        ]
        for number, (name, role, state, now) in enumerate(others):
            ref = WorkerRef(name, 1000 + number, f"127.0.0.1:{9 + number}")
            info: WorkerInfo = msgspec.structs.replace(first, ref=ref, role=role, state=state, load=now, **changes)
            made.members.put(info)
        yield made
