"""The access log: one line for each HTTP request when it has ended, on the log that everything else is on.

    {"event": "access", "method": "POST", "path": ..., "status": 200, "ms": 812.4, "request_id": ..., "key_id": ...,
     "prompt_tokens": 512, "cached_tokens": 448, "completion_tokens": 60, ...}

A path has no query here, a key only its id. Status 499 is a client that went before there was an answer.
"""

from __future__ import annotations

from typing import Any

from common.telemetry import get_logger
from common.types import Clock
from services.router.admission.callers import ANYONE
from services.router.exchange import Exchange, Receive, Scope, Send

CLIENT_GONE = 499

_log = get_logger("nanodeploy.access")


class AccessLog:
    """Around the whole application. Of a stream it sees the head and the end, not the events."""

    def __init__(self, app: Any, clock: Clock) -> None:
        self._app = app
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, request_id = CLIENT_GONE, b""
        exchange: Exchange | None = None

        def seen(of: Exchange) -> None:
            nonlocal exchange
            exchange = of

        async def sending(message: Any) -> None:
            nonlocal status, request_id
            if message["type"] == "http.response.start":
                status = message["status"]
                request_id = next((value for name, value in message["headers"] if name == b"x-request-id"), b"")
            await send(message)

        scope["nanodeploy.seen"] = seen
        started_s = self._clock.now()
        try:
            await self._app(scope, receive, sending)
        finally:
            del scope["nanodeploy.seen"]
            caller = exchange.caller if exchange is not None else scope.get("nanodeploy.caller", ANYONE)
            usage = exchange.usage if exchange is not None else None
            _log.info(
                "access",
                method=scope["method"],
                path=scope["path"],
                status=status,
                ms=round(1000 * (self._clock.now() - started_s), 2),
                request_id=request_id.decode("latin-1"),
                key_id=caller.key_id,
                **({} if usage is None else usage._asdict()),
            )
