"""The running cluster as the command line shows it: members from the controller, details from each worker."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing
from typing import Any

import msgspec

from common.errors import NanoDeployError, UnavailableError
from common.rpc.admin import WorkerChannels, WorkerStatus, fetch_snapshot, fetch_status
from common.rpc.codec.watch import PING_INTERVAL_S, Ping
from common.rpc.controller import GrpcController
from common.rpc.membership import MISSED_PINGS, MembershipTable, RevisionGapError
from common.types import MonotonicClock, Role, WorkerInfo

CALL_TIMEOUT_S = 5.0
SILENCE_S = PING_INTERVAL_S * MISSED_PINGS
SETTLE_S = 6.0  # after a change sessions between workers come and go without a word to the controller
QUIET_S = 30.0  # the longest time between two looks


class WorkerView(msgspec.Struct, frozen=True):
    """A member and what it answers; `error` says why it did not."""

    info: WorkerInfo
    status: WorkerStatus | None
    error: str = ""


async def view_cluster(controller: str, timeout_s: float = CALL_TIMEOUT_S) -> list[WorkerView]:
    """All members, by role and name. Raises an error of the tree when the controller does not answer."""
    snapshot = await fetch_snapshot(controller, timeout_s)
    return await view_workers(snapshot.workers, fetch_status, timeout_s)


async def view_workers(
    workers: Iterable[WorkerInfo],
    fetch: Callable[[str, float], Awaitable[WorkerStatus]],
    timeout_s: float = CALL_TIMEOUT_S,
) -> list[WorkerView]:
    """Those members, by role and name, each asked with `fetch` (address, timeout)."""

    async def view(info: WorkerInfo) -> WorkerView:
        try:
            return WorkerView(info, await fetch(info.ref.address, timeout_s))
        except NanoDeployError as error:
            return WorkerView(info, None, error.message)

    views = await asyncio.gather(*(view(info) for info in workers))
    return sorted(views, key=lambda view: (view.info.role, view.info.ref.worker_id))


async def follow_cluster(controller: str, refresh_s: float) -> AsyncGenerator[list[WorkerView], None]:
    """The members at first and whenever something changed, at most every `refresh_s`; ends with an error of the tree.

    One watch tells when to look; its pings pace the looks that follow a change, while sessions between workers
    settle. So a cluster at rest is asked next to nothing.
    """
    clock, table, peer = MonotonicClock(), MembershipTable(grace_s=0.0), GrpcController(controller)
    looked, news = -math.inf, 0.0
    try:
        async with WorkerChannels() as channels, aclosing(peer.watch("cli", silence_s=SILENCE_S)) as events:
            async for event in events:
                table.apply(event, clock.now())
                if not isinstance(event, Ping):
                    news = clock.now()
                silent_s = clock.now() - looked
                if silent_s > QUIET_S or (silent_s >= refresh_s and looked < news + SETTLE_S):
                    looked = clock.now()
                    await channels.keep([worker.ref.address for worker in table.workers.values()])
                    yield await view_workers(list(table.workers.values()), channels.fetch_status)
    except RevisionGapError as gap:
        raise UnavailableError(f"a change of the members was missed: {gap}") from None
    finally:
        await peer.close()
    raise UnavailableError(f"the controller at {controller} ended the watch")


def current(view: WorkerView) -> WorkerInfo:
    """The freshest facts: the worker's own answer, else what the controller has."""
    return view.status.worker if view.status is not None else view.info


def prefill_pairs(views: Sequence[WorkerView]) -> dict[tuple[str, str], int]:
    """Reads so far of each (decode worker, prefill worker) that can exist; 0 for a pair without a session."""
    pairs = {
        (decode.info.ref.worker_id, prefill.info.ref.worker_id): 0
        for decode in views
        if decode.info.role is Role.DECODE
        for prefill in views
        if prefill.info.role is Role.PREFILL
    }
    for view in views:
        for peer in view.status.peers if view.status is not None else ():
            pair = (view.info.ref.worker_id, peer.ref.worker_id)
            if pair in pairs:
                pairs[pair] += peer.reads
    return pairs


def worker_json(view: WorkerView) -> dict[str, Any]:
    """The stable form that `status --json` prints for a worker."""
    info = current(view)
    return {
        "worker_id": info.ref.worker_id,
        "role": info.role.value,
        "state": info.state.value,
        "address": info.ref.address,
        "http_address": info.http_address,
        "epoch": f"{info.ref.epoch:016x}",
        "pid": info.pid,
        "host": info.host,
        "version": info.version,
        "device": info.device,
        "model": info.model.name,
        "load": {
            "running": info.load.running,
            "waiting": info.load.waiting,
            "waiting_tokens": info.load.waiting_tokens,
            "tokens_per_s": info.load.tokens_per_s,
            "steps": info.load.steps,
        },
        "kv": [msgspec.to_builtins(states) for states in info.load.kv_states],
        "transports": list(info.transports),
        "engine_restarts": view.status.engine_restarts if view.status is not None else 0,
        "peers": [
            {
                "worker_id": peer.ref.worker_id,
                "state": peer.state,
                "transport": peer.transport,
                "detail": peer.detail,
                "bytes_read": peer.bytes_read,
                "reads": peer.reads,
                "digest_mismatches": peer.digest_mismatches,
            }
            for peer in (view.status.peers if view.status is not None else ())
        ],
        "error": view.error,
    }
