"""From a client's grammar to the text that llguidance compiles.

JSON is written as most models write it: spaces and newlines may stand between its parts, a few at a time, since a model
that may write them without end sometimes does. A schema's own `x-guidance` object has the last word on such options.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from llguidance import LLMatcher, regex_to_lark
from llguidance.gbnf_to_lark import any_to_lark

from common.engine.structured_schema import without_idle_keywords
from common.engine.structured_tags import literal, quoted, tags_to_lark
from common.types import Grammar, GrammarKind

_ASCII = "dw"  # \d and \w as in JSON schemas
MAX_REFS = 2000  # a chain of them is followed by recursion
JSON_OPTIONS: Any = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,16}"}


def compilable(grammar: Grammar, specials: Mapping[str, int]) -> str:
    """`ValueError` says what is wrong. `specials`: the model's special tokens by their text."""
    body = _body(grammar, specials)
    if not grammar.skip_close:
        return body
    opening = literal(grammar.skip_open, specials) if grammar.skip_open else ""
    closing = literal(grammar.skip_close, specials)
    skipped = f"({opening} skipped)?" if opening else "skipped"
    lazy = "" if "<[" in closing else "[lazy]"
    lark = f"start: {skipped} SPACE @body\nskipped{lazy}: TEXT {closing}\nTEXT: /(.|\\n)*/\nSPACE: /[ \\n]{{0,8}}/\n"
    return json.dumps({"grammars": [{"name": "skip", "lark_grammar": lark}, {"name": "body", **_content(body)}]})


def _content(body: str) -> dict[str, Any]:
    """One grammar as part of several."""
    if not body.startswith("{"):
        return {"lark_grammar": body}
    (only,) = json.loads(body)["grammars"]
    return {field: only[field] for field in ("json_schema", "lark_grammar") if only.get(field) is not None}


def _body(grammar: Grammar, specials: Mapping[str, int]) -> str:
    source = grammar.source
    if grammar.kind in (GrammarKind.JSON_SCHEMA, GrammarKind.STRUCTURAL_TAG, GrammarKind.GRAMMAR):
        refs = source.count("$ref")
        if refs > MAX_REFS:
            raise ValueError(f"has {refs} references; the limit is {MAX_REFS}")
    match grammar.kind:
        case GrammarKind.JSON_OBJECT:
            return LLMatcher.grammar_from_json_schema({"type": "object"}, JSON_OPTIONS)
        case GrammarKind.JSON_SCHEMA:
            schema = json.loads(source)
            return LLMatcher.grammar_from_json_schema(_object(schema), JSON_OPTIONS)
        case GrammarKind.REGEX:
            return LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(_unanchored(source), _ASCII)}/")
        case GrammarKind.CHOICE:
            options = dict.fromkeys(json.loads(source))
            return LLMatcher.grammar_from_lark("start: " + " | ".join(map(quoted, options)))
        case GrammarKind.GRAMMAR:
            return LLMatcher.grammar_from_lark(any_to_lark(source))
        case GrammarKind.STRUCTURAL_TAG:
            return LLMatcher.grammar_from_lark(tags_to_lark(json.loads(source), JSON_OPTIONS, specials))


def _object(schema: dict[str, Any] | bool) -> Any:
    if schema is False:
        raise ValueError("the schema is false: it allows nothing")
    return {} if schema is True else without_idle_keywords(schema)


def _unanchored(regex: str) -> str:
    """The whole answer is matched, so an anchor at either end says nothing more."""
    regex = regex.removeprefix("^")
    ends = regex.endswith("$") and (len(regex) - len(regex[:-1].rstrip("\\"))) % 2 == 1
    return regex[:-1] if ends else regex
