"""An answer as a list of blocks, one open at a time: what `/v1/responses` and `/v1/messages` have in common.

    first -> [open -> delta ... -> close] ... -> finish -> last

A block is a run of reasoning, a run of text, or one call; a delta of another kind closes the open one and opens the
next. `BlockEvents` follows the blocks and keeps what they hold; the two APIs write the events. A whole answer is made
by the same walk with one delta per block, so that streamed equals whole.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import orjson

from common.errors import NanoDeployError
from common.text.parsers import CallDelta
from services.router.replies import Ended, Head, Usage, dumps

BlockKind = Literal["reasoning", "text", "call"]


def sse(name: str, payload: dict[str, Any]) -> bytes:
    """An event that says its name twice: in the line `event:` and as the payload's `type`."""
    return b"event: %b\ndata: %b\n\n" % (name.encode(), dumps({"type": name, **payload}))


@dataclass
class Block:
    kind: BlockKind
    index: int  # in the answer
    parts: list[str] = field(default_factory=list)  # of its text, or of the call's arguments
    call_id: str = ""
    name: str = ""
    logprobs: list[dict[str, Any]] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.parts)


class BlockEvents(ABC):
    """A `Chunks` of one choice."""

    done: Final = b""  # the last event says that it is the last

    def __init__(self, head: Head) -> None:
        self.head = head
        self.blocks: list[Block] = []
        self.finish_reason = ""
        self.stop_reason: str | int | None = None
        self._open: Block | None = None
        self._call = -1  # the open call's index among the calls

    # -- what a run calls --

    def say_usage(self, usage: bytes | None) -> None:
        """Only the last event says something of usage."""
        assert usage is None or usage == b"null", "usage in every event is OpenAI's alone"

    def first(self, index: int) -> bytes:
        return self._begin()

    def text(self, index: int, text: str) -> bytes:
        return self._add("text", text)

    def texts(self, index: int, texts: Sequence[bytes]) -> bytes:
        return b"".join([self.text(index, orjson.loads(text)) for text in texts])

    def reasoning(self, index: int, text: str) -> bytes:
        return self._add("reasoning", text)

    def with_logprobs(self, index: int, text: str, logprobs: Any) -> bytes:
        """Tokens of reasoning and calls come with no text: blocks of text alone show theirs."""
        block = self._open
        if block is None or block.kind != "text":
            if not text:
                return b""
            opening = self._switch("text")
            block = self._open
            assert block is not None
        else:
            opening = b""
        block.logprobs += logprobs["content"]
        block.parts.append(text)
        return opening + self._delta(block, text, logprobs["content"])

    def calls(self, index: int, deltas: Sequence[CallDelta]) -> bytes:
        events: list[bytes] = []
        for delta in deltas:
            if delta.index != self._call or self._open is None:
                self._call = delta.index
                events.append(self._switch("call", delta.id, delta.name))
            if delta.arguments:
                events.append(self._add("call", delta.arguments))
        return b"".join(events)

    def finish(self, index: int, finish: str, stop_reason: str | int | None) -> bytes:
        self.finish_reason, self.stop_reason = finish, stop_reason
        return self._close_open()

    def walk(self, ended: Ended) -> None:
        """Take a finished choice as if it had been streamed."""
        self.first(0)
        if ended.reasoning:
            self.reasoning(0, ended.reasoning)
        if ended.logprobs is not None:
            self.with_logprobs(0, ended.text, ended.logprobs)
        elif ended.text or not (ended.calls or ended.reasoning):
            self.text(0, ended.text)
        for call in ended.calls:
            self._switch("call", call.id, call.name)
            self._add("call", call.arguments)
        self.finish(0, ended.finish, ended.stop_reason)

    # -- blocks --

    def _add(self, kind: BlockKind, text: str) -> bytes:
        block = self._open
        if block is not None and block.kind == kind:
            block.parts.append(text)
            return self._delta(block, text, None)
        opening = self._switch(kind)
        assert self._open is not None
        self._open.parts.append(text)
        return opening + self._delta(self._open, text, None)

    def _switch(self, kind: BlockKind, call_id: str = "", name: str = "") -> bytes:
        """Have a block of this kind open; a call always gets one of its own."""
        if self._open is not None and self._open.kind == kind != "call":
            return b""
        closing = self._close_open()
        self._open = Block(kind, len(self.blocks), call_id=call_id, name=name)
        self.blocks.append(self._open)
        return closing + self._opened(self._open)

    def _close_open(self) -> bytes:
        block, self._open = self._open, None
        return b"" if block is None else self._closed(block)

    # -- what the APIs write --

    @abstractmethod
    def _begin(self) -> bytes: ...

    @abstractmethod
    def _opened(self, block: Block) -> bytes: ...

    @abstractmethod
    def _delta(self, block: Block, text: str, logprobs: list[dict[str, Any]] | None) -> bytes: ...

    @abstractmethod
    def _closed(self, block: Block) -> bytes: ...

    @abstractmethod
    def last(self, usage: Usage | None, timings: dict[str, Any] | None) -> bytes: ...

    @abstractmethod
    def failed(self, error: NanoDeployError) -> bytes: ...
