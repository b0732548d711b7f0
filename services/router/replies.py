"""Answers in OpenAI's shapes, written as bytes. No models on the way out.

Stream chunks are templates made once per request: only the text is escaped per chunk.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import msgspec
import orjson

from common.errors import NanoDeployError
from common.text import Tokenizer
from common.text.parsers import CallDelta
from common.types import RequestStats, TokenLogprobs
from services.router.errors import error_body

DONE: Final = b"data: [DONE]\n\n"
LOWEST_LOGPROB: Final = -9999.0  # JSON has no -inf

dumps = orjson.dumps


def event(payload: bytes) -> bytes:
    return b"data: " + payload + b"\n\n"


class Head(NamedTuple):
    """What all answers to one request share."""

    id: str
    created: int
    model: str
    fingerprint: str


class Usage(NamedTuple):
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    reasoning_tokens: int = 0  # of the completion's

    def as_dict(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
        }


def waterfall(stats: Sequence[RequestStats | None], **times_ms: float) -> dict[str, Any]:
    """Where the time of a request went: one entry per prompt, and the router's own milliseconds."""
    requests = [msgspec.to_builtins(one or RequestStats()) for one in stats]
    return {"router": {name: round(ms, 3) for name, ms in times_ms.items()}, "requests": requests}


# -- logprobs ----------------------------------------------------------------------------------------


def _finite(logprob: float) -> float:
    return logprob if logprob > LOWEST_LOGPROB else LOWEST_LOGPROB


def _token_text(data: bytes, prefix: str = "") -> str:
    """A token as text; bytes that are no character by themselves are spelled out, as OpenAI does."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return prefix + "".join(f"\\x{byte:02x}" for byte in data)


def chat_logprobs(tokenizer: Tokenizer, token_ids: Sequence[int], found: TokenLogprobs) -> list[dict[str, Any]]:
    def entry(token: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token)
        return {"token": _token_text(data), "logprob": _finite(logprob), "bytes": list(data)}

    top = found.top_n
    return [
        entry(token, found.token_logprobs[i])
        | {"top_logprobs": [entry(found.top_ids[j], found.top_logprobs[j]) for j in range(i * top, i * top + top)]}
        for i, token in enumerate(token_ids)
    ]


def prompt_logprobs(
    tokenizer: Tokenizer, token_ids: Sequence[int], found: TokenLogprobs | None, top: int
) -> list[dict[str, Any] | None] | None:
    """As vLLM has them: by position of the prompt, the first one null; the token itself and the `top` best by id.

    A token's rank is known where it is one of the best.
    """
    if found is None:
        return None

    def entry(token: int, logprob: float, rank: int | None) -> dict[str, Any]:
        text = _token_text(tokenizer.token_bytes(token))
        return {"logprob": _finite(logprob), "rank": rank, "decoded_token": text}

    positions: list[dict[str, Any] | None] = [None]
    for i, token in enumerate(token_ids[1:]):
        start = i * found.top_n
        best = {
            str(found.top_ids[start + k]): entry(found.top_ids[start + k], found.top_logprobs[start + k], k + 1)
            for k in range(min(top, found.top_n))
        }
        ranks = list(found.top_ids[start : start + found.top_n])
        rank = ranks.index(token) + 1 if token in ranks else None
        positions.append({str(token): entry(token, found.token_logprobs[i], rank), **best})
    return positions


class CompletionLogprobs:
    """The columns of /v1/completions' logprobs."""

    def __init__(self) -> None:
        self.tokens: list[str] = []
        self.token_logprobs: list[float | None] = []
        self.top_logprobs: list[dict[str, float] | None] = []
        self.text_offset: list[int] = []

    def add(
        self, tokenizer: Tokenizer, token_ids: Sequence[int], found: TokenLogprobs, offsets: Sequence[int]
    ) -> CompletionLogprobs:
        for i, token in enumerate(token_ids):
            name = self._name(tokenizer, token)
            logprob = _finite(found.token_logprobs[i])
            top = {
                self._name(tokenizer, found.top_ids[j]): _finite(found.top_logprobs[j])
                for j in range(i * found.top_n, (i + 1) * found.top_n)
            }
            top.setdefault(name, logprob)
            self.tokens.append(name)
            self.token_logprobs.append(logprob)
            self.top_logprobs.append(top)
            self.text_offset.append(offsets[i])
        return self

    def add_prompt(
        self, tokenizer: Tokenizer, token_ids: Sequence[int], found: TokenLogprobs | None, skip_special: bool
    ) -> CompletionLogprobs:
        """The echoed prompt: its first token has no logprob. Tokens are all None if the worker sent none."""
        self.tokens.append(self._name(tokenizer, token_ids[0]))
        self.token_logprobs.append(None)
        self.top_logprobs.append(None)
        stream = tokenizer.detokenizer(skip_special_tokens=skip_special, at_start=True)
        offsets = [0]
        for token in token_ids[:-1]:
            offsets.append(offsets[-1] + len(stream.push((token,))))
        if found is not None:
            self.text_offset.append(0)
            return self.add(tokenizer, token_ids[1:], found, offsets[1:])
        rest = len(token_ids) - 1
        self.tokens.extend(self._name(tokenizer, token) for token in token_ids[1:])
        self.token_logprobs.extend([None] * rest)
        self.top_logprobs.extend([None] * rest)
        self.text_offset.extend(offsets)
        return self

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    @staticmethod
    def _name(tokenizer: Tokenizer, token: int) -> str:
        return _token_text(tokenizer.token_bytes(token), "bytes:")


# -- streams -----------------------------------------------------------------------------------------


class Chunks(ABC):
    """The chunks of one stream. `usage` is what each of them says about usage, None if it says nothing."""

    kind = ""
    done = DONE  # what follows the last event, and follows an error
    _opening = b""
    _closing = b""

    def __init__(self, head: Head, usage: bytes | None) -> None:
        self.head = head
        self._start = b"data: " + dumps(_head_dict(head, self.kind))[:-1] + b',"choices":[{"index":'
        self._plain_end = self._closing + b',"logprobs":null,"finish_reason":null}]'
        self._starts: dict[int, bytes] = {}
        self.say_usage(usage)

    def say_usage(self, usage: bytes | None) -> None:
        self._tail = b"}\n\n" if usage is None else b',"usage":' + usage + b"}\n\n"
        self._plain_tail = self._plain_end + self._tail

    def text(self, index: int, text: str) -> bytes:
        return self.texts(index, (dumps(text),))

    def texts(self, index: int, texts: Sequence[bytes]) -> bytes:
        """An event each for JSON strings."""
        start = self._starts.get(index)
        if start is None:
            start = self._starts[index] = b"%b%d%b" % (self._start, index, self._opening)
        tail = self._plain_tail
        return b"%b%b%b" % (start, (tail + start).join(texts), tail) if texts else b""

    def first(self, index: int) -> bytes:
        """What precedes a choice's first text."""
        return b""

    def with_logprobs(self, index: int, text: str, logprobs: Any) -> bytes:
        return self._chunk(index, self._body(text) | {"logprobs": logprobs, "finish_reason": None})

    def finish(self, index: int, finish: str, stop_reason: str | int | None) -> bytes:
        parts = self._start, index, dumps(self._body(""))[1:-1], dumps(finish), dumps(stop_reason), self._tail
        return b'%b%d,%b,"logprobs":null,"finish_reason":%b,"stop_reason":%b}]%b' % parts

    def last(self, usage: Usage | None, timings: dict[str, Any] | None) -> bytes:
        """The chunk without choices that carries usage and timings, if either was asked for."""
        if usage is None and timings is None:
            return b""
        body: dict[str, Any] = {**_head_dict(self.head, self.kind), "choices": []}
        if usage is not None:
            body["usage"] = usage.as_dict()
        if timings is not None:
            body["nanodeploy"] = timings
        return event(dumps(body))

    def failed(self, error: NanoDeployError) -> bytes:
        """The event of an error after the head of the answer."""
        return event(error_body(error))

    def _chunk(self, index: int, rest: dict[str, Any]) -> bytes:
        return b"%b%d,%b}]%b" % (self._start, index, dumps(rest)[1:-1], self._tail)

    def reasoning(self, index: int, text: str) -> bytes:
        """A piece of reasoning. Nothing where an API has none."""
        return b""

    def calls(self, index: int, deltas: Sequence[CallDelta]) -> bytes:
        """Parts of tool calls. Nothing where an API has none."""
        return b""

    @abstractmethod
    def _body(self, text: str) -> dict[str, Any]:
        """What a chunk says of a text beside its choice's number."""


class ChatChunks(Chunks):
    kind = "chat.completion.chunk"
    _opening = b',"delta":{"content":'
    _closing = b"}"

    def first(self, index: int) -> bytes:
        role = b',"delta":{"role":"assistant","content":""'
        return b"%b%d%b%b" % (self._start, index, role, self._plain_tail)

    def reasoning(self, index: int, text: str) -> bytes:
        data = dumps(text)  # by vLLM's new name and its old one
        delta = b',"delta":{"reasoning":%b,"reasoning_content":%b' % (data, data)
        return b"%b%d%b%b" % (self._start, index, delta, self._plain_tail)

    def calls(self, index: int, deltas: Sequence[CallDelta]) -> bytes:
        delta = b',"delta":{"tool_calls":' + dumps([_call_part(delta) for delta in deltas])
        return b"%b%d%b%b" % (self._start, index, delta, self._plain_tail)

    def _body(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}


def _call_part(delta: CallDelta) -> dict[str, Any]:
    if not delta.name:
        return {"index": delta.index, "function": {"arguments": delta.arguments}}
    function = {"name": delta.name, "arguments": delta.arguments}
    return {"index": delta.index, "id": delta.id, "type": "function", "function": function}


class CompletionChunks(Chunks):
    kind = "text_completion"
    _opening = b',"text":'

    def _body(self, text: str) -> dict[str, Any]:
        return {"text": text}


# -- whole answers -----------------------------------------------------------------------------------


class Call:
    """A whole tool call. `arguments` is the model's text: JSON, unless it was cut or is broken."""

    __slots__ = ("_parts", "id", "name")

    def __init__(self, first: CallDelta) -> None:
        self.id = first.id
        self.name = first.name
        self._parts = [first.arguments]

    def add(self, arguments: str) -> None:
        self._parts.append(arguments)

    @property
    def arguments(self) -> str:
        return "".join(self._parts)


def add_part(calls: list[Call], delta: CallDelta) -> None:
    """To the calls of a choice so far."""
    if delta.index == len(calls):
        calls.append(Call(delta))
    else:
        calls[delta.index].add(delta.arguments)


class Ended(NamedTuple):
    """A finished choice."""

    number: int
    text: str
    logprobs: Any
    finish: str
    stop_reason: str | int | None
    reasoning: str = ""
    calls: Sequence[Call] = ()
    prompt_logprobs: list[dict[str, Any] | None] | None = None
    vector: bytes = b""


def chat_message(choice: Ended) -> dict[str, Any]:
    """The assistant's message. Content is null where there are only calls or reasoning."""
    empty = not choice.text and (choice.calls or choice.reasoning)
    message: dict[str, Any] = {"role": "assistant", "content": None if empty else choice.text, "refusal": None}
    if choice.reasoning:
        message["reasoning"] = message["reasoning_content"] = choice.reasoning
    if choice.calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in choice.calls
        ]
    return message


def chat_answer(head: Head, choices: Sequence[Ended], usage: Usage, timings: dict[str, Any] | None) -> bytes:
    shaped = [
        {
            "index": choice.number,
            "message": chat_message(choice),
            "logprobs": choice.logprobs,
            "finish_reason": choice.finish,
            "stop_reason": choice.stop_reason,
        }
        for choice in choices
    ]
    found = choices[0].prompt_logprobs
    more = {} if found is None else {"prompt_logprobs": found}
    return _answer(head, "chat.completion", shaped, usage, timings, more)


def completion_answer(head: Head, choices: Sequence[Ended], usage: Usage, timings: dict[str, Any] | None) -> bytes:
    shaped = [
        {
            "index": choice.number,
            "text": choice.text,
            "logprobs": choice.logprobs,
            "finish_reason": choice.finish,
            "stop_reason": choice.stop_reason,
            **({} if choice.prompt_logprobs is None else {"prompt_logprobs": choice.prompt_logprobs}),
        }
        for choice in choices
    ]
    return _answer(head, "text_completion", shaped, usage, timings, {})


def _answer(
    head: Head,
    kind: str,
    choices: list[dict[str, Any]],
    usage: Usage,
    timings: dict[str, Any] | None,
    more: dict[str, Any],
) -> bytes:
    body = {**_head_dict(head, kind), "choices": choices, "usage": usage.as_dict(), **more}
    if timings is not None:
        body["nanodeploy"] = timings
    return dumps(body)


def _head_dict(head: Head, kind: str) -> dict[str, Any]:
    return {
        "id": head.id,
        "object": kind,
        "created": head.created,
        "model": head.model,
        "system_fingerprint": head.fingerprint,
    }
