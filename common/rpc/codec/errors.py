"""Failure and error tree <-> RequestError."""

from __future__ import annotations

from common.errors import NanoDeployError
from common.types import Failure
from nanodeploy.v1 import types_pb2 as pb

# Message and param end up in HTTP/2 trailers, which peers limit to 8 KiB.
MAX_MESSAGE_CHARS = 1024
MAX_PARAM_CHARS = 128

_TO_WIRE: dict[str, pb.ErrorCode] = {
    "invalid_request": pb.ERROR_CODE_INVALID_REQUEST,
    "not_found": pb.ERROR_CODE_NOT_FOUND,
    "overloaded": pb.ERROR_CODE_OVERLOADED,
    "unavailable": pb.ERROR_CODE_UNAVAILABLE,
    "deadline_exceeded": pb.ERROR_CODE_DEADLINE_EXCEEDED,
    "cancelled": pb.ERROR_CODE_CANCELLED,
    "internal": pb.ERROR_CODE_INTERNAL,
    "kv_transfer": pb.ERROR_CODE_KV_TRANSFER,
    "layout_mismatch": pb.ERROR_CODE_LAYOUT_MISMATCH,
    "unauthenticated": pb.ERROR_CODE_UNAUTHENTICATED,
}
_FROM_WIRE: dict[int, str] = {number: code for code, number in _TO_WIRE.items()}


def failure_to_proto(failure: Failure) -> pb.RequestError:
    """Codes that have no number on the wire travel as INTERNAL. Overlong texts are cut."""
    return pb.RequestError(
        code=_TO_WIRE.get(failure.code, pb.ERROR_CODE_INTERNAL),
        message=failure.message[:MAX_MESSAGE_CHARS],
        param=failure.param[:MAX_PARAM_CHARS],
    )


def failure_from_proto(error: pb.RequestError) -> Failure:
    """An unknown or unspecified code is `internal`: a failure is never lost because of its code."""
    return Failure(_FROM_WIRE.get(error.code, "internal"), error.message, error.param)


def error_to_proto(error: NanoDeployError) -> pb.RequestError:
    return failure_to_proto(Failure.of(error))


def error_from_proto(error: pb.RequestError) -> NanoDeployError:
    return failure_from_proto(error).to_error()
