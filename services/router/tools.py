"""A chat body's tools, and how the answers are read: which calls are wanted, what is reasoning.

checked tools + tool_choice -> `ToolUse` -> a `ParserPlan` for the text, if there is anything to look for
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from common.errors import InvalidRequestError, UnsupportedError
from common.text.parsers import (
    ARRAY,
    NO_LIMIT,
    Around,
    CallFormat,
    ParserPlan,
    Start,
    Tools,
    answer_or_calls,
    required,
    strict,
)
from common.types import Grammar, GrammarKind, SamplingParams
from services.router.models import ModelText
from services.router.schemas import AllowedTools, ChatBody, NamedTool

MAX_TOOLS: Final = 1024
_NAME: Final = re.compile(r"[\w.:/-]{1,256}")
_PROMPT_END_TOKENS: Final = 16  # enough for a mark that is spelled out


class ToolUse(msgspec.Struct, frozen=True):
    """`shown`: what the template gets. `callable_tools`: what may be called; empty if nothing may be."""

    shown: list[dict[str, Any]] | None
    callable_tools: list[dict[str, Any]]
    required: bool = False
    named: str = ""


def tool_use(body: ChatBody) -> ToolUse:
    """Raises `InvalidRequestError` that names the place."""
    tools = body.tools or []
    _check(tools)
    choice = body.tool_choice
    empty = body.tools is not None and choice == "auto"  # of none at all
    if not tools and not empty and choice not in (None, "none"):
        raise InvalidRequestError("tool_choice is allowed with tools only", param="tool_choice")
    if not tools or choice == "none":
        return ToolUse(tools or None, [])
    if isinstance(choice, NamedTool):
        return ToolUse(tools, _of_names(tools, [choice.function.name], "tool_choice"), True, choice.function.name)
    if isinstance(choice, AllowedTools):
        allowed = choice.allowed_tools
        chosen = _of_names(tools, [tool.function.name for tool in allowed.tools], "tool_choice")
        return ToolUse(chosen, chosen, allowed.mode == "required")
    return ToolUse(tools, tools, choice == "required")


def _of_names(tools: list[dict[str, Any]], names: Sequence[str], param: str) -> list[dict[str, Any]]:
    known = {tool["function"]["name"] for tool in tools}
    for name in names:
        if name not in known:
            raise InvalidRequestError(f"{param} names the function {name[:80]!r}, which is not in tools", param=param)
    return [tool for tool in tools if tool["function"]["name"] in names]


def _check(tools: list[dict[str, Any]]) -> None:
    if len(tools) > MAX_TOOLS:
        raise InvalidRequestError(f"tools has {len(tools)} entries, at most {MAX_TOOLS} are allowed", param="tools")
    for i, tool in enumerate(tools):
        where = f"tools[{i}]"
        if tool.get("type") != "function":
            raise InvalidRequestError(f"{where}.type must be 'function'", param=f"{where}.type")
        function = tool.get("function")
        if not isinstance(function, Mapping):
            raise InvalidRequestError(f"{where}.function must be an object with a name", param=f"{where}.function")
        name = function.get("name")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise InvalidRequestError(
                f"{where}.function.name must be 1 to 256 letters, digits or any of _ . : / -",
                param=f"{where}.function.name",
            )
        for key, kind in (("parameters", Mapping), ("strict", bool), ("description", str)):
            if function.get(key) is not None and not isinstance(function[key], kind):
                raise InvalidRequestError(
                    f"{where}.function.{key} must be {_KINDS[key]}", param=f"{where}.function.{key}"
                )


_KINDS: Final = {"parameters": "a JSON schema: an object", "strict": "true or false", "description": "a string"}


def parser_plan(
    body: ChatBody, use: ToolUse, text: ModelText, prompt: Sequence[int], calls: CallFormat | None
) -> ParserPlan | None:
    """How the answers are read; None if they are content as they are. `calls`: the format of calls to look for."""
    reasoning = text.reasoning
    inline = not body.separate_reasoning
    if calls is None and (reasoning is None or inline):
        return None
    start = reasoning_start(body, text, prompt)
    if calls is None and start is Start.CLOSED:
        return None
    return ParserPlan(
        calls=calls,
        tools=Tools(use.callable_tools),
        reasoning=reasoning,
        start=start,
        max_calls=1 if calls is not None and (use.named or body.parallel_tool_calls is False) else NO_LIMIT,
        inline=inline,
        hidden=not body.include_reasoning,
        says_calls=not use.named,
    )


def reasoning_start(body: ChatBody, text: ModelText, prompt: Sequence[int]) -> Start:
    """Where the prompt leaves a model that may reason first."""
    if text.reasoning is None:
        return Start.MAYBE
    if body.continue_final_message:
        return text.reasoning.continued(_last_content(body))
    return text.reasoning.start(text.tokenizer.decode(prompt[-_PROMPT_END_TOKENS:], skip_special_tokens=False))


def _last_content(body: ChatBody) -> str:
    last = body.messages[-1]
    content = last.get("content") if isinstance(last, Mapping) else None
    return content if isinstance(content, str) else ""


def call_format(use: ToolUse, text: ModelText) -> CallFormat | None:
    """How the answers write calls. Where calls are demanded of a model that has no way of its own, as an array."""
    if not use.callable_tools:
        return None
    if text.calls is not None:
        return text.calls
    if use.required:
        return ARRAY
    raise UnsupportedError(
        "tools need a format of calls, and this model's chat template shows none: set router.tool_call_parser",
        param="tools",
    )


def with_calls(sampling: SamplingParams, use: ToolUse, parsing: ParserPlan | None) -> SamplingParams:
    """With what makes the model call, or keep to the schemas of strict functions, where that is wanted."""
    if parsing is None or parsing.calls is None:
        return sampling
    syntax, tools = parsing.calls.syntax, use.callable_tools
    around = Around(parsing.is_limited, parsing.reasoning, parsing.start)
    asked = sampling.grammar
    if use.required:
        if asked is not None:
            raise InvalidRequestError(f"tool_choice that demands calls excludes {asked.param}", param="tool_choice")
        part = required(syntax, tools, around)
    elif asked is not None:
        schema = _schema(asked)
        if schema is None:
            return sampling
        part = answer_or_calls(schema, syntax, tools, around)
    elif syntax.trigger and any(tool["function"].get("strict") for tool in tools):
        part = strict(syntax, tools, around)
    else:
        return sampling
    param = "tools" if asked is None else asked.param
    source = json.dumps(part, ensure_ascii=False)
    grammar = Grammar(kind=GrammarKind.STRUCTURAL_TAG, source=source, param=param)
    return msgspec.structs.replace(sampling, grammar=grammar)


def _schema(grammar: Grammar) -> dict[str, Any] | None:
    """Of a grammar that calls may stand in the place of, as with OpenAI; None for others, which hold as they are."""
    if grammar.kind is GrammarKind.JSON_OBJECT:
        return {"type": "object"}
    schema = json.loads(grammar.source) if grammar.kind is GrammarKind.JSON_SCHEMA else None
    return schema if isinstance(schema, dict) else None
