"""Keeps one engine running behind a gRPC process.

    STARTING -> READY -> (engine died) -> STARTING -> READY ...        at most `max_restarts` in 5 minutes
    STARTING -> FAILED                                                  the very first engine said why it cannot start

A running engine tells its load once a second, and in a long step that it is at another layer. Silent for
`PROGRESS_LIMIT_S` it is not `serving` (the cluster sends nothing here); silent for `hang_timeout_s` it is killed,
which is a death like any other.

Each engine gets an epoch of its own: its memory, its requests and its leases die with it, so to the cluster a
restarted engine is another worker of the same name.
"""

from __future__ import annotations

import asyncio
import collections
import enum
from collections.abc import Callable
from typing import Protocol

from common.config import WorkerConfig
from common.engine.client import EngineClient
from common.engine.messages import (
    EngineFatal,
    EngineLoad,
    EngineProgress,
    EngineReady,
    FromEngine,
    GetLedger,
    Ledger,
    ToEngine,
)
from common.errors import DeadlineExceededError, UnavailableError
from common.telemetry import get_logger
from common.types import Clock, Failure, new_epoch

log = get_logger(__name__)

RESTART_WINDOW_S = 300.0
PROGRESS_LIMIT_S = 5.0  # of silence, then a running engine is not chosen
LATE_S = 1.0  # the event loop's own delay that counts
START_LIMIT_S = 600.0  # between two words of an engine that starts
LEDGER_TIMEOUT_S = 5.0


class HostState(enum.Enum):
    STARTING = "starting"
    READY = "ready"
    FAILED = "failed"
    STOPPED = "stopped"


class EngineOwner(Protocol):
    """The servicer behind which the engine runs."""

    def on_engine(self, message: FromEngine) -> None:
        """A message other than those the host takes itself."""

    def on_engine_ready(self, ready: EngineReady) -> None: ...

    def on_engine_lost(self, reason: str) -> None:
        """Everything that was running is gone: give each of it one terminal event."""


class EngineHost:
    def __init__(self, config: WorkerConfig, make_engine: Callable[[], EngineClient], clock: Clock) -> None:
        self._make_engine = make_engine
        self._clock = clock
        self._max_restarts = config.engine.max_restarts
        self._hang_s = config.engine.hang_timeout_s
        self._engine: EngineClient | None = None
        self._owner: EngineOwner | None = None
        self._deaths: collections.deque[float] = collections.deque()
        self._ledger_calls: dict[int, asyncio.Future[Ledger]] = {}
        self._restart: asyncio.Task[None] | None = None
        self._watch: asyncio.Task[None] | None = None
        self._was_ready = False
        self._silent = False
        self._killed = False
        self._verdict = ""  # why the engine that is about to end does so, where we know better than the kernel
        self._progress_at = clock.now()
        self.on_change: Callable[[], None] = lambda: None
        self.failed = asyncio.Event()
        """Set in FAILED."""
        self.epoch = new_epoch()
        self.state = HostState.STARTING
        self.reason = "the engine is starting"
        self.restarts = 0
        self.failure: Failure | None = None  # of the very first engine
        self.ready: EngineReady | None = None
        self.load: EngineLoad | None = None
        self._beats = 0  # of long steps

    async def start(self, owner: EngineOwner) -> None:
        """Start the first engine; later ones start by themselves."""
        self._owner = owner
        await self._start_engine()

    def send(self, message: ToEngine) -> None:
        if self._engine is not None:
            self._engine.send(message)

    def require_ready(self) -> EngineReady:
        """The running engine's facts, or `UnavailableError` that says what is amiss."""
        if self.state is not HostState.READY or self.ready is None:
            raise UnavailableError(f"the engine is not ready: {self.reason}")
        return self.ready

    @property
    def serving(self) -> bool:
        """The engine runs and makes progress."""
        return self.state is HostState.READY and not self._silent

    @property
    def steps(self) -> int:
        """Of the engine since its start, and signs of life amid long ones: it grows while the engine computes."""
        return self._beats + (self.load.load.steps if self.load is not None else 0)

    @property
    def engine_pid(self) -> int:
        return self._engine.pid if self._engine is not None else 0

    def health(self) -> tuple[bool, str]:
        """Does the engine make progress? An orderly start counts as healthy, giving up does not."""
        if self.state is HostState.FAILED:
            return False, self.reason
        silent_s = self._clock.now() - self._progress_at
        if silent_s > (PROGRESS_LIMIT_S if self.state is HostState.READY else START_LIMIT_S):
            return False, f"the engine has said nothing for {silent_s:.1f} s"
        return True, self.reason

    def look(self) -> float:
        """Take note of a silent engine, end a hung one; seconds until the next look is due.

        Never longer than `PROGRESS_LIMIT_S`: meanwhile the engine may start, speak and fall silent again.
        """
        silent_s = self._clock.now() - self._progress_at
        limit_s = self._hang_s if self.state is HostState.READY else START_LIMIT_S
        if silent_s >= limit_s and self._engine is not None and not self._killed:
            self._killed = True
            self._verdict = f"the engine made no progress for {silent_s:.0f} s and was killed"
            log.error("engine hangs", pid=self._engine.pid, silent_s=round(silent_s, 1), state=self.state.value)
            self._engine.kill()
        elif silent_s >= PROGRESS_LIMIT_S and self.serving:
            self._silent = True
            log.warning("engine is silent", pid=self.engine_pid, silent_s=round(silent_s, 1))
            self.on_change()
        ahead = (limit - silent_s for limit in (PROGRESS_LIMIT_S, limit_s) if limit > silent_s)
        return min([PROGRESS_LIMIT_S, *ahead])

    async def ledger(self, *, with_blocks: bool) -> Ledger:
        """Ask the engine for its KV ledger."""
        self.require_ready()
        call_id = new_epoch()
        future: asyncio.Future[Ledger] = asyncio.get_running_loop().create_future()
        self._ledger_calls[call_id] = future
        try:
            self.send(GetLedger(call_id, with_blocks))
            return await asyncio.wait_for(future, LEDGER_TIMEOUT_S)
        except TimeoutError:
            raise DeadlineExceededError(f"the engine did not answer within {LEDGER_TIMEOUT_S} s") from None
        finally:
            self._ledger_calls.pop(call_id, None)

    async def stop(self, timeout_s: float) -> None:
        self._set(HostState.STOPPED, "stopped")
        for task in (self._restart, self._watch):
            if task is not None:
                task.cancel()
        if self._engine is not None:
            await self._engine.stop(timeout_s)

    async def _start_engine(self) -> None:
        self.epoch = new_epoch()
        self.ready, self.load, self._beats = None, None, 0
        self._progress_at = self._clock.now()
        self._silent, self._killed, self._verdict = False, False, ""
        self._set(HostState.STARTING, "the engine is starting")
        engine = self._make_engine()
        self._engine = engine
        await engine.start(self._on_message, self._on_death)
        self._watch = self._watch or asyncio.get_running_loop().create_task(self._keep_looking())

    async def _keep_looking(self) -> None:
        """While this loop itself stands still (stopped, starved) nobody is heard: that is no silence."""
        while True:
            began, wait_s = self._clock.now(), self.look()
            await asyncio.sleep(wait_s)
            if self._clock.now() - began > wait_s + LATE_S:
                self._progress_at = self._clock.now()

    def _progressed(self) -> None:
        self._progress_at = self._clock.now()
        if self._silent:
            self._silent = False
            log.info("engine goes on", pid=self.engine_pid)
            self.on_change()

    def _on_message(self, message: FromEngine) -> None:
        assert self._owner is not None
        match message:
            case EngineReady():
                self.ready = message
                self._was_ready = True
                self._progressed()
                self._set(HostState.READY, "ready")
                self._owner.on_engine_ready(message)
            case EngineLoad():
                self.load = message
                self._progressed()
                self._owner.on_engine(message)
            case EngineProgress():
                if self.state is HostState.READY:
                    self._beats += 1
                else:
                    share = f": {100 * message.done // message.total} %" if message.total > 1 else ""
                    self.reason = message.stage + share
                self._progressed()
            case EngineFatal():
                log.error("engine cannot start", error=message.failure.message)
                self._verdict = message.failure.message
                if not self._was_ready:
                    self.failure = message.failure
                    self._fail(message.failure.message)
            case Ledger():
                future = self._ledger_calls.pop(message.call_id, None)
                if future is not None and not future.done():
                    future.set_result(message)
            case _:
                self._owner.on_engine(message)

    def _on_death(self, reason: str) -> None:
        assert self._owner is not None
        self._engine = None
        reason = self._verdict or reason
        for future in self._ledger_calls.values():
            if not future.done():
                future.set_exception(UnavailableError(reason))
        self._ledger_calls.clear()
        self._owner.on_engine_lost(reason)
        if self.state in (HostState.STOPPED, HostState.FAILED):
            return
        now = self._clock.now()
        self._deaths.append(now)
        while self._deaths[0] < now - RESTART_WINDOW_S:
            self._deaths.popleft()
        log.error("engine died", reason=reason, deaths=len(self._deaths))
        if len(self._deaths) > self._max_restarts:
            self._fail(f"{reason}; {len(self._deaths)} deaths in {RESTART_WINDOW_S:.0f} s")
            return
        self.restarts += 1
        self._set(HostState.STARTING, f"restarting: {reason}")
        self._restart = asyncio.get_running_loop().create_task(self._restart_later(len(self._deaths)))

    async def _restart_later(self, deaths: int) -> None:
        await asyncio.sleep(min(0.1 * 2 ** (deaths - 1), 10.0))
        try:
            await self._start_engine()
        except OSError as error:
            self._on_death(f"no engine process could be started: {error}")

    def _fail(self, reason: str) -> None:
        self._set(HostState.FAILED, reason)
        self.failed.set()

    def _set(self, state: HostState, reason: str) -> None:
        self.state, self.reason = state, reason
        self.on_change()
