"""Calls as grammars: what a family writes is allowed, in the order of the schema, and nothing else is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import grammar_support
import parser_support
import pytest
from grammar_support import WAYS, write_tokenizer
from parser_support import goldens, parse, plan

from common.text.parsers import CALL_PARSERS, REASONING_PARSERS, Around, Start, answer_or_calls, required, strict
from common.text.parsers.constraint import Part
from common.types import Grammar, GrammarKind

TOOLS = parser_support.tools()
STRICT = [{"type": "function", "function": TOOLS[0]["function"] | {"strict": True}}, TOOLS[1]]
MARKED = sorted({golden["family"] for golden in goldens()} - {"llama3_json", "llama4_pythonic"})
FULL: dict[str, Any] = {"city": "Zürich <b>", "unit": "celsius", "days": 3}
NO_UNIT = {"city": "007"}


@pytest.fixture(scope="module", params=WAYS, ids=lambda way: f"marks are {way}")
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    marks = {mark for name in MARKED for mark in CALL_PARSERS[name].marks if "DSML" not in mark}
    return write_tokenizer(tmp_path_factory.mktemp("marks"), [*sorted(marks), "｜DSML｜", "</think>"], request.param)


def allows(folder: Path, part: Part, text: str) -> bool:
    """Whether the text may be a whole answer."""
    grammar = Grammar(kind=GrammarKind.STRUCTURAL_TAG, source=json.dumps(part), param="tools")
    return grammar_support.allows(folder, grammar, text)


def written(family: str, *calls: tuple[str, dict[str, Any]]) -> str:
    """Calls as the family writes them, by its `CallSyntax`."""
    syntax, texts = CALL_PARSERS[family].syntax, []
    for number, (name, arguments) in enumerate(calls):
        inner = json.dumps(arguments, ensure_ascii=False)
        if field := syntax.field:
            inner = ""
            for key, value in arguments.items():
                begin = field.begin.replace("TYPED", "true" if isinstance(value, str) else "false").replace("KEY", key)
                inner += begin + (value if isinstance(value, str) else json.dumps(value)) + field.end
        inner = f"{number}{syntax.numbered}{inner}" if syntax.numbered else inner
        texts.append(syntax.begin.replace("NAME", name) + inner + syntax.end)
    return syntax.opens + syntax.separator.join(texts) + syntax.closes


def demanded(family: str, *, single: bool = False, start: Start = Start.MAYBE, thinks: bool = True) -> Part:
    reasoning = REASONING_PARSERS["think"] if thinks else None
    return required(CALL_PARSERS[family].syntax, TOOLS, Around(single, reasoning, start))


@pytest.mark.parametrize("family", [*MARKED, "llama3_json"])
def test_what_is_written_is_read(family: str) -> None:
    answer = parse(plan(family), written(family, ("get_weather", FULL), ("get_time", {})))
    assert answer.content == ""
    assert [(name, json.loads(arguments)) for _, name, arguments in answer.calls] == [
        ("get_weather", FULL),
        ("get_time", {}),
    ]


@pytest.mark.parametrize("family", [*MARKED, "llama3_json"])
def test_demanded_calls(family: str, checkpoint: Path) -> None:
    part = demanded(family, thinks=False)
    for calls in ([("get_weather", FULL)], [("get_weather", NO_UNIT)], [("get_time", {}), ("get_weather", FULL)]):
        assert allows(checkpoint, part, written(family, *calls)), calls
    assert allows(checkpoint, part, "\n" + written(family, ("get_time", {})))
    refused = [("launch", {}), ("get_weather", {}), ("get_weather", FULL | {"unit": "kelvin"})]
    refused += [("get_weather", FULL | {"days": 1.5})]
    for call in refused:
        assert not allows(checkpoint, part, written(family, call)), call
    assert not allows(checkpoint, part, "Hello.")
    assert not allows(checkpoint, part, "")
    one = demanded(family, single=True, thinks=False)
    assert allows(checkpoint, one, written(family, ("get_time", {})))
    assert not allows(checkpoint, one, written(family, ("get_time", {}), ("get_time", {})))


@pytest.mark.parametrize("family", MARKED)
def test_reasoning_is_free_before_demanded_calls(family: str, checkpoint: Path) -> None:
    call = written(family, ("get_time", {}))
    thought = "Hm, 你好 { < }\n"
    maybe, opened, closed = (demanded(family, start=start) for start in (Start.MAYBE, Start.OPEN, Start.CLOSED))
    assert allows(checkpoint, maybe, call)
    assert allows(checkpoint, maybe, f"<think>{thought}</think>\n\n{call}")
    assert not allows(checkpoint, maybe, f"{thought}</think>{call}")
    assert allows(checkpoint, opened, f"{thought}</think>{call}")
    assert not allows(checkpoint, opened, call)
    assert allows(checkpoint, closed, call)
    assert not allows(checkpoint, closed, f"<think>{thought}</think>{call}")


@pytest.mark.parametrize("family", MARKED)
def test_calls_in_the_place_of_a_formed_answer(family: str, checkpoint: Path) -> None:
    schema = {"type": "object", "properties": {"sum": {"type": "integer"}}, "required": ["sum"]}
    syntax, reasoning = CALL_PARSERS[family].syntax, REASONING_PARSERS["think"]
    part = answer_or_calls(schema, syntax, TOOLS, Around(False, reasoning, Start.MAYBE))
    assert allows(checkpoint, part, '{"sum": 3}')
    assert allows(checkpoint, part, '<think>Hm</think>\n{"sum": 3}')
    assert allows(checkpoint, part, written(family, ("get_time", {})))
    assert not allows(checkpoint, part, '{"sum": "3"}')
    assert not allows(checkpoint, part, "3")


@pytest.mark.parametrize("family", MARKED)
def test_strict_functions_within_free_text(family: str, checkpoint: Path) -> None:
    syntax = CALL_PARSERS[family].syntax
    part = strict(syntax, STRICT, Around(False, None, Start.MAYBE))
    assert allows(checkpoint, part, "Hello, 5 < 6.")
    assert allows(checkpoint, part, "I look.\n" + written(family, ("get_weather", NO_UNIT)))
    assert allows(checkpoint, part, written(family, ("get_time", {})))
    assert not allows(checkpoint, part, written(family, ("get_weather", {})))
    assert not allows(checkpoint, part, written(family, ("launch", {})))
    reasoning = REASONING_PARSERS["think"]
    part = strict(syntax, STRICT, Around(True, reasoning, Start.MAYBE))
    assert allows(checkpoint, part, "<think>Hm.</think>So.\n" + written(family, ("get_weather", NO_UNIT)))


@pytest.mark.parametrize("family", [name for name in MARKED if CALL_PARSERS[name].syntax.field is not None])
def test_a_parameter_may_be_named_as_a_placeholder_is(family: str, checkpoint: Path) -> None:
    arguments = {"TYPED": "a", "KEY": 1, "NAME": "b"}
    properties = {"TYPED": {"type": "string"}, "KEY": {"type": "integer"}, "NAME": {"type": "string"}}
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    tool = {"type": "function", "function": {"name": "TYPED_KEY", "parameters": schema}}
    part = required(CALL_PARSERS[family].syntax, [tool], Around(True, None, Start.CLOSED))
    assert allows(checkpoint, part, written(family, ("TYPED_KEY", arguments)))
