"""A model's answer as it streams: reasoning, content, calls.

push(text) ... -> finish(); `spent`: what follows is content, and need not come through here any more
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from common.text.parsers.arguments import Tools
from common.text.parsers.constraint import CallSyntax
from common.text.parsers.out import Out, Parsed, new_call_id
from common.text.parsers.reasoning import ReasoningFormat, Start, reasoning
from common.text.parsers.tape import Steps, Tape, peek_solid

NO_LIMIT: Final = 1 << 30
_ENDED: Final = object()
NO_TOOLS: Final = Tools()


class CallFormat(Protocol):
    """How a family writes calls."""

    @property
    def syntax(self) -> CallSyntax:
        """As a grammar."""

    @property
    def marks(self) -> tuple[str, ...]:
        """Strings that must survive detokenizing."""

    @property
    def reasoning_ends(self) -> tuple[str, ...]:
        """Marks that end reasoning which nothing closed."""

    def read(self, tape: Tape, out: Out, tools: Tools) -> Steps[None]: ...


@dataclass(frozen=True)
class ParserPlan:
    """What the answers to one request are read as. `max_calls`: an answer ends with so many.

    `inline` leaves reasoning where it is, in the content; `hidden` leaves it out.
    """

    calls: CallFormat | None = None
    tools: Tools = NO_TOOLS
    reasoning: ReasoningFormat | None = None
    start: Start = Start.MAYBE
    max_calls: int = NO_LIMIT
    inline: bool = False
    hidden: bool = False
    says_calls: bool = True  # in the reason for the end; a call that was forced by name ends by "stop"

    @property
    def marks(self) -> tuple[str, ...]:
        """Strings that must survive detokenizing."""
        around = () if self.reasoning is None else (self.reasoning.opening, self.reasoning.closing)
        return around if self.calls is None else (*around, *self.calls.marks)

    @property
    def is_limited(self) -> bool:
        return self.max_calls < NO_LIMIT

    def parser(self, make_id: Callable[[], str] = new_call_id) -> OutputParser:
        return OutputParser(self, make_id)


class OutputParser:
    """One choice's."""

    __slots__ = ("_out", "_steps", "_tape", "limit", "spent")

    def __init__(self, plan: ParserPlan, make_id: Callable[[], str] = new_call_id) -> None:
        self.limit = plan.max_calls
        self.spent = False
        self._tape = Tape()
        trims = plan.calls is not None
        self._out = Out(limit=plan.max_calls, inline=plan.inline, hidden=plan.hidden, trims=trims, make_id=make_id)
        self._out.reasons = plan.reasoning is not None and plan.start is Start.OPEN and not plan.inline
        self._steps = _read(self._tape, self._out, plan)

    def push(self, text: str) -> Parsed:
        if self.spent:
            return Parsed(text, "", ())
        self._tape.feed(text)
        self._resume()
        return self._out.take()

    def finish(self) -> Parsed:
        """The text is over."""
        if not self.spent:
            self._tape.over = True
            self._resume()
        self._out.flush()
        return self._out.take()

    @property
    def reasons(self) -> bool:
        """What comes next is reasoning, which is not content, unless it ends it."""
        return self._out.reasons

    @property
    def answers(self) -> bool:
        """No more reasoning comes."""
        return self._out.answers

    @property
    def num_calls(self) -> int:
        return min(self._out.num_calls, self.limit)

    @property
    def is_within_call(self) -> bool:
        """The last call is not complete."""
        return self._out.ended_calls < self._out.num_calls

    @property
    def full(self) -> bool:
        """As many calls are complete as are wanted."""
        return self._out.ended_calls >= self.limit

    def _resume(self) -> None:
        if next(self._steps, _ENDED) is _ENDED:
            self.spent = True
            self._out.content(self._tape.take_rest())


def _read(tape: Tape, out: Out, plan: ParserPlan) -> Steps[None]:
    if plan.reasoning is not None:
        ends = () if plan.calls is None else plan.calls.reasoning_ends
        yield from reasoning(tape, out, plan.reasoning, plan.start, ends)
    out.answers = True
    if plan.calls is not None:
        yield from plan.calls.read(tape, out, plan.tools)
    elif out.at_begin:
        yield from peek_solid(tape)  # white space after reasoning belongs to its mark
