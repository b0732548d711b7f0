"""Keeps what the workers can use on the workers, and the rest here, where it can still be ordered and refused.

    enter: room and nobody waiting -> running                        (no wait)
           else: the wait foreseen is too long, or the queue is full -> 429
                 waits for its turn -> running
                                   `-> 503 after `max_wait_s`, or 504 at its own deadline; client gone: withdrawn
    leave: its place goes to the next

Overload must not lower what is served in time. Requests beyond `factor` batches would only wait in the workers, first
come first served, until all are late; here a request is refused as soon as its wait is foreseen to be too long, from
how fast places were given out lately, and it costs no worker anything.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Final, NamedTuple

from common.errors import DeadlineExceededError, NanoDeployError, UnavailableError
from common.types import Clock
from services.router.admission.fair import FairQueue, Waiter
from services.router.errors import RateLimitedError

TICK_S: Final = 0.1  # while somebody waits: deadlines, and room that others have left
RATE_S: Final = 5.0  # how far back the pace is looked at
MAX_RETRY_AFTER_S: Final = 60.0
RUN_WEIGHT: Final = 0.05  # of the latest in the average


class GateSettings(NamedTuple):
    max_queued: int  # requests of one priority
    max_wait_s: float


class Pace:
    """Tokens a second that got a place while there was a queue."""

    def __init__(self) -> None:
        self._since_s = self._at_s = 0.0
        self._tokens = 0.0

    def restart(self, now_s: float) -> None:
        self._since_s = self._at_s = now_s
        self._tokens = 0.0

    def count(self, tokens: int, now_s: float) -> None:
        self._tokens = self._tokens * math.exp((self._at_s - now_s) / RATE_S) + tokens
        self._at_s = now_s

    def seconds(self, tokens: int, now_s: float) -> float:
        """How long that many will take; 0 while nothing is known."""
        seen_s = now_s - self._since_s
        if not self._tokens or seen_s <= 0:
            return 0.0
        faded = self._tokens * math.exp((self._at_s - now_s) / RATE_S)
        return tokens * RATE_S * -math.expm1(-seen_s / RATE_S) / faded


class Gate:
    """Of one model. `capacity`: sequences that may run now, 0 for no limit; asked at every entry."""

    def __init__(
        self,
        settings: GateSettings,
        capacity: Callable[[int], int],
        clock: Clock,
        call_later: Callable[[float, Callable[[], None]], asyncio.TimerHandle] | None = None,
    ) -> None:
        self._settings = settings
        self._capacity = capacity
        self._clock = clock
        self._call_later = call_later or asyncio.get_running_loop().call_later
        self._queue = FairQueue(settings.max_queued)
        self._pace = Pace()
        self._timer: asyncio.TimerHandle | None = None
        self._run_s = self._off_s = 0.0  # how long one has its place, on average, and how far they are from it
        self.running = 0  # sequences

    @property
    def waiting(self) -> tuple[int, int, int]:
        """Requests of priorities above, at and below the usual one."""
        return self._queue.sizes()

    def try_enter(self, seqs: int) -> bool:
        """A place at once, if nobody waits and there is one."""
        if len(self._queue) or not self._fits(seqs):
            return False
        self.running += seqs
        return True

    def _fits(self, seqs: int) -> bool:
        """One that is larger than all there is runs alone."""
        capacity = self._capacity(self.running)
        return not capacity or not self.running or self.running + seqs <= capacity

    def offer(
        self,
        flow: str,
        cost: int,
        seqs: int,
        priority: int,
        deadline_s: float,
        settle: Callable[[Exception | None], None],
    ) -> Waiter:
        """Join the queue. Raises `RateLimitedError` if that has no prospect."""
        now_s = self._clock.now()
        if not len(self._queue):
            self._pace.restart(now_s)
        wait_s, allowed_s = self.check(flow, cost, priority, deadline_s)
        give_up_s = now_s + allowed_s
        waiter = Waiter(flow, cost, seqs, priority, since_s=now_s, give_up_s=give_up_s, settle=settle)
        out = self._queue.offer(waiter)
        if out is not None:
            error = _refused(f"{self._settings.max_queued} requests are waiting, which is the limit", wait_s)
            if out is waiter:
                raise error
            out.settle(error)
        if self._timer is None:
            self._timer = self._call_later(TICK_S, self.tick)
        return waiter

    def check(self, flow: str, cost: int, priority: int, deadline_s: float) -> tuple[float, float]:
        """The wait foreseen and the longest allowed, seconds. Raises `RateLimitedError` if it is longer."""
        now_s = self._clock.now()
        run_s = self._run_s + 2 * self._off_s  # an answer that comes late helps nobody
        max_wait_s = self._settings.max_wait_s
        allowed_s = min(max_wait_s, deadline_s - now_s - run_s)
        if not len(self._queue):
            return 0.0, allowed_s
        wait_s = self._pace.seconds(self._queue.ahead(flow, cost, priority), now_s)
        if wait_s > allowed_s:
            late = f", an answer takes up to {run_s:.1f} s: past its deadline" if allowed_s < max_wait_s else ""
            raise _refused(f"the wait would be about {wait_s:.1f} s{late}", wait_s - allowed_s)
        return wait_s, allowed_s

    def withdraw(self, waiter: Waiter) -> None:
        """One that still waits goes without its turn."""
        if waiter.queued:
            self._queue.remove(waiter)

    def leave(self, seqs: int, ran_s: float | None = None) -> None:
        """One has ended `ran_s` after its turn; None: it never began."""
        self.running -= seqs
        if ran_s is None:
            ran_s = self._run_s
        off_s = ran_s - self._run_s
        self._run_s += RUN_WEIGHT * off_s
        self._off_s += RUN_WEIGHT * (abs(off_s) - self._off_s)
        if len(self._queue):
            self.pump()

    def pump(self) -> None:
        """Give out what places there are."""
        while (head := self._queue.head()) is not None and self._fits(head.seqs):
            self._queue.take(head)
            self.running += head.seqs
            self._pace.count(head.cost, self._clock.now())
            head.settle(None)

    def tick(self) -> None:
        """Ends waits that are over, then `pump`. Runs by itself while somebody waits."""
        now_s = self._clock.now()
        for waiter in [w for w in self._queue if w.give_up_s <= now_s]:
            self._queue.remove(waiter)
            waited_s = now_s - waiter.since_s
            late = waiter.give_up_s - waiter.since_s < self._settings.max_wait_s
            why = f"no place on a worker within {waited_s:.1f} s"
            waiter.settle(DeadlineExceededError(f"the request would be late: {why}") if late else _no_place(why))
        self.pump()
        self._timer = self._call_later(TICK_S, self.tick) if len(self._queue) else None

    def close(self, error: NanoDeployError) -> None:
        """Nobody waits any longer."""
        for waiter in list(self._queue):
            self._queue.remove(waiter)
            waiter.settle(error)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _refused(why: str, more_s: float) -> RateLimitedError:
    after_s = min(MAX_RETRY_AFTER_S, max(1.0, more_s))
    return RateLimitedError(f"The server is overloaded: {why}. Please retry later.", retry_after_s=after_s)


def _no_place(why: str) -> UnavailableError:
    return UnavailableError(f"The server is overloaded: {why}. Please retry later.")
