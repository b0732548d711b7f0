"""Schemas as generators write them: what says nothing is taken, what says something and is not supported is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from grammar_support import allows, vocabulary, write_tokenizer

from common.engine.constraint import compile_grammar
from common.errors import InvalidRequestError
from common.types import Grammar, GrammarKind

ITEMS: dict[str, Any] = {"type": "array", "items": {"type": "integer"}}
OBJECT: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "string"}}, "additionalProperties": False}
TEXT: dict[str, Any] = {"type": "string"}

IDLE: list[tuple[dict[str, Any], dict[str, Any]]] = [
    *(
        (ITEMS, {keyword: value})
        for keyword, value in [
            ("uniqueItems", False),
            ("minItems", 0),
            ("minItems", 0.0),
            ("minContains", 1),
            ("maxContains", 2),
            ("unevaluatedItems", True),
            ("additionalItems", False),
            ("prefixItems", []),
        ]
    ),
    *(
        (OBJECT, {keyword: value})
        for keyword, value in [
            ("propertyNames", {"type": "string"}),
            ("propertyNames", {"description": "a name"}),
            ("unevaluatedProperties", {}),
            ("dependentRequired", {}),
            ("dependentSchemas", {}),
            ("dependencies", {}),
            ("patternProperties", {}),
            ("required", []),
            ("minProperties", 0),
            ("$defs", {}),
            ("$schema", "http://json-schema.org/draft-04/schema#"),
            ("$schema", "https://json-schema.org/draft/2019-09/schema"),
            ("$schema", "http://json-schema.org/schema#"),
            ("$schema", "https://json-schema.org/draft-07/schema#"),
            ("$id", "https://example.com/a.schema.json"),
            ("$comment", "for readers"),
            ("title", "A"),
            ("description", "an a"),
            ("default", {"a": "", "uniqueItems": True}),
            ("examples", [{"not": {}}]),
            ("deprecated", True),
            ("readOnly", True),
            ("writeOnly", True),
            ("x-order", ["a"]),
            ("if", {"required": ["a"]}),
        ]
    ),
    *(
        (TEXT, more)
        for more in [
            {"minLength": 0},
            {"not": False},
            {"then": {"maxLength": 0}},
            {"if": {"const": "x"}, "then": True, "else": {"title": "other"}},
            {"format": "password"},
            {"format": "int32"},
            {"format": "file-path"},
            {"contentEncoding": "base64", "contentMediaType": "image/png", "contentSchema": {"not": {}}},
        ]
    ),
]
TEXTS = ["[]", "[1, 1]", '["a"]', "{}", '{"a": "x"}', '{"b": "x"}', '"x"', '""', "3"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("schemas"), (), "text")


def grammar(schema: Any) -> Grammar:
    return Grammar(kind=GrammarKind.JSON_SCHEMA, source=json.dumps(schema))


def tagged(schema: Any) -> Grammar:
    part = {"type": "json_schema", "json_schema": schema}
    return Grammar(kind=GrammarKind.STRUCTURAL_TAG, source=json.dumps({"format": part}))


def allowed(folder: Path, made: Grammar) -> list[str]:
    return [text for text in TEXTS if allows(folder, made, text)]


@pytest.mark.parametrize("make", [grammar, tagged])
@pytest.mark.parametrize(("schema", "more"), IDLE)
def test_what_says_nothing_changes_nothing(
    schema: dict[str, Any], more: dict[str, Any], make: Any, checkpoint: Path
) -> None:
    wanted = allowed(checkpoint, grammar(schema))
    assert wanted
    assert allowed(checkpoint, make(schema | more)) == wanted


@pytest.mark.parametrize("place", ["properties", "items", "anyOf", "$defs"])
def test_it_is_found_wherever_a_schema_stands(place: str, checkpoint: Path) -> None:
    inner = ITEMS | {"uniqueItems": False}
    outer: dict[str, Any] = {
        "properties": {"type": "object", "properties": {"not": inner}, "required": ["not"]},
        "items": {"type": "array", "items": inner, "minItems": 1, "maxItems": 1},
        "anyOf": {"anyOf": [inner, {"type": "null"}]},
        "$defs": {"$ref": "#/$defs/uniqueItems", "$defs": {"uniqueItems": inner}},
    }[place]
    text = {"properties": '{"not": [1, 1]}', "items": "[[1, 1]]", "anyOf": "[1, 1]", "$defs": "[1, 1]"}[place]
    assert allows(checkpoint, grammar(outer), text)
    assert not allows(checkpoint, grammar(outer), text.replace("1", '"x"'))


def test_values_and_names_are_no_keywords(checkpoint: Path) -> None:
    value = {"uniqueItems": False, "not": False, "format": "password"}
    assert allows(checkpoint, grammar({"const": value}), json.dumps(value))
    assert not allows(checkpoint, grammar({"const": value}), "{}")
    assert allows(checkpoint, grammar({"enum": [value]}), json.dumps(value))
    named = {"type": "object", "properties": {"uniqueItems": {"const": False}}, "additionalProperties": False}
    assert allows(checkpoint, grammar(named), '{"uniqueItems": false}')
    assert not allows(checkpoint, grammar(named), '{"uniqueItems": true}')


@pytest.mark.parametrize(
    ("schema", "keyword"),
    [
        (ITEMS | {"uniqueItems": True}, "uniqueItems"),
        (ITEMS | {"contains": {}}, "contains"),
        (ITEMS | {"unevaluatedItems": False}, "unevaluatedItems"),
        (OBJECT | {"propertyNames": {"pattern": "^a"}}, "propertyNames"),
        (OBJECT | {"propertyNames": {"type": "string", "maxLength": 3}}, "propertyNames"),
        (OBJECT | {"unevaluatedProperties": False}, "unevaluatedProperties"),
        (OBJECT | {"dependentRequired": {"a": ["b"]}}, "dependentRequired"),
        (TEXT | {"not": {}}, "not"),
        (TEXT | {"if": {"const": "x"}, "then": False}, "then"),
        (TEXT | {"if": {"const": "x"}, "else": {"maxLength": 3}}, "else"),
        (TEXT | {"format": "uri-reference"}, "uri-reference"),
        (TEXT | {"minLength": 1.5}, "minLength"),
    ],
)
def test_what_says_something_is_refused_by_name(schema: dict[str, Any], keyword: str, checkpoint: Path) -> None:
    with pytest.raises(InvalidRequestError, match=keyword):
        compile_grammar(grammar(schema), vocabulary(checkpoint))
