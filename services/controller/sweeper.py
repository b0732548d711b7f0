"""Ends leases on time: sleeps until the next one can end, sweeps, and sleeps again. No polling.

After an outage of the storage the workers could not renew, so the first sweep forgives: it extends every
lease once instead of expiring all. The same at start: nobody may have been here to take heartbeats.
"""

from __future__ import annotations

import asyncio
import random

from common.errors import UnavailableError
from common.rpc.client import Backoff
from common.telemetry import Metrics, get_logger
from services.controller.store import Store

_log = get_logger(__name__)

SLACK_S = 0.005


class Sweeper:
    def __init__(self, store: Store, ttl_s: float, metrics: Metrics, rng: random.Random) -> None:
        self._store = store
        self._ttl_s = ttl_s
        self._backoff = Backoff(rng, first_s=0.1, max_s=2.0)
        self._expired = metrics.counter("controller_leases_expired", "Workers removed because their lease ended")
        self._forgive = True

    def forgive(self) -> None:
        """The storage was away: the next sweep extends leases."""
        self._forgive = True

    async def run(self) -> None:
        while True:
            wait_s = await self._sweep()
            await asyncio.sleep(wait_s)

    async def _sweep(self) -> float:
        """One sweep; returns seconds until the next. A lease made meanwhile cannot end before one TTL."""
        forgiving, self._forgive = self._forgive, False
        try:
            swept = await self._store.sweep(self._ttl_s, forgive=forgiving)
        except UnavailableError:  # the hub says so in the log
            self._forgive = True
            return self._backoff.next_s()
        except Exception:  # noqa: BLE001 - the edge of the loop
            _log.exception("sweep failed")
            self._forgive = True
            return self._backoff.next_s()
        self._backoff.reset()
        if swept.expired:
            self._expired.inc(len(swept.expired))
            _log.warning("leases expired", worker_ids=swept.expired)
        next_s = self._ttl_s if swept.next_s is None else min(swept.next_s, self._ttl_s)
        return next_s + SLACK_S
