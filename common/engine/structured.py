"""Grammars of requests: compiled beside the steps, then one state a sequence that follows its tokens.

    open -> queued -> compiled (or found compiled) -> sent tokens replayed -> ready: the sequences may be scheduled
       |                `-> one failure of the request: it cannot be compiled, allows nothing, or takes too long
       `-> refused: too many wait already

Threads compile and replay, at a lower priority than steps; everything else happens where `poll` is called. What is
compiled is kept by kind and source, those used longest ago are dropped first. A sequence's state is a copy that knows
how many output tokens it has followed, so preemption changes nothing for it, and a resumed one replays its tokens.
"""

from __future__ import annotations

import contextlib
import math
import os
import queue
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.engine.constraint import Constraint, Matcher, Vocabulary, compile_grammar
from common.errors import InvalidRequestError, NanoDeployError, OverloadedError, UnsupportedError
from common.telemetry import get_logger
from common.types import Clock, Grammar

log = get_logger(__name__)

Tokens = Sequence[int]
OnReady = Callable[[list[Constraint]], None]
Key = tuple[str, str, str, str]  # kind, source, marks around what comes first
OnFailure = Callable[[NanoDeployError], None]

_STACK_BYTES = 64 << 20  # long chains of references are followed by recursion
_NICE = 5
_END_S = 1.0


@dataclass(frozen=True)
class GrammarLimits:
    """`max_nbytes`: of what is kept compiled, as estimated from sources. `timeout_s`: from `open` to ready."""

    threads: int = 2
    max_waiting: int = 256
    max_entries: int = 256
    max_nbytes: int = 256 << 20
    timeout_s: float = 10.0


@dataclass(eq=False)
class Ticket:
    """A request that waits for its grammar. `sent`: tokens to replay, of each of its sequences."""

    grammar: Grammar
    sent: Sequence[Tokens]
    params: Sequence[tuple[frozenset[int], bool]]
    deadline: float
    on_ready: OnReady
    on_failure: OnFailure
    started: bool = False


@dataclass
class _Work:
    """Done by a thread: `result` or `error`. `tickets` wait for it."""

    run: Callable[[], object]
    key: Key | None
    tickets: list[Ticket]
    result: object = None
    error: NanoDeployError | None = None
    started: bool = field(default=False)


class GrammarPool:
    """One per engine that samples. Threads and tokenizer are there from the first grammar on."""

    def __init__(
        self, folder: Path, vocab_size: int, eos_ids: frozenset[int], clock: Clock, limits: GrammarLimits | None = None
    ) -> None:
        self._limits = limits or GrammarLimits()
        self._clock = clock
        self._vocabulary = Vocabulary(folder, vocab_size, eos_ids)
        self._kept: OrderedDict[Key, Matcher] = OrderedDict()
        self._kept_nbytes = 0
        self._compiling: dict[Key, _Work] = {}
        self._waiting: dict[Ticket, _Work] = {}
        self._queue: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._done: deque[_Work] = deque()
        self._threads: list[threading.Thread] = []
        self._rings_due = 0  # of the descriptor: one for each piece of work that was given to the threads
        self._wakeup_fd = -1
        self.num_compiled = 0
        self.num_found = 0
        self.num_failed = 0

    @property
    def wakeup_fd(self) -> int:
        """Readable when `poll` has something to find. There from when somebody asks for it."""
        if self._wakeup_fd < 0:
            self._wakeup_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        return self._wakeup_fd

    def __len__(self) -> int:
        """Grammars that are kept compiled."""
        return len(self._kept)

    @property
    def kept_nbytes(self) -> int:
        return self._kept_nbytes

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def vocabulary(self) -> Vocabulary:
        return self._vocabulary

    def open(
        self,
        grammar: Grammar,
        sent: Sequence[Tokens],
        params: Sequence[tuple[frozenset[int], bool]],
        on_ready: OnReady,
        on_failure: OnFailure,
    ) -> Ticket | None:
        """A state for each of `sent`, brought up to those tokens; `params`: (stop ids, ignore_eos) of each.

        One of the two is called, now (then None is returned) or by a later `poll`. Raises OverloadedError, and
        UnsupportedError where there is no tokenizer.
        """
        if not self._vocabulary.is_there:
            raise UnsupportedError("structured output needs the model's tokenizer.json", param=grammar.param)
        ticket = Ticket(grammar, sent, params, self._clock.now() + self._limits.timeout_s, on_ready, on_failure)
        key = (grammar.kind.value, grammar.source, grammar.skip_open, grammar.skip_close)
        found = self._kept.get(key)
        if found is not None:
            self._kept.move_to_end(key)
            self.num_found += 1
            if not any(sent):
                on_ready(self._copies(ticket, found))
                return None
        if len(self._waiting) >= self._limits.max_waiting:
            raise OverloadedError(f"{len(self._waiting)} requests wait for their grammar already")
        if found is not None:
            self._replay(ticket, found)
        else:
            self._compile(ticket, key)
        return ticket

    def close(self, ticket: Ticket | None) -> None:
        """The request has ended. Idempotent."""
        if ticket is not None and (work := self._waiting.pop(ticket, None)) is not None:
            work.tickets.remove(ticket)

    @property
    def next_deadline(self) -> float:
        return min((t.deadline for t in self._waiting), default=math.inf)

    def poll(self) -> None:
        """Take what the threads have done, and fail what took too long."""
        if not self._rings_due:
            return  # nobody waits without work that is under way
        with contextlib.suppress(BlockingIOError):
            self._rings_due -= os.eventfd_read(self.wakeup_fd)
        while self._done:
            self._take(self._done.popleft())
        now = self._clock.now()
        for ticket in [t for t in self._waiting if t.deadline <= now]:
            work = self._waiting[ticket]
            self.close(ticket)
            ticket.on_failure(_late(ticket, work, self._limits.timeout_s))

    def shutdown(self) -> None:
        """Threads end when they have done what they are at; the descriptor is theirs until then."""
        for _ in self._threads:
            self._queue.put(None)
        deadline = time.monotonic() + _END_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if self._wakeup_fd >= 0 and not any(thread.is_alive() for thread in self._threads):
            os.close(self._wakeup_fd)
            self._wakeup_fd = -1

    def _compile(self, ticket: Ticket, key: Key) -> None:
        work = self._compiling.get(key)
        if work is None:
            grammar, vocabulary = ticket.grammar, self._vocabulary
            work = self._compiling[key] = _Work(lambda: compile_grammar(grammar, vocabulary), key, [])
            self._start(work)
        work.tickets.append(ticket)
        self._waiting[ticket] = work

    def _replay(self, ticket: Ticket, compiled: Matcher) -> None:
        def run() -> list[Constraint]:
            return self._copies(ticket, compiled)

        work = _Work(run, None, [ticket])
        self._waiting[ticket] = work
        self._start(work)

    def _copies(self, ticket: Ticket, compiled: Matcher) -> list[Constraint]:
        out = []
        for tokens, (stop_ids, ignore_eos) in zip(ticket.sent, ticket.params, strict=True):
            state = Constraint(
                compiled.deep_copy(), self._vocabulary, ticket.grammar.param, stop_ids, ignore_eos=ignore_eos
            )
            state.follow(tokens)
            out.append(state)
        return out

    def _start(self, work: _Work) -> None:
        if not self._threads:
            before = threading.stack_size(_STACK_BYTES)
            try:
                for i in range(self._limits.threads):
                    args = (self._queue, self._done, self.wakeup_fd)
                    thread = threading.Thread(target=_serve, args=args, name=f"grammar-{i}", daemon=True)
                    thread.start()
                    self._threads.append(thread)
            finally:
                threading.stack_size(before)
        self._rings_due += 1
        self._queue.put(work)

    def _take(self, work: _Work) -> None:
        tickets, work.tickets = work.tickets, []
        for ticket in tickets:
            del self._waiting[ticket]
        if work.key is None:
            for ticket in tickets:
                if work.error is not None:
                    ticket.on_failure(work.error)
                else:
                    assert isinstance(work.result, list)
                    ticket.on_ready(work.result)
            return
        del self._compiling[work.key]
        if work.error is not None:
            self.num_failed += 1
            for ticket in tickets:
                ticket.on_failure(_named(work.error, ticket.grammar.param))
            return
        assert isinstance(work.result, Matcher)
        self.num_compiled += 1
        self._keep(work.key, work.result)
        for ticket in tickets:
            if any(ticket.sent):
                self._replay(ticket, work.result)
            else:
                ticket.on_ready(self._copies(ticket, work.result))

    def _keep(self, key: Key, compiled: Matcher) -> None:
        self._kept[key] = compiled
        self._kept_nbytes += nbytes_of(key)
        while len(self._kept) > self._limits.max_entries or self._kept_nbytes > self._limits.max_nbytes:
            old, _ = self._kept.popitem(last=False)
            self._kept_nbytes -= nbytes_of(old)


def grammar_counters(pool: GrammarPool | None) -> dict[str, int]:
    """Zero on a worker that does not sample."""
    return {
        "grammars_compiled_total": pool.num_compiled if pool is not None else 0,
        "grammars_failed_total": pool.num_failed if pool is not None else 0,
        "grammars_found_total": pool.num_found if pool is not None else 0,
        "grammars_kept": len(pool) if pool is not None else 0,
    }


def nbytes_of(key: Key) -> int:
    """What a compiled grammar is taken to hold: measured, 0.1 MB for small ones and 36 MB for a schema of 170 KB."""
    return (128 << 10) + 200 * len(key[1])


def _serve(work_queue: queue.SimpleQueue[_Work | None], done: deque[_Work], wakeup_fd: int) -> None:
    """The life of a thread."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
    while (work := work_queue.get()) is not None:
        work.started = True
        try:
            work.result = work.run()
        except NanoDeployError as error:
            work.error = error
        except Exception as error:  # the edge of the thread: it fails who waits for this
            log.exception("a grammar was not compiled")
            work.error = InvalidRequestError(f"cannot be compiled: {type(error).__name__}")
        work.run = _nothing
        done.append(work)
        with contextlib.suppress(OSError):
            os.eventfd_write(wakeup_fd, 1)


def _nothing() -> object:
    return None


def _named(error: NanoDeployError, param: str) -> NanoDeployError:
    return type(error)(f"{param} {error.message}", param=param)


def _late(ticket: Ticket, work: _Work, timeout_s: float) -> NanoDeployError:
    if not work.started:
        return OverloadedError(f"the grammar was not compiled within {timeout_s:g} s: too many wait")
    param = ticket.grammar.param
    return InvalidRequestError(f"{param} takes more than {timeout_s:g} s to compile: simplify it", param=param)
