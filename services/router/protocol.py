"""HTTP connections: uvicorn's protocol with limits, and a short way for the routes that answer by themselves.

bytes -> httptools -> a direct route: `Cycle`, begun when what came with its head has been read
                      any other: uvicorn's own cycle, through the application and its middleware

A request that wants to speak another protocol (Java's client asks for h2c with its first) is read as if it did not.
httptools would take its body for that protocol's, so it is told the head again, without the wish.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Final

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from common.telemetry import get_logger
from services.router.errors import shaped

HEAD_TIMEOUT_S: Final = 20.0  # connection or first byte -> end of the request's headers
MAX_HEAD_BYTES: Final = 64 * 1024  # and of anything else that is no body: trailers, what frames its chunks
_PROBES: Final = (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 60_000))

App = Callable[[Any, Any, Any], Any]

_log = get_logger(__name__)


class Cycle(RequestResponseCycle):
    """One request on a direct route. The answer's head leaves with what follows it: one write instead of two."""

    head = b""
    bare = False  # its parts go unframed, to a client of HTTP/1.0: the end of the connection is the answer's

    async def send(self, message: Any) -> None:
        if self.flow.write_paused and not self.disconnected:
            await self.flow.drain()
        if self.disconnected:
            return
        if not self.response_started:
            self.response_started, self.waiting_for_100_continue = True, False
            self.head = self._head(message["status"], [*self.default_headers, *message["headers"]])
            return
        body, more = message.get("body", b""), message.get("more_body", False)
        if self.response_complete:
            raise RuntimeError("the answer is complete")
        if not self.chunked_encoding:
            self.expected_content_length -= len(body)
            if self.expected_content_length < 0 or (self.expected_content_length and not more):
                raise RuntimeError("the answer is not as long as its head says")
            self.put(body)
        else:
            part = self.framed(body) if body else b""
            self.put(part if more or self.bare else part + b"0\r\n\r\n")
        if not more:
            self.response_complete = True
            self.message_event.set()
            if not self.keep_alive:
                self.transport.close()
            self.on_response()

    def _head(self, status: int, headers: list[tuple[bytes, bytes]]) -> bytes:
        """Names are our own, in lower case; a value with a line break in it is refused."""
        self.chunked_encoding = True
        closes = False
        for name, value in headers:
            if name == b"content-length":
                self.chunked_encoding, self.expected_content_length = False, int(value)
            elif name == b"connection":
                closes = value == b"close"
        lines = b"".join([b"%b: %b\r\n" % header for header in headers])
        if lines.count(b"\n") != len(headers) or lines.count(b"\r") != len(headers):
            raise RuntimeError("a header has a line break in it")
        if closes:
            self.keep_alive = False
        elif not self.keep_alive:
            lines += b"connection: close\r\n"
        self.bare = self.chunked_encoding and self.scope["http_version"] == "1.0"
        if self.chunked_encoding and not self.bare:
            lines += b"transfer-encoding: chunked\r\n"
        return b"%b%b\r\n" % (STATUS_LINE[status], lines)

    def framed(self, data: bytes) -> bytes:
        return data if self.bare else b"%x\r\n%b\r\n" % (len(data), data)

    def put(self, data: bytes) -> None:
        """Nothing, if the connection is being closed: an end without its middle would look whole."""
        if self.head:
            data, self.head = self.head + data, b""
        if not self.transport.is_closing():
            self.transport.write(data)


class BoundedHttpProtocol(HttpToolsProtocol):
    """uvicorn's, with limits on a request's head, probes for dead peers, and `exchange.Connection`.

    `direct`: applications by path, for POST.
    """

    direct: ClassVar[Mapping[bytes, App]] = {}
    lost = False
    on_lost: Callable[[], None] | None = None
    on_writable: Callable[[], None] | None = None
    _head_timer: asyncio.TimerHandle | None = None
    _bare_bytes = 0  # came since the last that was a body's
    _begun: tuple[Cycle, App] | None = None  # read, and not started yet
    _running: RequestResponseCycle | None = None  # `cycle` is the last that was read: others may be in line before it

    @classmethod
    def with_direct(cls, direct: Mapping[bytes, App]) -> type[BoundedHttpProtocol]:
        return type(cls.__name__, (cls,), {"direct": direct})

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in _PROBES:
                if hasattr(socket, name):
                    sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._head_late)

    def data_received(self, data: bytes) -> None:
        self._bare_bytes += len(data)
        wrong = ""
        try:
            self._read(data)
        except httptools.HttpParserError:
            wrong = "Invalid HTTP request received."
        if self._begun is not None:
            (cycle, app), self._begun = self._begun, None
            self._start_asgi_task(cycle, app)
        if not wrong and self._bare_bytes > MAX_HEAD_BYTES:
            wrong = "The headers are too large."
        if wrong and not self.transport.is_closing():
            self.send_400_response(wrong)

    def _read(self, data: bytes) -> None:
        while data:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as asked:
                data = self._head_without_upgrade() + data[asked.args[0] :]

    def send_400_response(self, msg: str) -> None:
        """Not while a request that was read well is being answered: it would be taken for a part of that answer."""
        request_id, running = secrets.token_hex(16), self._running
        _log.warning("not HTTP", why=msg, request_id=request_id)
        if running is None or running.response_complete or (running.more_body and not running.response_started):
            body = shaped(msg, "invalid_request_error", None, None)
            headers = [
                *self.server_state.default_headers,
                (b"content-type", b"application/json"),
                (b"content-length", b"%d" % len(body)),
                (b"x-request-id", request_id.encode()),
                (b"connection", b"close"),
            ]
            lines = b"".join([b"%b: %b\r\n" % header for header in headers])
            self.transport.write(b"%b%b\r\n%b" % (STATUS_LINE[400], lines, body))
        self.transport.close()

    def _head_without_upgrade(self) -> bytes:
        """Of the request that was read last, for a new parser."""
        method, version = self.parser.get_method(), self.parser.get_http_version().encode()
        if method == b"CONNECT":
            raise httptools.HttpParserInvalidMethodError("this is no proxy")
        kept = [b"%b: %b\r\n" % header for header in self.headers if header[0] != b"upgrade"]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        return b"%b %b HTTP/%b\r\n%b\r\n" % (method, self.url, version, b"".join(kept))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._unset_keepalive_if_required()
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._head_late)
        scope: Any = self.scope
        scope["nanodeploy.connection"] = self

    def on_headers_complete(self) -> None:
        self._bare_bytes = 0
        if self.parser.should_upgrade():
            return
        self._stop_timer()
        self._unset_keepalive_if_required()  # set again if the answer before ended within this head
        app = self.direct.get(self.url)
        if app is None or self.parser.get_method() != b"POST":
            super().on_headers_complete()
        elif self.cycle is not None and not self.cycle.response_complete:
            super().on_headers_complete()  # pipelined: in line behind the one before
        else:
            self._begin_direct(app)
        self.headers = []  # where trailers go: they are none of the request's

    def on_body(self, body: bytes) -> None:
        self._bare_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def _begin_direct(self, app: App) -> None:
        version, scope = self.parser.get_http_version(), self.scope
        scope["method"], scope["http_version"] = "POST", version
        scope["path"], scope["raw_path"], scope["query_string"] = self.url.decode("ascii"), self.url, b""
        self.cycle = cycle = Cycle(
            scope=scope,
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=False,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=self.expect_100_continue,
            keep_alive=version != "1.0" and self.parser.should_keep_alive(),
            on_response=self.on_response_complete,
        )
        self._begun = cycle, app

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)
        self.lost = True
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
        if self.cycle is not None and self.cycle.response_complete:
            self.cycle = self._running = None  # type: ignore[assignment]  # each refers to the other
        for told in (self.on_lost, self.on_writable):
            if told is not None:
                told()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.on_writable is not None:
            self.on_writable()

    @property
    def full(self) -> bool:
        return self.flow.write_paused

    @property
    def has_whole_body(self) -> bool:
        return self._running is not None and not self._running.more_body

    def write_chunk(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if isinstance(self._running, Cycle):
            self._running.put(self._running.framed(data))
        else:
            self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    def abort(self) -> None:
        self.transport.abort()

    def _head_late(self) -> None:
        self._head_timer = None
        if self.cycle is not None and not self.cycle.response_complete:  # one in line, which may not even be read yet
            self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._head_late)
        else:
            self.transport.close()

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
