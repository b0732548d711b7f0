"""An exchange with nobody at the other end: requests that the router makes itself, for batches and the background."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

from services.router.admission.callers import Caller
from services.router.exchange import Exchange


class _NoConnection:
    """Never full; lost when whoever wanted the answer says so."""

    def __init__(self) -> None:
        self.lost = False
        self.full = False
        self.has_whole_body = True
        self.on_lost: Callable[[], None] | None = None
        self.on_writable: Callable[[], None] | None = None

    def write_chunk(self, data: bytes) -> None:
        pass

    def abort(self) -> None:
        self.lose()

    def lose(self) -> None:
        self.lost = True
        if self.on_lost is not None:
            self.on_lost()


class LocalExchange(Exchange):
    """`status` and `payload` are the answer, when there is one; `may_help`: asking again, by what it says."""

    def __init__(self, body: bytes, traceparent: str, caller: Caller) -> None:
        self._nobody = _NoConnection()
        scope: dict[str, Any] = {
            "method": "POST",
            "headers": [(b"content-length", str(len(body)).encode())],
            "nanodeploy.connection": self._nobody,
        }
        self._given = body
        self.status = 0
        self.may_help = True
        self.payload = b""
        super().__init__(scope, self._take, self._put)
        self.traceparent = traceparent
        self.caller = caller

    async def _take(self) -> MutableMapping[str, Any]:
        return {"type": "http.request", "body": self._given, "more_body": False}

    async def _put(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.may_help = self.status != 429 or any(name == b"retry-after" for name, _ in message["headers"])
        else:
            self.payload += message["body"]

    def lose(self) -> None:
        """Nobody wants the answer any more: what runs for it is cancelled."""
        self._nobody.lose()
