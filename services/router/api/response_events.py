"""How `/v1/responses` answers: the response object, and OpenAI's typed events in order.

    response.created -> response.in_progress -> (output_item.added -> [content_part.added -> delta ... -> done ->
    content_part.done] -> output_item.done) ... -> response.completed | response.incomplete | response.failed

Every event carries the next `sequence_number`. The last one carries the whole response.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Final

from common.errors import NanoDeployError
from services.router.api.blocks import Block, BlockEvents, BlockKind, sse
from services.router.replies import Ended, Head, Usage, dumps

_ITEM_PREFIX: Final[dict[BlockKind, str]] = {"reasoning": "rs", "text": "msg", "call": "fc"}
_PART_EVENT: Final[dict[BlockKind, str]] = {
    "reasoning": "response.reasoning_text",
    "text": "response.output_text",
    "call": "response.function_call_arguments",
}


def usage_dict(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def failure(error: NanoDeployError) -> dict[str, str]:
    """A response's own error; its codes are few."""
    code = "rate_limit_exceeded" if error.code == "overloaded" else "server_error"
    return {"code": "invalid_prompt" if error.code == "invalid_request" else code, "message": error.message}


class ResponseEvents(BlockEvents):
    """`frame`: what the request says of the response, and is the same in all its states."""

    def __init__(self, head: Head, frame: dict[str, Any]) -> None:
        super().__init__(head)
        self._number = 0
        self._ids = head.id.partition("_")[2]
        self.response: dict[str, Any] = {
            "id": head.id,
            "object": "response",
            "created_at": head.created,
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "model": head.model,
            "output": [],
            "usage": None,
            **frame,
        }

    # -- the ends --

    def _begin(self) -> bytes:
        return self._of_response("response.created") + self._of_response("response.in_progress")

    def _of_response(self, name: str) -> bytes:
        return self._event(name, {"response": self.response})

    def _event(self, name: str, payload: dict[str, Any]) -> bytes:
        number = self._number
        self._number += 1
        return sse(name, {"sequence_number": number, **payload})

    def last(self, usage: Usage | None, timings: dict[str, Any] | None) -> bytes:
        """Completes the response; its own event is `terminal`, when the response has been stored or not."""
        self.complete(usage, timings)
        return b""

    def complete(self, usage: Usage | None, timings: dict[str, Any] | None) -> None:
        cut = self.finish_reason == "length"
        status = "incomplete" if cut else "completed"
        self.response |= {
            "status": status,
            "completed_at": None if cut else int(time.time()),
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": [self._item(block, status if block is self.blocks[-1] else "completed") for block in self.blocks],
            "usage": None if usage is None else usage_dict(usage),
        }
        if timings is not None:
            self.response["nanodeploy"] = timings

    def terminal(self) -> bytes:
        return self._of_response(f"response.{self.response['status']}")

    def failed(self, error: NanoDeployError) -> bytes:
        output = [self._item(block, "incomplete" if block is self._open else "completed") for block in self.blocks]
        self.response |= {"status": "failed", "error": failure(error), "output": output, "store": False}
        return self.terminal()

    # -- blocks --

    def item_id(self, block: Block) -> str:
        return f"{_ITEM_PREFIX[block.kind]}_{self._ids}{block.index:02x}"

    def _part(self, block: Block) -> dict[str, Any]:
        if block.kind == "reasoning":
            return {"type": "reasoning_text", "text": block.text}
        return {"type": "output_text", "text": block.text, "annotations": [], "logprobs": block.logprobs}

    def _item(self, block: Block, status: str) -> dict[str, Any]:
        item: dict[str, Any] = {"id": self.item_id(block), "status": status}
        if block.kind == "call":
            arguments = {"arguments": block.text, "call_id": block.call_id, "name": block.name}
            return {"type": "function_call", **item, **arguments}
        content = [self._part(block)] if status != "in_progress" or block.parts else []
        if block.kind == "reasoning":
            return {"type": "reasoning", **item, "summary": [], "content": content}
        return {"type": "message", **item, "role": "assistant", "content": content}

    def _place(self, block: Block) -> dict[str, Any]:
        place = {"item_id": self.item_id(block), "output_index": block.index}
        return place if block.kind == "call" else place | {"content_index": 0}

    def _opened(self, block: Block) -> bytes:
        added = {"output_index": block.index, "item": self._item(block, "in_progress")}
        events = self._event("response.output_item.added", added)
        if block.kind != "call":
            events += self._event("response.content_part.added", {**self._place(block), "part": self._part(block)})
        name = f"{_PART_EVENT[block.kind]}.delta"
        place = dumps({"type": name, **self._place(block)})[:-1]
        self._start = b"event: %b\ndata: %b" % (name.encode(), place)
        self._tail = b',"logprobs":[]}\n\n' if block.kind == "text" else b"}\n\n"
        return events

    def _delta(self, block: Block, text: str, logprobs: list[dict[str, Any]] | None) -> bytes:
        number = self._number
        self._number += 1
        tail = self._tail if logprobs is None else b',"logprobs":%b}\n\n' % dumps(logprobs)
        return b'%b,"sequence_number":%d,"delta":%b%b' % (self._start, number, dumps(text), tail)

    def _closed(self, block: Block) -> bytes:
        place, name = self._place(block), f"{_PART_EVENT[block.kind]}.done"
        if block.kind == "call":
            events = self._event(name, {**place, "name": block.name, "arguments": block.text})
        else:
            logprobs = {"logprobs": block.logprobs} if block.kind == "text" else {}
            events = self._event(name, {**place, "text": block.text, **logprobs})
            events += self._event("response.content_part.done", {**place, "part": self._part(block)})
        status = "incomplete" if self.finish_reason == "length" else "completed"
        done = {"output_index": block.index, "item": self._item(block, status)}
        return events + self._event("response.output_item.done", done)


class ResponseStyle:
    """One request's: it keeps the events, whose response is stored before the client hears of its end.

    `response_id`: known before the answer; by default the answer's own.
    """

    prefix = "resp_"
    columns = False

    def __init__(self, frame: dict[str, Any], response_id: str = "") -> None:
        self.frame = frame
        self._id = response_id
        self.events: ResponseEvents | None = None
        self._streams = False

    def chunks(self, head: Head, usage: bytes | None) -> ResponseEvents:
        self._streams = True
        return self._begin(head)

    def whole(self, head: Head, choices: Sequence[Ended], usage: Usage, timings: dict[str, Any] | None) -> bytes:
        events = self._begin(head)
        events.walk(choices[0])
        events.complete(usage, timings)
        return b""

    def _begin(self, head: Head) -> ResponseEvents:
        self.events = ResponseEvents(head._replace(id=self._id or head.id), self.frame)
        return self.events

    async def finished(self, payload: bytes) -> bytes:
        assert self.events is not None
        await self.keep(self.events)
        return self.events.terminal() if self._streams else dumps(self.events.response)

    async def keep(self, events: ResponseEvents) -> None:
        """Nothing is stored, unless somebody says how."""
