"""`POST /v1/messages` and its token count, in Anthropic's form.

blocks -> chat messages -> the same job as any conversation -> Anthropic's message or events
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, Final

from common.errors import InvalidRequestError, NanoDeployError, UnsupportedError
from common.types import Clock, ModelInfo
from services.router.api.message_events import MessageStyle, NoThreadsError, error_dict
from services.router.api.schemas import CountBody, MessagesBody, Prompt, Turn
from services.router.api.translate import chat_body, kind_of, known, renamed, string, text_of, unsupported
from services.router.exchange import Exchange
from services.router.gateway import Gateway
from services.router.models import ModelText, ModelTexts
from services.router.params import Job, chat_job
from services.router.replies import dumps
from services.router.schemas import ChatBody, StreamOptions

FIELDS: Final = {
    "max_completion_tokens": "max_tokens",
    "stop": "stop_sequences",
    "response_format.json_schema": "output_config.format",
    "response_format": "output_config.format",
    "reasoning_effort": "output_config.effort",
}
_CHOICES: Final = {"auto": "auto", "any": "required", "none": "none"}


class Messages:
    def __init__(self, gateway: Gateway, clock: Clock) -> None:
        self._gateway = gateway
        self._clock = clock

    async def create(self, exchange: Exchange) -> None:
        with self._gateway.admitted():
            started_s = self._clock.now()
            body = await self._gateway.body(exchange, MessagesBody)
            style = MessageStyle(exchange.request_id)

            async def make_job(
                chat: ChatBody, model: ModelInfo, text: ModelText, texts: ModelTexts, rng: random.Random
            ) -> Job:
                job = await chat_job(chat, model, text, texts, rng)
                style.prompt_tokens = len(job.prompts[0])
                return job

            await self._gateway.serve(exchange, to_chat(body), make_job, style, started_s)

    async def count_tokens(self, exchange: Exchange) -> None:
        body = await self._gateway.body(exchange, CountBody)
        chat = chat_body(_prompt_fields(body))
        ids = await self._gateway.prompt_ids(chat)
        await exchange.answer(200, dumps({"input_tokens": len(ids)}))


def speak(exchange: Exchange) -> None:
    """Errors in Anthropic's form, and the header that its client reads the request's id from."""
    tell = renamed(FIELDS)

    def shape(error: NanoDeployError) -> bytes:
        return dumps(error_dict(tell(error), exchange.request_id))

    exchange.shape = shape
    exchange.headers.append((b"request-id", exchange.request_id.encode()))


def to_chat(body: MessagesBody) -> ChatBody:
    if body.thread is not None:
        raise NoThreadsError("thread is not supported: send the whole conversation", param="thread")
    same = ("temperature", "top_k", "top_p", "stream", "seed", "cache_salt", "priority")
    fields: dict[str, Any] = {name: getattr(body, name) for name in same}
    variables = dict(body.chat_template_kwargs or {})
    return chat_body(
        fields
        | _prompt_fields(body, variables)
        | {
            "max_completion_tokens": body.max_tokens,
            "stop": body.stop_sequences or None,
            "stream_options": StreamOptions(include_usage=True) if body.stream else None,
        }
    )


def _prompt_fields(body: Prompt, variables: dict[str, Any] | None = None) -> dict[str, Any]:
    system = text_of(body.system, "system", ("text",)) if body.system else ""
    messages = [{"role": "system", "content": system}] if system else []
    for i, turn in enumerate(body.messages):
        messages.extend(_turn(turn, f"messages[{i}]"))
    variables = variables or {}
    if body.thinking is not None and body.thinking.type != "adaptive":
        thinks = body.thinking.type == "enabled"
        variables = {"enable_thinking": thinks, "thinking": thinks} | variables  # families differ in the name
    if not messages:
        raise InvalidRequestError("messages has nothing that the model can read", param="messages")
    continues = messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls")
    output = body.output_config
    return {
        "model": body.model,
        "messages": messages,
        "tools": None if not body.tools else [_tool(tool, f"tools[{i}]") for i, tool in enumerate(body.tools)],
        **_tool_choice(body),
        "chat_template_kwargs": variables or None,
        "continue_final_message": continues or None,
        "reasoning_effort": None if output is None else output.effort,
        "response_format": None if output is None or output.format is None else _format(output.format),
    }


def _tool(tool: dict[str, Any], where: str) -> dict[str, Any]:
    if tool.get("type") not in (None, "custom"):
        raise UnsupportedError(f"{where}.type: only tools of the caller are supported", param=f"{where}.type")
    schema = tool.get("input_schema")
    if not isinstance(schema, dict):
        raise InvalidRequestError(f"{where}.input_schema must be an object", param=f"{where}.input_schema")
    function = {"name": string(tool, "name", where), "parameters": schema}
    more = {key: tool[key] for key in ("description", "strict") if tool.get(key) is not None}
    return {"type": "function", "function": function | more}


def _tool_choice(body: Prompt) -> dict[str, Any]:
    choice = body.tool_choice
    if choice is None:
        return {}
    kind = kind_of(choice, "tool_choice")
    if not body.tools and kind in ("auto", "none"):
        return {}
    parallel = {"parallel_tool_calls": False} if choice.get("disable_parallel_tool_use") is True else {}
    if kind == "tool":
        function = {"name": string(choice, "name", "tool_choice")}
        return {"tool_choice": {"type": "function", "function": function}, **parallel}
    if kind not in _CHOICES:
        raise unsupported("tool_choice", kind)
    return {"tool_choice": _CHOICES[kind], **parallel}


def _format(format_: dict[str, Any]) -> dict[str, Any]:
    if kind_of(format_, "output_config.format") != "json_schema":
        raise unsupported("output_config.format", format_["type"])
    known(format_, ("type", "schema"), "output_config.format")
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": format_.get("schema"), "strict": True}}


# -- turns -------------------------------------------------------------------------------------------


def _turn(turn: Turn, where: str) -> Iterator[dict[str, Any]]:
    """One turn is a message, after a message for each result of a tool."""
    if isinstance(turn.content, str):
        yield {"role": turn.role, "content": turn.content}
        return
    texts: list[str] = []
    message: dict[str, Any] = {"role": turn.role}
    for i, block in enumerate(turn.content):
        place = f"{where}.content[{i}]"
        kind = kind_of(block, place)
        if kind == "text":
            texts.append(string(block, "text", place))
        elif kind == "tool_result" and turn.role == "user":
            content = text_of(block.get("content") or "", f"{place}.content", ("text",))
            yield {"role": "tool", "tool_call_id": string(block, "tool_use_id", place), "content": content}
        elif kind == "tool_use" and turn.role == "assistant":
            message.setdefault("tool_calls", []).append(_call(block, place))
        elif kind == "thinking" and turn.role == "assistant":
            message["reasoning_content"] = message.get("reasoning_content", "") + string(block, "thinking", place)
        elif kind != "redacted_thinking" or turn.role != "assistant":
            raise unsupported(place, kind)
    message["content"] = "\n".join(texts)
    if texts or len(message) > 2 or not turn.content:
        yield message


def _call(block: dict[str, Any], where: str) -> dict[str, Any]:
    arguments = block.get("input")
    if not isinstance(arguments, dict):
        raise InvalidRequestError(f"{where}.input must be an object", param=f"{where}.input")
    function = {"name": string(block, "name", where), "arguments": arguments}
    return {"id": string(block, "id", where), "type": "function", "function": function}
