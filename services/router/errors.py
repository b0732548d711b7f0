"""Errors as OpenAI clients know them: `{"error": {"message", "type", "param", "code"}}` and a status."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import orjson
from pydantic import ValidationError

from common.errors import (
    CancelledByCallerError,
    DeadlineExceededError,
    InvalidRequestError,
    NanoDeployError,
    NotFoundError,
    OverloadedError,
    UnauthenticatedError,
    UnavailableError,
)

_TAGGED: Final = ("response_format", "tool_choice")  # their branches are named by an object's type
RETRY_AFTER_S: Final = 1  # a worker's queue moves within a second or it is not worth waiting for


class ContextLengthError(InvalidRequestError):
    """The prompt, or prompt and output, are longer than the model allows."""


class BodyTooLargeError(InvalidRequestError):
    pass


class BodyTimeoutError(InvalidRequestError):
    pass


class MissingError(NotFoundError):
    """A stored object that is not there, or no longer."""


class RateLimitedError(OverloadedError):
    """A key's limit, or a full queue. `retry_after_s` 0: asking again does not help. `headers`: x-ratelimit-*."""

    def __init__(
        self, message: str, *, retry_after_s: float = 0.0, headers: Sequence[tuple[bytes, bytes]] = ()
    ) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.headers = headers


class QuotaExceededError(RateLimitedError):
    """All that the key may ever spend is spent."""


# error class -> status, type, code; the first that fits
_SHAPES: Final[tuple[tuple[type[NanoDeployError], int, str, str | None], ...]] = (
    (BodyTooLargeError, 413, "invalid_request_error", "request_too_large"),
    (BodyTimeoutError, 408, "invalid_request_error", "request_timeout"),
    (ContextLengthError, 400, "invalid_request_error", "context_length_exceeded"),
    (InvalidRequestError, 400, "invalid_request_error", None),
    (UnauthenticatedError, 401, "invalid_request_error", "invalid_api_key"),
    (MissingError, 404, "invalid_request_error", "not_found"),
    (NotFoundError, 404, "invalid_request_error", "model_not_found"),
    (QuotaExceededError, 429, "insufficient_quota", "insufficient_quota"),
    (OverloadedError, 429, "rate_limit_error", "rate_limit_exceeded"),
    (UnavailableError, 503, "service_unavailable_error", "service_unavailable"),
    (DeadlineExceededError, 504, "timeout_error", "timeout"),
    (CancelledByCallerError, 499, "invalid_request_error", "cancelled"),
    (NanoDeployError, 500, "server_error", "internal_error"),
)


def status_of(error: NanoDeployError) -> int:
    return next(status for kind, status, _, _ in _SHAPES if isinstance(error, kind))


def error_body(error: NanoDeployError) -> bytes:
    shape = next((kind, code) for cls, _, kind, code in _SHAPES if isinstance(error, cls))
    return shaped(error.message, shape[0], error.param or None, shape[1])


def shaped(message: str, kind: str, param: str | None, code: str | None) -> bytes:
    return orjson.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}})


def error_headers(error: NanoDeployError) -> list[tuple[bytes, bytes]]:
    if isinstance(error, UnauthenticatedError):
        return [(b"www-authenticate", b"Bearer")]
    if isinstance(error, RateLimitedError):
        after = [(b"retry-after", b"%d" % math.ceil(error.retry_after_s))] if error.retry_after_s else []
        return [*after, *error.headers]
    if isinstance(error, OverloadedError | UnavailableError):
        return [(b"retry-after", str(RETRY_AFTER_S).encode())]
    return []


def idle_fields(error: ValidationError) -> set[str]:
    """Unknown fields of a body that are null, and so ask for nothing."""
    faults = error.errors(include_url=False, include_context=False)
    idle = (fault for fault in faults if fault["type"] == "extra_forbidden" and fault["input"] is None)
    return {str(fault["loc"][0]) for fault in idle if len(fault["loc"]) == 1}


def validation_error(error: ValidationError) -> InvalidRequestError:
    """The first fault that pydantic found, in one sentence that names the field."""
    faults = error.errors(include_url=False, include_context=False)
    same_field = [fault for fault in faults if fault["loc"][:1] == faults[0]["loc"][:1]]
    fault = max(same_field, key=lambda f: (_reach(f["loc"]), field_path(f["loc"]).count(".")))
    kind = fault["type"]
    param = field_path(fault["loc"])
    if kind == "json_invalid":
        return InvalidRequestError(f"the body is not valid JSON: {fault['msg'].removeprefix('Invalid JSON: ')}")
    if not param:
        return InvalidRequestError("the body must be a JSON object")
    if kind == "extra_forbidden":
        return InvalidRequestError(f"Unrecognized request argument supplied: {param}", param=param)
    if kind == "missing":
        return InvalidRequestError(f"Missing required parameter: {param}", param=param)
    if kind == "value_error":
        return InvalidRequestError(f"{param}: {fault['msg'].removeprefix('Value error, ')}", param=param)
    wanted = " or ".join(dict.fromkeys(_rule(f["type"], f["msg"]) for f in faults if field_path(f["loc"]) == param))
    return InvalidRequestError(f"{param}: {wanted}, got {_show(fault['input'])}", param=param)


def field_path(loc: Sequence[int | str]) -> str:
    """`("messages", 0, "content")` -> `messages[0].content`; names of union branches are left out."""
    path, tag = "", False
    for part in loc:
        if isinstance(part, int):
            path += f"[{part}]"
        elif tag:
            tag = not part.isidentifier()
        elif part.isidentifier() and part not in ("str", "int", "float", "bool", "dict", "list"):
            path += f".{part}" if path else part
            tag = path in _TAGGED
    return path


def _reach(loc: Sequence[int | str]) -> list[int]:
    """How far a branch of a union got before it failed: the furthest one is what the client meant."""
    return [part for part in loc if isinstance(part, int)]


def _rule(kind: str, message: str) -> str:
    if kind == "union_tag_not_found":
        return "must be an object with a type"
    if kind == "union_tag_invalid":
        return f"must be an object whose type is one of {message.partition('expected tags: ')[2]}"
    return message.replace("Input should be", "must be")


def _show(value: object) -> str:
    text = repr(value) if isinstance(value, str | int | float | bool | None) else type(value).__name__
    return text if len(text) <= 80 else text[:77] + "..."
