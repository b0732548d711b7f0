"""Bootstrap of a gRPC server: health, reflection, error status, keepalive, limits, graceful drain.

start -> serving -> drain: health says NOT_SERVING, on_drain hooks, no new calls, running calls get a
grace, then are cut -> stopped
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, NamedTuple

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from common.errors import ConfigError, NotFoundError
from common.rpc.http import HttpEndpoint, Response, Verdict, serve_http
from common.rpc.status import ErrorInterceptor
from common.rpc.tls import TlsFiles, process_tls, warn_if_exposed

__all__ = ["HttpEndpoint", "Response", "RpcServer", "ServerOptions", "Service", "Verdict", "serve_http"]

HEALTH_PERIOD_S = 1.0


class Service(NamedTuple):
    """One gRPC service. `name` is the full one, `add` registers the servicer, `serving` is asked per probe."""

    name: str
    add: Callable[[grpc.aio.Server], None]
    serving: Callable[[], bool]


class ServerOptions(NamedTuple):
    max_message_bytes: int = 64 * 2**20
    max_concurrent_rpcs: int | None = None
    keepalive_s: float = 20.0  # a silent connection is pinged after this long
    keepalive_timeout_s: float = 10.0  # and dropped when the ping is not answered for this long
    handshake_timeout_s: float = 10.0  # for a connection that opens and says nothing


class RpcServer:
    """One grpc.aio server with its services. `on_drain` hooks end what would outlive the grace (watches).

    It speaks TLS if `tls` or else this process has a certificate.
    """

    def __init__(
        self,
        services: Sequence[Service],
        *,
        host: str,
        port: int,
        options: ServerOptions = ServerOptions(),
        on_drain: Sequence[Callable[[], Awaitable[None]]] = (),
        tls: TlsFiles | None = None,
    ) -> None:
        self._services = {s.name: s for s in services}
        self._host = host
        self._port = port
        self._options = options
        self._on_drain = on_drain
        self._tls = tls or process_tls()
        self._draining = False
        self._server: grpc.aio.Server | None = None

    @property
    def port(self) -> int:
        """The bound port, once started."""
        return self._port

    async def start(self) -> int:
        """Bind (port 0 takes a free one) and serve; returns the port. Raises ConfigError if it is taken."""
        server = grpc.aio.server(
            interceptors=[ErrorInterceptor()],
            options=_channel_arguments(self._options),
            maximum_concurrent_rpcs=self._options.max_concurrent_rpcs,
        )
        for service in self._services.values():
            service.add(server)
        health: Any = health_pb2_grpc
        health.add_HealthServicer_to_server(_Health(self._serving), server)
        names = (*self._services, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name)
        reflection.enable_server_reflection((*names, reflection.SERVICE_NAME), server)
        host = f"[{self._host}]" if ":" in self._host else self._host
        try:
            if self._tls is not None and self._tls.serves:
                self._port = server.add_secure_port(f"{host}:{self._port}", self._tls.server_credentials())
            else:
                self._port = server.add_insecure_port(f"{host}:{self._port}")
                warn_if_exposed(self._host, "gRPC")
        except RuntimeError as error:
            raise ConfigError(f"cannot listen on {host}:{self._port} for gRPC: {error}") from error
        await server.start()
        self._server = server
        return self._port

    async def drain(self, grace_s: float) -> None:
        """Stop serving: at most `grace_s` for what runs. Safe to call twice."""
        self._draining = True
        server, self._server = self._server, None
        if server is None:
            return
        stopped = asyncio.ensure_future(server.stop(grace_s))
        for hook in self._on_drain:
            await hook()
        await stopped

    async def wait(self) -> None:
        """Until the server has stopped."""
        if self._server is not None:
            await self._server.wait_for_termination()

    def _serving(self, name: str) -> bool | None:
        """None: no such service. The empty name is all of them."""
        if name == "":
            return not self._draining and all(s.serving() for s in self._services.values())
        service = self._services.get(name)
        return None if service is None else not self._draining and service.serving()


def _channel_arguments(options: ServerOptions) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", options.max_message_bytes),
        ("grpc.max_send_message_length", options.max_message_bytes),
        ("grpc.keepalive_time_ms", int(options.keepalive_s * 1000)),
        ("grpc.keepalive_timeout_ms", int(options.keepalive_timeout_s * 1000)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", 5000),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 5000),
        ("grpc.server_handshake_timeout_ms", int(options.handshake_timeout_s * 1000)),
        # Two processes on one port would each get a share of the calls without anybody noticing.
        ("grpc.so_reuseport", 0),
    ]


class _Health(health_pb2_grpc.HealthServicer):
    """grpc.health.v1, asked from the services themselves on every probe: nothing to keep in step."""

    def __init__(self, serving: Callable[[str], bool | None]) -> None:
        self._serving = serving

    async def Check(self, request: Any, context: Any) -> Any:  # noqa: N802 - gRPC's name
        status = self._status(request.service)
        if status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN:
            raise NotFoundError(f"no service {request.service!r} here", param="service")
        return health_pb2.HealthCheckResponse(status=status)

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802 - gRPC's name
        last = None
        while True:
            status = self._status(request.service)
            if status != last:
                yield health_pb2.HealthCheckResponse(status=status)
                last = status
            await asyncio.sleep(HEALTH_PERIOD_S)

    def _status(self, name: str) -> Any:
        serving = self._serving(name)
        if serving is None:
            return health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        response = health_pb2.HealthCheckResponse
        return response.SERVING if serving else response.NOT_SERVING
