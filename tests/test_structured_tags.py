"""Structural tags, reasoning before an answer, and tokenizers, without an engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import text_support
from grammar_support import WAYS, allows, vocabulary, write_tokenizer

from common.engine.constraint import Vocabulary, compile_grammar
from common.errors import InvalidRequestError, UnsupportedError
from common.types import Grammar, GrammarKind

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
OLD = {
    "structures": [
        {"begin": "<f=one>", "schema": SCHEMA, "end": "</f>"},
        {"begin": "<f=two>", "schema": {"type": "array"}, "end": "</f>"},
    ],
    "triggers": ["<f="],
}


def tag(begin: str, content: dict[str, Any], *ends: str) -> dict[str, Any]:
    return {"type": "tag", "begin": begin, "content": content, "end": list(ends) if len(ends) > 1 else ends[0]}


JSON_PART = {"type": "json_schema", "json_schema": SCHEMA}
REGEX_PART = {"type": "regex", "pattern": r"a/b+\d"}
TEXT_PART = {"type": "any_text"}


@pytest.fixture(scope="module", params=WAYS, ids=lambda way: f"marks are {way}")
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    marks = ("<think>", "</think>", "<call>", "</call>")
    return write_tokenizer(tmp_path_factory.mktemp("tags"), marks, request.param)


def tags(source: dict[str, Any]) -> Grammar:
    return Grammar(kind=GrammarKind.STRUCTURAL_TAG, source=json.dumps(source))


TRIGGERED = {
    "type": "triggered_tags",
    "triggers": ["<call>"],
    "tags": [tag("<call>one ", JSON_PART, "</call>"), tag("<call>two ", REGEX_PART, "</call>", "<end>")],
}
SEPARATED = {
    "type": "tags_with_separator",
    "separator": "\n",
    "tags": [tag("<call>", REGEX_PART, "</call>")],
}
ONE, TWO = '<call>one {"a": 1}</call>', "<call>two a/bb7<end>"
WHOLE: list[tuple[dict[str, Any], list[str], list[str]]] = [
    (
        OLD,
        ["", "hi <b> there", 'x <f=one>{"a": 3}</f> y<f=two>[1]</f>z'],
        ["<f=three>", '<f=one>{"b": 3}</f>', "<f=one>"],
    ),
    ({"format": TRIGGERED}, ["", "hello", f"a{ONE}b{TWO}c", TWO], ["<call>", "<call>three", f"x{ONE[:-1]}"]),
    ({"format": TRIGGERED | {"at_least_one": True}}, [ONE, f"a {TWO} b"], ["", "hello"]),
    ({"format": TRIGGERED | {"stop_after_first": True}}, [f"a{ONE}", "hello"], [ONE + TWO, f"{ONE} b"]),
    (
        {"format": SEPARATED | {"at_least_one": True}},
        ["<call>a/b1</call>", "<call>a/b1</call>\n<call>a/bb2</call>"],
        ["", "<call>a/b1</call><call>a/b1</call>", "<call>a/b1</call>\n"],
    ),
    ({"format": SEPARATED}, ["", "<call>a/b1</call>"], ["x"]),
    (
        {"format": SEPARATED | {"stop_after_first": True}},
        ["<call>a/b1</call>"],
        ["<call>a/b1</call>\n<call>a/b1</call>"],
    ),
    (
        {"format": {"type": "sequence", "elements": [tag("<think>", TEXT_PART, "</think>"), JSON_PART]}},
        ['<think>hm\n< </think>{"a": 1}'],
        ['{"a": 1}', '<think>{"a": 1}'],
    ),
    (
        {"format": {"type": "or", "elements": [{"type": "const_string", "value": 'say "hi"\n'}, REGEX_PART]}},
        ['say "hi"\n', "a/b0"],
        ["say", "a/b"],
    ),
    ({"format": {"type": "const_string", "value": "a\x00\x7f\x85b"}}, ["a\x00\x7f\x85b"], ["ab"]),
]


@pytest.mark.parametrize(("source", "good", "bad"), WHOLE)
def test_tags(source: dict[str, Any], good: list[str], bad: list[str], checkpoint: Path) -> None:
    assert [text for text in good if not allows(checkpoint, tags(source), text)] == []
    assert [text for text in bad if allows(checkpoint, tags(source), text)] == []


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ({}, "structures"),
        ({"structures": [{"begin": "x"}], "triggers": ["x"]}, "schema"),
        ({"structures": [{"begin": "x", "schema": {}}], "triggers": ["y"]}, "no trigger"),
        ({"structures": [{"begin": "x", "schema": 5}], "triggers": ["x"]}, "object"),
        ({"structures": [{"begin": "x", "schema": {"x-guidance": 5}}], "triggers": ["x"]}, "x-guidance"),
        ({"format": 3}, "type"),
        ({"format": {"type": "tag", "begin": 1, "content": TEXT_PART, "end": ""}}, "begin"),
        ({"format": {"type": "sequence", "elements": []}}, "elements"),
        ({"format": {"type": "tags_with_separator", "tags": [TEXT_PART], "separator": ","}}, "tag"),
        ({"format": {"type": "regex", "pattern": "("}}, "unclosed"),
    ],
)
def test_what_is_no_tag_says_so(source: dict[str, Any], reason: str, checkpoint: Path) -> None:
    with pytest.raises(InvalidRequestError, match=reason):
        compile_grammar(tags(source), vocabulary(checkpoint))


@pytest.mark.parametrize(
    ("kind", "source", "answer", "other"),
    [
        (GrammarKind.JSON_SCHEMA, json.dumps(SCHEMA), '{"a": 1}', '{"b": 1}'),
        (GrammarKind.JSON_OBJECT, "", '{"b": []}', "[]"),
        (GrammarKind.REGEX, "a/b+", "a/bb", "a"),
        (GrammarKind.CHOICE, '["left", "right"]', "left", "up"),
        (GrammarKind.GRAMMAR, 'root ::= "x" [0-9]', "x7", "xx"),
        (GrammarKind.STRUCTURAL_TAG, json.dumps(OLD), 'x<f=one>{"a": 3}</f>', "<f=x"),
    ],
)
def test_reasoning_may_come_first(kind: GrammarKind, source: str, answer: str, other: str, checkpoint: Path) -> None:
    opened = Grammar(kind=kind, source=source, skip_close="</think>")
    assert allows(checkpoint, opened, f"so\n{{</think>\n\n{answer}")
    assert not allows(checkpoint, opened, f"so</think>{other}")
    if kind is not GrammarKind.STRUCTURAL_TAG:
        assert not allows(checkpoint, opened, answer)
    maybe = Grammar(kind=kind, source=source, skip_open="<think>", skip_close="</think>")
    assert allows(checkpoint, maybe, f"<think>so\n</think>\n\n{answer}")
    assert allows(checkpoint, maybe, answer)
    assert not allows(checkpoint, maybe, other)


def test_a_tokenizer_without_bytes_is_refused(tmp_path: Path) -> None:
    raw = text_support.word_piece()
    raw.save(str(tmp_path / "tokenizer.json"))
    words = Vocabulary(tmp_path, raw.get_vocab_size(), frozenset({2}))
    with pytest.raises(UnsupportedError, match="tokenizer of another kind"):
        compile_grammar(Grammar(kind=GrammarKind.JSON_OBJECT), words)


@pytest.mark.parametrize("make", [text_support.byte_level, text_support.byte_fallback])
@pytest.mark.parametrize("more", [-40, 0, 1000])
def test_a_vocabulary_may_be_larger_or_smaller_than_the_models(make: Any, more: int, tmp_path: Path) -> None:
    raw = make()
    raw.save(str(tmp_path / "tokenizer.json"))
    known = raw.get_vocab_size()
    words = Vocabulary(tmp_path, known + more, frozenset({2}))
    compile_grammar(Grammar(kind=GrammarKind.JSON_OBJECT), words)
    assert words.num_words == -(-max(known, known + more) // 32)
