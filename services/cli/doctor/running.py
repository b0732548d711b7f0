"""Checks of the running cluster: its processes, its members, and one token through every pair of workers."""

from __future__ import annotations

import asyncio
import os

import httpx

from common.errors import NanoDeployError
from common.types import Role, WorkerState
from services.cli.cluster import WorkerView, current, prefill_pairs, view_cluster
from services.cli.doctor.finding import Finding, fail, note, ok, skip
from services.cli.probe import complete_once
from services.cli.state import ClusterState, StateFolder, state_root
from services.cli.token import admin_token, auth_headers

NUM_TOKENS = 96  # over HandoffConfig.min_remote_tokens, so that a prefill worker takes part
REPORT_S = 2.5  # engines report their reads about once a second


async def services(state: ClusterState | None) -> Finding:
    if state is None:
        return skip("no cluster is up")
    dead = [service.name for service in state.services if not service.process.alive]
    if dead:
        return fail(f"not running: {', '.join(dead)}", f"see the logs beside {state.services[0].log}")
    restarts = [f"{s.name} {s.restarts}x" for s in state.services if s.restarts]
    if restarts:
        return note(f"all run; restarted: {', '.join(restarts)}", "see their logs for why")
    return ok(f"{len(state.services)} run")


async def workers(state: ClusterState | None) -> Finding:
    """Every member answers, is ready and keeps a KV ledger that adds up."""
    if state is None:
        return skip("no cluster is up")
    try:
        views = await view_cluster(state.controller)
    except NanoDeployError as error:
        return fail(f"controller at {state.controller}: {error.message}", "see the controller's log")
    if not any(view.info.role is Role.DECODE for view in views):
        return fail("no decode worker is registered", "see the decode workers' logs")
    faults = [fault for view in views for fault in _faults(view)]
    if faults:
        return fail("; ".join(faults), "see that worker's log")
    return ok(", ".join(view.info.ref.worker_id for view in views) + " are ready")


def _faults(view: WorkerView) -> list[str]:
    info = current(view)
    name = info.ref.worker_id
    if view.error:
        return [f"{name} does not answer: {view.error}"]
    faults = [] if info.state is WorkerState.READY else [f"{name} is {info.state.value}"]
    for states in info.load.kv_states:
        parts = states.free + states.live + states.cached + states.leased + states.in_flight
        if parts != states.total:
            faults.append(f"{name}: KV group {states.group} holds {parts} of {states.total} blocks")
    for peer in view.status.peers if view.status is not None else ():
        if peer.state in ("refused", "lost"):
            faults.append(f"{name} -> {peer.ref.worker_id} is {peer.state}: {peer.detail}")
        if peer.digest_mismatches:
            faults.append(f"{name} <- {peer.ref.worker_id}: {peer.digest_mismatches} digest mismatches")
    return faults


async def path(state: ClusterState | None) -> Finding:
    """A token through each (decode, prefill) pair; a pair that silently recomputes is a failure."""
    if state is None:
        return skip("no cluster is up")
    try:
        before = prefill_pairs(await view_cluster(state.controller))
        headers = auth_headers(admin_token(StateFolder(state_root(os.environ), state.name)))
        async with httpx.AsyncClient(verify=False) as client:  # its certificate names another address than ours
            for _ in range(max(1, 2 * len(before))):
                answer = await complete_once(client, state.url, state.model, NUM_TOKENS, 60.0, headers)
        if not before:
            return ok(answer.path)
        await asyncio.sleep(REPORT_S)
        after = prefill_pairs(await view_cluster(state.controller))
    except NanoDeployError as error:
        return fail(error.message, "see `nanodeploy status` and the router's log")
    moved = {pair: after.get(pair, 0) - reads for pair, reads in before.items()}
    idle = [f"{prefill} -> {decode}" for (decode, prefill), reads in moved.items() if reads == 0]
    if len(idle) == len(moved):
        return fail(
            f"tokens came, but every decode worker recomputed ({answer.fallback or 'no prefill worker was chosen'}); "
            f"KV never moved {', '.join(idle)}",
            "see the sessions in `nanodeploy status --json` (peers) and the decode workers' logs",
        )
    if idle:
        return note(f"KV did not move {', '.join(idle)}", "the router may not have chosen these pairs; run it again")
    pairs = ", ".join(f"{prefill} -> {decode}" for decode, prefill in moved)
    return ok(f"KV moved {pairs}; the last: {answer.path}")
