"""The workers as a router knows them: a table that follows a controller's watch and outlives it.

    (no table) -> Snapshot -> Change, Loads, Ping ... -> a gap, silence or a lost controller -> Snapshot ...

While no controller answers, the table stays as it was. When one comes back with its storage lost (another
incarnation, or an older revision), workers that it does not name yet are kept until they register again or
a grace passes: an empty control plane must not empty the routers.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from types import MappingProxyType
from typing import NamedTuple

import msgspec

from common.errors import UnavailableError
from common.rpc.client import Backoff
from common.rpc.codec.watch import PING_INTERVAL_S, Change, ChangeKind, Loads, Ping, Snapshot, WatchEvent
from common.rpc.controller import Connect, ControllerPeer, GrpcController
from common.rpc.tasks import end_tasks
from common.telemetry import get_logger
from common.types import Clock, MonotonicClock, WorkerInfo

_log = get_logger(__name__)

MISSED_PINGS = 3
MAX_BACKOFF_S = 2.0


class MembershipChange(NamedTuple):
    """What listeners get; `reason` of a removal: expired, deregistered, replaced, unlisted, not re-registered."""

    kind: ChangeKind
    worker: WorkerInfo
    reason: str = ""


class RevisionGapError(Exception):
    """A change was missed: ask for a snapshot."""


class MembershipTable:
    """The state, without time or network of its own. `apply` returns what changed."""

    def __init__(self, grace_s: float) -> None:
        self._grace_s = grace_s
        self._incarnation = ""
        self._revision = 0
        self._unconfirmed: dict[str, float] = {}  # worker id -> when to give it up
        self.workers: dict[str, WorkerInfo] = {}

    def apply(self, event: WatchEvent, now_s: float) -> list[MembershipChange]:
        """Raises RevisionGapError when the event does not follow the one before."""
        match event:
            case Snapshot():
                return self._take_snapshot(event, now_s)
            case Change():
                self._expect(event.revision, self._revision + 1)
                self._revision = event.revision
                if event.kind is ChangeKind.REMOVED:
                    return self._remove(event.worker.ref.worker_id, event.worker.ref.epoch, event.reason)
                return self._put(event.worker)
            case Loads():
                self._take_loads(event)
                return self._give_up(now_s)  # a busy cluster is never so quiet that a ping comes
            case Ping():
                self._expect(event.revision, self._revision)
                return self._give_up(now_s)

    def _expect(self, got: int, want: int) -> None:
        if not self._incarnation or got != want:
            raise RevisionGapError(f"revision {got} after {self._revision}")

    def _take_snapshot(self, snapshot: Snapshot, now_s: float) -> list[MembershipChange]:
        storage_kept = snapshot.incarnation == self._incarnation and snapshot.revision >= self._revision
        self._incarnation, self._revision = snapshot.incarnation, snapshot.revision
        changes = [change for worker in snapshot.workers for change in self._put(worker)]
        named = {worker.ref.worker_id for worker in snapshot.workers}
        for worker_id, worker in list(self.workers.items()):
            if worker_id in named:
                continue
            if storage_kept and worker_id not in self._unconfirmed:
                changes += self._remove(worker_id, worker.ref.epoch, "unlisted")
            else:
                self._unconfirmed[worker_id] = now_s + self._grace_s
        return changes

    def _put(self, worker: WorkerInfo) -> list[MembershipChange]:
        worker_id = worker.ref.worker_id
        old = self.workers.get(worker_id)
        self._unconfirmed.pop(worker_id, None)
        self.workers[worker_id] = worker
        if old is None:
            return [MembershipChange(ChangeKind.ADDED, worker)]
        if old.ref.epoch != worker.ref.epoch:
            return [
                MembershipChange(ChangeKind.REMOVED, old, "replaced"),
                MembershipChange(ChangeKind.ADDED, worker),
            ]
        if msgspec.structs.replace(old, load=worker.load) == worker:
            return []
        return [MembershipChange(ChangeKind.UPDATED, worker)]

    def _remove(self, worker_id: str, epoch: int, reason: str) -> list[MembershipChange]:
        old = self.workers.get(worker_id)
        if old is None or old.ref.epoch != epoch:
            return []
        del self.workers[worker_id]
        self._unconfirmed.pop(worker_id, None)
        return [MembershipChange(ChangeKind.REMOVED, old, reason)]

    def _take_loads(self, loads: Loads) -> None:
        for entry in loads.entries:
            worker = self.workers.get(entry.worker_id)
            if worker is not None and worker.ref.epoch == entry.epoch:
                self.workers[entry.worker_id] = msgspec.structs.replace(worker, load=entry.load)

    def _give_up(self, now_s: float) -> list[MembershipChange]:
        late = [worker_id for worker_id, deadline in self._unconfirmed.items() if deadline <= now_s]
        return [
            change
            for worker_id in late
            for change in self._remove(worker_id, self.workers[worker_id].ref.epoch, "not re-registered")
        ]


class Membership:
    """Follows the controllers in turn. Life: start -> (synced, lost, synced again ...) -> stop.

    `grace_s` must exceed the lease TTL plus one heartbeat. Listeners are called from the event loop, after
    the table has changed; what they raise is logged.
    """

    def __init__(
        self,
        controllers: Sequence[str],
        *,
        watcher_id: str,
        connect: Connect = GrpcController,
        clock: Clock = MonotonicClock(),
        rng: random.Random | None = None,
        ping_interval_s: float = PING_INTERVAL_S,
        grace_s: float = 10.0,
    ) -> None:
        if not controllers:
            raise ValueError("at least one controller address is needed")
        self._addresses = tuple(controllers)
        self._watcher_id = watcher_id
        self._connect = connect
        self._clock = clock
        self._rng = rng or random.SystemRandom()
        self._silence_s = ping_interval_s * MISSED_PINGS
        self._table = MembershipTable(grace_s)
        self._listeners: list[Callable[[MembershipChange], None]] = []
        self._peers: dict[str, ControllerPeer] = {}
        self._synced = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.connected = False  # a controller's watch is being followed right now

    @property
    def workers(self) -> Mapping[str, WorkerInfo]:
        """Worker id -> worker with its latest load. A live view: do not await while iterating over it."""
        return MappingProxyType(self._table.workers)

    @property
    def synced(self) -> bool:
        """There was a snapshot since start; the table may be old if not `connected`."""
        return self._synced.is_set()

    def subscribe(self, listener: Callable[[MembershipChange], None]) -> None:
        """Call `listener` on every change from now on; those already known come first, as added."""
        for worker in list(self._table.workers.values()):
            listener(MembershipChange(ChangeKind.ADDED, worker))
        self._listeners.append(listener)

    def start(self) -> None:
        assert self._task is None, "started twice"
        self._task = asyncio.create_task(self._run(), name="membership")

    async def wait_synced(self, timeout_s: float) -> bool:
        """Wait for the first snapshot; False when there was none in time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._synced.wait()
        return self._synced.is_set()

    async def stop(self) -> None:
        if self._task is not None:
            await end_tasks([self._task])
            self._task = None
        self.connected = False
        for peer in self._peers.values():
            await peer.close()
        self._peers.clear()

    async def _run(self) -> None:
        backoff = Backoff(self._rng, first_s=0.1, max_s=MAX_BACKOFF_S)
        failures = index = 0
        while True:
            address = self._addresses[index]
            try:
                await self._follow(address, backoff)
            except RevisionGapError as gap:
                _log.info("membership resync", controller=address, reason=str(gap))
                delay = self._rng.uniform(0.0, 0.05)
            except Exception as error:  # noqa: BLE001 - the table stays, whatever the controller does
                failures = 1 if self.connected else failures + 1
                if failures == 1:
                    _log.warning("controller lost, serving on the last table", controller=address, error=str(error))
                index = (index + 1) % len(self._addresses)
                delay = backoff.next_s() if failures % len(self._addresses) == 0 else 0.0
            self.connected = False
            await asyncio.sleep(delay)

    async def _follow(self, address: str, backoff: Backoff) -> None:
        peer = self._peers.get(address) or self._connect(address)
        self._peers[address] = peer
        async with aclosing(peer.watch(self._watcher_id, silence_s=self._silence_s)) as events:
            async for event in events:
                self._tell(self._table.apply(event, self._clock.now()))
                if isinstance(event, Snapshot):
                    _log.info("membership synced", controller=address, workers=len(event.workers))
                    self.connected = True
                    self._synced.set()
                    backoff.reset()
        raise UnavailableError("the controller ended the watch")

    def _tell(self, changes: list[MembershipChange]) -> None:
        for change in changes:
            for listener in self._listeners:
                try:
                    listener(change)
                except Exception:  # noqa: BLE001 - one listener must not harm the others
                    _log.exception("membership listener failed", worker_id=change.worker.ref.worker_id)
