"""How `/v1/messages` answers: Anthropic's message, its events and its errors.

message_start -> (content_block_start -> content_block_delta ... -> content_block_stop) ... -> message_delta ->
message_stop | error
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import orjson

from common.errors import NanoDeployError, UnsupportedError
from services.router.api.blocks import Block, BlockEvents, sse
from services.router.errors import status_of
from services.router.replies import Ended, Head, Usage, dumps

_ERROR_TYPES: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_STOP_REASONS: Final = {"length": "max_tokens", "tool_calls": "tool_use"}
_DELTAS: Final = {
    "text": b'{"type":"text_delta","text":',
    "reasoning": b'{"type":"thinking_delta","thinking":',
    "call": b'{"type":"input_json_delta","partial_json":',
}


class NoThreadsError(UnsupportedError):
    """No conversation is kept here. Anthropic's clients that hear it in these words send the whole one instead."""

    details: Final = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}


def error_dict(error: NanoDeployError, request_id: str) -> dict[str, Any]:
    told: dict[str, Any] = {"type": _ERROR_TYPES.get(status_of(error), "api_error"), "message": error.message}
    if isinstance(error, NoThreadsError):
        told["details"] = error.details
    return {"type": "error", "error": told, "request_id": request_id}


def usage_dict(usage: Usage) -> dict[str, Any]:
    """Anthropic counts tokens read from a cache apart from the others."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }


class MessageEvents(BlockEvents):
    def __init__(self, head: Head, request_id: str, prompt_tokens: int = 0) -> None:
        super().__init__(head)
        self._request_id = request_id
        self._prompt_tokens = prompt_tokens

    # -- the ends --

    def message(self, content: list[dict[str, Any]], stop: dict[str, Any], usage: Usage) -> dict[str, Any]:
        model = {"id": self.head.id, "type": "message", "role": "assistant", "model": self.head.model}
        return {**model, "content": content, **stop, "usage": usage_dict(usage)}

    def _begin(self) -> bytes:
        stop = {"stop_reason": None, "stop_sequence": None}
        message = self.message([], stop, Usage(self._prompt_tokens, 0, 0))
        return sse("message_start", {"message": message})

    @property
    def stop(self) -> dict[str, Any]:
        sequence = self.stop_reason if isinstance(self.stop_reason, str) else None
        ended = "tool_use" if any(block.kind == "call" for block in self.blocks) else "end_turn"  # a tool by name too
        reason = "stop_sequence" if sequence is not None else _STOP_REASONS.get(self.finish_reason, ended)
        return {"stop_reason": reason, "stop_sequence": sequence}

    def last(self, usage: Usage | None, timings: dict[str, Any] | None) -> bytes:
        more = {} if timings is None else {"nanodeploy": timings}
        counts = usage_dict(usage or Usage(self._prompt_tokens, 0, 0))
        return sse("message_delta", {"delta": self.stop, "usage": counts, **more}) + sse("message_stop", {})

    def failed(self, error: NanoDeployError) -> bytes:
        return sse("error", error_dict(error, self._request_id))

    # -- blocks --

    def content(self) -> list[dict[str, Any]]:
        return [self._block(block) for block in self.blocks]

    @staticmethod
    def _block(block: Block, *, empty: bool = False) -> dict[str, Any]:
        if block.kind == "reasoning":
            return {"type": "thinking", "thinking": block.text, "signature": ""}
        if block.kind == "text":
            return {"type": "text", "text": block.text, "citations": None}
        return {
            "type": "tool_use",
            "id": block.call_id,
            "name": block.name,
            "input": {} if empty else arguments_of(block.text),
        }

    def _opened(self, block: Block) -> bytes:
        delta = _DELTAS[block.kind]
        self._start = b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,"delta":%b' % (
            block.index,
            delta,
        )
        return sse("content_block_start", {"index": block.index, "content_block": self._block(block, empty=True)})

    def _delta(self, block: Block, text: str, logprobs: list[dict[str, Any]] | None) -> bytes:
        return b"%b%b}}\n\n" % (self._start, dumps(text))

    def _closed(self, block: Block) -> bytes:
        return sse("content_block_stop", {"index": block.index})


def arguments_of(text: str) -> orjson.Fragment:
    """A call's input, as the model wrote it.

    An answer that was cut has half of it: as Anthropic does not show such a text, neither do we.
    """
    try:
        whole = isinstance(orjson.loads(text), dict)
    except orjson.JSONDecodeError:
        whole = False
    return orjson.Fragment(text if whole else "{}")


class MessageStyle:
    prefix = "msg_"
    columns = False
    finished = None

    def __init__(self, request_id: str) -> None:
        self._request_id = request_id
        self.prompt_tokens = 0

    def chunks(self, head: Head, usage: bytes | None) -> MessageEvents:
        return MessageEvents(head, self._request_id, self.prompt_tokens)

    def whole(self, head: Head, choices: Sequence[Ended], usage: Usage, timings: dict[str, Any] | None) -> bytes:
        events = MessageEvents(head, self._request_id)
        events.walk(choices[0])
        message = events.message(events.content(), events.stop, usage)
        return dumps(message if timings is None else message | {"nanodeploy": timings})
