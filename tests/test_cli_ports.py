"""Ports that are held for services which have yet to start, against everybody who might take them meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import pytest
from redis_support import binaries

from common.config.schema import RouterConfig
from common.errors import ConfigError
from common.rpc.membership import Membership
from common.rpc.server import RpcServer, Verdict, serve_http
from services.cli.ports import Ports
from services.router.server import Router

HOST = "127.0.0.1"


@pytest.fixture
def ports() -> Iterator[Ports]:
    with Ports() as made:
        yield made


def test_none_is_given_twice(ports: Ports) -> None:
    given = [ports.take(HOST, 0) for _ in range(50)]
    assert len(set(given)) == 50
    assert given[0] != ports.take(HOST, given[0])


def test_another_launcher_that_has_not_started_its_services_yet_moves_aside(ports: Ports) -> None:
    port = ports.take(HOST, 0)
    with Ports() as other:
        assert other.take(HOST, port) != port
        with pytest.raises(ConfigError, match=f"port {port} on {HOST} is in use: choose another --port"):
            other.take_exactly(HOST, port, "--port")


def test_a_port_is_free_again_after_close() -> None:
    with Ports() as first:
        port = first.take(HOST, 0)
    with Ports() as second:
        assert second.take_exactly(HOST, port, "--port") == port


def test_who_asks_for_any_port_does_not_get_a_held_one(ports: Ports) -> None:
    held = {ports.take(HOST, 0) for _ in range(20)}
    with contextlib.ExitStack() as stack, socket.create_server((HOST, 0), backlog=512) as server:
        for _ in range(200):
            listener = stack.enter_context(socket.create_server((HOST, 0)))
            assert listener.getsockname()[1] not in held
        for _ in range(200):
            caller = stack.enter_context(socket.create_connection(server.getsockname()))
            assert caller.getsockname()[1] not in held


def test_a_program_that_wants_the_port_for_itself_is_refused(ports: Ports) -> None:
    with socket.socket() as sock, pytest.raises(OSError, match="in use"):
        sock.bind((HOST, ports.take(HOST, 0)))


async def test_every_kind_of_service_may_listen_there_again_and_again(ports: Ports) -> None:
    for _ in range(2):
        port = ports.take(HOST, 0)
        for _ in range(2):
            rpc = RpcServer([], host=HOST, port=port)
            assert await rpc.start() == port
            await rpc.drain(0.0)
        for _ in range(2):
            http = await serve_http(HOST, port, metrics=bytes, alive=lambda: Verdict(True), ready=lambda: Verdict(True))
            _, writer = await asyncio.open_connection(HOST, port)
            writer.close()
            await http.stop()
        config = RouterConfig(host=HOST, port=port)
        router = Router(config, Membership(config.controllers, watcher_id="test"))
        assert await router.start() == port
        await router.stop(0.0)
        valkey = await asyncio.create_subprocess_exec(
            binaries()["valkey"], "--port", str(port), "--bind", HOST, "--save", "", stdout=asyncio.subprocess.DEVNULL
        )
        async with asyncio.timeout(20):
            while True:
                with contextlib.suppress(OSError):
                    reader, writer = await asyncio.open_connection(HOST, port)
                    break
                assert valkey.returncode is None
                await asyncio.sleep(0.02)
        writer.write(b"PING\r\n")
        assert await reader.readline() == b"+PONG\r\n"
        writer.close()
        valkey.terminate()
        await valkey.wait()
