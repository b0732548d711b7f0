"""The HTTP application: FastAPI for the small routes and the documents, raw ASGI for the hot ones.

`RawEndpoint` gives each exchange its request id and trace, turns errors into answers and counts. The raw routes
are in the OpenAPI document with the schemas that check their bodies.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.routing import Route

from common.errors import CancelledByCallerError, InternalError, NanoDeployError, NotFoundError
from common.rpc.context import call_context
from common.telemetry import get_logger, new_trace, parse_traceparent
from common.telemetry.metrics import CONTENT_TYPE
from common.types import Role
from services.router import replies
from services.router.admission.callers import Callers
from services.router.errors import error_body, error_headers, shaped, status_of
from services.router.exchange import Exchange, Receive, Scope, Send
from services.router.gateway import Gateway
from services.router.metrics import RouterMetrics
from services.router.schemas import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody

_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9_.:\-]{1,128}")

_log = get_logger(__name__)


class RawEndpoint:
    """One POST route as a raw ASGI callable."""

    def __init__(
        self,
        path: str,
        handle: Callable[[Exchange], Awaitable[None]],
        metrics: RouterMetrics,
        rng: random.Random,
        callers: Callers,
    ) -> None:
        self._path = path
        self._handle = handle
        self._metrics = metrics
        self._rng = rng
        self._callers = callers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send)
        request_id = exchange.header(b"x-request-id")
        if _REQUEST_ID.fullmatch(request_id) is None:
            request_id = f"{self._rng.getrandbits(128):032x}"
        exchange.request_id = request_id
        trace = parse_traceparent(exchange.header(b"traceparent"))
        trace = new_trace(self._rng) if trace is None else trace.child(self._rng)
        exchange.traceparent = trace.traceparent
        exchange.headers = [(b"x-request-id", request_id.encode()), (b"traceparent", trace.traceparent.encode())]
        with call_context(request_id, trace.traceparent):
            status = await self._guarded(exchange)
        self._metrics.http.labels(self._path, status).inc()

    async def _guarded(self, exchange: Exchange) -> int:
        try:
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


class _App(FastAPI):
    """The hot routes skip the middleware, which would wrap every event that is sent; the rest of /v1 needs a key too.

    Who asks is in the scope, as `nanodeploy.caller`.
    """

    def __init__(self, callers: Callers, rng: random.Random, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._callers = callers
        self._rng = rng
        self.raw: dict[str, RawEndpoint] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and (raw := self.raw.get(scope["path"])) is not None:
            await raw(scope, receive, send)
            return
        if scope["type"] == "http":
            send = self._with_request_id(scope, send)
        if scope["type"] == "http" and scope["path"].startswith("/v1/") and scope["method"] != "OPTIONS":
            try:
                scope["nanodeploy.caller"] = self._callers.caller(scope["headers"])
            except NanoDeployError as error:
                await _refusal(error)(scope, receive, send)
                return
        await super().__call__(scope, receive, send)

    def _with_request_id(self, scope: Scope, send: Send) -> Send:
        """Raw routes name it themselves."""
        given = next((value for key, value in scope["headers"] if key == b"x-request-id"), b"")
        request_id = given if _REQUEST_ID.fullmatch(given.decode("latin-1")) else b"%032x" % self._rng.getrandbits(128)

        async def sending(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = message | {"headers": [*message.get("headers", ()), (b"x-request-id", request_id)]}
            await send(message)

        return sending


def make_app(gateway: Gateway, rng: random.Random) -> FastAPI:
    app = _App(
        gateway.callers, rng, title="NanoDeploy", version="1", description="OpenAI-compatible API.", redoc_url=None
    )
    raw: list[tuple[str, type, str, Callable[[Exchange], Awaitable[None]]]] = [
        ("/v1/chat/completions", ChatBody, "Answer a conversation", gateway.chat),
        ("/v1/completions", CompletionBody, "Continue a text", gateway.completions),
        ("/tokenize", TokenizeBody, "Tokens of a text or conversation", gateway.tokenize),
        ("/detokenize", DetokenizeBody, "Text of tokens", gateway.detokenize),
    ]
    for path, _, _, handle in raw:
        app.raw[path] = RawEndpoint(path, handle, gateway.metrics, rng, gateway.callers)
        app.router.routes.append(Route(path, app.raw[path], methods=["POST"]))
    _add_small_routes(app, gateway)
    _add_error_shapes(app)
    bodies = [(path, body, summary) for path, body, summary, _ in raw]
    document: dict[str, Any] = {}

    def openapi() -> dict[str, Any]:
        if not document:
            document.update(_document(app, bodies))
        return document

    app.openapi = openapi  # type: ignore[method-assign]
    return app


def _document(app: FastAPI, bodies: list[tuple[str, type, str]]) -> dict[str, Any]:
    made = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    template = "#/components/schemas/{model}"
    models = [(body, "validation") for _, body, _ in bodies]
    refs, definitions = models_json_schema(models, ref_template=template)  # type: ignore[arg-type]
    made.setdefault("components", {}).setdefault("schemas", {}).update(definitions["$defs"])
    for path, body, summary in bodies:
        schema = refs[(body, "validation")]
        error = {"description": "An OpenAI error object", "content": {"application/json": {"schema": {}}}}
        made["paths"][path] = {
            "post": {
                "summary": summary,
                "operationId": path.strip("/").replace("/", "_"),
                "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
                "responses": {
                    "200": {"description": "OK"},
                    "400": error,
                    "401": error,
                    "404": error,
                    "429": error,
                    "503": error,
                },
            }
        }
    return made


def _refusal(error: NanoDeployError) -> Response:
    response = _json(error_body(error), status_of(error))
    response.raw_headers.extend(error_headers(error))
    return response


def _json(payload: bytes, status: int = 200) -> Response:
    return Response(payload, status, media_type="application/json")


def _add_small_routes(app: FastAPI, gateway: Gateway) -> None:
    started = int(time.time())

    def card(name: str, max_model_len: int) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": started,
            "owned_by": "nanodeploy",
            "root": name,
            "parent": None,
            "max_model_len": max_model_len,
        }

    @app.get("/v1/models", summary="Models served")
    async def list_models() -> Response:
        data = [card(name, model.max_model_len) for name, model in gateway.models().items()]
        return _json(replies.dumps({"object": "list", "data": data}))

    @app.get("/v1/models/{name:path}", summary="One model")
    async def get_model(name: str) -> Response:
        model = gateway.models().get(name)
        if model is None:
            error = NotFoundError(f"The model `{name}` does not exist.", param="model")
            return _json(error_body(error), 404)
        return _json(replies.dumps(card(name, model.max_model_len)))

    @app.get("/health", summary="200 while the process is alive")
    async def health() -> Response:
        return _json(replies.dumps({"alive": True, "reason": ""}))

    @app.get("/ready", summary="200 when a request can be served")
    async def ready() -> Response:
        workers = gateway.decode_workers()
        able = [worker for worker in workers if gateway.relay.ready(worker)]
        ok = bool(able) and not gateway.draining
        reason = "stopping" if gateway.draining else "" if ok else "no decode worker is ready"
        body = {"ready": ok, "reason": reason, "decode_workers": len(workers), "ready_workers": len(able)}
        return _json(replies.dumps(body), 200 if ok else 503)

    @app.get("/metrics", summary="Prometheus metrics")
    async def metrics() -> Response:
        _refresh(gateway)
        return Response(gateway.metrics.base.render(), media_type=CONTENT_TYPE)


def _refresh(gateway: Gateway) -> None:
    """Gauges are set when somebody looks."""
    metrics = gateway.metrics
    metrics.workers.clear()
    for worker in gateway.members.workers.values():
        if worker.role in (Role.DECODE, Role.PREFILL):
            metrics.workers.labels(worker.role.value, worker.state.value).inc()
    for priority, size in zip(("high", "normal", "low"), gateway.places.waiting(), strict=True):
        metrics.waiting.labels(priority).set(size)
    metrics.attached.set(gateway.relay.attached)
    metrics.moves.set(gateway.relay.moves)


def _add_error_shapes(app: FastAPI) -> None:
    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        what = f"{request.method} {request.url.path}"
        message = {404: f"Unknown path: {what}", 405: f"Method not allowed: {what}"}.get(
            error.status_code, error.detail
        )
        response = _json(shaped(message, "invalid_request_error", None, None), error.status_code)
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def crash(request: Request, error: Exception) -> Response:
        _log.error("route failed", path=request.url.path, exc_info=error)
        return _json(error_body(InternalError("internal error")), 500)
