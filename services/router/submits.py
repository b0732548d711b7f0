"""Requests on their way to one worker, several in a call: a call costs more than what is in it.

    submit -> waiting -> in a call -> its own slot or error

Whoever comes while no call is out goes at once, with those of the same turn of the loop. The others wait for the
answer to the call that is out, `HOLD_S` at most. A worker answers each request by itself as soon as it can, so
a slow one delays nobody.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, Callable, Iterable
from dataclasses import dataclass
from typing import Final

from common.errors import NanoDeployError, UnavailableError
from common.types import GenerationRequest, WorkerRef

HOLD_S: Final = 0.002
MOST_REQUESTS: Final = 128  # in a call
MOST_TOKENS: Final = 1 << 20  # of their prompts: a message has 64 MiB at most


@dataclass(frozen=True)
class Submission:
    """`answer` gets the slot, or the worker's error."""

    request: GenerationRequest
    prefill: WorkerRef | None
    timeout_s: float
    answer: asyncio.Future[int]


Answers = AsyncIterable[Iterable[tuple[int, int | NanoDeployError]]]
"""(index, slot or error) of each submission, some at a time."""


class Submits:
    """`send(submissions)`: one call. Its errors are those of all that it has not answered."""

    def __init__(self, send: Callable[[list[Submission]], Answers]) -> None:
        self._send = send
        self._waiting: list[Submission] = []
        self._timer: asyncio.Handle | None = None
        self._unanswered = 0  # calls that nothing has come back from
        self._calls: set[asyncio.Task[None]] = set()

    async def submit(self, request: GenerationRequest, prefill: WorkerRef | None, timeout_s: float) -> int:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[int] = loop.create_future()
        self._waiting.append(Submission(request, prefill, timeout_s, answer))
        if self._timer is None:
            self._timer = loop.call_later(HOLD_S, self._go) if self._unanswered else loop.call_soon(self._go)
        return await answer

    async def close(self) -> None:
        """What is under way fails with `UnavailableError`."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for call in self._calls:
            call.cancel()
        await asyncio.gather(*self._calls, return_exceptions=True)
        _fail(self._waiting, UnavailableError("the connection is closed"))
        self._waiting.clear()

    def _go(self) -> None:
        self._timer = None
        while self._waiting:
            call = asyncio.create_task(self._call(self._take()))
            self._calls.add(call)
            call.add_done_callback(self._calls.discard)

    def _take(self) -> list[Submission]:
        """The first of those that wait, as many as go into a call; one in any case."""
        count = tokens = 0
        for submission in self._waiting[:MOST_REQUESTS]:
            tokens += len(submission.request.prompt_token_ids)
            if count and tokens > MOST_TOKENS:
                break
            count += 1
        taken, self._waiting = self._waiting[:count], self._waiting[count:]
        return taken

    async def _call(self, submissions: list[Submission]) -> None:
        self._unanswered += 1
        answered = False
        error: NanoDeployError = UnavailableError("the worker did not answer this request")
        try:
            async for answers in self._send(submissions):
                if not answered:
                    answered = True
                    self._on_answer()
                for index, answer in answers:
                    _settle(submissions[index].answer, answer)
        except NanoDeployError as raised:
            error = raised
        finally:
            if not answered:
                self._on_answer()
            _fail(submissions, error)

    def _on_answer(self) -> None:
        self._unanswered -= 1
        if self._timer is not None and not self._unanswered:
            self._timer.cancel()
            self._go()


def _settle(future: asyncio.Future[int], answer: int | NanoDeployError) -> None:
    if future.done():
        return
    if isinstance(answer, NanoDeployError):
        future.set_exception(answer)
    else:
        future.set_result(answer)


def _fail(submissions: Iterable[Submission], error: NanoDeployError) -> None:
    for submission in submissions:
        _settle(submission.answer, error)
