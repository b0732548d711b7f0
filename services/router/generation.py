"""One generation request as the router follows it, and the mailbox where its tokens wait for the client.

    PLACING (a worker is being found) <-> RUNNING (bound to a slot of a worker) -> done

A generation goes back from RUNNING to PLACING when its worker is lost: sampling is keyed by place, so another
worker continues it from `sent`, the tokens received so far, as if nothing had happened. It is done when every
choice ended, when it failed, or when it was cancelled; nothing is delivered after that.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

import msgspec

from common.errors import NanoDeployError, OverloadedError
from common.types import ChoiceDelta, Clock, FinishReason, GenerationRequest, RequestStats, TokenLogprobs, WorkerRef

if TYPE_CHECKING:
    from services.router.link import WorkerLink
    from services.router.routing.board import Hints, Ticket

ACK_TOKENS: Final = 256  # taken over, and the worker not told yet
ABNORMAL = (FinishReason.CANCELLED, FinishReason.ERROR)
MIN_REST_S: Final = 0.0005  # shorter rests are not worth a timer
MAX_REST_S: Final = 0.01
LATE_WEIGHT: Final = 4.0
EASY_LOAD: Final = 0.5  # of a core: rounds need no rest for it
FULL_LOAD: Final = 0.8  # ... and the longest
BEHIND_LOAD: Final = 0.95
LOAD_WINDOW_S: Final = 0.02
LOAD_MEMORY_S: Final = 0.1
TIMER_S: Final = 0.001  # a timer may be so late of itself


class Singles:
    """Rows in a row of one choice, each a token and nothing else: most of an answer. `position` is the first's."""

    __slots__ = ("choice", "generation", "position", "token_ids")

    def __init__(self, generation: Generation, choice: int, position: int, token_id: int) -> None:
        self.generation = generation
        self.choice = choice
        self.position = position
        self.token_ids = [token_id]

    def deltas(self) -> Iterator[ChoiceDelta]:
        """Each row by itself."""
        for position, token_id in enumerate(self.token_ids, self.position):
            yield ChoiceDelta(choice=self.choice, position=position, token_ids=(token_id,))


Batch = list[tuple["Generation", "ChoiceDelta | Singles"]]


class Mailbox:
    """What arrived for one HTTP request. Bounded: a client that does not keep up is cut off, never waited for.

        OPEN <-> HELD (the client's connection is full, or its answer has not begun) -> over

    The worker's stream puts in (`deliver`, `fail`); the courier, soon after, has `hand_over` give it to `consume`,
    which never waits. The request's own task wakes twice at most: for the first delta and at the end.
    """

    __slots__ = (
        "_courier",
        "_deltas",
        "_failure",
        "_limit",
        "_on_overflow",
        "_over",
        "_pending",
        "_singles",
        "_waiter",
        "consume",
        "held",
    )

    def __init__(self, courier: Courier, limit_tokens: int, on_overflow: Callable[[], None]) -> None:
        self._courier = courier
        self._limit = limit_tokens
        self._on_overflow = on_overflow
        self._deltas: Batch = []
        self._singles: Singles | None = None  # the last of the deltas, while more may join it
        self._failure: BaseException | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._over = False
        self._pending = 0  # tokens
        self.consume: Callable[[Batch], None] | None = None
        self.held = False

    def deliver(self, generation: Generation, delta: ChoiceDelta) -> None:
        self._singles = None
        self._put(generation, delta, len(delta.token_ids))

    def deliver_single(self, generation: Generation, choice: int, position: int, token_id: int) -> None:
        """The same for a row that is a token and nothing else."""
        singles = self._singles
        if singles is None or self.held or singles.generation is not generation or singles.choice != choice:
            self._singles = singles = Singles(generation, choice, position, token_id)
            self._put(generation, singles, 1)
        else:
            singles.token_ids.append(token_id)
            self._pending += 1

    def _put(self, generation: Generation, delta: ChoiceDelta | Singles, num_tokens: int) -> None:
        deltas = self._deltas
        if self._failure is not None or self._over:
            return
        deltas.append((generation, delta))
        self._pending += num_tokens
        if self.held and self._pending > self._limit:  # not held: a burst, gone in the next round
            deltas.clear()
            self.fail(OverloadedError(f"the client fell more than {self._limit} tokens behind and was cut off"))
            self._on_overflow()
        elif len(deltas) == 1:
            if self.held:
                self._wake()  # the first of an answer waits for no round
            else:
                self._courier.call(self)

    def fail(self, error: BaseException) -> None:
        """End the request; what was delivered before is still given out. The first failure counts."""
        if self._failure is None and not self._over:
            self._failure, self._singles = error, None
            self._courier.call(self)

    def finish(self) -> None:
        """The consumer has all it wants."""
        self._over, self._singles = True, None
        self._deltas.clear()
        self._wake()

    def close(self) -> None:
        """Its request is answered. What it refers to refers to it: a cycle that need not wait for the collector."""
        self.finish()
        self.consume = self._failure = None

    def hold(self) -> None:
        """Keep what comes until `release`."""
        self.held = True

    def release(self) -> None:
        """And hand over what came."""
        if self.held:
            self.held = False
            if self._courier.is_behind:
                self._courier.call(self)
            else:
                self.hand_over()

    def hand_over(self) -> None:
        if self.held:
            self._wake()
            return
        if self._deltas and self.consume is not None:
            deltas, self._deltas, self._pending, self._singles = self._deltas, [], 0, None
            try:
                self.consume(deltas)
            except Exception as error:  # noqa: BLE001 - the edge of a callback: it fails this request
                self._failure, self._over, self._singles = error, True, None
        if self._over or (self._failure is not None and not self._deltas):
            self._wake()

    async def begun(self) -> None:
        """Wait until something was delivered. Raises the failure if nothing was."""
        while not self._deltas:
            if self._failure is not None:
                raise self._failure
            await self._woken()

    async def ended(self) -> None:
        """Wait for `finish`. Raises the failure once nothing is left."""
        while self._failure is None or (self._deltas and not self._over):
            if self._over:
                return
            await self._woken()
        raise self._failure

    async def _woken(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Load:
    """Which share of a core the loop's thread used lately. `cpu_s`: the seconds of it so far."""

    def __init__(self, clock: Clock, cpu_s: Callable[[], float]) -> None:
        self._clock, self._cpu_s = clock, cpu_s
        self._since_s, self._used_s = clock.now(), cpu_s()
        self.share = 0.0

    def measure(self) -> None:
        now = self._clock.now()
        elapsed_s = now - self._since_s
        if elapsed_s >= LOAD_WINDOW_S:
            used_s = self._cpu_s()
            share = (used_s - self._used_s) / elapsed_s
            self.share += min(elapsed_s / LOAD_MEMORY_S, 1.0) * (share - self.share)
            self._since_s, self._used_s = now, used_s


class Courier:
    """Has mailboxes hand over what arrived in them, all of a loop tick together.

    Nothing waits while there is time. When the core has little left, when handing over (detokenize, write) takes long,
    or when the loop came late to it, the next round rests in proportion: a busy loop takes in several steps per write,
    not one, and the first tokens of others, which wait for no round, find it less busy.
    """

    def __init__(self, clock: Clock, cpu_s: Callable[[], float] = time.thread_time) -> None:
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._load = Load(clock, cpu_s)
        self._called: list[Mailbox] = []
        self._due_s = self._late_s = self._rest_until_s = 0.0

    @property
    def is_behind(self) -> bool:
        """There is so little time that a first token had better share a write."""
        return self._late_s >= MAX_REST_S or self._load.share >= BEHIND_LOAD

    def call(self, mailbox: Mailbox) -> None:
        if not self._called:
            now = self._due_s = self._clock.now()
            rest_s = self._rest_until_s - now
            if rest_s > MIN_REST_S:
                self._due_s += rest_s
                self._loop.call_later(rest_s, self._round)
            else:
                self._loop.call_soon(self._round)
        self._called.append(mailbox)

    def _round(self) -> None:
        called, self._called = self._called, []
        started_s = self._clock.now()
        for mailbox in called:
            mailbox.hand_over()
        ended_s = self._clock.now()
        self._load.measure()
        self._late_s = ended_s - started_s + LATE_WEIGHT * max(started_s - self._due_s - TIMER_S, 0.0)
        busy_s = MAX_REST_S * (self._load.share - EASY_LOAD) / (FULL_LOAD - EASY_LOAD)
        self._rest_until_s = ended_s + min(max(self._late_s, busy_s), MAX_REST_S)


class Generation:
    """Owned by the relay; the request's task reads `stats` and `prompt_logprobs` and may close or cancel it."""

    __slots__ = (
        "_mailbox",
        "deaths",
        "done",
        "ended",
        "gaps",
        "hints",
        "index",
        "link",
        "lost_on",
        "placements",
        "prompt_logprobs",
        "request",
        "routes",
        "sent",
        "slot",
        "stats",
        "ticket",
        "unacked",
        "worker_id",
    )

    def __init__(self, request: GenerationRequest, mailbox: Mailbox, index: int, hints: Hints) -> None:
        self.request = request
        self.hints = hints
        self.index = index
        self._mailbox = mailbox
        self.sent: list[list[int]] = [[] for _ in range(request.sampling.n)]
        self.ended = [False] * request.sampling.n
        self.done = False
        self.stats: RequestStats | None = None
        self.prompt_logprobs: TokenLogprobs | None = None
        self.link: WorkerLink | None = None
        self.worker_id = ""  # decode worker that has it, or had it last
        self.lost_on: WorkerRef | None = None
        self.slot = 0
        self.unacked = 0
        self.gaps = 0
        self.placements = 0  # workers it was sent to
        self.deaths = 0  # engines that died with it
        self.ticket: Ticket | None = None  # how the board counts it
        self.routes: list[dict[str, object]] = []  # why it went where, if the caller asked

    def accept(self, delta: ChoiceDelta) -> bool:
        """Take a row: drop what is known already, deliver the rest. False if tokens before it are missing."""
        choice, token_ids = delta.choice, delta.token_ids
        if choice >= len(self.sent):
            return False
        sent = self.sent[choice]
        known = len(sent) - delta.position
        if known < 0:
            return False
        if self.ended[choice]:
            return True
        if known:
            delta = _cut(delta, min(known, len(token_ids)))
            token_ids = delta.token_ids
        sent.extend(token_ids)
        self.unacked += len(token_ids)
        if self.ticket is not None and not self.ticket.has_begun:
            self.ticket.began(self.stats)
        if delta.finish is not None:
            self._end(choice)
        more = delta.finish or delta.logprobs or delta.stop_token_id is not None
        if len(token_ids) == 1 and not more:
            self._mailbox.deliver_single(self, choice, delta.position, token_ids[0])
        elif token_ids or delta.finish is not None:
            self._mailbox.deliver(self, delta)
        return True

    def accept_single(self, choice: int, position: int, token_id: int) -> bool:
        """`accept` of the next row as it mostly is, a token and nothing else. False: it needs a closer look."""
        if choice >= len(self.sent):
            return False
        sent = self.sent[choice]
        if len(sent) != position or self.ended[choice] or not 0 < self.unacked < ACK_TOKENS:
            return False
        sent.append(token_id)
        self.unacked += 1
        self._mailbox.deliver_single(self, choice, position, token_id)
        return True

    def fail(self, error: NanoDeployError) -> None:
        if not self.done:
            self.done = True
            self._mailbox.fail(error)
            self._drop()

    def close_choice(self, choice: int) -> None:
        """A stop string ended this choice."""
        if not self.ended[choice]:
            self._end(choice)
            if self.done:
                self._drop()
            elif self.link is not None:
                self.link.drop_choice(self, choice)

    def cancel(self) -> None:
        """Nobody wants the rest: the worker hears of it in this loop tick."""
        if not self.done:
            self.done = True
            self._drop()

    def to_resume(self) -> GenerationRequest:
        """The request for the next worker: with the tokens received so far, if any."""
        if not any(self.sent):
            return self.request
        ended = tuple(choice for choice, over in enumerate(self.ended) if over)
        sent = tuple(tuple(ids) for ids in self.sent)
        return msgspec.structs.replace(self.request, sent=sent, ended_choices=ended)

    def positions(self) -> list[tuple[int, int, int]]:
        """(slot, choice, next position) of each choice. A vector takes one."""
        if self.request.pooling is not None:
            return [(self.slot, 0, int(self.ended[0]))]
        return [(self.slot, choice, len(ids)) for choice, ids in enumerate(self.sent)]

    def open_positions(self) -> list[tuple[int, int, int]]:
        return [position for position in self.positions() if not self.ended[position[1]]]

    def has_ended(self, choice: int) -> bool:
        return choice < len(self.ended) and self.ended[choice]

    def _end(self, choice: int) -> None:
        self.ended[choice] = True
        self.done = all(self.ended)

    def _drop(self) -> None:
        if self.link is not None:
            self.link.drop(self)


def _cut(delta: ChoiceDelta, skip: int) -> ChoiceDelta:
    """The row without its first `skip` tokens."""
    logprobs = delta.logprobs
    if logprobs is not None:
        first = skip * logprobs.top_n
        logprobs = TokenLogprobs(
            logprobs.token_logprobs[skip:], logprobs.top_n, logprobs.top_ids[first:], logprobs.top_logprobs[first:]
        )
    return msgspec.structs.replace(
        delta, position=delta.position + skip, token_ids=delta.token_ids[skip:], logprobs=logprobs
    )
