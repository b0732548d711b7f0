"""JSON as a model writes it, read while it comes and passed on as it is.

Only structure is looked at, not validity: arguments are the model's own text, so a stream need not wait for their
end. What no JSON has outside strings (`<`, a backtick) ends a value: it is the mark after a call cut short.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container
from typing import Any, Final

from common.text.parsers.out import Out
from common.text.parsers.tape import Emit, Steps, Tape, peek_solid, quoted, scan, take

_OUTSIDE: Final = re.compile(r'["{}\[\]<`]')
_INSIDE: Final = re.compile(r'["\\]')
_SCALAR_END: Final = re.compile(r'[\s,;:{}\[\]"<`]')
_OTHER_KEYS: Final = ("id", "type")
_ARGUMENT_KEYS: Final = ("arguments", "parameters")
MAX_EARLY_CHARS: Final = 1 << 16  # arguments before the name are held back, at most so many


def loads(text: str) -> Any:
    """Strict JSON. Raises `ValueError` for whatever is wrong, its depth too."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except RecursionError as error:
        raise ValueError("too deep") from error


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def value(tape: Tape, emit: Emit) -> Steps[bool]:
    """Emit the text of one value. False if it ended early."""
    first = yield from peek_solid(tape)
    if first == '"':
        tape.at += 1
        emit('"')
        return (yield from quoted(tape, _INSIDE, emit))
    if first in ("{", "["):
        return (yield from _nested(tape, emit))
    return (yield from _scalar(tape, emit))


def _nested(tape: Tape, emit: Emit) -> Steps[bool]:
    depth = 0
    while char := (yield from scan(tape, _OUTSIDE, emit)):
        if char in "<`":
            return False
        emit(char)
        tape.at += 1
        if char == '"':
            if not (yield from quoted(tape, _INSIDE, emit)):
                return False
        elif char in "{[":
            depth += 1
        else:
            depth -= 1
            if not depth:
                return True
    return False


def _scalar(tape: Tape, emit: Emit) -> Steps[bool]:
    seen = False
    while True:
        text, at = tape.text, tape.at
        found = _SCALAR_END.search(text, at)
        end = len(text) if found is None else found.start()
        if end > at:
            emit(text[at:end])
            tape.at, seen = end, True
        if found is not None:
            return seen
        if tape.over:
            return False
        yield


def string(tape: Tape) -> Steps[str | None]:
    """The value of a string literal that comes next; None if there is none or it is broken."""
    if (yield from peek_solid(tape)) != '"':
        return None
    parts: list[str] = []
    if not (yield from value(tape, parts.append)):
        return None
    try:
        found = loads("".join(parts))
    except ValueError:
        return None
    return found if isinstance(found, str) else None


def call(tape: Tape, out: Out, known: Container[str] | None) -> Steps[bool]:
    """An object with `name` and `arguments` (or `parameters`), put out as a call.

    False if it is none and nothing was put out. `known`: names that make it a call; None takes any.
    """
    if not (yield from take(tape, "{")):
        return False
    name, begun, early = "", False, ""
    while (char := (yield from peek_solid(tape))) != "}":
        if char == ",":
            tape.at += 1
            continue
        if begun:
            tape.keep()
        key = (yield from string(tape)) if char == '"' else None
        if key is None or (yield from peek_solid(tape)) != ":":
            if begun:
                tape.rewind()
            return begun
        tape.at += 1
        if begun:
            tape.forget()
            if not (yield from value(tape, lambda _: None)):
                return True
        elif key == "name" and not name:
            name = (yield from string(tape)) or ""
            if not name or (known is not None and name not in known):
                return False
        elif key in _ARGUMENT_KEYS and name:
            begun = True
            out.begin_call(name)
            tape.forget()
            if not (yield from _arguments(tape, out.arguments)):
                return True
        elif key in _ARGUMENT_KEYS and not early:
            early = (yield from _early(tape)) or ""
            if not early:
                return False
        elif key not in _OTHER_KEYS or not (yield from value(tape, lambda _: None)):
            return False
    tape.at += 1
    if not name:
        return False
    if not begun:
        out.begin_call(name)
        out.arguments(early or "{}")
    out.end_call()
    return True


def _early(tape: Tape) -> Steps[str | None]:
    """Arguments that precede the name, held back; None if they are broken or too long."""
    parts: list[str] = []
    complete = yield from _arguments(tape, parts.append)
    text = "".join(parts)
    return text if complete and len(text) <= MAX_EARLY_CHARS else None


def _arguments(tape: Tape, emit: Emit) -> Steps[bool]:
    """A value; a string that holds an object is taken for the object, null for an empty one."""
    first = yield from peek_solid(tape)
    if first in ("{", "["):
        return (yield from value(tape, emit))
    parts: list[str] = []
    complete = yield from value(tape, parts.append)
    text = "".join(parts)
    if complete and first == '"':
        try:
            inner = loads(text)
            if isinstance(loads(inner), dict):
                text = inner
        except ValueError:
            pass
    emit("{}" if text == "null" else text)
    return complete
