"""Requests on their way to one worker: several in a message, on the stream that brings their tokens.

    submit -> waiting -> sent -> its own slot or error
                 ^        | the stream broke: sent again on the next one, which an unanswered request may run twice for
                 `--------'                     a moment: the slot that nobody knows is cancelled at its first token

Whoever comes while no message is out goes at once. The others wait for the first answer to the message that is out,
`HOLD_S` at most: a message costs more than what is in it. A worker answers each request by itself as soon as it can,
so a slow one delays nobody.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple

from common.errors import InvalidRequestError, NanoDeployError, UnavailableError
from common.types import Clock

HOLD_S: Final = 0.001
MOST_REQUESTS: Final = 128  # in a message
MOST_NBYTES: Final = 16 << 20  # of several requests
MOST_NBYTES_ALONE: Final = 60 << 20  # a message has 64 MiB at most: a larger one ends the stream for everybody
_NUMBERS: Final = 2**32


Answer = Callable[[int | NanoDeployError], None]
"""Gets the slot, or the worker's error, once. Called from the stream's reader: it must neither wait nor raise."""


class Submission(NamedTuple):
    """`item` is a serialised `SubmitItem`."""

    item: bytes
    late_s: float  # when its time to be answered is over
    answer: Answer


class Submits:
    """Of one worker process. `write_to` runs while there is a stream to it."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._waiting: deque[Submission] = deque()
        self._sent: dict[int, Submission] = {}  # by number
        self._number = 0
        self._due = asyncio.Event()
        self._hold: asyncio.TimerHandle | None = None  # while a message is out
        self._timer: asyncio.TimerHandle | None = None

    def submit(self, item: bytes, timeout_s: float, answer: Answer) -> None:
        """`answer` gets an `UnavailableError` if the worker does not say anything in time.

        Raises `InvalidRequestError` if the request is too large for a message.
        """
        if len(item) > MOST_NBYTES_ALONE:
            raise InvalidRequestError(
                f"the request takes {len(item) >> 20} MiB on its way to a worker, {MOST_NBYTES_ALONE >> 20} are allowed"
            )
        self._waiting.append(Submission(item, self._clock.now() + timeout_s, answer))
        if self._hold is None:
            self._due.set()
        self._look_after(timeout_s)

    async def write_to(self, send: Callable[[list[Submission]], Awaitable[None]]) -> None:
        """Send what waits, and first what the stream before left unanswered. Raises what `send` raises."""
        self._waiting.extendleft(reversed(self._sent.values()))
        self._sent.clear()
        self._number = 0
        self._let_go()
        while True:
            if taken := self._take():
                self._hold = asyncio.get_running_loop().call_later(HOLD_S, self._let_go)
                await send(taken)
            self._due.clear()
            if self._hold is not None or not self._waiting:
                await self._due.wait()

    def answered(self, number: int, answer: int | NanoDeployError) -> None:
        submission = self._sent.pop(number, None)
        if submission is not None:
            submission.answer(answer)
        if self._hold is not None:
            self._let_go()

    def fail(self, error: NanoDeployError) -> None:
        """All that have no answer get this one."""
        submissions = [*self._sent.values(), *self._waiting]
        self._sent.clear()
        self._waiting.clear()
        for submission in submissions:
            submission.answer(error)

    def close(self) -> None:
        self.fail(UnavailableError("the connection is closed"))
        self._let_go()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _let_go(self) -> None:
        if self._hold is not None:
            self._hold.cancel()
            self._hold = None
        if self._waiting:
            self._due.set()

    def _take(self) -> list[Submission]:
        """The first of those that wait, as many as go into a message; one in any case."""
        taken: list[Submission] = []
        nbytes = 0
        while self._waiting and len(taken) < MOST_REQUESTS:
            submission = self._waiting[0]
            nbytes += len(submission.item)
            if taken and nbytes > MOST_NBYTES:
                break
            self._waiting.popleft()
            self._sent[self._number] = submission
            self._number = (self._number + 1) % _NUMBERS
            taken.append(submission)
        return taken

    def _look(self) -> None:
        """Whose time is over; looks again when the next one's may be."""
        self._timer = None
        now = self._clock.now()
        late = [s for s in (*self._sent.values(), *self._waiting) if s.late_s <= now]
        self._sent = {number: s for number, s in self._sent.items() if s.late_s > now}
        self._waiting = deque(s for s in self._waiting if s.late_s > now)
        for submission in late:
            submission.answer(UnavailableError("the worker did not answer this request"))
        next_s = min((s.late_s for s in (*self._sent.values(), *self._waiting)), default=None)
        if next_s is not None:
            self._look_after(next_s - now)

    def _look_after(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        if self._timer is not None:
            if self._timer.when() <= loop.time() + seconds:
                return
            self._timer.cancel()
        self._timer = loop.call_later(seconds, self._look)
