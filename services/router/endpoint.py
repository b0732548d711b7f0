"""One route as a raw ASGI callable: request id, trace, who asks, errors as answers, counts."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple

from prometheus_client import Counter
from pydantic import BaseModel

from common.errors import CancelledByCallerError, InternalError, NanoDeployError
from common.rpc.context import bind_call, call_context
from common.telemetry import TraceContext, get_logger, parse_traceparent
from common.telemetry.spans import begin_trace, record, tracing
from services.router.admission.callers import Callers
from services.router.errors import status_of
from services.router.exchange import Exchange, Receive, Scope, Send
from services.router.metrics import RouterMetrics

_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9_.:\-]{1,128}")

_log = get_logger(__name__)


def request_id_of(scope: Scope, rng: random.Random) -> str:
    """The caller's own name for its request, or a new one."""
    given = next((value.decode("latin-1") for key, value in scope["headers"] if key == b"x-request-id"), "")
    return given if _REQUEST_ID.fullmatch(given) else f"{rng.getrandbits(128):032x}"


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
        self._method = api.method
        self._handle = api.handle
        self._prepare = api.prepare
        self._metrics = metrics
        self._rng = rng
        self._callers = callers
        self._counted: dict[int, Counter] = {}  # by status

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send)
        request_id = request_id_of(scope, self._rng)
        above = parse_traceparent(exchange.header(b"traceparent"))
        trace = begin_trace(self._rng) if above is None else above.child(self._rng)
        began_s = time.monotonic() if trace.sampled else 0.0
        exchange.request_id, exchange.traceparent = request_id, trace.traceparent
        exchange.headers = [(b"x-request-id", request_id.encode()), (b"traceparent", trace.traceparent.encode())]
        bind_call(request_id, trace)  # every request has a task of its own
        status = await self._guarded(exchange, known=False)
        if (seen := scope.get("nanodeploy.seen")) is not None:
            seen(exchange)
        if (counter := self._counted.get(status)) is None:
            counter = self._counted[status] = self._metrics.http.labels(self._path, status)
        counter.inc()
        if trace.sampled and tracing():
            self._record(
                exchange, trace, above.span_id if above is not None else "", time.monotonic() - began_s, status
            )

    def _record(self, exchange: Exchange, own: TraceContext, parent: str, seconds: float, status: int) -> None:
        found: dict[str, str | int | float | bool] = {
            "http.request.method": self._method,
            "http.route": self._path,
            "http.response.status_code": status,
            "nanodeploy.request_id": exchange.request_id,
        }
        if exchange.usage is not None:
            found["gen_ai.usage.input_tokens"] = exchange.usage.prompt_tokens
            found["gen_ai.usage.output_tokens"] = exchange.usage.completion_tokens
        error = f"HTTP {status}" if status >= 500 else ""
        record(f"{self._method} {self._path}", own, parent, seconds, kind="server", attributes=found, error=error)

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
