"""The other ranks as rank 0 has them: what it tells them, what they answer, and what becomes of them.

    start -> every rank builds its part -> orders in turn, the same to all -> close
                 `--- a rank ends, fails or hangs at any point: all are lost, and with them the engine

Orders are not answered one by one: collectives keep ranks together. A thread of its own hears what ranks say, so that
a rank's end is noticed while rank 0 is inside of a step. It then ends the collectives, which a step on a GPU would
wait for without end, and the loop finds out at its next `check`. Rank 0 may be the one that cannot go on (`give_up`).
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from common.errors import RankLostError
from common.parallel.link import Link, LinkClosedError
from common.telemetry import get_logger

log = get_logger(__name__)

FAILED = 0  # kind of a rank's last frame: why it ends
DONE = 1  # a step has ended there
ANSWER = 2  # to what was asked
_LOOK_S = 0.5
_CAUSE_S = 1.0  # from an error of rank 0's collectives to the news of the rank that is its cause
_END_S = 5.0


class RankBody(Protocol):
    """What a rank runs in: a process, or a thread in tests."""

    def end(self, timeout_s: float) -> None:
        """It was asked to end; make it."""


@dataclass(frozen=True)
class Rank:
    number: int
    link: Link
    reads: Link  # a second one, for reads of KV beside steps
    body: RankBody


class Ranks:
    """`hang_s`: longest time in which no rank gets on with a step."""

    def __init__(self, ranks: Sequence[Rank], hang_s: float) -> None:
        self.ranks = list(ranks)
        self._hang_s = hang_s
        self._lost = ""
        self._sent = 0
        self._num_orders = 0
        self._done = dict.fromkeys((r.number for r in ranks), 0)
        self._answers: dict[int, deque[bytes]] = {r.number: deque() for r in ranks}
        self._heard = threading.Condition()
        self._progress_at = time.monotonic()
        self._closing = False
        self.wakeup_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        """Readable once ranks are lost."""
        self.on_lost: Callable[[], None] = lambda: None
        """Called in the thread that noticed."""
        self._thread = threading.Thread(target=self._listen, name="ranks", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """`RankLostError` if a rank is lost."""
        if self._lost:
            raise RankLostError(self._lost)

    def give_up(self, reason: str, cause_s: float = _CAUSE_S) -> None:
        """Rank 0 cannot go on: all are lost, for this reason unless it turns out within `cause_s` that one was before.

        `check` raises after it.
        """
        with self._heard:
            self._heard.wait_for(lambda: self._lost, cause_s)
        self._lose(reason)

    @property
    def num_orders(self) -> int:
        """Told so far."""
        return self._num_orders

    def progressed(self) -> None:
        """Rank 0 got on with a step, so the others do as well."""
        self._progress_at = time.monotonic()

    def tell(self, kind: int, payload: bytes = b"", *, is_step: bool = False) -> None:
        """The same order to all ranks. `is_step`: each says when it has done it."""
        self.check()
        self._num_orders += 1
        if is_step:
            self._progress_at = time.monotonic()
            self._sent += 1
        for rank in self.ranks:
            try:
                rank.link.send(kind, payload)
            except LinkClosedError as error:
                self._lose(f"rank {rank.number} takes no orders: {error}")
                self.check()

    def answers(self, timeout_s: float) -> list[bytes]:
        """One answer of each rank, in their order."""
        deadline = time.monotonic() + timeout_s
        with self._heard:
            while not all(self._answers.values()):
                self.check()
                left = deadline - time.monotonic()
                if left > 0:
                    self._heard.wait(min(left, _LOOK_S))
                    continue
                silent = next(n for n, found in self._answers.items() if not found)
                self._lose(f"rank {silent} has not answered within {timeout_s:.0f} s")
            return [found.popleft() for found in self._answers.values()]

    def close(self) -> None:
        """Ask all to end, and make them."""
        timeout_s = _END_S if not self._lost else _LOOK_S
        self._closing = True
        for rank in self.ranks:
            rank.link.end()
            rank.reads.end()
        for rank in self.ranks:
            rank.body.end(timeout_s)
        self._thread.join(timeout_s)
        for rank in self.ranks:
            rank.link.close()
            rank.reads.close()
        with contextlib.suppress(OSError):
            os.close(self.wakeup_fd)

    # -- the listening thread --

    def _listen(self) -> None:
        poll = select.poll()
        by_fd = {r.link.fileno(): r for r in self.ranks}
        for fd in by_fd:
            poll.register(fd, select.POLLIN)
        while not self._closing and not self._lost:
            for fd, _ in poll.poll(_LOOK_S * 1e3):
                self._hear(by_fd[fd])
            self._look()

    def _hear(self, rank: Rank) -> None:
        try:
            while rank.link.wait(0):
                kind, payload = rank.link.receive()
                if kind == FAILED:
                    self._lose(f"rank {rank.number} failed: {payload.decode(errors='replace')}")
                    return
                with self._heard:
                    if kind == ANSWER:
                        self._answers[rank.number].append(payload)
                        self._heard.notify_all()
                    elif kind == DONE:
                        self._done[rank.number] += 1
                        self._progress_at = time.monotonic()
        except (LinkClosedError, ValueError) as error:
            self._lose(f"rank {rank.number} is gone: {error}")

    def _look(self) -> None:
        behind = [n for n, done in self._done.items() if done < self._sent]
        if behind and time.monotonic() - self._progress_at > self._hang_s:
            self._lose(f"rank {behind[0]} has not ended a step, and none got on with it for {self._hang_s:.0f} s")

    def _lose(self, reason: str) -> None:
        with self._heard:
            if self._lost or self._closing:
                return
            self._lost = reason
            self._heard.notify_all()
        log.error("ranks are lost", reason=reason)
        os.eventfd_write(self.wakeup_fd, 1)
        self.on_lost()
