"""/metrics, /health and /ready of every service, on one small asyncio endpoint.

Not a web server: GET and HEAD, one request a connection, headers under 8 KiB within 5 s. It costs nothing at
rest (a full ASGI server ticks ten times a second) and cannot be held by half-open connections.

    /health   200 while the process is alive and its loop progresses; 503 asks for a restart
    /ready    200 when it can serve; 503 with the reason means: send nothing here now
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import NamedTuple

import orjson

from common.errors import ConfigError
from common.telemetry import get_logger
from common.telemetry.metrics import CONTENT_TYPE

MAX_HEADER_BYTES = 8192
READ_TIMEOUT_S = 5.0
MAX_CONNECTIONS = 64

_log = get_logger(__name__)


class Verdict(NamedTuple):
    """An answer with its reason; `detail` is added to the JSON."""

    ok: bool
    reason: str = ""
    detail: Mapping[str, object] = {}


class Response(NamedTuple):
    status: int
    body: bytes
    content_type: str = "application/json"


Route = Callable[[], Response]


class HttpEndpoint:
    """Life: start -> port -> stop."""

    def __init__(self, routes: Mapping[str, Route]) -> None:
        self._routes = routes
        self._open = 0
        self._server: asyncio.Server | None = None

    @property
    def port(self) -> int:
        assert self._server is not None, "not started"
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def start(self, host: str, port: int) -> None:
        """Listen (port 0 takes a free one). Raises ConfigError when the address cannot be had."""
        try:
            self._server = await asyncio.start_server(self._serve, host, port, limit=MAX_HEADER_BYTES)
        except OSError as error:
            raise ConfigError(f"cannot listen on {host}:{port} for HTTP: {error}") from error

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open += 1
        try:
            async with asyncio.timeout(READ_TIMEOUT_S):
                writer.write(await self._answer(reader))
                await writer.drain()
        except (TimeoutError, OSError, asyncio.IncompleteReadError):
            pass
        finally:
            self._open -= 1
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader) -> bytes:
        if self._open > MAX_CONNECTIONS:
            return _encode(_text(503, "too many connections"))
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            return _encode(_text(431, f"headers over {MAX_HEADER_BYTES} bytes"))
        method, target = _parse(head)
        if method not in ("GET", "HEAD"):
            return _encode(_text(405 if method else 400, "GET and HEAD only"))
        route = self._routes.get(target.partition("?")[0])
        if route is None:
            return _encode(_text(404, f"no such path; have {', '.join(self._routes)}"))
        try:
            response = route()
        except Exception:  # noqa: BLE001 - the edge of a request
            _log.exception("http route failed", path=target)
            response = _text(500, "internal error")
        return _encode(response, with_body=method == "GET")


async def serve_http(
    host: str,
    port: int,
    *,
    metrics: Callable[[], bytes],
    alive: Callable[[], Verdict],
    ready: Callable[[], Verdict],
    routes: Mapping[str, Route] | None = None,
) -> HttpEndpoint:
    """Start the endpoint all services share. `metrics` renders Prometheus text; callbacks must not block."""
    endpoint = HttpEndpoint(
        {
            "/metrics": lambda: Response(200, metrics(), CONTENT_TYPE),
            "/health": lambda: _verdict("alive", alive()),
            "/ready": lambda: _verdict("ready", ready()),
            **(routes or {}),
        }
    )
    await endpoint.start(host, port)
    return endpoint


def _verdict(word: str, verdict: Verdict) -> Response:
    body = {word: verdict.ok, "reason": verdict.reason, **verdict.detail}
    return Response(200 if verdict.ok else 503, orjson.dumps(body, default=str))


def _parse(head: bytes) -> tuple[str, str]:
    parts = head.split(b"\r\n", 1)[0].split(b" ")
    if len(parts) != 3 or not parts[2].startswith(b"HTTP/1."):
        return "", ""
    return parts[0].decode("latin-1"), parts[1].decode("latin-1")


def _text(status: int, message: str) -> Response:
    return Response(status, message.encode() + b"\n", "text/plain; charset=utf-8")


def _encode(response: Response, *, with_body: bool = True) -> bytes:
    phrase = HTTPStatus(response.status).phrase
    head = (
        f"HTTP/1.1 {response.status} {phrase}\r\nContent-Type: {response.content_type}\r\n"
        f"Content-Length: {len(response.body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode("latin-1") + (response.body if with_body else b"")
