"""Tools through the gateway: what workers are asked for, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from router_support import Cluster, say, tokenizer
from tools_support import (
    ASK,
    PARIS,
    TEXT,
    TOOLS,
    WITH_TOOLS,
    both,
    caller,
    cluster,
)

from common.types import GrammarKind

__all__ = ["caller"]


def tags(part: Any) -> list[dict[str, Any]]:
    """The tags of a structural tag that have a schema."""
    if isinstance(part, list):
        return [tag for one in part for tag in tags(one)]
    if not isinstance(part, dict):
        return []
    if part.get("type") == "tag" and part["content"]["type"] == "json_schema":
        return [part]
    return [tag for one in part.values() for tag in tags(one)]


async def asked(made: Cluster, **body: Any) -> dict[str, Any] | None:
    answer = await made.post("/v1/chat/completions", **body)
    assert answer.status_code == 200, answer.text
    grammar = made.worker.requests[-1].sampling.grammar
    if grammar is None:
        return None
    assert (grammar.kind, grammar.param) == (GrammarKind.STRUCTURAL_TAG, "tools")
    found: dict[str, Any] = json.loads(grammar.source)
    return found


async def test_calls_that_are_demanded_have_a_grammar(caller: Cluster) -> None:
    assert await asked(caller, **WITH_TOOLS) is None
    assert await asked(caller, **WITH_TOOLS, tool_choice="auto") is None
    wanted = tags(await asked(caller, **WITH_TOOLS, tool_choice="required"))
    assert [tag["begin"] for tag in wanted[: len(TOOLS)]] == [
        f'<tool_call>\n{{"name": "{tool["function"]["name"]}", "arguments": ' for tool in TOOLS
    ]
    schema = wanted[0]["content"]["json_schema"]
    assert TOOLS[0]["function"]["parameters"].items() <= schema.items()
    named = {"type": "function", "function": {"name": "get_time"}}
    wanted = tags(await asked(caller, **WITH_TOOLS, tool_choice=named))
    assert {tag["begin"] for tag in wanted} == {'<tool_call>\n{"name": "get_time", "arguments": '}
    allowed = {"mode": "required", "tools": [named]}
    await asked(caller, **WITH_TOOLS, tool_choice={"type": "allowed_tools", "allowed_tools": allowed})
    prompt = tokenizer().decode(caller.worker.requests[-1].prompt_token_ids)
    assert "get_time" in prompt
    assert "get_weather" not in prompt


async def test_finish_of_demanded_calls(caller: Cluster) -> None:
    _, finish = await both(caller, **WITH_TOOLS, tool_choice="required")
    assert finish == "tool_calls"
    named = {"type": "function", "function": {"name": "get_weather"}}
    answer, finish = await both(caller, **WITH_TOOLS, tool_choice=named)
    assert (len(answer.calls), finish) == (1, "stop")


async def test_strict_functions_have_a_grammar(caller: Cluster) -> None:
    one = {"type": "function", "function": TOOLS[0]["function"] | {"strict": True}}
    part = await asked(caller, **ASK, tools=[one, TOOLS[1]])
    assert "triggered_tags" in json.dumps(part)
    schemas = [tag["content"]["json_schema"] for tag in tags(part)[:2]]
    assert schemas == [one["function"]["parameters"], {"type": "object"}]
    assert await asked(caller, **ASK, tools=[one], tool_choice="none") is None


async def test_a_formed_answer_with_tools(caller: Cluster) -> None:
    schema = {"type": "object", "properties": {"sum": {"type": "integer"}}}
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema, "strict": True}}
    answer = await caller.post("/v1/chat/completions", **WITH_TOOLS, response_format=form)
    assert answer.status_code == 200, answer.text
    grammar = caller.worker.requests[-1].sampling.grammar
    assert grammar is not None
    assert (grammar.kind, grammar.param) == (GrammarKind.STRUCTURAL_TAG, "response_format")
    assert json.dumps(schema) in grammar.source
    assert "get_weather" in grammar.source
    refused = await caller.post("/v1/chat/completions", **WITH_TOOLS, response_format=form, tool_choice="required")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tool_choice")


async def test_demanded_calls_of_a_model_that_knows_none(tmp_path: Path) -> None:
    text = '[{"name": "get_time", "parameters": {}}, {"name": "get_weather", "parameters": {"city": "Paris"}}]'
    async with cluster(tmp_path, say(text)) as made:
        answer, finish = await both(made, **WITH_TOOLS, tool_choice="required")
        assert ([call[1:] for call in answer.calls], finish) == (
            [["get_time", "{}"], ["get_weather", PARIS]],
            "tool_calls",
        )
        assert tags(await asked(made, **WITH_TOOLS, tool_choice="required"))


async def test_parsers_are_settings(tmp_path: Path) -> None:
    settings = {"tool_call_parser": "hermes", "reasoning_parser": "none"}
    async with cluster(tmp_path, say(TEXT), **settings) as made:
        answer, _ = await both(made, **WITH_TOOLS)
    assert (answer.reasoning, len(answer.calls)) == ("", 2)
    assert answer.content.startswith("<think>")


# -- bodies ----------------------------------------------------------------------------------------------


def function(**fields: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": fields}]}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        (function(), "tools[0].function.name"),
        (function(name="no spaces"), "tools[0].function.name"),
        (function(name="f", parameters=[]), "tools[0].function.parameters"),
        (function(name="f", strict="yes"), "tools[0].function.strict"),
        ({"tools": TOOLS[1:2] * 1025}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
    ],
)
async def test_bad_tools_are_named(caller: Cluster, body: dict[str, Any], param: str) -> None:
    answer = await caller.post("/v1/chat/completions", **ASK, **body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert param in error["message"]


async def test_a_conversation_with_calls_and_results(caller: Cluster) -> None:
    async with caller.openai() as client:
        first: Any = await client.chat.completions.create(**WITH_TOOLS)
        messages = [
            *ASK["messages"],
            first.choices[0].message,
            {"role": "tool", "tool_call_id": first.choices[0].message.tool_calls[0].id, "content": "18 °C"},
            {"role": "tool", "tool_call_id": first.choices[0].message.tool_calls[1].id, "content": []},
        ]
        await client.chat.completions.create(**WITH_TOOLS | {"messages": messages})
    prompt = tokenizer().decode(caller.worker.requests[-1].prompt_token_ids, skip_special_tokens=False)
    assert '<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}</tool_call>' in prompt
    assert "<think>It wants 你好.</think>One moment 🙂." in prompt
    assert "<|im_start|>tool\n18 °C<|im_end|>\n<|im_start|>tool\n<|im_end|>" in prompt
