"""Reasoning before the answer: `<think> ... </think>`, the opening mark often the prompt's last token.

MAYBE (it begins if the text does with the mark) -> OPEN -> closed: the rest is the answer
"""

from __future__ import annotations

from enum import Enum
from typing import Final, NamedTuple

from common.text.parsers.out import Out
from common.text.parsers.tape import Marks, Steps, Tape, peek_solid, take, until


class Start(Enum):
    MAYBE = "maybe"
    OPEN = "open"
    CLOSED = "closed"


class ReasoningFormat(NamedTuple):
    """`unmarked`: reasoning comes first even where nothing opens it."""

    opening: str
    closing: str
    unmarked: bool = False

    def start(self, prompt_end: str) -> Start:
        """Where the end of a prompt, which asks for an answer, leaves the model."""
        end = prompt_end.rstrip()
        if end.endswith(self.opening):
            return Start.OPEN
        if end.endswith(self.closing):
            return Start.CLOSED
        return Start.OPEN if self.unmarked else Start.MAYBE

    def continued(self, content: str) -> Start:
        """Where an answer left to be continued stands."""
        return Start.OPEN if content.rfind(self.opening) > content.rfind(self.closing) else Start.CLOSED


THINK: Final = ReasoningFormat("<think>", "</think>")
KINDS: Final = (THINK, ReasoningFormat("◁think▷", "◁/think▷"), ReasoningFormat("[THINK]", "[/THINK]"))


def reasoning(tape: Tape, out: Out, form: ReasoningFormat, start: Start, ends: tuple[str, ...]) -> Steps[None]:
    """`ends`: marks of calls that end reasoning which nothing closed."""
    if start is Start.CLOSED:
        return
    tape.keep()
    yield from peek_solid(tape)
    marked = yield from take(tape, form.opening)
    if not marked or out.inline:
        tape.rewind()
    if not marked and start is Start.MAYBE:
        return
    tape.forget()
    if out.inline:
        out.reasoning((yield from until(tape, Marks(form.closing), out.reasoning)))
        return
    out.begin_text()
    out.reasons = True
    mark = yield from until(tape, Marks(form.closing, *ends), out.reasoning)
    out.reasons = False
    if mark:
        out.begin_text()
    if mark in ends:
        tape.at -= len(mark)
