"""Arguments of calls whose format writes them as plain text: their types are those of the tool's schema.

A parameter that can only be a string is passed on while it comes; any other waits for its end.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from common.text.parsers.json_text import loads
from common.text.parsers.out import Out
from common.text.parsers.tape import SPACE, Marks, Steps, Tape, until

ANY: Final = frozenset({"null", "boolean", "integer", "number", "array", "object", "string"})
STRING: Final = frozenset({"string"})
_NUMBER: Final = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")
_WHOLE: Final = re.compile(r"(-?(?:0|[1-9]\d*))(?:\.0+)?")
_MAX_SCHEMAS: Final = 64  # looked at for one parameter: references may go in circles, and fan out
_NAMES: Final = {  # JSON's and Python's
    name: json_name
    for json_name, names in {"null": ("null", "None"), "true": ("true", "True"), "false": ("false", "False")}.items()
    for name in names
}


class Tools:
    """The functions of a request: their names, and the types their parameters may have."""

    def __init__(self, tools: Sequence[Mapping[str, Any]] = ()) -> None:
        self._parameters: dict[str, Mapping[str, Any]] = {}
        for tool in tools:
            function = tool.get("function")
            if isinstance(function, Mapping) and isinstance(function.get("name"), str):
                parameters = function.get("parameters")
                self._parameters[function["name"]] = parameters if isinstance(parameters, Mapping) else {}

    def __contains__(self, name: object) -> bool:
        return name in self._parameters

    def types(self, function: str, parameter: str) -> frozenset[str]:
        """JSON types that the schema allows; all of them where it says nothing."""
        root = self._parameters.get(function, {})
        properties = root.get("properties")
        schema = properties.get(parameter) if isinstance(properties, Mapping) else None
        if schema is None:
            schema = root.get("additionalProperties")
        return _types(schema, root, iter(range(_MAX_SCHEMAS)))


def _types(schema: Any, root: Mapping[str, Any], budget: Iterator[int]) -> frozenset[str]:
    if not isinstance(schema, Mapping) or next(budget, None) is None:
        return ANY
    found = ANY
    named = schema.get("type")
    names = [named] if isinstance(named, str) else named
    if isinstance(names, list):
        found &= frozenset(name for name in names if isinstance(name, str))
    if "number" in found:
        found |= {"integer"}
    options = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(options, list):
        found &= frozenset(_type_of(option) for option in options)
    reference = schema.get("$ref")
    if isinstance(reference, str):
        found &= _types(_resolve(reference, root), root, budget)
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), list):
            found &= frozenset().union(*(_types(one, root, budget) for one in schema[key]))
    if isinstance(schema.get("allOf"), list):
        for one in schema["allOf"]:
            found &= _types(one, root, budget)
    return found or ANY


def _type_of(option: Any) -> str:
    kinds = {type(None): "null", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}
    return kinds.get(type(option), "string")


def _resolve(reference: str, root: Mapping[str, Any]) -> Any:
    found: Any = root
    for key in reference.removeprefix("#").strip("/").split("/"):
        found = found.get(key.replace("~1", "/").replace("~0", "~")) if isinstance(found, Mapping) else None
    return found


def to_json(text: str, types: frozenset[str]) -> str:
    """A parameter's text as JSON of one of `types`; a string if it is none of them."""
    if types == STRING:
        return quote(text)
    bare = text.strip()
    word = _NAMES.get(bare) or ("string" not in types and _NAMES.get(bare.capitalize()))
    if word and ("null" if word == "null" else "boolean") in types:
        return word
    if "number" in types and _NUMBER.fullmatch(bare):
        return bare
    if "integer" in types and (whole := _WHOLE.fullmatch(bare)):
        return whole[1]
    if bare[:1] in ("{", "[") and types & {"object", "array"} and (nested := _nested(bare)) is not None:
        return nested
    return bare if bare[:1] == '"' and "string" in types and _is_string(bare) else quote(text)


def _is_string(text: str) -> bool:
    try:
        return isinstance(loads(text), str)
    except ValueError:
        return False


def _nested(text: str) -> str | None:
    """JSON, or a literal of Python as JSON; None if it is neither."""
    try:
        loads(text)
    except ValueError:
        return literal(text)
    return text


def literal(text: str) -> str | None:
    """A Python literal as JSON. JSON's own names are taken too."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that Python does not know
            tree = ast.parse(text.strip(), mode="eval")
        return json.dumps(_plain(tree.body), ensure_ascii=False, allow_nan=False)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError, OverflowError):
        return None


def _plain(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=None | bool() | int() | float() | str()):
            return node.value
        case ast.Name(id=name) if name in _NAMES:
            return json.loads(_NAMES[name])
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return -number
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_plain(item) for item in items]
        case ast.Dict(keys=keys, values=values):
            return {_key(key): _plain(item) for key, item in zip(keys, values, strict=True)}
    raise ValueError("not a literal")


def _key(node: ast.expr | None) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    raise ValueError("a key is not a string")


def quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


class ArgumentWriter:
    """Parameters one after the other, as an object: `{"a": 1, "b": "x"}`."""

    __slots__ = ("_num", "_out")

    def __init__(self, out: Out) -> None:
        self._out = out
        self._num = 0

    def _key(self, name: str) -> str:
        self._num += 1
        return f"{', ' if self._num > 1 else '{'}{quote(name)}: "

    def add(self, name: str, json_text: str) -> None:
        self._out.arguments(self._key(name) + json_text)

    def close(self) -> None:
        self._out.arguments("}" if self._num else "{}")
        self._out.end_call()

    def stop(
        self, tape: Tape, opening: str, end: str, *, closes: tuple[str, ...] = (), after: tuple[str, ...] = ()
    ) -> None:
        """The call breaks at the parameter that the text was kept from: what follows is content.

        If it was cut short instead, half a mark (`opening` of a parameter, `closes` of the call, `after` what ends the
        name by `end`) is no text, and a name is put out as far as it came.
        """
        tape.rewind()
        rest = tape.text[tape.at :].lstrip(SPACE)
        if not tape.over:
            return
        if not any(mark.startswith(rest) for mark in (opening, *closes)):
            name, found, tail = rest.removeprefix(opening).partition(end)
            if not rest.startswith(opening) or (
                found and not any(mark.startswith(tail.lstrip(SPACE)) for mark in after)
            ):
                return
            name = name[: len(name) - Marks(end).partial(name, 0)]
            self._out.arguments(self._key(name)[: -len('": ')])
        tape.take_rest()

    def read(self, tape: Tape, name: str, types: frozenset[str], end: Marks, *, newlines: bool) -> Steps[bool]:
        """A parameter's text up to `end`. `newlines`: one at its begin and one at its end belong to the format.

        Cut short, it is put out as far as it came, without an end.
        """
        if types != STRING:
            parts: list[str] = []
            complete = yield from until(tape, end, parts.append, halves=False)
            text = "".join(parts)
            if complete:
                self.add(name, to_json(_without_newlines(text) if newlines else text, types))
            else:
                self._out.arguments(self._key(name) + text.strip())
            return bool(complete)
        self._out.arguments(self._key(name) + '"')
        trimmed = _Trimmed(self._out) if newlines else None
        complete = yield from until(tape, end, trimmed.add if trimmed else self._add_string, halves=False)
        if complete:
            self._out.arguments('"')
        elif trimmed:
            trimmed.flush()
        return bool(complete)

    def _add_string(self, text: str) -> None:
        self._out.arguments(quote(text)[1:-1])


def _without_newlines(text: str) -> str:
    return text.removeprefix("\n").removesuffix("\n")


class _Trimmed:
    """`_without_newlines` of a text that comes in pieces, written as the inside of a JSON string."""

    __slots__ = ("_begun", "_held", "_out")

    def __init__(self, out: Out) -> None:
        self._out = out
        self._begun = False
        self._held = ""

    def add(self, text: str) -> None:
        if not self._begun:
            self._begun = True
            text = text.removeprefix("\n")
        text = self._held + text
        self._held = "\n" if text.endswith("\n") else ""
        self._out.arguments(quote(text.removesuffix("\n"))[1:-1])

    def flush(self) -> None:
        if self._held:
            self._out.arguments(quote(self._held)[1:-1])
            self._held = ""
