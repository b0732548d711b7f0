"""How answers look: one `Style` per API, and the stream of events that it writes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from common.errors import NanoDeployError
from common.text.parsers import CallDelta
from services.router.replies import (
    ChatChunks,
    CompletionChunks,
    Ended,
    Head,
    Usage,
    chat_answer,
    completion_answer,
)


class Stream(Protocol):
    """What a run tells of its choices, in order: `first`, what each delta added, `finish`; at the end `last`, once.

    `failed` takes the place of what is left. `done` follows either.
    """

    @property
    def done(self) -> bytes: ...

    def say_usage(self, usage: bytes | None) -> None: ...

    def first(self, index: int) -> bytes: ...

    def text(self, index: int, text: str) -> bytes: ...

    def texts(self, index: int, texts: Sequence[bytes]) -> bytes:
        """`text` of each, which are JSON strings already."""
        ...

    def reasoning(self, index: int, text: str) -> bytes: ...

    def calls(self, index: int, deltas: Sequence[CallDelta]) -> bytes: ...

    def with_logprobs(self, index: int, text: str, logprobs: Any) -> bytes: ...

    def finish(self, index: int, finish: str, stop_reason: str | int | None) -> bytes: ...

    def last(self, usage: Usage | None, timings: dict[str, Any] | None) -> bytes: ...

    def failed(self, error: NanoDeployError) -> bytes: ...


class Style(Protocol):
    """How the answers of one API look. `columns`: its logprobs are `CompletionLogprobs`, else a list of tokens.

    `finished`, where it is not None, is awaited with the last bytes of an answer and returns those to send.
    """

    @property
    def prefix(self) -> str:
        """Of an answer's id."""
        ...

    @property
    def columns(self) -> bool: ...

    @property
    def finished(self) -> Callable[[bytes], Awaitable[bytes]] | None: ...

    def chunks(self, head: Head, usage: bytes | None) -> Stream: ...

    def whole(self, head: Head, choices: Sequence[Ended], usage: Usage, timings: dict[str, Any] | None) -> bytes: ...


class ChatStyle:
    prefix = "chatcmpl-"
    columns = False
    finished: Callable[[bytes], Awaitable[bytes]] | None = None
    chunks = staticmethod(ChatChunks)
    whole = staticmethod(chat_answer)


class CompletionStyle:
    prefix = "cmpl-"
    columns = True
    finished: Callable[[bytes], Awaitable[bytes]] | None = None
    chunks = staticmethod(CompletionChunks)
    whole = staticmethod(completion_answer)
