"""Web pages of other origins may use the API, as browsers ask (Fetch standard, "CORS protocol").

A request with an `Origin` goes through Starlette's middleware, which answers preflights and names who may read; all
others, and the dashboard, are not touched. Cookies and other credentials of a browser are never asked for: a page
brings its own API key.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.middleware.cors import CORSMiddleware

from services.router.exchange import Receive, Scope, Send

_READABLE = (
    *("x-request-id", "traceparent", "retry-after"),
    *(f"x-ratelimit-{what}-{unit}" for what in ("limit", "remaining", "reset") for unit in ("requests", "tokens")),
)


class Cors:
    """`origins`: "*" among them is all."""

    def __init__(self, app: Any, origins: Sequence[str]) -> None:
        self._app = app
        self._asked = CORSMiddleware(
            app, allow_origins=origins, allow_methods=("*",), allow_headers=("*",), expose_headers=_READABLE
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_asked = any(name == b"origin" for name, _ in scope["headers"]) and not scope["path"].startswith("/dashboard")
        await (self._asked if is_asked else self._app)(scope, receive, send)
