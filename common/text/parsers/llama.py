"""Calls that nothing marks: an answer that begins as one is one, if it names a function of the request.

Llama 3 and 4 write JSON objects, or a Python list of calls, after <|python_tag|> or <|python_start|> or after
nothing. What else begins with a brace or a bracket stays content. Also what a grammar makes a model write
whose own way of calling is not known: an array of objects.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from common.text.parsers import json_text
from common.text.parsers.arguments import ArgumentWriter, Tools, literal, quote
from common.text.parsers.constraint import JSON_CALL, CallSyntax
from common.text.parsers.out import Out
from common.text.parsers.tape import Emit, Marks, Steps, Tape, peek, peek_solid, quoted, scan, short, until

_OPENS: Final = ("<|python_tag|>", "<|python_start|>")
_CLOSES: Final = ("<|python_end|>",)
_EXPRESSION: Final = re.compile(r"""["'()\[\]{},]""")
_PARENTHESIS: Final = Marks("(")
_EQUALS: Final = Marks("=")
_STRING_ENDS: Final = {quote_mark: re.compile(rf"[{quote_mark}\\]") for quote_mark in "\"'"}


class UnmarkedFormat(NamedTuple):
    syntax: CallSyntax
    opens: tuple[str, ...] = ()
    closes: tuple[str, ...] = ()
    reasoning_ends: tuple[str, ...] = ()

    @property
    def marks(self) -> tuple[str, ...]:
        return (*self.opens, *self.closes)

    def read(self, tape: Tape, out: Out, tools: Tools) -> Steps[None]:
        yield from _calls(tape, out, tools)
        if not self.opens:
            yield from _rest(tape, out)
            return
        marks = Marks(*self.opens, *self.closes)
        while mark := (yield from until(tape, marks, out.content)):
            if mark in self.opens:
                out.hold(mark)
                yield from _calls(tape, out, tools)
            elif not out.after_call:
                out.content(mark)


LLAMA: Final = UnmarkedFormat(JSON_CALL._replace(separator="; ", opens="", closes=""), _OPENS, _CLOSES)
ARRAY: Final = UnmarkedFormat(JSON_CALL)


def _rest(tape: Tape, out: Out) -> Steps[None]:
    while (yield from peek(tape)):
        out.content(tape.take_rest())


def _calls(tape: Tape, out: Out, tools: Tools) -> Steps[None]:
    """Objects and lists of calls, one after the other; the text stands after the last of them."""
    separators: tuple[str, ...] = ()
    while True:
        tape.keep()
        first = yield from peek_solid(tape)
        if first and first in separators:
            tape.at += 1
            first = yield from peek_solid(tape)
        found = False
        if first == "{":
            found = yield from json_text.call(tape, out, tools)
        elif first == "[":
            found = yield from _list(tape, out, tools)
        if not found:
            tape.rewind()
            return
        tape.forget()
        separators = (";", ",")


def _list(tape: Tape, out: Out, tools: Tools) -> Steps[bool]:
    """`[...]` of JSON objects, or of calls in Python's way. False: its first element is no call."""
    tape.at += 1
    begun = False
    while True:
        first = yield from peek_solid(tape)
        if begun:
            if first == "]":
                tape.at += 1
                return True
            tape.keep()
            if first == ",":
                tape.at += 1
                first = yield from peek_solid(tape)
        if first == "{":
            found = yield from json_text.call(tape, out, tools)
        else:
            found = yield from _python_call(tape, out, tools)
        if not found:
            if begun:
                tape.rewind()
            return begun
        tape.forget()
        begun = True


def _python_call(tape: Tape, out: Out, tools: Tools) -> Steps[bool]:
    text, found = yield from short(tape, _PARENTHESIS)
    name = text.strip()
    if not found or name not in tools:
        return False
    out.begin_call(name)
    tape.forget()
    writer = ArgumentWriter(out)
    while (char := (yield from peek_solid(tape))) != ")":
        if char == ",":
            tape.at += 1
            continue
        tape.keep()
        text, found = yield from short(tape, _EQUALS)
        key = text.strip()
        if not found or not key.isidentifier():
            if tape.over and tape.text[tape.at :].strip().isidentifier():
                writer.stop(tape, "", "=")
            else:
                tape.rewind()
            return True
        tape.forget()
        parts: list[str] = []
        complete = yield from _expression(tape, parts.append)
        text = "".join(parts).strip()
        if not complete:
            writer.add(key, quote(text[1:])[:-1] if text[:1] in ("'", '"') else text)
            return True
        writer.add(key, literal(text) or quote(text))
    tape.at += 1
    writer.close()
    return True


def _expression(tape: Tape, emit: Emit) -> Steps[bool]:
    """A value's text, up to the comma or bracket after it."""
    depth = 0
    while char := (yield from scan(tape, _EXPRESSION, emit)):
        if not depth and char in ",)":
            return True
        emit(char)
        tape.at += 1
        if char in "\"'":
            if not (yield from quoted(tape, _STRING_ENDS[char], emit)):
                return False
        elif char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
    return False
