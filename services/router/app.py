"""The HTTP application: FastAPI for the small routes and the documents, raw ASGI for the rest (`RawEndpoint`)."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.routing import Route

from common.errors import InternalError, NanoDeployError, NotFoundError
from common.telemetry import get_logger
from common.telemetry.metrics import CONTENT_TYPE
from common.types import ModelInfo, Role
from services.router import replies
from services.router.admission.callers import Callers
from services.router.console.routes import add_dashboard
from services.router.endpoint import Api, RawEndpoint, request_id_of
from services.router.errors import error_body, error_headers, shaped, status_of
from services.router.exchange import Receive, Scope, Send
from services.router.gateway import Gateway
from services.router.openapi import document
from services.router.schemas import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody

_log = get_logger(__name__)


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
            if scope["method"] == "HEAD":  # answered as GET; the server leaves the body away
                scope = {**scope, "method": "GET"}
        if scope["type"] == "http" and scope["path"].startswith("/v1/") and scope["method"] != "OPTIONS":
            try:
                scope["nanodeploy.caller"] = self._callers.caller(scope["headers"])
            except NanoDeployError as error:
                await _refusal(error)(scope, receive, send)
                return
        await super().__call__(scope, receive, send)

    def _with_request_id(self, scope: Scope, send: Send) -> Send:
        """Raw routes name it themselves."""
        request_id = request_id_of(scope, self._rng).encode()

        async def sending(message: Any) -> None:
            if message["type"] == "http.response.start" and not _names(message):
                message = message | {"headers": [*message.get("headers", ()), (b"x-request-id", request_id)]}
            await send(message)

        return sending


def _names(message: Any) -> bool:
    return any(name == b"x-request-id" for name, _ in message.get("headers", ()))


def make_app(gateway: Gateway, rng: random.Random, more: Sequence[Api] = ()) -> _App:
    """`more`: the APIs beside chat and completions."""
    app = _App(
        gateway.callers, rng, title="NanoDeploy", version="1", description="OpenAI-compatible API.", redoc_url=None
    )
    apis = [
        Api("POST", "/v1/chat/completions", "Answer a conversation", gateway.chat, ChatBody),
        Api("POST", "/v1/completions", "Continue a text", gateway.completions, CompletionBody),
        Api("POST", "/tokenize", "Tokens of a text or conversation", gateway.tokenize, TokenizeBody),
        Api("POST", "/detokenize", "Text of tokens", gateway.detokenize, DetokenizeBody),
        *more,
    ]
    for api in apis:
        endpoint = RawEndpoint(api, gateway.metrics, rng, gateway.callers)
        if api.method == "POST" and "{" not in api.path:
            app.raw[api.path] = endpoint
        app.router.routes.append(Route(api.path, endpoint, methods=[api.method]))
    _add_small_routes(app, gateway)
    add_dashboard(app, gateway)
    _add_error_shapes(app)
    made: dict[str, Any] = {}

    def openapi() -> dict[str, Any]:
        if not made:
            made.update(document(app, apis))
        return made

    app.openapi = openapi  # type: ignore[method-assign]
    return app


def _refusal(error: NanoDeployError) -> Response:
    response = _json(error_body(error), status_of(error))
    response.raw_headers.extend(error_headers(error))
    return response


def _json(payload: bytes, status: int = 200) -> Response:
    return Response(payload, status, media_type="application/json")


def _add_small_routes(app: FastAPI, gateway: Gateway) -> None:
    started = int(time.time())

    def card(name: str, model: ModelInfo) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": started,
            "owned_by": "nanodeploy",
            "root": name,
            "parent": None,
            "max_model_len": model.max_model_len,
            "capabilities": gateway.capabilities(model),
        }

    @app.get("/v1/models", summary="Models served; a checkpoint's folder is a name too, and not shown")
    async def list_models() -> Response:
        data = [card(name, model) for name, model in gateway.models().items() if name == model.name]
        return _json(replies.dumps({"object": "list", "data": data}))

    @app.get("/v1/models/{name:path}", summary="One model")
    async def get_model(name: str) -> Response:
        model = gateway.models().get(name)
        if model is None:
            error = NotFoundError(f"The model `{name}` does not exist.", param="model")
            return _json(error_body(error), 404)
        return _json(replies.dumps(card(name, model)))

    @app.get("/health", summary="200 while the process is alive")
    async def health() -> Response:
        return _json(replies.dumps({"alive": True, "reason": ""}))

    @app.get("/ready", summary="200 when a request can be served")
    async def ready() -> Response:
        workers = gateway.decode_workers()
        able = [worker for worker in workers if gateway.relay.ready(worker)]
        keys = gateway.callers.known or gateway.callers.closed
        ok = bool(able) and keys and not gateway.draining
        why = "no decode worker is ready" if keys else "API keys are not known yet"
        reason = "stopping" if gateway.draining else "" if ok else why
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
    metrics.prefix_blocks.set(len(gateway.relay.board.table))
    metrics.prefix_exact.set(gateway.relay.board.num_exact)
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
