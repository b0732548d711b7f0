"""TLS and mTLS between services and at the API's port, with certificates that an authority of ours signs."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import router_support as support
from api_support import stored_cluster
from redis_support import run_redis
from tls_support import Authority

from common.config import RouterConfig, TlsConfig
from common.errors import ConfigError, UnavailableError
from common.rpc import tls as tls_module
from common.rpc.client import call, open_channel
from common.rpc.server import RpcServer, Service
from common.rpc.tls import TlsFiles, is_loopback
from nanodeploy.v1 import limits_pb2 as pb
from nanodeploy.v1 import limits_pb2_grpc
from services.cli.doctor import running
from services.cli.doctor.finding import Level
from services.cli.state import ClusterState, ProcessId
from services.controller.limit_servicer import SERVICE
from services.router.https import check_files

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="certificates are made by the openssl command")


class Answers(limits_pb2_grpc.LimitsServiceServicer):
    """Says whose certificate the caller showed."""

    async def ListKeys(self, request: Any, context: Any) -> Any:  # noqa: N802
        names = context.auth_context().get("x509_common_name", [b""])
        return pb.ListKeysResponse(incarnation=names[0].decode(), revision=1)

    def add_to(self, server: Any) -> None:
        limits_pb2_grpc.add_LimitsServiceServicer_to_server(self, server)  # type: ignore[no-untyped-call]


@asynccontextmanager
async def serving(config: TlsConfig | None) -> AsyncIterator[str]:
    tls = TlsFiles(config) if config else None
    server = RpcServer([Service(SERVICE, Answers().add_to, lambda: True)], host="127.0.0.1", port=0, tls=tls)
    yield f"127.0.0.1:{await server.start()}"
    await server.drain(0)


async def who(address: str, config: TlsConfig | None) -> str:
    """Whom the server takes us for. Raises `UnavailableError` if there is no connection."""
    async with open_channel(address, tls=TlsFiles(config) if config else None) as channel:
        return await ask(channel)


async def ask(channel: Any) -> str:
    stub: Any = limits_pb2_grpc.LimitsServiceStub(channel)  # type: ignore[no-untyped-call]
    response = await call(stub.ListKeys, pb.ListKeysRequest(), timeout_s=5)
    return str(response.incarnation)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ca")


async def test_both_sides_show_who_they_are(authority: Authority, tmp_path: Path) -> None:
    other = Authority(tmp_path / "other", "another authority")
    async with serving(authority.config("server")) as address:
        mine = authority.config("client")
        assert await who(address, mine) == "client"
        nobody = TlsConfig(ca=mine.ca)
        foreign = TlsConfig(ca=mine.ca, cert=other.config("client").cert, key=other.config("client").key)
        distrusts = TlsConfig(ca=str(other.cert), cert=mine.cert, key=mine.key)
        for config in (nobody, foreign, distrusts, None):
            with pytest.raises(UnavailableError):
                await who(address, config)


async def test_tls_without_certificates_of_callers(authority: Authority) -> None:
    server = authority.config("server")
    async with serving(TlsConfig(cert=server.cert, key=server.key)) as address:
        assert await who(address, TlsConfig(ca=server.ca)) == ""
        with pytest.raises(UnavailableError):
            await who(address, None)
    async with serving(None) as address:
        assert await who(address, None) == ""
        with pytest.raises(UnavailableError):
            await who(address, TlsConfig(ca=server.ca))


# ruff: noqa: ASYNC240 -- small files
async def test_renewed_certificates_are_used_without_a_restart(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The authority changes as well: what is old is refused from then on, what is open goes on."""
    monkeypatch.setattr(tls_module, "LOOK_S", 0.0)
    server, client = authority.config("server"), authority.config("client")
    async with serving(server) as address, open_channel(address, tls=TlsFiles(client)) as channel:
        assert await ask(channel) == "client"
        before = {path: Path(path).read_bytes() for path in (client.ca, client.cert, client.key)}
        renewed = Authority(tmp_path / "renewed", "test authority")
        for name, config in (("server", server), ("renewed-client", client)):
            for old, new in zip((config.cert, config.key), renewed.issue(name), strict=True):
                Path(old).write_bytes(new.read_bytes())
        Path(server.ca).write_bytes(renewed.cert.read_bytes())
        assert await ask(channel) == "renewed-client", "the same channel, another connection"
        await asyncio.sleep(0)
        assert len(channel._calls) == 1, "the old one is let go"
        old = {name: tmp_path / f"old-{name}" for name in ("ca", "cert", "key")}
        for path, content in zip(old.values(), before.values(), strict=True):
            path.write_bytes(content)
        with pytest.raises(UnavailableError):
            await who(address, TlsConfig(**{name: str(path) for name, path in old.items()}))


async def test_files_that_become_unreadable_leave_the_last_ones(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls_module, "LOOK_S", 0.0)
    client = authority.config("client")
    async with serving(authority.config("server")) as address, open_channel(address, tls=TlsFiles(client)) as channel:
        Path(client.key).unlink()
        assert await ask(channel) == "client"


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def spoil(config: TlsConfig, name: str, how: str, other: Authority) -> None:
    path = Path(getattr(config, name))
    change = {"empty": lambda _: b"", "half": half, "other": lambda _: other.issue("other")[1].read_bytes()}[how]
    path.write_bytes(change(path.read_bytes()))


SPOILT = [("ca", "empty"), ("ca", "half"), ("cert", "empty"), ("cert", "half"), ("key", "empty"), ("key", "other")]


@pytest.mark.parametrize(("name", "how"), SPOILT)
async def test_files_that_cannot_be_used_leave_the_last_ones_until_they_can(
    authority: Authority, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str, how: str
) -> None:
    """Over an empty key gRPC aborts the process: every service that looks while it is being written."""
    monkeypatch.setattr(tls_module, "LOOK_S", 0.0)
    server, client = authority.config("server"), authority.config("client")
    async with serving(server) as address, open_channel(address, tls=TlsFiles(client)) as channel:
        good = Path(getattr(client, name)).read_bytes()
        spoil(client, name, how, authority)
        assert [await ask(channel) for _ in range(3)] == ["client"] * 3
        assert sum("cannot be used" in record.getMessage() for record in caplog.records) >= 1
        Path(getattr(client, name)).write_bytes(good)
        assert await ask(channel) == "client"


@pytest.mark.parametrize(("name", "how"), SPOILT)
def test_files_that_cannot_be_used_are_named_at_the_start(authority: Authority, name: str, how: str) -> None:
    config = authority.config("server")
    spoil(config, name, how, authority)
    with pytest.raises(ConfigError, match="cannot be used") as caught:
        TlsFiles(config)
    assert getattr(config, name) in caught.value.message


def test_wrong_files_are_said_at_the_start(authority: Authority, tmp_path: Path) -> None:
    config = authority.config("a")
    for wrong in (TlsConfig(cert=config.cert), TlsConfig(key=config.key), TlsConfig(ca=str(tmp_path / "none.pem"))):
        with pytest.raises(ConfigError):
            TlsFiles(wrong)


@pytest.mark.parametrize(
    ("host", "inside"),
    [("127.0.0.1", True), ("::1", True), ("[::1]", True), ("localhost", True), ("0.0.0.0", False), ("::", False)],
)
def test_loopback(host: str, inside: bool) -> None:
    assert is_loopback(host) == inside


async def test_one_warning_for_plain_text_that_others_reach(
    caplog: pytest.LogCaptureFixture, authority: Authority
) -> None:
    caplog.set_level(logging.INFO)
    for config, warnings in ((None, 1), (authority.config("server"), 0)):
        caplog.clear()
        tls = TlsFiles(config) if config else None
        server = RpcServer([], host="0.0.0.0", port=0, tls=tls)
        await server.start()
        await server.drain(0)
        assert sum("plain text" in record.getMessage() for record in caplog.records) == warnings


# -- the API --


async def test_https_and_its_renewal(authority: Authority, tmp_path: Path) -> None:
    cert, key = authority.issue("api")
    config = {"ssl_certfile": str(cert), "ssl_keyfile": str(key)}
    async with support.cluster(tmp_path / "model", support.say("hello there"), **config) as made:
        url = f"https://127.0.0.1:{made.router.port}"
        with pytest.raises(httpx.HTTPError):
            await made.http.get("/health")  # plain text
        trusting = ssl.create_default_context(cafile=str(authority.cert))
        body: dict[str, Any] = {"prompt": "abc", "max_tokens": 20, "stream": True}
        async with httpx.AsyncClient(base_url=url, verify=trusting) as http:
            answer = await http.post("/v1/completions", json=body)
            text = "".join(event["choices"][0]["text"] for event in support.events(answer.text) if event["choices"])
            assert text == "hello there"
            first = await certificate(made.router.port)
            authority.issue("api")
            deadline = time.monotonic() + 10
            while await certificate(made.router.port) == first:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.1)
            assert (await http.post("/v1/completions", json=body)).status_code == 200


async def test_doctor_proves_a_path_that_speaks_https(authority: Authority, tmp_path: Path) -> None:
    cert, key = authority.issue("api")
    files = {"ssl_certfile": str(cert), "ssl_keyfile": str(key)}
    with run_redis() as server:
        async with stored_cluster(
            server, tmp_path / "model", support.say("hello"), max_model_len=2000, **files
        ) as made:
            state = ClusterState(
                name="t",
                phase="ready",
                launcher=ProcessId.of(os.getpid()),
                url=f"https://127.0.0.1:{made.cluster.router.port}",
                controller=f"127.0.0.1:{made.controller.port}",
                model=support.MODEL,
                version="0",
            )
            found = await running.path(state)
            assert found.level is Level.OK, found


async def certificate(port: int) -> str:
    """What a new connection is shown."""
    return await asyncio.to_thread(ssl.get_server_certificate, ("127.0.0.1", port), timeout=10)


async def test_https_goes_on_with_what_it_has_while_files_do_not_fit(authority: Authority, tmp_path: Path) -> None:
    cert, key = authority.issue("api")
    config = {"ssl_certfile": str(cert), "ssl_keyfile": str(key)}
    async with support.cluster(tmp_path / "model", support.say("hello there"), **config) as made:
        first = await certificate(made.router.port)
        new_cert, new_key = authority.issue("renewed")
        for content in (new_cert.read_bytes(), b""):
            cert.write_bytes(content)
            await asyncio.sleep(1.5)  # it looks once a second
            assert await certificate(made.router.port) == first
        key.write_bytes(new_key.read_bytes())
        cert.write_bytes(new_cert.read_bytes())
        deadline = time.monotonic() + 10
        while await certificate(made.router.port) == first:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.1)


def test_https_files_that_do_not_fit(authority: Authority) -> None:
    cert, _ = authority.issue("one")
    _, key = authority.issue("two")
    for config in ({"ssl_certfile": str(cert)}, {"ssl_certfile": str(cert), "ssl_keyfile": str(key)}):
        with pytest.raises(ConfigError):
            check_files(RouterConfig(**config))
