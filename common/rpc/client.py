"""Channels and calls: every call has a deadline, every failure is an error of our tree.

Only calls declared idempotent are tried again, only when the peer was unreachable (`UnavailableError`), with
full jitter and inside the one deadline that the caller gave.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable
from typing import Any, TypeVar

import grpc
import tenacity

from common.errors import DeadlineExceededError, UnavailableError
from common.rpc.context import outgoing_metadata
from common.rpc.status import error_from_rpc
from common.rpc.tls import RenewingChannel, TlsFiles, process_tls
from common.types import Clock, MonotonicClock

T = TypeVar("T")
Request = TypeVar("Request")
Response = TypeVar("Response")

MAX_ATTEMPTS = 4
FIRST_BACKOFF_S = 0.05
MAX_BACKOFF_S = 1.0


def open_channel(
    address: str,
    *,
    max_message_bytes: int = 64 * 2**20,
    keepalive_s: float = 20.0,
    keepalive_timeout_s: float = 10.0,
    tls: TlsFiles | None = None,
) -> Any:
    """A channel of its own connection to host:port, with TLS if this process has it. It connects on the first call.

    Proxies of the environment are not used; gRPC's own retries are off; a lost connection is tried again
    after 0.1 to 2 s, and calls made meanwhile fail at once.
    """
    options: list[tuple[str, Any]] = [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.keepalive_time_ms", int(keepalive_s * 1000)),
        ("grpc.keepalive_timeout_ms", int(keepalive_timeout_s * 1000)),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2000),
        ("grpc.enable_http_proxy", 0),
        ("grpc.enable_retries", 0),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    tls = tls or process_tls()
    if tls is None or not tls.calls:
        return grpc.aio.insecure_channel(address, options=options)
    if tls.server_name:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    return RenewingChannel(tls, lambda credentials: grpc.aio.secure_channel(address, credentials, options=options))


class Backoff:
    """Waits that double from `first_s` up to `max_s`, each drawn between half of it and the whole."""

    def __init__(self, rng: random.Random, first_s: float = FIRST_BACKOFF_S, max_s: float = MAX_BACKOFF_S) -> None:
        self._rng = rng
        self._first_s = first_s
        self._max_s = max_s
        self._failures = 0

    def next_s(self) -> float:
        ceiling = min(self._max_s, self._first_s * 2.0 ** min(self._failures, 30))
        self._failures += 1
        return ceiling * self._rng.uniform(0.5, 1.0)

    def reset(self) -> None:
        self._failures = 0


async def call(
    method: Callable[..., Awaitable[Response]],
    request: Request,
    *,
    timeout_s: float,
    idempotent: bool = False,
    metadata: tuple[tuple[str, str], ...] = (),
    clock: Clock = MonotonicClock(),
    rng: random.Random | None = None,
) -> Response:
    """One unary call, over within `timeout_s` seconds, tries included.

    `method` is a stub's unary-unary method. Raises an error of the tree, never grpc's.
    """
    deadline = clock.now() + timeout_s

    async def once() -> Response:
        left = deadline - clock.now()
        if left <= 0:
            raise DeadlineExceededError(f"no answer within {timeout_s:g} s")
        try:
            return await method(request, timeout=left, metadata=(*outgoing_metadata(), *metadata))
        except grpc.RpcError as error:
            raise error_from_rpc(error) from error

    if not idempotent:
        return await once()
    draw = rng or random.SystemRandom()

    def wait(state: tenacity.RetryCallState) -> float:
        return draw.uniform(0, min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2.0**state.attempt_number))

    def stop(state: tenacity.RetryCallState) -> bool:
        return state.attempt_number >= MAX_ATTEMPTS or clock.now() + state.upcoming_sleep >= deadline

    retrying = tenacity.AsyncRetrying(
        sleep=asyncio.sleep,
        retry=tenacity.retry_if_exception_type(UnavailableError),
        wait=wait,
        stop=stop,
        reraise=True,
    )
    return await retrying(once)


async def stream(
    method: Callable[..., AsyncIterable[Response]], request: Request, *, timeout_s: float
) -> AsyncGenerator[Response, None]:
    """The messages that answer one call, all within `timeout_s` seconds.

    `method` is a stub's unary-stream method. Raises an error of the tree, never grpc's.
    """
    answers = method(request, timeout=timeout_s, metadata=outgoing_metadata())
    try:
        async for message in answers:
            yield message
    except grpc.RpcError as error:
        raise error_from_rpc(error) from error
    finally:
        cancel: Any = getattr(answers, "cancel", None)
        if cancel is not None:
            cancel()


async def read_stream(
    stream: AsyncIterable[T], *, silence_s: float, first_s: float | None = None
) -> AsyncGenerator[T, None]:
    """Messages of a streaming call; no wait for one is longer than `silence_s` (`first_s` for the first).

    The call is cancelled when the reader leaves. Raises DeadlineExceededError on silence.
    """
    messages = aiter(stream)
    limit = silence_s if first_s is None else first_s
    try:
        while True:
            try:
                async with asyncio.timeout(limit):
                    message = await anext(messages)
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise DeadlineExceededError(f"silent for {limit:g} s") from None
            except grpc.RpcError as error:
                raise error_from_rpc(error) from error
            yield message
            limit = silence_s
    finally:
        cancel: Any = getattr(stream, "cancel", None)
        if cancel is not None:
            cancel()
