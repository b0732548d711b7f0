"""From the items of `/v1/responses` to chat messages, and from an answer's items to what follows them.

Reasoning and calls that stand beside each other are one assistant message, as chat templates know it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final

from common.errors import InvalidRequestError, UnsupportedError
from services.router.api.schemas import ResponsesBody
from services.router.api.translate import chat_body, kind_of, known, string, text_of, unsupported
from services.router.schemas import ChatBody, StreamOptions

LOGPROBS: Final = "message.output_text.logprobs"
FIELDS: Final = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}
_TEXT_KINDS: Final = ("input_text", "output_text", "text", "refusal", "summary_text", "reasoning_text")
_SAME: Final = (
    *("model", "temperature", "top_p", "top_logprobs", "top_k", "min_p", "seed", "stop", "repetition_penalty"),
    *("chat_template_kwargs", "cache_salt", "parallel_tool_calls", "user", "prompt_cache_key", "stream"),
)

Message = dict[str, Any]


def to_chat(body: ResponsesBody, messages: Sequence[Message]) -> ChatBody:
    """`messages`: the conversation so far and the input, without the instructions."""
    system = [{"role": "system", "content": body.instructions}] if body.instructions else []
    fields: dict[str, Any] = {name: getattr(body, name) for name in _SAME}
    logprobs = LOGPROBS in (body.include or ()) or body.top_logprobs is not None
    format_ = None if body.text is None else body.text.format
    return chat_body(
        fields
        | {
            "messages": [*system, *messages],
            "max_completion_tokens": body.max_output_tokens,
            "priority": body.priority,
            "logprobs": logprobs or None,
            "tools": None if not body.tools else [_tool(tool, f"tools[{i}]") for i, tool in enumerate(body.tools)],
            "tool_choice": _tool_choice(body),
            "response_format": None if format_ is None else _format(format_),
            "reasoning_effort": None if body.reasoning is None else body.reasoning.effort,
            "truncate_prompt_tokens": -1 if body.truncation == "auto" else None,
            "stream_options": StreamOptions(include_usage=True) if body.stream else None,
        }
    )


def _tool(tool: dict[str, Any], where: str) -> dict[str, Any]:
    if kind_of(tool, where) != "function":
        raise UnsupportedError(f"{where}.type: only functions are supported", param=f"{where}.type")
    names = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {key: tool[key] for key in names if tool.get(key) is not None}}


def _tool_choice(body: ResponsesBody) -> str | dict[str, Any] | None:
    """Clients say auto and none whether there are tools or not."""
    choice = body.tool_choice
    if not isinstance(choice, dict):
        return choice if body.tools or choice not in ("auto", "none") else None
    kind = kind_of(choice, "tool_choice")
    if kind == "allowed_tools":
        tools = choice.get("tools")
        named = [
            _named(tool, f"tool_choice.tools[{i}]") for i, tool in enumerate(tools if isinstance(tools, list) else [])
        ]
        return {"type": kind, kind: {"mode": choice.get("mode"), "tools": named}}
    return _named(choice, "tool_choice")


def _named(choice: Any, where: str) -> dict[str, Any]:
    if kind_of(choice, where) != "function":
        raise unsupported(where, choice["type"])
    return {"type": "function", "function": {"name": string(choice, "name", where)}}


def _format(format_: dict[str, Any]) -> dict[str, Any]:
    kind = kind_of(format_, "text.format")
    if kind != "json_schema":
        return format_
    names = ("name", "description", "schema", "strict")
    known(format_, ("type", *names), "text.format")
    return {"type": kind, kind: {key: format_[key] for key in names if format_.get(key) is not None}}


# -- items -------------------------------------------------------------------------------------------


def items_of(body: ResponsesBody) -> list[dict[str, Any]]:
    """The input as items, as it is shown again later."""
    given = body.input
    if given is None or given == []:
        raise InvalidRequestError("input is required: a text or a list of items", param="input")
    if isinstance(given, str):
        return [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": given}]}]
    for i, item in enumerate(given):
        if not isinstance(item, dict):
            raise InvalidRequestError(f"input[{i}] must be an object", param=f"input[{i}]")
    return given


def messages_of(items: Sequence[dict[str, Any]]) -> list[Message]:
    messages: list[Message] = []
    reasoning: list[str] = []
    for i, item in enumerate(items):
        where = f"input[{i}]"
        kind = item.get("type") or "message"
        if kind == "reasoning":
            reasoning.append(text_of(item.get("content") or item.get("summary") or [], f"{where}.content", _TEXT_KINDS))
        elif kind == "function_call":
            turn = _assistant(messages, reasoning)
            turn.setdefault("tool_calls", []).append(_call(item, where))
        elif kind == "function_call_output":
            output = text_of(item.get("output"), f"{where}.output", _TEXT_KINDS)
            messages.append({"role": "tool", "tool_call_id": string(item, "call_id", where), "content": output})
        elif kind == "message":
            content = text_of(item.get("content"), f"{where}.content", _TEXT_KINDS)
            role = string(item, "role", where)
            if role == "assistant":
                turn = _assistant(messages, reasoning, fresh=True)
                turn["content"] = content
            else:
                messages.append({"role": role, "content": content})
        else:
            raise unsupported(where, str(kind))
    if reasoning:
        _assistant(messages, reasoning)
    return messages


def _assistant(messages: list[Message], reasoning: list[str], *, fresh: bool = False) -> Message:
    """The assistant's turn at the end, or a new one; `fresh`: one without content and calls."""
    last = messages[-1] if messages and messages[-1]["role"] == "assistant" else None
    if last is None or reasoning or (fresh and (last["content"] or last.get("tool_calls"))):
        last = {"role": "assistant", "content": ""}
        if reasoning:
            last["reasoning_content"] = "\n".join(reasoning)
            reasoning.clear()
        messages.append(last)
    return last


def _call(item: dict[str, Any], where: str) -> dict[str, Any]:
    function = {"name": string(item, "name", where), "arguments": _arguments(string(item, "arguments", where))}
    return {"id": string(item, "call_id", where), "type": "function", "function": function}


def _arguments(text: str) -> str:
    """Those of a call that was cut, or that the model broke, are left out: it is asked to go on all the same."""
    try:
        whole = isinstance(json.loads(text or "{}"), dict)
    except (ValueError, RecursionError):
        whole = False
    return text if whole else "{}"
