"""One HTTP exchange on raw ASGI: read a bounded body, answer with JSON or a stream of events, notice a lost client.

READING -> (nothing sent) -> answered
                         `-> STREAMING -> ended, by what the API ends its streams with, after an error event or not
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import AsyncIterable, Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any, Final, Protocol
from urllib.parse import parse_qsl

from common.errors import CancelledByCallerError, NanoDeployError, UnsupportedError
from services.router.admission.callers import ANYONE
from services.router.errors import BodyTimeoutError, BodyTooLargeError, error_body, error_headers, status_of
from services.router.replies import DONE, Usage

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_SAFE: Final = re.compile(r"[A-Za-z0-9_.\-]{0,64}")
_MAX_QUERY: Final = 4096
BODY_TIMEOUT_S: Final = 60.0  # for the whole body
TAKE_TIMEOUT_S: Final = 60.0  # for a client to take what was sent, before more is
_DRAIN_FACTOR: Final = 4  # an oversized body is read on up to this many times the limit, so that the answer arrives
_JSON: Final = (b"content-type", b"application/json")
_SSE: Final = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx in front must not gather events
]


class Connection(Protocol):
    """The client's connection, as the HTTP server puts it into the scope."""

    lost: bool
    on_lost: Callable[[], None] | None
    on_writable: Callable[[], None] | None  # it has room again, or is gone

    @property
    def full(self) -> bool:
        """Whether what was written waits for the client."""
        ...

    @property
    def has_whole_body(self) -> bool:
        """Nothing of the request is still to come."""
        ...

    def write_chunk(self, data: bytes) -> None:
        """A part of the body of a chunked answer that has begun; nothing if the connection is gone."""
        ...

    def abort(self) -> None: ...


class Exchange:
    """`headers` are added to every answer; `shape` writes an error's body."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._connection: Connection = scope["nanodeploy.connection"]
        self._headers: dict[bytes, bytes] | None = None  # by name
        self._complete = False  # the body was read to its end
        self.streaming = False
        self.ended = False
        self.headers: list[tuple[bytes, bytes]] = []
        self.request_id = self.traceparent = ""
        self.caller = ANYONE
        self.usage: Usage | None = None  # of an answer that tokens were made for
        self.shape: Callable[[NanoDeployError], bytes] = error_body
        self._failed: Callable[[NanoDeployError], bytes] | None = None
        self._done = DONE

    @property
    def raw_headers(self) -> list[tuple[bytes, bytes]]:
        found: list[tuple[bytes, bytes]] = self._scope["headers"]
        return found

    @property
    def owner(self) -> str:
        """Whose stored objects the caller's are: safe in keys, empty where the API is open."""
        tenant = self.caller.tenant
        if _SAFE.fullmatch(tenant) is None:
            return hashlib.blake2b(tenant.encode(), digest_size=16).hexdigest()
        return tenant

    def path(self, name: str) -> str:
        """A part of the route's path."""
        found: str = self._scope["path_params"][name]
        return found

    def query(self) -> dict[str, str]:
        return dict(parse_qsl(self._scope["query_string"].decode("latin-1")[:_MAX_QUERY]))

    def header(self, name: bytes) -> str:
        """Empty if it was not sent; the first if it was sent more than once."""
        if self._headers is None:
            self._headers = dict(reversed(self._scope["headers"]))
        return self._headers.get(name, b"").decode("latin-1")

    # -- in --

    async def body(self, limit: int) -> bytes:
        """The whole body.

        Raises `BodyTooLargeError`, `BodyTimeoutError`, `CancelledByCallerError`, `UnsupportedError`.
        """
        if (coding := self.header(b"content-encoding")) not in ("", "identity"):
            raise UnsupportedError(f"Content-Encoding {coding[:64]} is not supported: send the body as it is")
        declared = self.header(b"content-length")
        too_large = declared.isdigit() and int(declared) > limit
        if too_large and self.header(b"expect").lower() == "100-continue":
            raise _too_large(limit)  # it asks before it sends
        keep = limit if not too_large else 0
        if self._connection.has_whole_body:
            return await self._read(keep, limit)
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                return await self._read(keep, limit)
        except TimeoutError:
            raise BodyTimeoutError(f"the body did not arrive within {BODY_TIMEOUT_S:g} s") from None

    async def _read(self, keep: int, limit: int) -> bytes:
        chunks: list[bytes] = []
        size = 0
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise CancelledByCallerError("the client went away")
            chunk: bytes = message.get("body", b"")
            size += len(chunk)
            if size <= keep:
                chunks.append(chunk)
            else:
                chunks.clear()
            self._complete = not message.get("more_body", False)
            if self._complete or size > _DRAIN_FACTOR * limit:
                break
        if size > keep:
            raise _too_large(limit)
        return b"".join(chunks)

    @contextmanager
    def watch(self, on_lost: Callable[[], None], on_writable: Callable[[], None]) -> Iterator[None]:
        """Call `on_lost` as soon as the client disconnects, `on_writable` when a full connection has room again."""
        connection = self._connection
        connection.on_lost, connection.on_writable = on_lost, on_writable
        try:
            if connection.lost:
                on_lost()
            yield
        finally:
            connection.on_lost = connection.on_writable = None

    # -- out --

    async def answer(self, status: int, payload: bytes, *headers: tuple[bytes, bytes]) -> None:
        self.ended = True
        length = (b"content-length", str(len(payload)).encode())
        sent = [_JSON, length, *self.headers, *headers]
        if not self._complete and self._scope["method"] == "POST":
            sent.append((b"connection", b"close"))  # the rest of the body is not wanted
        await self._say({"type": "http.response.start", "status": status, "headers": sent})
        await self._say({"type": "http.response.body", "body": payload})

    async def pour(self, kind: bytes, length: int, parts: AsyncIterable[bytes]) -> None:
        """An answer of `length` bytes in parts, as fast as the client takes them. Cut where a part lacks."""
        self.ended = True
        sent = [(b"content-type", kind), (b"content-length", str(length).encode()), *self.headers]
        await self._say({"type": "http.response.start", "status": 200, "headers": sent})
        async for part in parts:
            length -= len(part)
            if length < 0 or self._connection.lost:
                length = -1
                break
            await self._say({"type": "http.response.body", "body": part, "more_body": True})
        if length:
            self.abort()
            raise CancelledByCallerError("the answer could not be sent to its end")
        await self._say({"type": "http.response.body", "body": b""})

    async def _say(self, message: MutableMapping[str, Any]) -> None:
        """Send when the client has taken what was sent; cut the connection if it does not within `TAKE_TIMEOUT_S`."""
        if not self._connection.full:
            await self._send(message)
            return
        try:
            async with asyncio.timeout(TAKE_TIMEOUT_S):
                await self._send(message)
        except TimeoutError:
            self.abort()
            raise CancelledByCallerError("the client does not read its answer") from None

    async def begin(self) -> None:
        """The head of a stream of events."""
        self.streaming = True
        await self._say({"type": "http.response.start", "status": 200, "headers": [*_SSE, *self.headers]})

    def write(self, events: bytes) -> bool:
        """Some events of a stream that has begun. False if the client must catch up before more are written."""
        self._connection.write_chunk(events)
        return not self._connection.full

    def speak(self, failed: Callable[[NanoDeployError], bytes], done: bytes) -> None:
        """The stream to come: how it says an error, and what ends it."""
        self._failed, self._done = failed, done

    async def end(self, data: bytes = b"") -> None:
        """The last events, and what ends the stream."""
        if not self.streaming:
            await self.begin()
        self.ended = True
        await self._say({"type": "http.response.body", "body": data + self._done})

    async def fail(self, error: NanoDeployError) -> None:
        if self.ended:
            return
        if self.streaming and self._failed is not None:
            await self.end(self._failed(error))
        elif not isinstance(error, CancelledByCallerError):
            await self.answer(status_of(error), self.shape(error), *error_headers(error))

    def abort(self) -> None:
        """Drop the connection without waiting for a client that does not read."""
        self._connection.abort()

    def abort_if_full(self) -> None:
        """The same, where more could not be said before the client reads."""
        if self._connection.full:
            self.abort()


def _too_large(limit: int) -> BodyTooLargeError:
    return BodyTooLargeError(f"the body is larger than {limit} bytes")
