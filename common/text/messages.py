"""Chat messages as clients send them, checked and brought to the form that templates expect.

Every error names its place: `messages[2].content`. Content is a string or a list of text parts, which are
joined by newlines; tool-call arguments, JSON text on the wire, become `Arguments`; reasoning has both of its names;
what a client echoes back from a response (`refusal`, `parsed` ...) or marks (`type`, `cache_control`) is dropped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from common.errors import InvalidRequestError, UnsupportedError

ROLES: Final = ("system", "developer", "user", "assistant", "tool", "function")
_KEPT: Final = ("name", "tool_call_id", "reasoning_content", "reasoning")
_MAY_LACK_CONTENT: Final = ("assistant", "tool", "function")
_DROPPED: Final = frozenset(
    {"refusal", "annotations", "audio", "function_call", "weight", "parsed", "type", "cache_control"}
)
_TEXT_PARTS: Final = ("text", "input_text", "output_text", "refusal")

Message = dict[str, Any]


class Arguments(dict[str, Any]):
    """A call's arguments: an object for templates that go through it, and its JSON text for those that print it."""

    def __init__(self, values: Mapping[str, Any], text: str) -> None:
        super().__init__(values)
        self._text = text

    def __str__(self) -> str:
        return self._text

    def __add__(self, other: str) -> str:
        return self._text + other

    def __radd__(self, other: str) -> str:
        return other + self._text


def normalize_messages(messages: Sequence[Any], *, extra_roles: Sequence[str] = ()) -> list[Message]:
    """Messages for a template: `role`, `content` (a string) and what else was given. Raises `InvalidRequestError`."""
    if not messages:
        raise InvalidRequestError("messages must not be empty", param="messages")
    roles = (*ROLES, *extra_roles) if extra_roles else ROLES
    return [_message(message, i, roles) for i, message in enumerate(messages)]


def check_ends(*, add_generation_prompt: bool, continue_final_message: bool) -> None:
    if continue_final_message and add_generation_prompt:
        raise InvalidRequestError(
            "continue_final_message and add_generation_prompt exclude each other", param="continue_final_message"
        )


def _bad(where: str, rule: str) -> InvalidRequestError:
    return InvalidRequestError(f"{where} {rule}", param=where)


def _message(message: Any, index: int, roles: Sequence[str]) -> Message:
    if type(message) is dict and len(message) == 2:  # most are plain
        role, content = message.get("role"), message.get("content")
        if role in roles and type(content) is str and content.isascii():
            return {"role": role, "content": content}
    where = f"messages[{index}]"
    if not isinstance(message, Mapping):
        raise _bad(where, "must be an object with role and content")
    role = message.get("role")
    if not isinstance(role, str) or role not in roles:
        raise _bad(f"{where}.role", f"must be one of {', '.join(roles)}, got {_show(role)}")
    out: Message = {"role": role}
    for key, value in message.items():
        if key in ("role", "content", "tool_calls") or key in _DROPPED or value is None:
            continue
        if key not in _KEPT:
            raise _bad(f"{where}.{key}", "is not a known field of a message")
        if not isinstance(value, str):
            raise _bad(f"{where}.{key}", f"must be a string, got {_show(value)}")
        out[key] = value
    reasoning = out.get("reasoning_content", out.get("reasoning"))
    if reasoning is not None:
        out["reasoning"] = out["reasoning_content"] = reasoning
    calls = message.get("tool_calls")
    if calls:
        if role != "assistant":
            raise _bad(f"{where}.tool_calls", "is allowed in assistant messages only")
        out["tool_calls"] = _tool_calls(calls, f"{where}.tool_calls")
    out["content"] = _content(message.get("content"), where, may_lack=role in _MAY_LACK_CONTENT)
    return out


def _content(content: Any, where: str, *, may_lack: bool) -> str:
    where = f"{where}.content"
    if isinstance(content, str):
        _check_unicode(content, where)
        return content
    if content is None:
        if may_lack:
            return ""
        raise _bad(where, "is required: a string or a list of text parts")
    if not isinstance(content, list):
        raise _bad(where, f"must be a string or a list of text parts, got {_show(content)}")
    return "\n".join(_part(part, f"{where}[{i}]") for i, part in enumerate(content))


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        _check_unicode(part, where)
        return part
    if not isinstance(part, Mapping) or not isinstance(kind := part.get("type"), str):
        raise _bad(where, 'must be an object like {"type": "text", "text": "..."}')
    if kind not in _TEXT_PARTS:
        raise UnsupportedError(f"{where}.type {kind!r} is not supported: this model takes text", param=f"{where}.type")
    key = "refusal" if kind == "refusal" else "text"
    text = part.get(key)
    if not isinstance(text, str):
        raise _bad(f"{where}.{key}", f"must be a string, got {_show(text)}")
    _check_unicode(text, f"{where}.{key}")
    return text


def _tool_calls(calls: Any, where: str) -> list[Message]:
    if not isinstance(calls, list):
        raise _bad(where, f"must be a list, got {_show(calls)}")
    return [_tool_call(call, f"{where}[{i}]") for i, call in enumerate(calls)]


def _tool_call(call: Any, where: str) -> Message:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise _bad(f"{where}.function", "must be an object with name and arguments")
    arguments = function.get("arguments")
    text = arguments if isinstance(arguments, str) and arguments.strip() else ""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(text) if text else {}
        except (ValueError, RecursionError) as error:
            raise _bad(f"{where}.function.arguments", f"is not valid JSON: {error}") from error
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise _bad(f"{where}.function.arguments", "must be a JSON object")
    made = Arguments(arguments, text or json.dumps(arguments, ensure_ascii=False))
    out = {"type": "function", "function": {"name": function["name"], "arguments": made}}
    if isinstance(call.get("id"), str):
        out["id"] = call["id"]
    return out


def _check_unicode(text: str, where: str) -> None:
    """JSON may carry lone surrogates; no tokenizer takes them."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise _bad(where, f"is not valid Unicode: {error.reason}") from error


def _show(value: Any) -> str:
    if value is None:
        return "nothing"
    text = repr(value) if isinstance(value, str | int | float | bool) else type(value).__name__
    return text if len(text) <= 80 else text[:77] + "..."
