"""A worker's membership, kept up by itself.

    start -> Register -> Heartbeat, Heartbeat ... -> stop -> Deregister
                ^            |
                |            +-- NOT_FOUND (lease ran out, storage flushed), or the worker's description
                +---------------- changed; an unreachable controller: the next address, with backoff

Leases live in the storage behind all controllers, so a heartbeat may go to any of them. Nothing here raises
to the worker: a cluster without a controller goes on serving.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Sequence

import msgspec

from common.errors import NotFoundError
from common.rpc.client import Backoff
from common.rpc.controller import Connect, ControllerPeer, GrpcController, Registered
from common.rpc.membership import Membership, MembershipChange
from common.rpc.tasks import end_tasks
from common.telemetry import get_logger
from common.types import WorkerInfo, WorkerLoad, WorkerState

__all__ = ["Membership", "MembershipChange", "RegistryClient"]

_log = get_logger(__name__)

_FIRST_TERMS = Registered(lease_ttl_s=3.0, heartbeat_s=1.0)  # until a controller has told its own
_MAX_BACKOFF_S = 2.0


class RegistryClient:
    """Keeps one worker registered. `describe` is called before every message and tells the worker as it is.

    `on_drain` is called once per registration, from the loop, when somebody asks this worker to drain.
    """

    def __init__(
        self,
        controllers: Sequence[str],
        describe: Callable[[], WorkerInfo],
        *,
        on_drain: Callable[[], None] = lambda: None,
        connect: Connect = GrpcController,
        rng: random.Random | None = None,
    ) -> None:
        if not controllers:
            raise ValueError("at least one controller address is needed")
        self._addresses = tuple(controllers)
        self._describe = describe
        self._on_drain = on_drain
        self._connect = connect
        self._rng = rng or random.SystemRandom()
        self._backoff = Backoff(self._rng, first_s=0.1, max_s=_MAX_BACKOFF_S)
        self._peers: dict[str, ControllerPeer] = {}
        self._index = 0
        self._failures = 0  # in a row
        self._terms = _FIRST_TERMS
        self._known_as: WorkerInfo | None = None  # what the controller has, without state and load
        self._drain_told = False
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def registered(self) -> bool:
        """The last word from a controller was that this worker is a member."""
        return self._known_as is not None and self._failures == 0

    def start(self) -> None:
        assert self._task is None, "started twice"
        self._task = asyncio.create_task(self._run(), name="registry")

    def poke(self) -> None:
        """Tell the controller now: the worker's state or description changed."""
        self._wake.set()

    async def stop(self, timeout_s: float = 2.0) -> None:
        """Leave the cluster, in at most `timeout_s`; the lease removes what could not be told."""
        if self._task is not None:
            await end_tasks([self._task])
            self._task = None
        if self._known_as is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._deregister(self._known_as, timeout_s)
        for peer in self._peers.values():
            await peer.close()
        self._peers.clear()
        self._known_as = None

    async def _run(self) -> None:
        while True:
            try:
                await self._tell()
            except NotFoundError:
                _log.warning("not a member any more, registering again")
                self._known_as = None
                delay = self._rng.uniform(0.0, min(0.1, self._terms.heartbeat_s))
            except Exception as error:  # noqa: BLE001 - nothing may reach the worker
                delay = self._after_failure(error)
            else:
                if self._failures:
                    _log.info("controller reached", address=self._addresses[self._index], failures=self._failures)
                self._failures = 0
                self._backoff.reset()
                delay = self._terms.heartbeat_s * self._rng.uniform(0.9, 1.0)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await self._wake.wait()
            self._wake.clear()

    async def _tell(self) -> None:
        worker = self._describe()
        peer = self._peer(self._addresses[self._index])
        timeout_s = max(0.2, self._terms.lease_ttl_s / 3)
        plain = _without_load(worker)
        if plain != self._known_as:
            self._terms = await peer.register(worker, timeout_s=timeout_s)
            if self._known_as is None:
                self._drain_told = False
                _log.info("registered", worker_id=worker.ref.worker_id, controller=self._addresses[self._index])
            self._known_as = plain
            return
        ref = worker.ref
        draining = await peer.heartbeat(ref.worker_id, ref.epoch, worker.state, worker.load, timeout_s=timeout_s)
        if draining and not self._drain_told:
            self._drain_told = True
            if worker.state is not WorkerState.DRAINING:
                self._on_drain()

    def _after_failure(self, error: Exception) -> float:
        """Seconds until the next try: other controllers at once, then all of them after a backoff."""
        if self._failures == 0:
            _log.warning("controller not reached", address=self._addresses[self._index], error=str(error))
        self._failures += 1
        self._index = (self._index + 1) % len(self._addresses)
        return self._backoff.next_s() if self._failures % len(self._addresses) == 0 else 0.0

    async def _deregister(self, worker: WorkerInfo, timeout_s: float) -> None:
        for step in range(len(self._addresses)):
            peer = self._peer(self._addresses[(self._index + step) % len(self._addresses)])
            try:
                await peer.deregister(worker.ref.worker_id, worker.ref.epoch, timeout_s=timeout_s / 2)
                return
            except Exception as error:  # noqa: BLE001 - the lease does it then
                _log.info("could not deregister", error=str(error))

    def _peer(self, address: str) -> ControllerPeer:
        if address not in self._peers:
            self._peers[address] = self._connect(address)
        return self._peers[address]


def _without_load(worker: WorkerInfo) -> WorkerInfo:
    return msgspec.structs.replace(worker, state=WorkerState.STARTING, load=WorkerLoad())
