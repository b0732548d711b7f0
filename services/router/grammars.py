"""What a body says its answer has to look like: `response_format`, `structured_outputs`, older and SGLang's names.

Here only size and JSON syntax are checked; the decode worker compiles it, and refuses what cannot be.
"""

from __future__ import annotations

from typing import Any

import msgspec
import orjson

from common.errors import InvalidRequestError
from common.text.parsers.reasoning import ReasoningFormat, Start
from common.types import Grammar, GrammarKind
from services.router.schemas import JsonSchemaFormat, SamplingFields, StructuralTagFormat, StructuredOutputs, TextFormat

Found = tuple[GrammarKind, str, str]  # kind, source, field


def grammar_of(body: SamplingFields) -> Grammar | None:
    """None if nothing is asked for. Raises `InvalidRequestError` that names the field."""
    found = [*_response_format(body), *_guided(body)]
    if body.structured_outputs is not None:
        found += _structured(body.structured_outputs)
    if not found:
        return None
    kind, source, param = found[0]
    if len(found) > 1:
        raise InvalidRequestError(f"{found[1][2]} and {param} exclude each other", param=found[1][2])
    return Grammar(kind=kind, source=source, param=param)


def behind_reasoning(grammar: Grammar | None, form: ReasoningFormat | None, start: Start) -> Grammar | None:
    """The same for the answer alone, where the model may reason first."""
    if grammar is None or form is None or start is Start.CLOSED:
        return grammar
    opening = form.opening if start is Start.MAYBE else ""
    return msgspec.structs.replace(grammar, skip_open=opening, skip_close=form.closing)


def _response_format(body: SamplingFields) -> list[Found]:
    wanted = body.response_format
    param = "response_format"
    if wanted is None or isinstance(wanted, TextFormat):
        return []
    if isinstance(wanted, JsonSchemaFormat):
        schema = wanted.json_schema.schema_
        if schema is None:
            return [(GrammarKind.JSON_OBJECT, "", param)]
        return [(GrammarKind.JSON_SCHEMA, _json(schema, param), param)]
    if isinstance(wanted, StructuralTagFormat):
        source = wanted.model_dump(exclude_none=True, exclude={"type"})
        return [(GrammarKind.STRUCTURAL_TAG, _json(source, param), param)]
    return [(GrammarKind.JSON_OBJECT, "", param)]


def _guided(body: SamplingFields) -> list[Found]:
    found: list[Found] = []
    if body.guided_json is not None:
        param = "guided_json"
        spaces = StructuredOutputs(whitespace_pattern=body.guided_whitespace_pattern)
        found.append((GrammarKind.JSON_SCHEMA, _spaced(spaces, _schema(body.guided_json, param), param), param))
    for regex, param in ((body.guided_regex, "guided_regex"), (body.regex, "regex")):
        if regex is not None:
            found.append((GrammarKind.REGEX, regex, param))
    if body.guided_choice is not None:
        found.append((GrammarKind.CHOICE, _json(body.guided_choice, "guided_choice"), "guided_choice"))
    for grammar, param in ((body.guided_grammar, "guided_grammar"), (body.ebnf, "ebnf")):
        if grammar is not None:
            found.append((GrammarKind.GRAMMAR, grammar, param))
    return found


def _structured(wanted: StructuredOutputs) -> list[Found]:
    found: list[Found] = []
    if wanted.json_ is not None:
        param = "structured_outputs.json"
        found.append((GrammarKind.JSON_SCHEMA, _spaced(wanted, _schema(wanted.json_, param), param), param))
    if wanted.regex is not None:
        found.append((GrammarKind.REGEX, wanted.regex, "structured_outputs.regex"))
    if wanted.choice is not None:
        param = "structured_outputs.choice"
        found.append((GrammarKind.CHOICE, _json(wanted.choice, param), param))
    if wanted.grammar is not None:
        found.append((GrammarKind.GRAMMAR, wanted.grammar, "structured_outputs.grammar"))
    if wanted.json_object:
        param = "structured_outputs.json_object"
        source = _spaced(wanted, '{"type":"object"}', param)
        found.append((GrammarKind.JSON_SCHEMA, source, param))
    if wanted.structural_tag is not None:
        param = "structured_outputs.structural_tag"
        tag = wanted.structural_tag
        found.append((GrammarKind.STRUCTURAL_TAG, tag if isinstance(tag, str) else _json(tag, param), param))
    return found


def _spaced(wanted: StructuredOutputs, source: str, param: str) -> str:
    """The schema with what the request says of white space, where it does not say so itself."""
    options: dict[str, Any] = {}
    if wanted.disable_any_whitespace:
        options["whitespace_flexible"] = False
    if wanted.whitespace_pattern is not None:
        options["whitespace_pattern"] = wanted.whitespace_pattern
    if not options:
        return source
    try:
        schema = orjson.loads(source)
    except orjson.JSONDecodeError as error:
        raise InvalidRequestError(f"{param} is not valid JSON: {error}", param=param) from None
    if not isinstance(schema, dict):
        return source
    own = schema.get("x-guidance")
    return _json({**schema, "x-guidance": {**options, **(own if isinstance(own, dict) else {})}}, param)


def _schema(schema: str | dict[str, Any] | bool, param: str) -> str:
    return schema if isinstance(schema, str) else _json(schema, param)


def _json(value: Any, param: str) -> str:
    try:
        return orjson.dumps(value).decode()
    except TypeError as error:  # nested too deeply, or an integer of more than 64 bits
        raise InvalidRequestError(f"{param} cannot be used: {error}", param=param) from None
