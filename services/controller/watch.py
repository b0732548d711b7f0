"""One tail of the storage, fanned out to all watchers.

    UNSYNCED -> snapshot -> SYNCED: changes, loads, pings -> storage lost: watchers are cut, UNSYNCED, backoff
                   ^                        |
                   +--- gap, other incarnation, entry that cannot be read: all watchers get a new snapshot

The hub holds the table, so a new watcher starts from memory. A watcher that does not keep up is cut off: it
comes back and gets a snapshot, which is shorter than what it missed. Loads replace each other while waiting.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import AsyncIterator, Callable

import msgspec

from common.errors import InternalError, NanoDeployError, UnavailableError
from common.rpc.client import Backoff
from common.rpc.codec import PING_INTERVAL_S, Change, ChangeKind, LoadEntry, Loads, Ping, Snapshot, WatchEvent
from common.telemetry import get_logger
from common.types import Clock, WorkerInfo
from services.controller.store import Head, Store, TailEntry

_log = get_logger(__name__)

MAX_PENDING = 1024  # changes that a watcher may be behind


class _Watcher:
    """What one watcher has yet to be sent. Bounded: changes by `MAX_PENDING`, loads by the workers."""

    def __init__(self) -> None:
        self.wake = asyncio.Event()
        self.ended: NanoDeployError | None = None
        self._events: deque[WatchEvent] = deque()
        self._loads: dict[str, LoadEntry] = {}
        self._ping: Ping | None = None

    def put(self, event: WatchEvent) -> None:
        match event:
            case Snapshot():
                self._events.clear()
                self._loads.clear()
                self._events.append(event)
            case Change() if len(self._events) >= MAX_PENDING:
                self.end(UnavailableError("watcher is too slow"))
            case Change():
                self._events.append(event)
            case Loads():
                self._loads.update((entry.worker_id, entry) for entry in event.entries)
            case Ping():
                self._ping = event
        self.wake.set()

    def take(self) -> list[WatchEvent]:
        """Everything that waits, changes first: a load never comes before its worker."""
        self.wake.clear()
        events = list(self._events)
        if self._loads:
            events.append(Loads(tuple(self._loads.values())))
        if self._ping is not None and not events:
            events.append(self._ping)
        self._events.clear()
        self._loads.clear()
        self._ping = None
        return events

    def end(self, error: NanoDeployError) -> None:
        self.ended = error
        self._events.clear()
        self.wake.set()


class WatchHub:
    """`run` follows the storage until cancelled; `on_lost` is called when the storage was not reachable."""

    def __init__(
        self,
        store: Store,
        *,
        clock: Clock,
        rng: random.Random,
        ping_s: float = PING_INTERVAL_S,
        on_lost: Callable[[], None] = lambda: None,
    ) -> None:
        self._store = store
        self._clock = clock
        self._ping_s = ping_s
        self._on_lost = on_lost
        self._backoff = Backoff(rng, first_s=0.1, max_s=2.0)
        self._watchers: set[_Watcher] = set()
        self._head: Head | None = None  # None: not synced
        self._workers: dict[str, WorkerInfo] = {}
        self._behind = False
        self._lost_reason = "not synced with the storage yet"
        self._progress_s = clock.now()

    @property
    def synced(self) -> bool:
        return self._head is not None

    @property
    def reason(self) -> str:
        """Why it is not synced, empty if it is."""
        return "" if self.synced else self._lost_reason

    @property
    def num_watchers(self) -> int:
        return len(self._watchers)

    @property
    def workers(self) -> tuple[WorkerInfo, ...]:
        return tuple(self._workers.values())

    def stalled_s(self) -> float:
        """Seconds since the loop last came round; above a few ping intervals it hangs."""
        return self._clock.now() - self._progress_s

    async def run(self) -> None:
        while True:
            try:
                await self._follow()
                delay = 0.0
            except UnavailableError as error:
                self._lose(error)
                delay = self._backoff.next_s()
            except Exception:  # noqa: BLE001 - the edge of the loop
                _log.exception("following the storage failed")
                self._lose(InternalError("following the storage failed"))
                delay = self._backoff.next_s()
            self._progress_s = self._clock.now()
            await asyncio.sleep(delay)

    def close(self) -> None:
        """End all watches: the controller stops."""
        self._cut(UnavailableError("the controller is stopping"))

    async def watch(self) -> AsyncIterator[WatchEvent]:
        """A snapshot, then what follows; UnavailableError when the storage is or gets lost."""
        watcher = _Watcher()
        watcher.put(self._snapshot())
        self._watchers.add(watcher)
        try:
            while True:
                await self._news(watcher)
                for event in watcher.take():
                    yield event
                if watcher.ended is not None:
                    raise watcher.ended
        finally:
            self._watchers.discard(watcher)

    async def _news(self, watcher: _Watcher) -> None:
        """Pings come before the limit unless the hub hangs."""
        try:
            async with asyncio.timeout(self._ping_s * 10):
                await watcher.wake.wait()
        except TimeoutError:
            raise UnavailableError("the controller does not follow its storage") from None

    def _snapshot(self) -> Snapshot:
        if self._head is None:
            raise UnavailableError(self._lost_reason)
        return Snapshot(self._head.incarnation, self._head.revision, tuple(self._workers.values()))

    async def _follow(self) -> None:
        """Sync and tail; returns when a new snapshot is needed."""
        snapshot, cursor = await self._store.snapshot()
        self._head = Head(snapshot.incarnation, snapshot.revision)
        self._workers = {w.ref.worker_id: w for w in snapshot.workers}
        self._behind = False
        self._backoff.reset()
        self._broadcast(snapshot)
        _log.info("synced", incarnation=snapshot.incarnation, revision=snapshot.revision, workers=len(self._workers))
        while True:
            entries, cursor = await self._store.tail(cursor, self._ping_s)
            self._progress_s = self._clock.now()
            if not (self._take(entries) if entries else await self._check_head()):
                _log.warning("resync", revision=self._head.revision)
                return

    def _take(self, entries: list[TailEntry]) -> bool:
        """Apply and pass on; False when they do not follow what is known."""
        assert self._head is not None
        loads: list[LoadEntry] = []
        for incarnation, event in entries:
            if incarnation != self._head.incarnation or event is None:
                return False
            if isinstance(event, LoadEntry):
                loads += self._take_load(event)
            elif event.revision == self._head.revision + 1:
                self._head = Head(incarnation, event.revision)
                self._take_change(event)
            else:
                return False
        if loads:
            self._broadcast(Loads(tuple(loads)))
        return True

    def _take_change(self, change: Change) -> None:
        worker = change.worker
        if change.kind is ChangeKind.REMOVED:
            self._workers.pop(worker.ref.worker_id, None)
        else:
            self._workers[worker.ref.worker_id] = worker
        _log.info(
            f"worker {change.kind}",
            worker_id=worker.ref.worker_id,
            state=worker.state,
            reason=change.reason,
            revision=change.revision,
        )
        self._broadcast(change)

    def _take_load(self, entry: LoadEntry) -> list[LoadEntry]:
        worker = self._workers.get(entry.worker_id)
        if worker is None or worker.ref.epoch != entry.epoch:
            return []
        self._workers[entry.worker_id] = msgspec.structs.replace(worker, load=entry.load)
        return [entry]

    async def _check_head(self) -> bool:
        """Nothing came for a while: is the storage still the one we follow? A ping for the watchers if so.

        One change may have landed since the tail returned; two quiet rounds behind it mean that it is lost.
        """
        assert self._head is not None
        head = await self._store.head()
        if head == self._head:
            self._behind = False
            self._broadcast(Ping(head.revision))
            return True
        if head.incarnation != self._head.incarnation or head.revision < self._head.revision or self._behind:
            return False
        self._behind = True
        return True

    def _lose(self, error: NanoDeployError) -> None:
        if self.synced or not self._watchers:
            _log.warning("storage lost", error=error.message)
        self._head = None
        self._lost_reason = error.message
        self._on_lost()
        self._cut(UnavailableError(error.message))

    def _broadcast(self, event: WatchEvent) -> None:
        for watcher in self._watchers:
            watcher.put(event)

    def _cut(self, error: NanoDeployError) -> None:
        for watcher in self._watchers:
            watcher.end(error)
