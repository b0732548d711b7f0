"""One route as a raw ASGI callable: request id, trace, who asks, errors as answers, counts."""

from __future__ import annotations

import random
import re
from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple

from pydantic import BaseModel

from common.errors import CancelledByCallerError, InternalError, NanoDeployError
from common.rpc.context import call_context
from common.telemetry import get_logger, new_trace, parse_traceparent
from services.router.admission.callers import Callers
from services.router.errors import status_of
from services.router.exchange import Exchange, Receive, Scope, Send
from services.router.metrics import RouterMetrics

REQUEST_ID: Final = re.compile(r"[A-Za-z0-9_.:\-]{1,128}")

_log = get_logger(__name__)


class Api(NamedTuple):
    """A route as the application and its document know it. `prepare` comes before anything that can fail."""

    method: str
    path: str
    summary: str
    handle: Callable[[Exchange], Awaitable[None]]
    body: type[BaseModel] | None = None
    prepare: Callable[[Exchange], None] | None = None


class RawEndpoint:
    def __init__(self, api: Api, metrics: RouterMetrics, rng: random.Random, callers: Callers) -> None:
        self._path = api.path
        self._handle = api.handle
        self._prepare = api.prepare
        self._metrics = metrics
        self._rng = rng
        self._callers = callers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send)
        request_id = exchange.header(b"x-request-id")
        if REQUEST_ID.fullmatch(request_id) is None:
            request_id = f"{self._rng.getrandbits(128):032x}"
        trace = parse_traceparent(exchange.header(b"traceparent"))
        trace = new_trace(self._rng) if trace is None else trace.child(self._rng)
        exchange.request_id, exchange.traceparent = request_id, trace.traceparent
        exchange.headers = [(b"x-request-id", request_id.encode()), (b"traceparent", trace.traceparent.encode())]
        with call_context(request_id, trace.traceparent):
            status = await self._guarded(exchange, known=False)
        self._metrics.http.labels(self._path, status).inc()

    async def of_router(self, exchange: Exchange) -> None:
        """A request that the router makes itself, for a caller who was admitted before."""
        exchange.request_id = f"{self._rng.getrandbits(128):032x}"
        with call_context(exchange.request_id, exchange.traceparent):
            await self._guarded(exchange, known=True)

    async def _guarded(self, exchange: Exchange, *, known: bool) -> int:
        try:
            if self._prepare is not None:
                self._prepare(exchange)
            if not known:
                exchange.caller = self._callers.caller(exchange.raw_headers)
            await self._handle(exchange)
            return 200
        except CancelledByCallerError:
            _log.info("client went away", path=self._path)
            return 499
        except NanoDeployError as error:
            status = status_of(error)
            log = _log.warning if status >= 500 else _log.info
            said = error.message if status >= 500 else error.code  # a client's mistake may quote what it sent
            log("request failed", path=self._path, status=status, error=said, param=error.param)
            await exchange.fail(error)
            return status
        except Exception:  # noqa: BLE001 - the edge of a request
            _log.exception("request failed", path=self._path)
            await exchange.fail(InternalError("internal error"))
            return 500
