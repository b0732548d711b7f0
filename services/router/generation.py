"""One generation request as the router follows it, and the mailbox where its tokens wait for the client.

    PLACING (a worker is being found) <-> RUNNING (bound to a slot of a worker) -> done

A generation goes back from RUNNING to PLACING when its worker is lost: sampling is keyed by place, so another
worker continues it from `sent`, the tokens received so far, as if nothing had happened. It is done when every
choice ended, when it failed, or when it was cancelled; nothing is delivered after that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from common.errors import NanoDeployError, OverloadedError
from common.types import ChoiceDelta, FinishReason, GenerationRequest, RequestStats, TokenLogprobs, WorkerRef

if TYPE_CHECKING:
    from services.router.link import WorkerLink

ABNORMAL = (FinishReason.CANCELLED, FinishReason.ERROR)


class Mailbox:
    """What arrived for one HTTP request. Bounded: a client that does not keep up is cut off, never waited for.

    The producer is the worker's stream (`deliver`, `fail`), the one consumer the request's own task (`take`).
    """

    __slots__ = ("_deltas", "_failure", "_limit", "_on_overflow", "_waiter", "pending_tokens")

    def __init__(self, limit_tokens: int, on_overflow: Callable[[], None]) -> None:
        self._limit = limit_tokens
        self._on_overflow = on_overflow
        self._deltas: list[tuple[Generation, ChoiceDelta]] = []
        self._failure: NanoDeployError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self.pending_tokens = 0

    def deliver(self, generation: Generation, delta: ChoiceDelta) -> None:
        if self._failure is not None:
            return
        self._deltas.append((generation, delta))
        self.pending_tokens += len(delta.token_ids)
        if self.pending_tokens > self._limit:
            self._deltas.clear()
            self.fail(OverloadedError(f"the client fell more than {self._limit} tokens behind and was cut off"))
            self._on_overflow()
        self._wake()

    def fail(self, error: NanoDeployError) -> None:
        """End the request; what was delivered before is still given out. The first failure counts."""
        if self._failure is None:
            self._failure = error
            self._wake()

    async def take(self) -> list[tuple[Generation, ChoiceDelta]]:
        """All deltas since the last call, at least one. Raises the failure once nothing is left."""
        while not self._deltas:
            if self._failure is not None:
                raise self._failure
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        taken, self._deltas = self._deltas, []
        self.pending_tokens = 0
        return taken

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Generation:
    """Owned by the relay; the request's task reads `stats` and `prompt_logprobs` and may close or cancel it."""

    __slots__ = (
        "_mailbox",
        "done",
        "ended",
        "gaps",
        "index",
        "link",
        "lost_on",
        "placements",
        "prefill_id",
        "prompt_logprobs",
        "request",
        "sent",
        "slot",
        "stats",
        "unacked",
    )

    def __init__(self, request: GenerationRequest, mailbox: Mailbox, index: int = 0) -> None:
        self.request = request
        self.index = index
        self._mailbox = mailbox
        self.sent: list[list[int]] = [[] for _ in range(request.sampling.n)]
        self.ended = [False] * request.sampling.n
        self.done = False
        self.stats: RequestStats | None = None
        self.prompt_logprobs: TokenLogprobs | None = None
        self.link: WorkerLink | None = None
        self.lost_on: WorkerRef | None = None
        self.slot = 0
        self.unacked = 0
        self.gaps = 0
        self.placements = 0  # workers it was sent to
        self.prefill_id = ""  # prefill worker asked, until the first token

    def accept(self, delta: ChoiceDelta) -> bool:
        """Take a row: drop what is known already, deliver the rest. False if tokens before it are missing."""
        choice = delta.choice
        if choice >= len(self.sent) or delta.position > len(self.sent[choice]):
            return False
        if self.ended[choice]:
            return True
        known = len(self.sent[choice]) - delta.position
        if known > 0:
            delta = _cut(delta, min(known, len(delta.token_ids)))
        self.sent[choice].extend(delta.token_ids)
        self.unacked += len(delta.token_ids)
        self.prefill_id = ""
        if delta.finish is not None:
            self._end(choice)
        if delta.token_ids or delta.finish is not None:
            self._mailbox.deliver(self, delta)
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
        """(slot, choice, next position) of each choice."""
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
