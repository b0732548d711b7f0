"""A checked job from start to answer: its generations, its text, its reply - whole or as a stream.

Both forms read the same deltas through the same `ChoiceText`, so a stream's pieces add up to the whole answer.
How an answer looks - chat, completion, a response, a message - is the business of a `Style` alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

from common.errors import CancelledByCallerError, DeadlineExceededError, NanoDeployError
from common.text import StopAutomaton, Tokenizer
from common.types import ChoiceDelta, Clock, GenerationRequest, RequestStats
from services.router import replies
from services.router.choice import ChoiceText, Piece
from services.router.exchange import Exchange
from services.router.generation import Batch, Courier, Generation, Mailbox, Singles
from services.router.metrics import ModelMetrics
from services.router.params import Job
from services.router.replies import Call, CompletionLogprobs, Ended, Head, Usage, add_part
from services.router.routing.board import NO_HINTS, Hints
from services.router.style import Stream, Style

_UNBOUNDED: Final = 2**62


class Starter(Protocol):
    """The part of the relay that a run uses."""

    courier: Courier

    def start(
        self, request: GenerationRequest, mailbox: Mailbox, index: int = 0, hints: Hints = NO_HINTS
    ) -> Generation: ...

    def finish(self, generation: Generation) -> None: ...


class ChoiceState:
    """One choice of one prompt. `number` is its index in the answer."""

    __slots__ = ("calls", "echoed", "last_s", "logprobs", "number", "pieces", "prompt", "reasoning", "text", "vector")

    def __init__(self, number: int, prompt: int, text: ChoiceText) -> None:
        self.number = number
        self.prompt = prompt
        self.text = text
        self.pieces: list[str] = []
        self.reasoning: list[str] = []
        self.calls: list[Call] = []
        self.logprobs: Any = None
        self.echoed = False
        self.last_s = 0.0
        self.vector = b""


class Run:
    """One HTTP request's work. `answer_whole` or `answer_stream`, once."""

    def __init__(
        self,
        job: Job,
        requests: Sequence[GenerationRequest],
        tokenizer: Tokenizer,
        head: Head,
        *,
        style: Style,
        clock: Clock,
        started_s: float,
        metrics: ModelMetrics,
        hints: Hints = NO_HINTS,
    ) -> None:
        self._job = job
        self._requests = requests
        self._tokenizer = tokenizer
        self.head = head
        self._style = style
        self._clock = clock
        self._started_s = started_s
        self._metrics = metrics
        self._hints = hints
        self._echo_texts = [self._echo_text(i) for i in range(len(job.prompts))] if job.echo else []
        automaton = StopAutomaton(job.sampling.stop) if job.sampling.stop else None
        self._choices = [
            [self._choice(prompt, choice, automaton) for choice in range(job.sampling.n)]
            for prompt in range(len(job.prompts))
        ]
        self._left = len(job.prompts) * job.sampling.n
        self._generations: list[Generation] = []
        self._logprobs = job.sampling.logprobs is not None
        self.made_s = clock.now()
        self.first_token_s = 0.0

    # -- parts --

    def _echo_text(self, prompt: int) -> str:
        if self._job.prompt_texts:
            return self._job.prompt_texts[prompt]
        skip = self._job.sampling.skip_special_tokens
        return self._tokenizer.decode(self._job.prompts[prompt], skip_special_tokens=skip)

    def _choice(self, prompt: int, choice: int, automaton: StopAutomaton | None) -> ChoiceState:
        offset = len(self._echo_texts[prompt]) if self._job.echo else 0
        job = self._job
        text = ChoiceText(self._tokenizer, job.sampling, automaton, job.prompts[prompt], offset, job.parsing)
        return ChoiceState(prompt * self._job.sampling.n + choice, prompt, text)

    def _echo(self, choice: ChoiceState) -> tuple[str, Any]:
        """The prompt's text and, with logprobs, its tokens: what precedes an echoed answer."""
        choice.echoed = True
        if not self._job.echo:
            return "", None
        columns = None
        if self._logprobs:
            found = self._generations[choice.prompt].prompt_logprobs
            if found is not None:
                found = found.best(self._job.sampling.logprobs or 0)
            ids = self._job.prompts[choice.prompt]
            skip = self._job.sampling.skip_special_tokens
            columns = CompletionLogprobs().add_prompt(self._tokenizer, ids, found, skip)
        return self._echo_texts[choice.prompt], columns

    def _shape_logprobs(self, piece: Piece) -> Any:
        """A piece's logprobs in the endpoint's shape; None where none were asked for or none came."""
        if not self._logprobs or piece.logprobs is None:
            return None
        if not self._style.columns:
            content = replies.chat_logprobs(self._tokenizer, piece.token_ids, piece.logprobs)
            return {"content": content, "refusal": None}
        columns = CompletionLogprobs()
        return columns.add(self._tokenizer, piece.token_ids, piece.logprobs, piece.offsets).as_dict()

    @property
    def stats(self) -> list[RequestStats | None]:
        return [generation.stats for generation in self._generations]

    @property
    def decode_worker(self) -> str:
        """Of the first prompt."""
        return self._generations[0].worker_id

    def usage(self) -> Usage:
        prompt = sum(map(len, self._job.prompts))
        cached = sum(s.cached_tokens + s.remote_cached_tokens for s in self.stats if s is not None)
        texts = [choice.text for choices in self._choices for choice in choices]
        output = 0 if self._job.echo_only else sum(text.num_tokens for text in texts)
        reasoning = sum(text.num_reasoning_tokens for text in texts)
        return Usage(prompt, output, min(cached, prompt), reasoning)

    @property
    def finishes(self) -> list[str]:
        return [choice.text.finish for choices in self._choices for choice in choices if choice.text.finish]

    def _timings(self, wanted: bool) -> dict[str, Any] | None:
        if not wanted and not self._hints.explain:
            return None
        start = self._started_s
        times = {"first_token_ms": self.first_token_s - start, "total_ms": self._clock.now() - start}
        found = replies.waterfall(self.stats, **{name: 1000 * seconds for name, seconds in times.items()})
        if self._hints.explain:
            found["routing"] = [generation.routes for generation in self._generations]
        return found

    # -- deltas --

    async def _follow(
        self,
        mailbox: Mailbox,
        relay: Starter,
        exchange: Exchange,
        deadline_s: float,
        emit: Callable[[Batch], None],
        *,
        stream: bool,
    ) -> None:
        """Start the generations and emit what they bring, batch by batch, until all choices have ended."""

        def consume(deltas: Batch) -> None:
            emit(deltas)
            if not self._left:
                mailbox.finish()

        def end(error: NanoDeployError) -> None:
            mailbox.fail(error)
            for generation in self._generations:
                generation.cancel()

        def lost() -> None:
            end(CancelledByCallerError("the client went away"))

        def late() -> None:
            end(DeadlineExceededError(f"the request was not finished within {deadline_s - self._started_s:g} s"))
            exchange.abort_if_full()  # what it has not taken keeps the mailbox, and so this request, waiting

        mailbox.consume = consume
        timer = asyncio.get_running_loop().call_later(max(deadline_s - self._clock.now(), 0), late)
        try:
            with exchange.watch(lost, mailbox.release):
                hints = self._hints
                self._generations = [relay.start(r, mailbox, i, hints) for i, r in enumerate(self._requests)]
                if stream:
                    mailbox.hold()  # the head of the answer precedes its events, and an early error has another
                    await mailbox.begun()
                    await exchange.begin()
                    mailbox.release()
                await mailbox.ended()
        finally:
            timer.cancel()
            mailbox.close()
            for generation in self._generations:
                relay.finish(generation)

    def _take(self, deltas: Batch) -> list[tuple[ChoiceState, Piece]]:
        now = self._arrived()
        batch: list[tuple[ChoiceState, Piece]] = []
        for generation, found in deltas:
            choice = self._choices[generation.index][found.choice]
            for delta in found.deltas() if isinstance(found, Singles) else (found,):
                if choice.text.finish is None:
                    self._timed(choice, len(delta.token_ids), now)
                    batch.append((choice, self._push(generation, choice, delta)))
        return batch

    def _arrived(self) -> float:
        """Now; noted if these are the first tokens."""
        now = self._clock.now()
        if not self.first_token_s:
            self.first_token_s = now
            self._metrics.first_token.observe(now - self._started_s)
        return now

    def _timed(self, choice: ChoiceState, num_tokens: int, now: float, rows: int = 1) -> None:
        """`rows` came at once, with these tokens in all."""
        if choice.last_s and num_tokens:
            self._metrics.inter_token.observe((now - choice.last_s) / num_tokens, rows)
        choice.last_s = now

    def _push(self, generation: Generation, choice: ChoiceState, delta: ChoiceDelta) -> Piece:
        piece = choice.text.push(delta)
        if piece.ends:
            choice.vector = delta.vector
            self._left -= 1
            generation.close_choice(delta.choice)
        return piece

    # -- answers --

    async def answer_whole(self, relay: Starter, exchange: Exchange, deadline_s: float, *, timings: bool) -> None:
        def keep(deltas: Batch) -> None:
            for choice, piece in self._take(deltas):
                if not choice.echoed:
                    text, choice.logprobs = self._echo(choice)
                    choice.pieces.append(text)
                if not self._job.echo_only:
                    choice.pieces.append(piece.text)
                    choice.reasoning.append(piece.reasoning)
                    for part in piece.calls:
                        add_part(choice.calls, part)
                    self._add_logprobs(choice, piece)

        mailbox = Mailbox(relay.courier, _UNBOUNDED, exchange.abort)
        await self._follow(mailbox, relay, exchange, deadline_s, keep, stream=False)
        ended = [_ended(choice, self._prompt_logprobs(choice)) for choices in self._choices for choice in choices]
        payload = self._style.whole(self.head, ended, self.usage(), self._timings(timings))
        await exchange.answer(200, await self._finished(payload))

    def _prompt_logprobs(self, choice: ChoiceState) -> list[dict[str, Any] | None] | None:
        top = self._job.prompt_logprobs
        if top is None:
            return None
        found = self._generations[choice.prompt].prompt_logprobs
        return replies.prompt_logprobs(self._tokenizer, self._job.prompts[choice.prompt], found, top)

    async def _finished(self, payload: bytes) -> bytes:
        """The last that is sent, which some styles keep a copy of first."""
        finished = self._style.finished
        return payload if finished is None else await finished(payload)

    def _add_logprobs(self, choice: ChoiceState, piece: Piece) -> None:
        if not self._logprobs or piece.logprobs is None:
            return
        if not self._style.columns:
            found = replies.chat_logprobs(self._tokenizer, piece.token_ids, piece.logprobs)
            choice.logprobs = (choice.logprobs or []) + found
        else:
            choice.logprobs = choice.logprobs or CompletionLogprobs()
            choice.logprobs.add(self._tokenizer, piece.token_ids, piece.logprobs, piece.offsets)

    async def answer_stream(
        self,
        relay: Starter,
        exchange: Exchange,
        deadline_s: float,
        *,
        limit_tokens: int,
        include_usage: bool,
        continuous_usage: bool,
        timings: bool,
    ) -> None:
        """`limit_tokens` is how far the client may fall behind, per choice."""
        chunks = self._style.chunks(self.head, b"null" if include_usage else None)
        exchange.speak(chunks.failed, chunks.done)
        mailbox = Mailbox(relay.courier, limit_tokens * self._left, exchange.abort)
        waits = self._style.finished is not None
        ending = b""  # the last events, which leave with what ends the stream

        def send(deltas: Batch) -> None:
            if continuous_usage:
                batch = self._take(deltas)
                chunks.say_usage(replies.dumps(self.usage().as_dict()))
                events = b"".join([self._events(chunks, choice, piece) for choice, piece in batch])
            else:
                events = self._stream_events(chunks, deltas)
            if not self._left and not waits:
                nonlocal ending
                ending = events
            elif events and not exchange.write(events):
                mailbox.hold()

        await self._follow(mailbox, relay, exchange, deadline_s, send, stream=True)
        last = chunks.last(self.usage() if include_usage else None, self._timings(timings))
        await exchange.end(ending + await self._finished(last))

    def _stream_events(self, chunks: Stream, deltas: Batch) -> bytes:
        """All of a batch's events, which leave in one write. Most deltas are tokens of plain text."""
        now = self._arrived()
        events: list[bytes] = []
        for generation, delta in deltas:
            choice = self._choices[generation.index][delta.choice]
            text = choice.text
            if text.finish is not None:
                continue
            if isinstance(delta, ChoiceDelta):
                self._timed(choice, len(delta.token_ids), now)
                if text.plain and choice.echoed and delta.finish is None:
                    if shown := text.push_plain(delta.token_ids):
                        events.append(chunks.text(choice.number, shown))
                else:
                    events.append(self._events(chunks, choice, self._push(generation, choice, delta)))
            elif text.plain and (choice.echoed or not self._job.echo):
                if not choice.echoed:
                    choice.echoed = True
                    events.append(chunks.first(choice.number))
                count = len(delta.token_ids)
                self._timed(choice, count, now, count)
                events.append(chunks.texts(choice.number, text.write_plain(delta.token_ids)))
            else:
                for single in delta.deltas():
                    if text.finish is None:
                        self._timed(choice, 1, now)
                        events.append(self._events(chunks, choice, self._push(generation, choice, single)))
        return events[0] if len(events) == 1 else b"".join(events)

    def _events(self, chunks: Stream, choice: ChoiceState, piece: Piece) -> bytes:
        events: list[bytes] = []
        number = choice.number
        if not choice.echoed:
            events.append(chunks.first(number))
            text, columns = self._echo(choice)
            if columns is not None:
                events.append(chunks.with_logprobs(number, text, columns.as_dict()))
            elif text:
                events.append(chunks.text(number, text))
        if not self._job.echo_only:
            logprobs = self._shape_logprobs(piece)
            if piece.reasoning:
                events.append(chunks.reasoning(number, piece.reasoning))
            if logprobs is not None:
                events.append(chunks.with_logprobs(number, piece.text, logprobs))
            elif piece.text:
                events.append(chunks.text(number, piece.text))
            if piece.calls:
                events.append(chunks.calls(number, piece.calls))
        if piece.ends:
            events.append(chunks.finish(number, choice.text.finish or "", choice.text.stop_reason))
        return b"".join(events)


def _ended(choice: ChoiceState, prompt_logprobs: list[dict[str, Any] | None] | None) -> Ended:
    text = choice.text
    return Ended(
        choice.number,
        "".join(choice.pieces),
        _finished(choice.logprobs),
        text.finish or "",
        text.stop_reason,
        "".join(choice.reasoning),
        choice.calls,
        prompt_logprobs,
        choice.vector,
    )


def _finished(logprobs: list[Any] | CompletionLogprobs | None) -> Any:
    """What a choice collected, in the answer's shape."""
    if isinstance(logprobs, CompletionLogprobs):
        return logprobs.as_dict()
    return None if logprobs is None else {"content": logprobs, "refusal": None}
