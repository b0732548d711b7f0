"""`/dashboard`: one page that needs nothing else, and `/dashboard/data`, the JSON that it asks for.

The page holds no data and is open to everybody who reaches the router; data need a key where the API does.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path
from typing import Final

import msgspec
from fastapi import FastAPI, Request, Response

from common.errors import NanoDeployError
from services.router.console.snapshot import snapshot
from services.router.errors import error_body, error_headers, status_of
from services.router.gateway import Gateway

_PARTS: Final = Path(__file__).parent / "page"
_SCRIPTS: Final = ("lib.js", "panels.js", "chat.js", "main.js")
_PRIVATE: Final = {"cache-control": "no-store", "x-content-type-options": "nosniff"}


def add_dashboard(app: FastAPI, gateway: Gateway) -> None:
    @app.get("/dashboard", include_in_schema=False)
    async def dashboard() -> Response:
        text, policy = page()
        headers = _PRIVATE | {"content-security-policy": policy, "referrer-policy": "no-referrer"}
        return Response(text, media_type="text/html", headers=headers)

    @app.get("/dashboard/data", include_in_schema=False)
    async def data(request: Request) -> Response:
        try:
            caller = gateway.callers.caller(request.scope["headers"])
        except NanoDeployError as error:
            response = Response(error_body(error), status_of(error), _PRIVATE, "application/json")
            response.raw_headers.extend(error_headers(error))
            return response
        asked = request.query_params
        since = asked.get("since", "")
        known = asked.get("epoch") == gateway.recent.epoch and since.isascii() and since.isdigit() and len(since) < 16
        found = snapshot(gateway, caller, int(since) if known else 0)
        return Response(msgspec.json.encode(found), 200, _PRIVATE, "application/json")


@cache
def page() -> tuple[str, str]:
    """The page, and its Content-Security-Policy: it runs this script alone and asks this router alone."""
    style = (_PARTS / "style.css").read_text(encoding="utf-8")
    script = "".join((_PARTS / name).read_text(encoding="utf-8") for name in _SCRIPTS)
    text = (_PARTS / "page.html").read_text(encoding="utf-8")
    text = text.replace("/*STYLE*/", style).replace("/*SCRIPT*/", script)
    policy = (
        f"default-src 'none'; style-src {_source(style)}; script-src {_source(script)}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text, policy


def _source(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
