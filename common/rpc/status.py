"""The error tree <-> gRPC status, in this one place.

servicer raises NanoDeployError -> ErrorInterceptor -> status code, message, RequestError in the trailers
anything else   ->                  -> INTERNAL, traceback in the log, nothing disclosed
client sees grpc.RpcError -> error_from_rpc -> the same error of the tree again
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError

from common.errors import (
    CancelledByCallerError,
    DeadlineExceededError,
    InternalError,
    InvalidRequestError,
    KVTransferError,
    LayoutMismatchError,
    NanoDeployError,
    NotFoundError,
    OverloadedError,
    UnauthenticatedError,
    UnavailableError,
    UnsupportedError,
)
from common.rpc.codec.errors import error_from_proto, error_to_proto
from common.rpc.context import call_context, incoming
from common.telemetry import get_logger
from nanodeploy.v1 import types_pb2

ERROR_KEY = "nanodeploy-error-bin"

_log = get_logger(__name__)

# The first class that an error is an instance of decides.
_STATUS: tuple[tuple[type[NanoDeployError], grpc.StatusCode], ...] = (
    (UnsupportedError, grpc.StatusCode.UNIMPLEMENTED),
    (InvalidRequestError, grpc.StatusCode.INVALID_ARGUMENT),
    (UnauthenticatedError, grpc.StatusCode.UNAUTHENTICATED),
    (NotFoundError, grpc.StatusCode.NOT_FOUND),
    (OverloadedError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (UnavailableError, grpc.StatusCode.UNAVAILABLE),
    (DeadlineExceededError, grpc.StatusCode.DEADLINE_EXCEEDED),
    (CancelledByCallerError, grpc.StatusCode.CANCELLED),
    (KVTransferError, grpc.StatusCode.ABORTED),
    (LayoutMismatchError, grpc.StatusCode.FAILED_PRECONDITION),
)

# For statuses that gRPC itself made, without our trailers.
_BARE: dict[grpc.StatusCode, type[NanoDeployError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequestError,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequestError,
    grpc.StatusCode.UNIMPLEMENTED: UnsupportedError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.UNAUTHENTICATED: UnauthenticatedError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: OverloadedError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.ABORTED: UnavailableError,
    # A call cancelled here raises asyncio.CancelledError; this one was cut by the peer, which is going away.
    grpc.StatusCode.CANCELLED: UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
}


def status_of(error: NanoDeployError) -> grpc.StatusCode:
    return next((status for cls, status in _STATUS if isinstance(error, cls)), grpc.StatusCode.INTERNAL)


def error_from_rpc(error: grpc.RpcError) -> NanoDeployError:
    """The error that a failed call stands for; exact when the peer is ours, by status otherwise."""
    if not isinstance(error, grpc.aio.AioRpcError):
        return InternalError(f"call failed: {error}")
    status = error.code()
    trailers: Any = error.trailing_metadata() or ()
    for key, value in trailers:
        if key == ERROR_KEY and isinstance(value, bytes):
            try:
                return error_from_proto(types_pb2.RequestError.FromString(value))
            except DecodeError:
                break
    message = error.details() or status.name.lower()
    if status is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in message:
        return InvalidRequestError(message)
    return _BARE.get(status, InternalError)(message)


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: NanoDeployError) -> NoReturn:
    """End the call with the error's status; raises grpc's AbortError."""
    proto = error_to_proto(error)
    trailers = ((ERROR_KEY, proto.SerializeToString()),)
    await context.abort(status_of(error), proto.message, trailing_metadata=trailers)
    raise AssertionError("abort returned")


class _Undecodable:
    """Stands for a request that is not the message it should be."""

    def __init__(self, error: Exception) -> None:
        self.error = error


class ErrorInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg] # not generic at run time
    """Outermost on every server: turns exceptions into status and binds request id and trace to the task."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        handler: Any = await continuation(handler_call_details)
        if handler is None:
            return None  # type: ignore[return-value] # gRPC then answers UNIMPLEMENTED
        kind = ("stream" if handler.request_streaming else "unary") + (
            "_stream" if handler.response_streaming else "_unary"
        )
        behavior = _wrap(getattr(handler, kind), handler_call_details)
        deserialize = handler.request_deserializer
        if deserialize is not None:
            deserialize = (_refusing if handler.request_streaming else _lenient)(deserialize)
        make: Any = getattr(grpc, f"{kind}_rpc_method_handler")
        wrapped: grpc.RpcMethodHandler[Any, Any] = make(
            behavior, request_deserializer=deserialize, response_serializer=handler.response_serializer
        )
        return wrapped


def _lenient(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """GRPC answers UNKNOWN when a deserializer raises; the wrapped behavior answers INVALID_ARGUMENT."""

    def decode(raw: bytes) -> Any:
        try:
            return deserialize(raw)
        except Exception as error:  # noqa: BLE001 - protobuf has several; all mean the caller's bytes are wrong
            return _Undecodable(error)

    return decode


def _refusing(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """In a stream, a deserializer that raises does so inside the behavior, where the message is awaited."""

    def decode(raw: bytes) -> Any:
        try:
            return deserialize(raw)
        except Exception as error:
            raise _not_expected(error) from error

    return decode


def _not_expected(error: Exception) -> InvalidRequestError:
    return InvalidRequestError(f"not the expected message: {error}")


def _wrap(behavior: Any, details: Any) -> Any:
    method = details.method
    request_id, traceparent = incoming(details.invocation_metadata or ())

    if inspect.isasyncgenfunction(behavior):

        async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
            with call_context(request_id, traceparent):
                try:
                    _check(request)
                    async for response in behavior(request, context):
                        yield response
                except Exception as error:  # noqa: BLE001 - the edge of an RPC
                    await _answer(context, method, error)

        return stream

    async def single(request: Any, context: Any) -> Any:
        with call_context(request_id, traceparent):
            try:
                _check(request)
                return await behavior(request, context)
            except Exception as error:  # noqa: BLE001 - the edge of an RPC
                await _answer(context, method, error)

    return single


def _check(request: Any) -> None:
    if isinstance(request, _Undecodable):
        raise _not_expected(request.error)


async def _answer(context: Any, method: str, error: Exception) -> NoReturn:
    match error:
        case grpc.aio.AbortError():
            raise error
        case NanoDeployError():
            await abort(context, error)
        case grpc.RpcError():
            await abort(context, error_from_rpc(error))
        case _:
            _log.error("rpc failed", method=method, exc_info=error)
            await abort(context, InternalError("internal error"))
