"""Processes of a cluster are killed at times drawn from a seed, one or two at once, and have to come back.

killed (SIGKILL) -> started again by the launcher, an engine by its worker -> every worker is registered and
ready, with a new epoch where it was killed -> a token comes through: back
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass

from cluster_support import RunningCluster

from common.errors import NanoDeployError, UnavailableError
from common.rpc.admin import fetch_snapshot
from common.types import WorkerInfo, WorkerState

BACK_S = 60.0
AFTER_S = 1.5  # a request sent this long after `back` has nothing to do with the fault any more


Targets = tuple[str, ...]  # services, or `<worker>/engine`


@dataclass(frozen=True)
class Fault:
    """Times are those of time.time()."""

    targets: Targets
    at: float
    back_at: float

    @property
    def window(self) -> tuple[float, float]:
        return self.at - 0.05, self.back_at + AFTER_S

    @property
    def visible(self) -> bool:
        """Clients may get an error: their stream's own worker or router died. All else must not be seen."""
        return any(target == "router" or target.startswith("decode") for target in self.targets)


def schedule(rng: random.Random, workers: list[str], rounds: int) -> list[Targets]:
    """Who is killed in each round: everybody in turn, in a new order each time around; in every third round two."""
    everybody = ["storage", "controller", "router", *workers, *(f"{worker}/engine" for worker in workers)]
    queue: list[str] = []
    drawn: list[Targets] = []
    for number in range(rounds):
        if len(queue) < 2:
            queue += rng.sample(everybody, len(everybody))
        size = 2 if number % 3 == 2 and not _related(*queue[-2:]) else 1
        drawn.append(tuple(queue.pop() for _ in range(size)))
    return drawn


def _related(one: str, other: str) -> bool:
    """An engine dies with its worker."""
    return one.partition("/")[0] == other.partition("/")[0]


async def kill(cluster: RunningCluster, targets: Targets) -> Fault:
    """Kill and wait until the cluster is whole again; fails when it is not within `BACK_S`."""
    epochs = _epochs(await _members(cluster))
    pids = [cluster.engine_pid(t.partition("/")[0]) if "/" in t else cluster.pid(t) for t in targets]
    at = time.time()
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    killed = dict(zip(targets, pids, strict=True))
    while not await _is_back(cluster, killed, epochs):
        assert time.time() - at < BACK_S, f"{' and '.join(targets)} not back within {BACK_S} s"
        await asyncio.sleep(0.1)
    return Fault(targets, at, time.time())


async def _members(cluster: RunningCluster) -> tuple[WorkerInfo, ...]:
    """The controller may be starved for a second by the load: asked again for a while."""
    last = time.time() + BACK_S
    while True:
        try:
            return (await fetch_snapshot(cluster.state.controller, 5.0)).workers
        except UnavailableError:
            if time.time() > last:
                raise
            await asyncio.sleep(0.2)


def _epochs(workers: Iterable[WorkerInfo]) -> dict[str, int]:
    return {worker.ref.worker_id: worker.ref.epoch for worker in workers}


async def _is_back(cluster: RunningCluster, killed: dict[str, int], epochs: dict[str, int]) -> bool:
    if any("/" not in target and cluster.pid(target) == pid for target, pid in killed.items()):
        return False
    try:
        members = (await fetch_snapshot(cluster.state.controller, 5.0)).workers
    except NanoDeployError:
        return False
    now = _epochs(members)
    if now.keys() != epochs.keys() or any(worker.state is not WorkerState.READY for worker in members):
        return False
    anew = {target.partition("/")[0] for target in killed} & epochs.keys()
    return all(now[worker] != epochs[worker] for worker in anew) and await asyncio.to_thread(cluster.is_ready)
