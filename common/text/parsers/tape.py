"""The text a parser reads, as it arrives, and the steps that all formats are written in.

A format is a generator: it reads from a `Tape` and yields where it needs text that has not come yet. Each step
decides by the text alone, never by how it was cut into pieces, so whatever is made of these steps streams exactly
what it makes of the whole. At the end (`over`) steps no longer wait: what could have become a mark is text.

    feed(piece), resume the generator -> it reads, yields -> ... -> over = True, resume -> it returns
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from typing import Final, TypeVar

T = TypeVar("T")
Steps = Generator[None, None, T]
Emit = Callable[[str], object]

MAX_NAME_CHARS: Final = 256  # longer is no function, and its text is held back no longer
SPACE: Final = " \t\r\n"  # what formats put around marks; an indent in Chinese text is none
_SPACE: Final = re.compile(f"[{SPACE}]*")


class Tape:
    __slots__ = ("_kept", "at", "over", "text")

    def __init__(self) -> None:
        self.text = ""
        self.at = 0
        self.over = False
        self._kept = -1  # where `rewind` goes back to; -1 without

    def feed(self, piece: str) -> None:
        keep = self.at if self._kept < 0 else self._kept
        self.text = self.text[keep:] + piece
        self.at -= keep
        if self._kept >= 0:
            self._kept = 0

    def keep(self) -> None:
        """From here on the text is kept, until `rewind` or `forget`."""
        self._kept = self.at

    def rewind(self) -> None:
        """Back to where the text was kept from."""
        assert self._kept >= 0
        self.at, self._kept = self._kept, -1

    def forget(self) -> None:
        self._kept = -1

    def take_rest(self) -> str:
        rest, self.text, self.at = self.text[self.at :], "", 0
        return rest


class Marks:
    """Strings looked for together. None may begin or lie within another."""

    __slots__ = ("_begin", "_longest", "_marks", "search")

    def __init__(self, *marks: str) -> None:
        assert all(marks), marks
        assert not any(a != b and a in b for a in marks for b in marks), marks
        self._marks = marks
        self._longest = max(map(len, marks))
        self._begin = re.compile("[" + "".join(re.escape(mark[0]) for mark in marks) + "]").search
        self.search = re.compile("|".join(map(re.escape, marks))).search

    def partial(self, text: str, at: int) -> int:
        """Characters at the end of `text[at:]` that may become a mark."""
        start = max(at, len(text) - self._longest + 1)
        while found := self._begin(text, start):
            start = found.start()
            end = text[start:]
            if any(mark.startswith(end) for mark in self._marks):
                return len(end)
            start += 1
        return 0


def until(tape: Tape, marks: Marks, emit: Emit, *, halves: bool = True) -> Steps[str]:
    """Emit what precedes the first mark and step over it: the mark, or "" where the text ended without one.

    `halves`: what may be a mark cut short at the end is text.
    """
    while True:
        text, at = tape.text, tape.at
        if found := marks.search(text, at):
            if found.start() > at:
                emit(text[at : found.start()])
            tape.at = found.end()
            return found.group()
        safe = len(text) - (0 if tape.over and halves else marks.partial(text, at))
        if safe > at:
            emit(text[at:safe])
            tape.at = safe
        if tape.over:
            if not halves:
                tape.take_rest()
            return ""
        yield


def scan(tape: Tape, stops: re.Pattern[str], emit: Emit, *, through: bool = False) -> Steps[str]:
    """Emit what precedes the first of `stops`, which are of one character; `through`: that too. "" at the end."""
    while True:
        text, at = tape.text, tape.at
        found = stops.search(text, at)
        end = len(text) if found is None else found.end() if through else found.start()
        if end > at:
            emit(text[at:end])
            tape.at = end
        if found is not None:
            return found.group()
        if tape.over:
            return ""
        yield


def quoted(tape: Tape, stops: re.Pattern[str], emit: Emit) -> Steps[bool]:
    """Emit the rest of a string with its closing quote. `stops`: that quote, or a backslash."""
    while (stop := (yield from scan(tape, stops, emit, through=True))) == "\\":
        escaped = yield from peek(tape)
        emit(escaped)
        tape.at += len(escaped)
    return bool(stop)


def peek(tape: Tape) -> Steps[str]:
    """The next character, not taken; "" at the end."""
    while tape.at == len(tape.text):
        if tape.over:
            return ""
        yield
    return tape.text[tape.at]


def peek_solid(tape: Tape) -> Steps[str]:
    """Step over white space, then `peek`."""
    while True:
        found = _SPACE.match(tape.text, tape.at)
        assert found is not None
        tape.at = found.end()
        if tape.at < len(tape.text):
            return tape.text[tape.at]
        if tape.over:
            return ""
        yield


def take(tape: Tape, literal: str) -> Steps[bool]:
    """Step over `literal` if it comes next."""
    while True:
        text, at = tape.text, tape.at
        if text.startswith(literal, at):
            tape.at += len(literal)
            return True
        if tape.over or not literal.startswith(text[at:]):
            return False
        yield


def short(tape: Tape, marks: Marks, limit: int = MAX_NAME_CHARS) -> Steps[tuple[str, str]]:
    """The text up to a mark, and the mark; ("", "") if the text ends before one or gets too long."""
    while True:
        text, at = tape.text, tape.at
        found = marks.search(text, at, at + limit + 64)
        if found and found.start() - at <= limit:
            tape.at = found.end()
            return text[at : found.start()], found.group()
        if tape.over or found or len(text) - at > limit + 64:
            return "", ""
        yield


def close(tape: Tape, mark: str) -> Steps[bool]:
    """Step over white space and the mark that ends something, if it comes. One cut short at the end is no text."""
    yield from peek_solid(tape)
    if (yield from take(tape, mark)):
        return True
    if tape.over:
        tape.take_rest()
    return False
