"""Calls as a grammar, in each family's own way of writing them: what a model must write where calls are demanded.

Made as a structural tag (`GrammarKind.STRUCTURAL_TAG`, the form with `format`): a tree of texts and schemas. Reasoning
stays free, before the calls. Families that write arguments as plain text get one field per property of the schema.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from common.text.parsers.arguments import STRING, Tools
from common.text.parsers.reasoning import ReasoningFormat, Start

Part = dict[str, Any]

_NO_ARGUMENTS: Final[Part] = {"type": "object", "properties": {}, "additionalProperties": False}
_SPACE: Final[Part] = {"type": "regex", "pattern": r"[ \n]{0,4}"}


class FieldSyntax(NamedTuple):
    """A parameter as text. `KEY` in `begin` is its name, `TYPED` whether it is a string: true or false."""

    begin: str
    end: str


class CallSyntax(NamedTuple):
    """How a family writes a call: `NAME` in `begin` is the function's. `opens` and `closes` frame all calls."""

    begin: str
    end: str
    separator: str = ""
    opens: str = ""
    closes: str = ""
    field: FieldSyntax | None = None
    numbered: str = ""  # a number and this text precede the arguments
    trigger: str = ""  # begins calls within text; empty: nothing marks them


class Around(NamedTuple):
    """What stands around calls. `single`: one call, and nothing after it."""

    single: bool
    reasoning: ReasoningFormat | None
    start: Start


JSON_CALL: Final = CallSyntax('{"name": "NAME", "parameters": ', "}", separator=", ", opens="[", closes="]")


def required(
    syntax: CallSyntax,
    functions: Sequence[Mapping[str, Any]],
    around: Around,
) -> Part:
    """Nothing but calls of `functions` (OpenAI's objects), after reasoning: one at least, `single` one alone."""
    return {"format": _after_reasoning(_section(syntax, functions, around.single), around)}


def strict(
    syntax: CallSyntax,
    functions: Sequence[Mapping[str, Any]],
    around: Around,
) -> Part:
    """Free text, in which what begins as a call is one. Arguments of strict functions follow their schemas."""
    assert syntax.trigger
    if syntax.opens:
        calls = _calls(syntax, functions, around.single, only_strict=True)
        tags = [{"type": "tag", "begin": syntax.opens, "content": calls, "end": syntax.closes}]
    else:
        tags = [_tag(syntax, function, only_strict=True) for function in functions]
    triggered = {
        "type": "triggered_tags",
        "triggers": [syntax.trigger],
        "tags": tags,
        "stop_after_first": around.single,
    }
    return {"format": _after_reasoning(triggered, around)}


def answer_or_calls(
    schema: Any,
    syntax: CallSyntax,
    functions: Sequence[Mapping[str, Any]],
    around: Around,
) -> Part:
    """A JSON value of `schema`, or calls in its place."""
    value: Part = {"type": "json_schema", "json_schema": schema}
    either = {"type": "or", "elements": [_section(syntax, functions, around.single), value]}
    return {"format": _after_reasoning(either, around)}


def _after_reasoning(part: Part, around: Around) -> Part:
    """`part`, after white space, and after reasoning that the model may begin or has begun."""
    reasoning, start = around.reasoning, around.start
    if reasoning is None or start is Start.CLOSED:
        return _sequence(_SPACE, part)
    opening = "" if start is Start.OPEN else reasoning.opening
    thought: Part = {"type": "tag", "begin": opening, "content": {"type": "any_text"}, "end": reasoning.closing}
    if start is Start.MAYBE:
        thought = {"type": "or", "elements": [_sequence(_SPACE, thought), _text("")]}
    return _sequence(thought, _SPACE, part)


def _sequence(*parts: Part) -> Part:
    return {"type": "sequence", "elements": list(parts)}


def _text(value: str) -> Part:
    return {"type": "const_string", "value": value}


def _section(syntax: CallSyntax, functions: Sequence[Mapping[str, Any]], single: bool) -> Part:
    calls = _calls(syntax, functions, single, only_strict=False)
    return _sequence(_text(syntax.opens), calls, _text(syntax.closes)) if syntax.opens else calls


def _calls(syntax: CallSyntax, functions: Sequence[Mapping[str, Any]], single: bool, *, only_strict: bool) -> Part:
    return {
        "type": "tags_with_separator",
        "tags": [_tag(syntax, function, only_strict=only_strict) for function in functions],
        "separator": syntax.separator,
        "at_least_one": True,
        "stop_after_first": single,
    }


def _tag(syntax: CallSyntax, tool: Mapping[str, Any], *, only_strict: bool) -> Part:
    function = tool["function"]
    free = only_strict and not function.get("strict")
    schema = {"type": "object"} if free else parameters_schema(function)
    if syntax.field is None:
        content: Part = {"type": "json_schema", "json_schema": schema}
    else:
        content = _fields(syntax.field, function["name"], schema, Tools([tool]))
    if syntax.numbered:
        content = _sequence({"type": "regex", "pattern": "[0-9]{1,4}"}, _text(syntax.numbered), content)
    begin = syntax.begin.replace("NAME", function["name"])
    return {"type": "tag", "begin": begin, "content": content, "end": syntax.end}


def parameters_schema(function: Mapping[str, Any]) -> dict[str, Any]:
    """Of a function; without one it takes no arguments. What cannot be enforced is ignored unless it is strict."""
    schema = dict(function.get("parameters") or _NO_ARGUMENTS)
    if not function.get("strict"):
        schema.setdefault("x-guidance", {"lenient": True})
    return schema


def _fields(field: FieldSyntax, name: str, schema: Mapping[str, Any], tools: Tools) -> Part:
    """Properties in their order, those that are not required or not. Free text where they are not spelled out."""
    properties = schema.get("properties")
    if not isinstance(properties, Mapping) or any(key in schema for key in ("anyOf", "oneOf", "allOf", "$ref")):
        return {"type": "any_text"}
    needed = schema.get("required")
    needed = needed if isinstance(needed, list) else []
    parts = []
    for key, value in properties.items():
        part = _field(field, key, value, schema, tools.types(name, key))
        parts.append(part if key in needed else {"type": "or", "elements": [part, _text("")]})
    return _sequence(*parts) if parts else _text("")


def _field(field: FieldSyntax, key: str, value: Any, root: Mapping[str, Any], types: frozenset[str]) -> Part:
    typed = "true" if types == STRING else "false"
    begin = field.begin.replace("TYPED", typed).replace("KEY", key)
    options = value.get("enum") if isinstance(value, Mapping) else None
    content: Part = {"type": "any_text"}
    if types == STRING and isinstance(options, list) and options:
        content = {"type": "or", "elements": [_text(option) for option in options if isinstance(option, str)]}
    elif "string" not in types and isinstance(value, Mapping):
        shared = {name: root[name] for name in ("$defs", "definitions", "x-guidance") if name in root}
        content = {"type": "json_schema", "json_schema": {**shared, **value}}
    return {"type": "tag", "begin": begin, "content": content, "end": field.end}
