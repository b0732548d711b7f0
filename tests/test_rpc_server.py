"""A real server and real clients on loopback: status, health, reflection, drain, hostile connections, HTTP."""

# ruff: noqa: N802

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from common import errors
from common.rpc import status
from common.rpc.client import Backoff, call, open_channel, read_stream
from common.rpc.context import call_context
from common.rpc.server import RpcServer, ServerOptions, Service, Verdict, serve_http
from common.telemetry.logs import bound_fields
from nanodeploy.v1 import controller_pb2 as pb
from nanodeploy.v1 import controller_pb2_grpc, decode_pb2, decode_pb2_grpc

NAME = "nanodeploy.v1.ControllerService"
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
TREE = [
    cls
    for cls in vars(errors).values()
    if isinstance(cls, type) and issubclass(cls, errors.NanoDeployError) and cls is not errors.NanoDeployError
]


class Servicer(controller_pb2_grpc.ControllerServiceServicer):
    """Answers with what it was told to: an error to raise, or what it saw of the call."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.failures_left = 0
        self.calls = 0
        self.context: dict[str, Any] = {}

    async def Drain(self, request, context):
        self.calls += 1
        self.context = dict(bound_fields())
        if self.failures_left:
            self.failures_left -= 1
            raise errors.UnavailableError("restarting")
        if self.error:
            raise self.error
        return pb.DrainResponse()

    async def Heartbeat(self, request, context):
        await asyncio.sleep(30)

    async def Watch(self, request, context) -> AsyncIterator[pb.WatchResponse]:
        yield pb.WatchResponse(ping=pb.WatchPing(revision=1))
        if self.error:
            raise self.error
        await asyncio.sleep(30)


class Peer:
    """One running server with a client on it."""

    def __init__(self, server: RpcServer, servicer: Servicer, channel: grpc.aio.Channel) -> None:
        self.server = server
        self.servicer = servicer
        self.channel = channel
        self.stub = controller_pb2_grpc.ControllerServiceStub(channel)
        self.ready = True


@asynccontextmanager
async def running(options: ServerOptions = ServerOptions(), **kwargs: Any) -> AsyncIterator[Peer]:
    servicer = Servicer()
    box: list[Peer] = []

    def add(server: grpc.aio.Server) -> None:
        controller_pb2_grpc.add_ControllerServiceServicer_to_server(servicer, server)

    server = RpcServer([Service(NAME, add, lambda: box[0].ready)], host="127.0.0.1", port=0, options=options, **kwargs)
    port = await server.start()
    assert port == server.port != 0
    channel = open_channel(f"127.0.0.1:{port}")
    box.append(Peer(server, servicer, channel))
    try:
        yield box[0]
    finally:
        await channel.close()
        await server.drain(0.0)


async def drain_call(peer: Peer, **kwargs: Any) -> Any:
    return await call(peer.stub.Drain, pb.DrainRequest(worker_id="w"), **{"timeout_s": 5.0, **kwargs})


@pytest.mark.parametrize("cls", TREE)
async def test_every_error_crosses_the_wire(cls):
    async with running() as peer:
        peer.servicer.error = cls("what was wrong: ü", param="field")
        with pytest.raises(errors.NanoDeployError) as caught:
            await drain_call(peer)
        expected = errors.error_from_code(cls.code if cls.code != "config" else "internal", "x")
        assert type(caught.value) is type(expected)
        assert (caught.value.message, caught.value.param) == ("what was wrong: ü", "field")
        with pytest.raises(grpc.RpcError) as raw:
            await peer.stub.Drain(pb.DrainRequest(), timeout=5)
        assert raw.value.code() == status.status_of(cls("x"))


async def test_overlong_error_message_still_arrives():
    async with running() as peer:
        peer.servicer.error = errors.OverloadedError("ü" * 50_000)
        with pytest.raises(errors.OverloadedError) as caught:
            await drain_call(peer)
        assert caught.value.message == "ü" * 1024


async def test_unexpected_exception_is_internal_logged_and_not_disclosed(caplog):
    async with running() as peer:
        peer.servicer.error = KeyError("secret")
        with caplog.at_level(logging.ERROR), structlog.testing.capture_logs() as logs:
            with pytest.raises(errors.InternalError) as caught:
                await drain_call(peer)
        assert "secret" not in caught.value.message
        assert any(entry["event"] == "rpc failed" and isinstance(entry["exc_info"], KeyError) for entry in logs)


async def test_error_in_the_middle_of_a_stream():
    async with running() as peer:
        peer.servicer.error = errors.UnavailableError("storage is gone")
        messages = read_stream(peer.stub.Watch(pb.WatchRequest()), silence_s=5)
        assert (await anext(messages)).ping.revision == 1
        with pytest.raises(errors.UnavailableError, match="storage is gone"):
            await anext(messages)


async def test_silent_stream_is_given_up():
    async with running() as peer:
        messages = read_stream(peer.stub.Watch(pb.WatchRequest()), silence_s=0.2, first_s=5)
        assert (await anext(messages)).ping.revision == 1
        with pytest.raises(errors.DeadlineExceededError, match="silent"):
            await anext(messages)


async def test_every_call_has_a_deadline():
    async with running() as peer:
        with pytest.raises(errors.DeadlineExceededError):
            await call(peer.stub.Heartbeat, pb.HeartbeatRequest(), timeout_s=0.2)
        started = asyncio.get_running_loop().time()
        with pytest.raises(errors.DeadlineExceededError):
            await call(peer.stub.Heartbeat, pb.HeartbeatRequest(), timeout_s=0.2, idempotent=True)
        assert asyncio.get_running_loop().time() - started < 2


async def test_only_idempotent_calls_are_tried_again():
    async with running() as peer:
        peer.servicer.failures_left = 2
        with pytest.raises(errors.UnavailableError):
            await drain_call(peer)
        assert peer.servicer.calls == 1
        peer.servicer.failures_left = 2
        await drain_call(peer, idempotent=True, rng=random.Random(1))
        assert peer.servicer.calls == 4
        peer.servicer.failures_left = 99
        with pytest.raises(errors.UnavailableError):
            await drain_call(peer, idempotent=True)
        assert peer.servicer.calls == 8
        peer.servicer.failures_left, peer.servicer.error = 0, errors.InvalidRequestError("bad")
        with pytest.raises(errors.InvalidRequestError):
            await drain_call(peer, idempotent=True)
        assert peer.servicer.calls == 9


async def test_unreachable_peer_fails_at_once():
    channel = open_channel("127.0.0.1:1")
    stub = controller_pb2_grpc.ControllerServiceStub(channel)
    started = asyncio.get_running_loop().time()
    with pytest.raises(errors.UnavailableError):
        await call(stub.Drain, pb.DrainRequest(), timeout_s=20)
    assert asyncio.get_running_loop().time() - started < 5
    await channel.close()


async def test_request_id_and_trace_reach_the_servicer():
    async with running() as peer:
        with call_context("req-7", TRACE):
            await drain_call(peer)
        assert peer.servicer.context == {"request_id": "req-7", "trace_id": TRACE.split("-")[1]}
        await drain_call(peer)
        assert peer.servicer.context == {}
        await peer.stub.Drain(pb.DrainRequest(), timeout=5, metadata=(("x-request-id", "a b"), ("traceparent", "?")))
        assert peer.servicer.context == {}


async def test_health_follows_the_callback():
    async with running() as peer:
        health = health_pb2_grpc.HealthStub(peer.channel)

        async def check(name: str) -> int:
            return (await health.Check(health_pb2.HealthCheckRequest(service=name), timeout=5)).status

        response = health_pb2.HealthCheckResponse
        assert [await check(""), await check(NAME)] == [response.SERVING] * 2
        watch = health.Watch(health_pb2.HealthCheckRequest(service=NAME), timeout=10)
        assert (await watch.read()).status == response.SERVING
        peer.ready = False
        assert [await check(""), await check(NAME)] == [response.NOT_SERVING] * 2
        assert (await watch.read()).status == response.NOT_SERVING
        watch.cancel()
        with pytest.raises(grpc.RpcError) as caught:
            await check("no.such.Service")
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND


async def test_reflection_lists_the_services():
    async with running() as peer:
        stub = reflection_pb2_grpc.ServerReflectionStub(peer.channel)
        stream = stub.ServerReflectionInfo(timeout=5)
        await stream.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        names = {s.name for s in (await stream.read()).list_services_response.service}
        assert {NAME, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"} <= names
        await stream.write(reflection_pb2.ServerReflectionRequest(file_containing_symbol=NAME))
        assert (await stream.read()).file_descriptor_response.file_descriptor_proto
        await stream.done_writing()
        stream.cancel()


async def test_port_in_use_is_a_config_error():
    async with running() as peer:
        second = RpcServer([], host="127.0.0.1", port=peer.server.port)
        with pytest.raises(errors.ConfigError, match=str(peer.server.port)):
            await second.start()


async def test_drain_waits_for_running_calls_and_then_cuts_them():
    ended = asyncio.Event()

    async def end_watches() -> None:
        ended.set()

    async with running(on_drain=[end_watches]) as peer:
        pending = asyncio.ensure_future(call(peer.stub.Heartbeat, pb.HeartbeatRequest(), timeout_s=20))
        await drain_call(peer)
        started = asyncio.get_running_loop().time()
        await peer.server.drain(0.3)
        assert ended.is_set()
        assert 0.2 < asyncio.get_running_loop().time() - started < 5
        with pytest.raises(errors.UnavailableError):
            await pending
        with pytest.raises(errors.UnavailableError):
            await drain_call(peer)


async def test_wrong_message_is_refused_and_the_server_lives():
    async with running() as peer:
        raw = peer.channel.unary_unary(f"/{NAME}/Drain")
        with pytest.raises(grpc.RpcError) as caught:
            await raw(b"\xff\xff\xff\xff", timeout=5)
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        with pytest.raises(errors.UnsupportedError):
            await call(peer.channel.unary_unary(f"/{NAME}/NoSuchMethod"), b"", timeout_s=5)
        await drain_call(peer)


class EchoServicer(decode_pb2_grpc.DecodeServiceServicer):
    """A bidirectional stream, written as generator or with read and write."""

    def __init__(self, *, as_generator: bool) -> None:
        if not as_generator:
            self.Stream = self.read_and_write

    async def Stream(self, requests, context) -> AsyncIterator[decode_pb2.StreamResponse]:
        async for request in requests:
            yield decode_pb2.StreamResponse(attached=decode_pb2.StreamAttached(epoch=request.attach.epoch))

    async def read_and_write(self, requests, context) -> None:
        while (request := await context.read()) is not grpc.aio.EOF:
            answer = decode_pb2.StreamAttached(epoch=request.attach.epoch)
            await context.write(decode_pb2.StreamResponse(attached=answer))


@pytest.mark.parametrize("as_generator", [True, False])
async def test_wrong_message_in_a_stream_ends_that_stream_alone(as_generator):
    servicer = EchoServicer(as_generator=as_generator)
    name = "nanodeploy.v1.DecodeService"

    def add(server: grpc.aio.Server) -> None:
        decode_pb2_grpc.add_DecodeServiceServicer_to_server(servicer, server)

    server = RpcServer([Service(name, add, lambda: True)], host="127.0.0.1", port=0)
    channel = open_channel(f"127.0.0.1:{await server.start()}")
    good = decode_pb2_grpc.DecodeServiceStub(channel).Stream(timeout=10)
    hello = decode_pb2.StreamRequest(attach=decode_pb2.StreamAttach(epoch=5))
    await good.write(hello)
    assert (await good.read()).attached.epoch == 5
    bad = channel.stream_stream(f"/{name}/Stream")(timeout=10)
    await bad.write(b"\xff\xff")
    with pytest.raises(grpc.RpcError) as caught:
        await bad.read()
    assert type(status.error_from_rpc(caught.value)) is errors.InvalidRequestError
    await good.write(hello)
    assert (await good.read()).attached.epoch == 5
    await good.done_writing()
    assert await good.read() is grpc.aio.EOF
    await channel.close()
    await server.drain(0.0)


async def test_oversized_message_is_refused_and_the_server_lives():
    async with running(ServerOptions(max_message_bytes=10_000)) as peer:
        with pytest.raises(errors.InvalidRequestError, match="larger than max"):
            await call(peer.stub.Drain, pb.DrainRequest(worker_id="x" * 20_000), timeout_s=5)
        await drain_call(peer)


async def test_half_open_and_garbage_connections_do_not_matter():
    async with running(ServerOptions(handshake_timeout_s=0.3)) as peer:
        pairs = [await asyncio.open_connection("127.0.0.1", peer.server.port) for _ in range(20)]
        for index, (_, writer) in enumerate(pairs[:10]):
            writer.write(b"GET / HTTP/1.1\r\n\r\n" if index % 2 else random.Random(index).randbytes(4096))
        await drain_call(peer)
        for reader, writer in pairs:  # all are closed by the server, the silent ones by the handshake's limit
            async with asyncio.timeout(10):
                try:
                    while await reader.read(65536):
                        pass
                except ConnectionError:
                    pass
            writer.close()
        await drain_call(peer)


async def test_backoff_grows_with_jitter_and_resets():
    backoff = Backoff(random.Random(3), first_s=0.1, max_s=1.0)
    waits = [backoff.next_s() for _ in range(40)]
    for wait, ceiling in zip(waits, [0.1, 0.2, 0.4, 0.8, *[1.0] * 36], strict=True):
        assert ceiling / 2 <= wait <= ceiling
    assert len(set(waits)) == len(waits)
    backoff.reset()
    assert backoff.next_s() <= 0.1


async def http(port: int, raw: bytes) -> tuple[int, bytes]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(raw)
    answer = await reader.read()
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


async def test_http_endpoint():
    ready = [Verdict(False, "no decode worker", {"workers": 0})]
    endpoint = await serve_http(
        "127.0.0.1", 0, metrics=lambda: b"x 1\n", alive=lambda: Verdict(True), ready=lambda: ready[0]
    )
    port = endpoint.port

    async def get(path: str) -> tuple[int, bytes]:
        return await http(port, f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())

    assert await get("/metrics") == (200, b"x 1\n")
    code, body = await get("/ready?verbose=1")
    assert (code, json.loads(body)) == (503, {"ready": False, "reason": "no decode worker", "workers": 0})
    ready[0] = Verdict(True)
    assert (await get("/ready"))[0] == 200
    code, body = await get("/health")
    assert (code, json.loads(body)["alive"]) == (200, True)
    assert (await get("/other"))[0] == 404
    assert (await http(port, b"POST /health HTTP/1.1\r\n\r\n"))[0] == 405
    assert (await http(port, b"\x00\x01garbage\r\n\r\n"))[0] == 400
    assert (await http(port, b"GET /" + b"x" * 20_000))[0] == 431
    assert await http(port, b"HEAD /metrics HTTP/1.1\r\n\r\n") == (200, b"")
    ready[0] = None  # type: ignore[call-overload] # a callback that fails
    assert (await get("/ready"))[0] == 500
    await endpoint.stop()


async def test_http_half_open_connections_are_dropped(monkeypatch):
    monkeypatch.setattr("common.rpc.http.READ_TIMEOUT_S", 0.2)
    endpoint = await serve_http(
        "127.0.0.1", 0, metrics=lambda: b"", alive=lambda: Verdict(True), ready=lambda: Verdict(True)
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", endpoint.port)
    writer.write(b"GET /hea")
    async with asyncio.timeout(5):
        assert await reader.read() == b""
    writer.close()
    with pytest.raises(errors.ConfigError):
        await serve_http(
            "127.0.0.1",
            endpoint.port,
            metrics=lambda: b"",
            alive=lambda: Verdict(True),
            ready=lambda: Verdict(True),
        )
    await endpoint.stop()
