"""One request of the soak, sent, followed and judged.

asked -> right                    the answer of the offline run, token by token where it shows its tokens
      -> left                     we went away on purpose; what had come was a beginning of the right answer
      -> refused                  a bad request got its 4xx
      -> error                    one clear error: a status of 5xx or an event in the stream, with a message
      -> lost                     the router itself was gone: connection refused or cut
      -> wrong | stuck            never: a right answer is the only other one, and everything ends
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx
from soak_book import BadQuestion, Book, Choice, Question

BOUND_S = 60.0  # by then any request has ended; they take milliseconds
ERROR_TYPES = ("server_error", "service_unavailable_error", "rate_limit_error", "timeout_error")


class WrongAnswerError(Exception):
    pass


class ClearError(Exception):
    """The cluster said that and why it cannot answer."""


@dataclass(frozen=True)
class Outcome:
    kind: str
    result: str
    began: float  # time.time(), as log lines have it
    ended: float
    detail: str = ""


@dataclass
class Tally:
    """All that happened, of all rounds."""

    outcomes: list[Outcome] = field(default_factory=list)
    totals: Counter[str] = field(default_factory=Counter)  # of the answers' own statistics
    fallbacks: Counter[str] = field(default_factory=Counter)

    def add_stats(self, requests: list[dict[str, Any]]) -> None:
        for stats in filter(None, requests):
            for name in ("cached_tokens", "computed_tokens", "transferred_tokens", "preemptions"):
                self.totals[name] += stats[name]
            if stats["fallback"]:
                self.fallbacks[stats["fallback"]] += 1


class Asker:
    """Sends requests over connections of its own; close it and the cluster sees none of them any more."""

    def __init__(self, url: str, model: str, book: Book, tally: Tally) -> None:
        self._url = url
        self._model = model
        self._book = book
        self._tally = tally
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        self._http = httpx.AsyncClient(base_url=url, timeout=BOUND_S * 2, limits=limits)

    async def close(self) -> None:
        await self._http.aclose()

    async def ask(self, rng: random.Random, bad: tuple[BadQuestion, ...]) -> Outcome:
        """One request of any kind."""
        draw = rng.random()
        if draw < 0.06:
            wrong = rng.choice(bad)
            return await self._judged("bad", self._refused(wrong))
        if draw < 0.08:
            return await self._judged("half-open", self._half_open(rng))
        question = self._book.draw(rng)
        if draw < 0.13:
            return await self._judged("gone whole", self._gone(question, rng.uniform(0.0, 0.05)))
        if draw < 0.25:
            return await self._judged("gone stream", self._stream(question, leave_after=rng.randint(0, 8)))
        if draw < 0.62:
            return await self._judged(f"{question.kind} stream", self._stream(question))
        return await self._judged(f"{question.kind} whole", self._whole(question))

    async def _judged(self, kind: str, request: Any) -> Outcome:
        began, result, detail = time.time(), "", ""
        try:
            async with asyncio.timeout(BOUND_S):
                result = await request
        except TimeoutError:
            result = "stuck"
        except WrongAnswerError as error:
            result, detail = "wrong", str(error)
        except ClearError as error:
            result, detail = "error", str(error)
        except (httpx.TransportError, OSError, asyncio.IncompleteReadError) as error:
            result, detail = "lost", f"{type(error).__name__} {error}"
        outcome = Outcome(kind, result, began, time.time(), detail)
        self._tally.outcomes.append(outcome)
        return outcome

    # -- kinds ---------------------------------------------------------------------------------------

    async def _whole(self, question: Question) -> str:
        response = await self._http.post(
            _path(question), json=self._body(question), headers={"x-nanodeploy-timings": "1"}
        )
        answer = _checked(response.status_code, response.content)
        got = sorted(answer["choices"], key=lambda choice: choice["index"])
        for right, choice in zip(question.right, got, strict=True):
            text = choice["message"]["content"] if question.chat else choice["text"]
            self._compare(question, right, text or "", choice["finish_reason"], _names(choice))
        _check_usage(question, answer["usage"])
        self._tally.add_stats(answer["nanodeploy"]["requests"])
        return "right"

    async def _stream(self, question: Question, leave_after: int | None = None) -> str:
        texts, names = [""] * len(question.right), [list[str]() for _ in question.right]
        finishes = [""] * len(question.right)
        usage, events = None, 0
        body = self._body(question) | {"stream": True, "stream_options": {"include_usage": True}}
        async with self._http.stream("POST", _path(question), json=body) as response:
            if response.status_code != 200:
                _checked(response.status_code, await response.aread())
            async for line in response.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    _check_beginnings(question, texts)
                    raise _clear(event)
                for choice in event["choices"]:
                    index = choice["index"]
                    texts[index] += (choice["delta"].get("content") if question.chat else choice["text"]) or ""
                    names[index] += _names(choice)
                    finishes[index] = choice["finish_reason"] or finishes[index]
                usage = event.get("usage") or usage
                if events == leave_after:
                    _check_beginnings(question, texts)
                    return "left"
                events += 1
        if usage is None:
            raise WrongAnswerError(f"{question.kind}: a stream ended without its usage and without an error")
        for right, text, finish, tokens in zip(question.right, texts, finishes, names, strict=True):
            self._compare(question, right, text, finish, tokens)
        _check_usage(question, usage)
        return "right"

    async def _gone(self, question: Question, after_s: float) -> str:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(after_s):
                return await self._whole(question)
        return "left"

    async def _refused(self, bad: BadQuestion) -> str:
        headers = {"content-type": "application/json"}
        response = await self._http.post("/v1/completions", content=bad.content, headers=headers)
        if response.status_code >= 500:
            _checked(response.status_code, response.content)
        message = response.json()["error"]["message"]
        if response.status_code != bad.status or not message:
            raise WrongAnswerError(f"{bad.content[:80]!r}: {response.status_code} {message!r}, not {bad.status}")
        return "refused"

    async def _half_open(self, rng: random.Random) -> str:
        """A request that stops in the middle of its head or body."""
        data = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 500\r\n\r\n" + b'{"prompt": "' * 20
        _, writer = await asyncio.open_connection(*_address(self._url))
        writer.write(data[: rng.randint(1, len(data))])
        await writer.drain()
        await asyncio.sleep(rng.uniform(0.0, 0.2))
        writer.transport.abort()
        return "left"

    # -- what is right ---------------------------------------------------------------------------------

    def _body(self, question: Question) -> dict[str, Any]:
        return {"model": self._model, **question.body}

    def _compare(self, question: Question, right: Choice, text: str, finish: str, names: list[str]) -> None:
        if (text, finish) != (right.text, right.finish):
            raise WrongAnswerError(f"{question.kind}: {text!r} ({finish}), not {right.text!r} ({right.finish})")
        if "logprobs" in question.body:
            tokens = tuple(self._book.names[name] for name in names)
            if tokens != right.tokens:
                raise WrongAnswerError(f"{question.kind}: tokens {tokens}, not {right.tokens}")


async def flood(url: str, model: str, count: int, rng: random.Random) -> int:
    """`count` streams at once, cut all together when a fifth of them have spoken. How many had."""
    spoken, enough = [0], asyncio.Event()
    prompt = [rng.randrange(4, 256) for _ in range(60)]
    body = {"model": model, "prompt": prompt, "max_tokens": 400, "temperature": 0, "stream": True, "ignore_eos": True}
    tasks = [asyncio.create_task(_flooding(url, body, spoken, enough, count // 5)) for _ in range(count)]
    try:
        async with asyncio.timeout(BOUND_S):
            await enough.wait()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return spoken[0]


async def _flooding(url: str, body: dict[str, Any], spoken: list[int], enough: asyncio.Event, limit: int) -> None:
    reader, writer = await asyncio.open_connection(*_address(url))
    data = json.dumps(body).encode()
    try:
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n")
        writer.write(b"content-length: %d\r\n\r\n%s" % (len(data), data))
        await reader.readuntil(b"data: ")
        spoken[0] += 1
        if spoken[0] >= limit:
            enough.set()
        await reader.read(-1)
    finally:
        writer.transport.abort()


def _address(url: str) -> tuple[str, int]:
    host, port = url.removeprefix("http://").split(":")
    return host, int(port)


def _path(question: Question) -> str:
    return "/v1/chat/completions" if question.chat else "/v1/completions"


def _names(choice: dict[str, Any]) -> list[str]:
    return (choice.get("logprobs") or {}).get("tokens") or []


def _checked(status: int, content: bytes) -> dict[str, Any]:
    """The answer, or the error that is said."""
    try:
        answer: dict[str, Any] = json.loads(content)
    except ValueError:
        raise WrongAnswerError(f"status {status} with {content[:200]!r}") from None
    if status != 200:
        raise _clear(answer)
    return answer


def _clear(answer: dict[str, Any]) -> Exception:
    error = answer.get("error") or {}
    if error.get("type") not in ERROR_TYPES or not error.get("message"):
        return WrongAnswerError(f"an error that is not clear: {answer}")
    return ClearError(error["message"])


def _check_beginnings(question: Question, texts: list[str]) -> None:
    for right, text in zip(question.right, texts, strict=True):
        if not right.text.startswith(text):
            raise WrongAnswerError(f"{question.kind}: {text!r} is no beginning of {right.text!r}")


def _check_usage(question: Question, usage: dict[str, Any]) -> None:
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    if usage["prompt_tokens"] != question.prompt_tokens or not 0 <= cached <= question.prompt_tokens:
        raise WrongAnswerError(f"{question.kind}: usage {usage} for a prompt of {question.prompt_tokens} tokens")
