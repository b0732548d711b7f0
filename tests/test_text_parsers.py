"""Calls and reasoning by family: the conformance suite, and what holds for texts that nobody wrote down."""

from __future__ import annotations

import json
import random
import re
from typing import Any, get_args

import parser_support
import pytest
from parser_support import Answer, cut, expected, goldens, parse, parser, plan

from common.config.schema import ReasoningParser, ToolCallParser
from common.errors import ConfigError
from common.text.parsers import CALL_PARSERS, REASONING_PARSERS, ParserPlan, Start, Tools, call_format
from common.text.parsers.arguments import ANY, to_json
from common.text.parsers.llama import ARRAY

FAMILIES = sorted({golden["family"] for golden in goldens()})


@pytest.mark.parametrize("golden", goldens(), ids=lambda golden: f"{golden['family']}: {golden['name']}")
def test_streamed_is_whole_is_golden(golden: dict[str, Any]) -> None:
    text, made, want = golden["text"], plan(golden["family"], golden["start"]), expected(golden)
    assert parse(made, [text]) == want
    assert parse(made, text) == want  # character by character
    for at in range(1, len(text)):
        assert parse(made, [text[:at], text[at:]]) == want, at
    rng = random.Random()
    for _ in range(20):
        pieces = cut(text, rng)
        assert parse(made, pieces) == want, pieces
    if not golden.get("cut"):
        assert all(isinstance(json.loads(arguments), dict) for _, _, arguments in want.calls)


@pytest.mark.parametrize("golden", goldens(), ids=lambda golden: f"{golden['family']}: {golden['name']}")
def test_a_text_may_end_anywhere(golden: dict[str, Any]) -> None:
    """Nothing that was streamed is taken back, calls before a cut are whole, and no half mark is in the cut one."""
    text, made, want = golden["text"], plan(golden["family"], golden["start"]), expected(golden)
    reader, so_far = parser(made), Answer()
    for at, char in enumerate(text):
        so_far.add(reader.push(char))
        assert so_far.begins(want), text[: at + 1]
        ended = parse(made, [text[: at + 1]])
        assert so_far.begins(ended), text[: at + 1]
        assert ended.calls[:-1] == want.calls[: max(len(ended.calls) - 1, 0)], text[: at + 1]
        assert not any(mark in call[2] for call in ended.calls for mark in ("</", "<｜") if mark not in str(want.calls))


def test_every_parser_has_goldens() -> None:
    aliases = {
        "qwen3": "hermes",
        "qwen3_xml": "qwen3_coder",
        "llama4_json": "llama3_json",
        "pythonic": "llama4_pythonic",
    }
    assert {aliases.get(name, name) for name in CALL_PARSERS} == set(FAMILIES)
    for alias, name in aliases.items():
        assert CALL_PARSERS[alias] is CALL_PARSERS[name]


FURTHER_KEY = re.compile(r'["}\]]\s*,?\s*"\w+"\s*:')
ARGUMENTS = re.compile(r'"(arguments|parameters)"\s*:')


def fragments(family: str) -> list[str]:
    """Marks of the family, what stands between them, and words."""
    texts = [golden["text"] for golden in goldens() if golden["family"] == family]
    found = [part for text in texts for part in re.findall(r"<[^<>]{1,60}>|[^<>]{1,20}|.", text, re.DOTALL)]
    return sorted({*found, '{"name": "get_time", ', '"arguments": {', "}", "}}", '"', "[", "\\", "get_time", "\n", " "})


@pytest.mark.parametrize("family", FAMILIES)
def test_any_text_streams_as_it_parses_whole(family: str) -> None:
    """Broken in every way: no exception, and no word of it is lost, but those of further keys in a call's object and
    of arguments that it gives anew.
    """
    seed = random.randrange(2**32)
    rng, parts = random.Random(seed), fragments(family)
    for _ in range(400):
        words = [f"w{i}w" for i in range(rng.randint(1, 6))]
        text = "".join(w + "".join(rng.choices(parts, k=rng.randint(0, 6))) for w in ["", *words])
        made = plan(family, rng.choice(("maybe", "open", "closed")))
        whole = parse(made, [text])
        assert parse(made, cut(text, rng)) == parse(made, text) == whole, (seed, text)
        shown = whole.content + whole.reasoning + "".join(part for call in whole.calls for part in call)
        lost = [word for word in words if word not in shown and f'"{word}' not in text]
        for word in lost:
            before, _, after = text.partition(word)
            assert FURTHER_KEY.search(before) or (ARGUMENTS.search(before) and ARGUMENTS.search(after)), (seed, text)


@pytest.mark.parametrize("calls", [None, CALL_PARSERS["hermes"]])
def test_an_indent_that_is_no_ascii_is_text(calls: Any) -> None:
    indent = "\u3000\u3000"
    made = ParserPlan(calls=calls, reasoning=REASONING_PARSERS["think"], start=Start.OPEN)
    for pieces in (
        [f"why\n</think>\n\n{indent}First.\n{indent}Second.\xa0"],
        f"why</think>{indent}First.\n{indent}Second.\xa0",
    ):
        assert parse(made, pieces) == Answer(f"{indent}First.\n{indent}Second.\xa0", "why")


def test_reasoning_may_stay_or_be_hidden() -> None:
    text = '<think>\nWhy?\n</think>\n\nSo.\n<tool_call>\n{"name": "get_time"}\n</tool_call>'
    calls = [[parser_support.MADE_ID, "get_time", "{}"]]
    assert parse(plan("hermes", hidden=True), text) == Answer("So.", "", calls)
    assert parse(plan("hermes", inline=True), text) == Answer("<think>\nWhy?\n</think>\n\nSo.", "", calls)
    assert parse(plan("hermes", "open", inline=True), "\nWhy?</think> So.") == Answer("\nWhy?</think> So.")


def test_a_parser_that_has_nothing_left_to_find_says_so() -> None:
    reader = parser(ParserPlan(reasoning=REASONING_PARSERS["think"]))
    assert not reader.spent
    reader.push("<think>hm</think>\n\n")
    assert not reader.spent
    assert reader.push("So").content == "So"
    assert reader.spent
    assert reader.push(" <think>").content == " <think>"


def test_unmarked_reasoning() -> None:
    form = REASONING_PARSERS["deepseek_r1"]
    assert form.start("user: hi") is Start.OPEN
    assert form.start("<think>\n\n</think>\n\n") is Start.CLOSED
    assert REASONING_PARSERS["qwen3"].start("user: say <think> please") is Start.MAYBE
    assert form.continued("<think>I w") is Start.OPEN
    assert form.continued("The ans") is Start.CLOSED


def test_one_call_at_most() -> None:
    reader, answer = parser(plan("hermes", max_calls=1)), Answer()
    call = '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'
    answer.add(reader.push(call[:-14]))
    answer.add(reader.push(call[-14:]))
    assert reader.full
    answer.add(reader.push("\n" + call))
    answer.add(reader.finish())
    assert len(answer.calls) == reader.num_calls == 1


def test_an_array_of_calls() -> None:
    array = ParserPlan(ARRAY, Tools(parser_support.tools()))
    text = '[{"name": "get_time", "parameters": {}}, {"name": "get_weather", "parameters": {"city": "]"}}]'
    assert [call[1:] for call in parse(array, text).calls] == [["get_time", "{}"], ["get_weather", '{"city": "]"}']]


def types(schema: dict[str, Any], **root: Any) -> set[str]:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": schema}, **root}}}
    return set(Tools([tool]).types("f", "x"))


def test_types_of_a_schema() -> None:
    assert types({"type": "integer"}) == {"integer"}
    assert types({"type": "number"}) == {"integer", "number"}
    assert types({"type": ["string", "null"]}) == {"string", "null"}
    assert types({"anyOf": [{"type": "boolean"}, {"type": "null"}]}) == {"boolean", "null"}
    assert types({"enum": [1, "a"]}) == {"integer", "string"}
    assert types({"const": True}) == {"boolean"}
    assert types({"$ref": "#/$defs/a"}, **{"$defs": {"a": {"allOf": [{"type": "array"}, {}]}}}) == {"array"}
    assert types({"$ref": "#/properties/x"}) == ANY  # it never ends
    assert types({"anyOf": [{"$ref": "#/properties/x"}] * 50}) == ANY
    for nonsense in ({}, {"type": 5}, {"type": {}}, {"enum": 3}, {"anyOf": "x"}, {"allOf": 3}, {"$ref": "x/y"}):
        assert types(nonsense) == ANY, nonsense
    assert Tools().types("g", "y") == ANY


@pytest.mark.parametrize(
    ("text", "allowed", "json_text"),
    [
        ("12345678901234567890", {"integer"}, "12345678901234567890"),
        ("1.50", {"number"}, "1.50"),
        ("1e5", {"number"}, "1e5"),
        ("5.0", {"integer"}, "5"),
        ("TRUE", {"boolean"}, "true"),
        ("True", {"boolean", "string"}, "true"),
        ("TRUE", {"boolean", "string"}, '"TRUE"'),
        ("NaN", {"number"}, '"NaN"'),
        ("[NaN]", {"array"}, '"[NaN]"'),
        ("{'a': (1, -2.5, None)}", {"object"}, '{"a": [1, -2.5, null]}'),
        ("{1: 2}", {"object"}, '"{1: 2}"'),
        ("[" * 100_000, {"array"}, json.dumps("[" * 100_000)),
        ("[__import__('os')]", {"array"}, "\"[__import__('os')]\""),
        ('"quoted"', {"string", "null"}, '"quoted"'),
        ('"quoted"', {"string"}, '"\\"quoted\\""'),
        (" 5 ", {"string"}, '" 5 "'),
        ("9" * 5000, {"integer"}, "9" * 5000),
    ],
)
def test_arguments_have_the_types_of_the_schema(text: str, allowed: set[str], json_text: str) -> None:
    assert to_json(text, frozenset(allowed)) == json_text


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{{ '<|tool_calls_section_begin|><|tool_call_begin|>' }}", "kimi_k2"),
        ("<｜DSML｜tool_calls", "deepseek_v4"),
        ("<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>", "deepseek_v31"),
        ("<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json", "deepseek_v3"),
        ("｜DSML｜function_calls", "deepseek_v32"),
        ("<tool_call>{function-name}\n<arg_key>", "glm45"),
        ("<tool_call>{function-name}<arg_key>", "glm47"),
        ("<tool_call>\n<function=example>", "qwen3_coder"),
        ('<tool_call>\n{"name": <function-name>', "hermes"),
        ("<|python_tag|>", "llama3_json"),
        ("{{ messages }}", "none"),
    ],
)
def test_templates_show_the_family(template: str, name: str) -> None:
    assert call_format("auto", template, "") is call_format(name, "", "")


def test_families_without_a_template_and_wrong_names() -> None:
    assert call_format("auto", "", "deepseek_v32") is CALL_PARSERS["deepseek_v32"]
    with pytest.raises(ConfigError, match="tool_call_parser must be auto, none or one of hermes"):
        call_format("hermess", "", "")


def test_settings_name_every_parser() -> None:
    assert set(get_args(ToolCallParser)) == {"auto", "none", *CALL_PARSERS}
    assert set(get_args(ReasoningParser)) == {"auto", "none", *REASONING_PARSERS}
