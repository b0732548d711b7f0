"""What the router tells a worker on its stream: cancels at once, acknowledgements gathered.

A message costs far more than its rows, so acknowledgements wait a little for others: a request's are due after
`ACK_TOKENS` tokens, after `ACK_PERIOD_S`, and at its end. Cancels leave in the loop tick they are made in.
What could not be sent stays for the next stream.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Final, Protocol

from services.router.generation import ACK_TOKENS, Generation

ACK_PERIOD_S: Final = 1.0
ACK_GATHER_S: Final = 0.02

Positions = Sequence[tuple[int, int, int]]  # (slot, choice, next output position)
Cancels = Sequence[tuple[int, int | None]]  # (slot, choice; None: all of the request)


class Sender(Protocol):
    async def send(self, cancels: Cancels, acks: Positions) -> None: ...


class Outbox:
    def __init__(self) -> None:
        self._cancels: list[tuple[int, int | None]] = []
        self._acks: list[tuple[int, int, int]] = []
        self._unacked: set[Generation] = set()
        self._period: asyncio.TimerHandle | None = None
        self._gather: asyncio.TimerHandle | None = None
        self._due = asyncio.Event()
        self._sent = asyncio.Event()
        self._sent.set()

    def cancel(self, slot: int, choice: int | None = None) -> None:
        self._cancels.append((slot, choice))
        self.signal()

    def received(self, generation: Generation) -> None:
        """It took a row."""
        if generation.unacked >= ACK_TOKENS or generation.done:
            self._acknowledge(generation)
        elif generation not in self._unacked:
            self._unacked.add(generation)
            if self._period is None:
                self._period = asyncio.get_running_loop().call_later(ACK_PERIOD_S, self._acknowledge_all)

    def forget(self, generation: Generation) -> None:
        """It is no longer this worker's: nothing more is acknowledged."""
        generation.unacked = 0
        self._unacked.discard(generation)

    def signal(self) -> None:
        self._sent.clear()
        self._due.set()

    async def write_to(self, stream: Sender) -> None:
        """Send what is due until the stream breaks: raises what it raises."""
        while True:
            await self._due.wait()
            self._due.clear()
            cancels, self._cancels = self._cancels, []
            acks, self._acks = self._acks, []
            try:
                await stream.send(cancels, acks)
            except BaseException:
                self._cancels = cancels + self._cancels
                raise
            if not self._due.is_set():
                self._sent.set()

    async def drained(self, timeout_s: float) -> None:
        """Wait until nothing is due, or the time is over."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._sent.wait()

    def close(self) -> None:
        for timer in (self._period, self._gather):
            if timer is not None:
                timer.cancel()

    def _acknowledge(self, generation: Generation) -> None:
        generation.unacked = 0
        self._unacked.discard(generation)
        self._acks.extend(generation.positions())
        if self._gather is None:
            self._gather = asyncio.get_running_loop().call_later(ACK_GATHER_S, self._gathered)

    def _acknowledge_all(self) -> None:
        self._period = None
        for generation in list(self._unacked):
            self._acknowledge(generation)

    def _gathered(self) -> None:
        self._gather = None
        self.signal()
