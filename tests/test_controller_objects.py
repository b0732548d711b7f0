"""Stored objects over real gRPC and a real storage: versions, parts, limits, time, holders, lists."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from redis_support import RedisServer, binaries, fresh_namespace, run_redis

from common.config import ControllerConfig
from common.errors import InvalidRequestError, NotFoundError, OverloadedError, UnavailableError
from common.rpc import objects as objects_module
from common.rpc.codec.objects import ObjectKey
from common.rpc.objects import ObjectClient
from common.rpc.server import RpcServer, Service
from nanodeploy.v1 import objects_pb2_grpc
from services.controller.app import Controller
from services.controller.object_servicer import SERVICE

KEY = ObjectKey("file", "", "file-1")


@pytest.fixture(scope="module", params=sorted(binaries()))
def server(request: Any) -> Iterator[RedisServer]:
    with run_redis(request.param) as running:
        yield running


@asynccontextmanager
async def objects(
    server: RedisServer, shown: str = "", first: str = "127.0.0.1:9", **limits: Any
) -> AsyncIterator[ObjectClient]:
    """A client of two controllers, of which the first is never there."""
    config = ControllerConfig(port=0, http_port=0, redis_url=server.url, namespace=fresh_namespace(), **limits)
    controller = Controller(config)
    await controller.start()
    client = ObjectClient([first, f"127.0.0.1:{controller.port}"], shown)
    try:
        yield client
    finally:
        await client.close()
        await controller.stop(0.1)


async def test_a_document_has_versions(server: RedisServer) -> None:
    async with objects(server) as client:
        assert await client.put(KEY, b"one", ttl_s=60, expected_version=0) == (True, 1)
        assert await client.put(KEY, b"two", ttl_s=60, expected_version=0) == (False, 1)
        assert await client.put(KEY, b"two", expected_version=1) == (True, 2)
        found = await client.get(KEY)
        assert (found.data, found.version, found.nbytes, found.num_parts) == (b"two", 2, 3, 0)
        assert 50 < found.remaining_s <= 60
        assert await client.find(KEY._replace(owner="else")) is None, "an owner sees its own alone"
        assert await client.delete(KEY)
        assert not await client.delete(KEY)
        with pytest.raises(NotFoundError):
            await client.get(KEY)
        with pytest.raises(NotFoundError):
            await client.put(KEY, b"x")  # no time limit and nothing there


class Hangs(objects_pb2_grpc.ObjectServiceServicer):
    """As a process that was stopped: its connections stay, and nothing is said on them."""

    async def GetObject(self, request: Any, context: Any) -> Any:  # noqa: N802
        await asyncio.sleep(60)


async def test_a_controller_that_hangs_is_left_for_the_next(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects_module, "CALL_TIMEOUT_S", 1.0)
    add: Any = objects_pb2_grpc.add_ObjectServiceServicer_to_server
    hung = RpcServer([Service(SERVICE, lambda made: add(Hangs(), made), lambda: True)], host="127.0.0.1", port=0)
    address = f"127.0.0.1:{await hung.start()}"
    async with objects(server, first=address) as client:
        assert await client.find(KEY) is None
        monkeypatch.setattr(objects_module, "CALL_TIMEOUT_S", 60.0)
        assert await asyncio.wait_for(client.find(KEY), 10.0) is None
    await hung.drain(0)


async def test_parts_are_written_once(server: RedisServer) -> None:
    async with objects(server) as client:
        with pytest.raises(NotFoundError):
            await client.put_parts(KEY, {0: b"x"})
        await client.put(KEY, b"{}", ttl_s=60)
        parts = {i: bytes([i % 256]) * (1 + i) for i in range(600)}
        assert await client.put_parts(KEY, parts) == 600
        assert await client.put_parts(KEY, {5: b"other", 700: b"new"}) == 1
        assert await client.list_parts(KEY) == [*range(600), 700]
        assert await client.get_parts(KEY, [5, 650, 3]) == {5: parts[5], 3: parts[3]}
        assert await client.get_parts(KEY, range(600)) == parts
        found = await client.get(KEY)
        assert (found.num_parts, found.nbytes) == (601, 2 + 3 + sum(map(len, parts.values())))
        await client.delete(KEY)
        assert await client.list_parts(KEY) == []


async def test_large_parts_come_in_several_answers(server: RedisServer) -> None:
    async with objects(server) as client:
        await client.put(KEY, b"", ttl_s=60)
        parts = {i: bytes([i]) * 2**20 for i in range(40)}
        assert await client.put_parts(KEY, parts) == 40
        assert await client.get_parts(KEY, range(40)) == parts


async def test_sizes_are_bounded(server: RedisServer) -> None:
    async with objects(server, max_object_bytes=100, max_stored_bytes=250) as client:
        with pytest.raises(InvalidRequestError, match="at most 100 bytes"):
            await client.put(KEY, b"x" * 101, ttl_s=60)
        for i in range(2):
            await client.put(KEY._replace(id=f"f{i}"), b"x" * 50, ttl_s=60)
            await client.put_parts(KEY._replace(id=f"f{i}"), {0: b"y" * 50})
        with pytest.raises(InvalidRequestError):
            await client.put_parts(KEY._replace(id="f0"), {1: b"y"})
        await client.put(KEY, b"x" * 50, ttl_s=60)
        with pytest.raises(OverloadedError, match="full"):
            await client.put(KEY._replace(id="f3"), b"x", ttl_s=60)
        await client.put(KEY, b"", expected_version=1)  # smaller is always allowed
        await client.put(KEY._replace(id="f3"), b"x" * 50, ttl_s=60)
        await client.delete(KEY._replace(id="f0"))
        await client.put(KEY._replace(id="f4"), b"x" * 100, ttl_s=60)
        with pytest.raises(InvalidRequestError, match="ttl_s"):
            await client.put(KEY, b"", ttl_s=10**7)


async def test_time_makes_room(server: RedisServer) -> None:
    async with objects(server, max_stored_bytes=100) as client:
        await client.put(KEY, b"x" * 40, ttl_s=1)
        await client.put_parts(KEY, {0: b"y" * 50})
        other = KEY._replace(id="other")
        with pytest.raises(OverloadedError):
            await client.put(other, b"x" * 40, ttl_s=60)
        await asyncio.sleep(1.1)
        assert await client.find(KEY) is None
        assert (await client.page("file", "")).objects == ()
        await client.put(other, b"x" * 100, ttl_s=60)
        assert await client.list_parts(KEY) == []


async def test_one_holder_at_a_time(server: RedisServer) -> None:
    async with objects(server) as client:
        with pytest.raises(NotFoundError):
            await client.claim(KEY, "a", 5)
        await client.put(KEY, b"", ttl_s=60)
        assert await client.claim(KEY, "a", 5)
        assert not await client.claim(KEY, "b", 5)
        assert (await client.get(KEY)).holder == "a"
        assert await client.put_parts(KEY, {0: b"of a"}, holder="a") == 1
        with pytest.raises(OverloadedError):
            await client.put_parts(KEY, {1: b"of b"}, holder="b")
        await client.claim(KEY, "a", 0)
        assert await client.claim(KEY, "b", 0.2)
        await asyncio.sleep(0.3)
        assert (await client.get(KEY)).holder == ""
        assert await client.claim(KEY, "a", 5)


async def test_lists_are_pages_newest_first(server: RedisServer) -> None:
    async with objects(server) as client:
        ids = [f"file-{i:03}" for i in range(150)]
        for i, id_ in enumerate(ids):
            await client.put(KEY._replace(id=id_), str(i).encode(), ttl_s=60)
        for id_ in ids[::3]:
            await client.delete(KEY._replace(id=id_))
        left = [id_ for i, id_ in enumerate(ids) if i % 3][::-1]
        seen: list[str] = []
        more = True
        while more:
            page = await client.page("file", "", after=seen[-1] if seen else "", limit=40)
            seen += [found.id for found in page.objects]
            more = page.has_more
        assert seen == left
        assert not (await client.page("file", "", limit=100)).has_more
        with pytest.raises(NotFoundError):
            await client.page("file", "", after="never")
        assert (await client.page("batch", "")).objects == ()


@pytest.mark.parametrize(
    "key",
    [ObjectKey("File", "", "x"), ObjectKey("file", "a:b", "x"), ObjectKey("file", "", "a:b"), KEY._replace(id="")],
)
async def test_keys_are_checked(server: RedisServer, key: ObjectKey) -> None:
    async with objects(server) as client:
        with pytest.raises(InvalidRequestError, match="key"):
            await client.put(key, b"", ttl_s=60)


@pytest.mark.parametrize("shown", ["", "wrong", "right"])
async def test_an_admin_token_guards_what_is_stored(server: RedisServer, shown: str) -> None:
    async with objects(server, shown, admin_token="right") as client:
        if shown == "right":
            assert (await client.put(KEY, b"x", ttl_s=60)).stored
            return
        calls: list[Any] = [
            client.put(KEY, b"x", ttl_s=60),
            client.get(KEY),
            client.page("file", ""),
            client.delete(KEY),
        ]
        calls += [client.put_parts(KEY, {0: b""}), client.get_parts(KEY, [0]), client.list_parts(KEY)]
        for asked in (*calls, client.claim(KEY, "a", 5)):
            with pytest.raises(UnavailableError):
                await asked
