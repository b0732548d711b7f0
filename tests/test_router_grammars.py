"""Bodies that say what an answer has to look like, and what is sent to workers for them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from common.errors import InvalidRequestError
from common.text.parsers.reasoning import THINK, Start
from common.types import MAX_SOURCE_BYTES, Grammar, GrammarKind
from services.router.grammars import behind_reasoning, grammar_of
from services.router.schemas import ChatBody, CompletionBody

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
TAG = {"triggers": ["<f"], "structures": [{"begin": "<f>", "schema": {}, "end": "</f>"}]}
PART = {"format": {"type": "const_string", "value": "x"}}


def found(body: dict[str, Any]) -> Grammar | None:
    chat = grammar_of(ChatBody.model_validate_json(json.dumps({"messages": [{"role": "user"}], **body})))
    assert grammar_of(CompletionBody.model_validate_json(json.dumps({"prompt": "x", **body}))) == chat
    return chat


@pytest.mark.parametrize(
    ("body", "kind", "source", "param"),
    [
        ({"response_format": {"type": "json_object"}}, GrammarKind.JSON_OBJECT, None, "response_format"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "strict": True, "schema": SCHEMA},
                }
            },
            GrammarKind.JSON_SCHEMA,
            SCHEMA,
            "response_format",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            GrammarKind.JSON_OBJECT,
            None,
            "response_format",
        ),
        ({"response_format": {"type": "structural_tag", **TAG}}, GrammarKind.STRUCTURAL_TAG, TAG, "response_format"),
        (
            {"response_format": {"type": "structural_tag", **PART}},
            GrammarKind.STRUCTURAL_TAG,
            PART,
            "response_format",
        ),
        ({"guided_json": SCHEMA}, GrammarKind.JSON_SCHEMA, SCHEMA, "guided_json"),
        ({"guided_json": json.dumps(SCHEMA)}, GrammarKind.JSON_SCHEMA, SCHEMA, "guided_json"),
        (
            {"guided_json": SCHEMA, "guided_whitespace_pattern": " ?", "guided_decoding_backend": "auto"},
            GrammarKind.JSON_SCHEMA,
            {**SCHEMA, "x-guidance": {"whitespace_pattern": " ?"}},
            "guided_json",
        ),
        (
            {"structured_outputs": {"json": {"x-guidance": {"lenient": True}}, "disable_any_whitespace": True}},
            GrammarKind.JSON_SCHEMA,
            {"x-guidance": {"lenient": True, "whitespace_flexible": False}},
            "structured_outputs.json",
        ),
        ({"guided_choice": ["ja", "nein"]}, GrammarKind.CHOICE, ["ja", "nein"], "guided_choice"),
        ({"structured_outputs": {"json": SCHEMA}}, GrammarKind.JSON_SCHEMA, SCHEMA, "structured_outputs.json"),
        ({"structured_outputs": {"choice": ["a"]}}, GrammarKind.CHOICE, ["a"], "structured_outputs.choice"),
        (
            {"structured_outputs": {"json_object": True, "disable_any_whitespace": True}},
            GrammarKind.JSON_SCHEMA,
            {"type": "object", "x-guidance": {"whitespace_flexible": False}},
            "structured_outputs.json_object",
        ),
        (
            {"structured_outputs": {"structural_tag": json.dumps(TAG)}},
            GrammarKind.STRUCTURAL_TAG,
            TAG,
            "structured_outputs.structural_tag",
        ),
    ],
)
def test_json_of_all_kinds(body: dict[str, Any], kind: GrammarKind, source: Any, param: str) -> None:
    grammar = found(body)
    assert grammar is not None
    assert (grammar.kind, grammar.param) == (kind, param)
    assert (json.loads(grammar.source) if grammar.source else None) == source


@pytest.mark.parametrize(
    ("body", "kind", "param"),
    [
        ({"guided_regex": "a+"}, GrammarKind.REGEX, "guided_regex"),
        ({"structured_outputs": {"regex": "a+"}}, GrammarKind.REGEX, "structured_outputs.regex"),
        ({"regex": "a+"}, GrammarKind.REGEX, "regex"),
        ({"ebnf": "a+"}, GrammarKind.GRAMMAR, "ebnf"),
        ({"guided_grammar": "a+"}, GrammarKind.GRAMMAR, "guided_grammar"),
        ({"structured_outputs": {"grammar": "a+"}}, GrammarKind.GRAMMAR, "structured_outputs.grammar"),
    ],
)
def test_texts_of_all_kinds(body: dict[str, Any], kind: GrammarKind, param: str) -> None:
    assert found(body) == Grammar(kind=kind, source="a+", param=param)


def test_nothing_is_asked_for() -> None:
    for body in ({}, {"response_format": {"type": "text"}}, {"structured_outputs": {}}, {"response_format": None}):
        assert found(body) is None


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": ""}, "guided_json"),
        ({"guided_json": '"x"'}, "guided_json"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_regex": "a" * (MAX_SOURCE_BYTES + 1)}, "guided_regex"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice"),
        (
            {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
            "structured_outputs.regex",
        ),
        ({"structured_outputs": {"json": "[", "disable_any_whitespace": True}}, "structured_outputs.json"),
        ({"structured_outputs": {"structural_tag": "[1]"}}, "structured_outputs.structural_tag"),
    ],
)
def test_bad_ones_name_their_field(body: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        found(body)
    assert caught.value.param == param


def test_reasoning_comes_before_what_is_asked_for() -> None:
    grammar = Grammar(kind=GrammarKind.REGEX, source="a")
    assert behind_reasoning(grammar, None, Start.OPEN) == grammar
    assert behind_reasoning(grammar, THINK, Start.CLOSED) == grammar
    assert behind_reasoning(None, THINK, Start.OPEN) is None
    opened, maybe = (behind_reasoning(grammar, THINK, start) for start in (Start.OPEN, Start.MAYBE))
    assert opened is not None
    assert (opened.skip_open, opened.skip_close) == ("", "</think>")
    assert maybe is not None
    assert (maybe.skip_open, maybe.skip_close) == ("<think>", "</think>")
