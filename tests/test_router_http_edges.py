"""One connection at its edges: requests in line, cut anywhere, other protocols, floods, clients that do not read."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import random
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httptools
import pytest
from router_support import MODEL, Cluster, Script, cluster, say, tokenizer, until

from common.telemetry.logs import bound_fields
from common.types import GenerationRequest
from services.router import protocol
from services.router.endpoint import RawEndpoint

BODY: dict[str, Any] = {"model": MODEL, "prompt": "x"}
H2C = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n"


def post(
    body: dict[str, Any], headers: bytes = b"", path: bytes = b"/v1/completions", version: bytes = b"1.1"
) -> bytes:
    data = json.dumps(body).encode()
    head = b"POST %b HTTP/%b\r\nhost: x\r\ncontent-length: %d\r\n%b\r\n" % (path, version, len(data), headers)
    return head + data


class Answers:
    """What comes back on a connection, answer by answer."""

    def __init__(self) -> None:
        self.done: list[tuple[int, str, bytes]] = []  # status, request id, body
        self._parser = httptools.HttpResponseParser(self)

    def feed(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        self._id, self._body = "", b""

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"x-request-id":
            self._id = value.decode()

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        self.done.append((self._parser.get_status_code(), self._id, self._body))


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.answers = Answers()

    async def got(self, count: int) -> list[tuple[int, str, bytes]]:
        async with asyncio.timeout(20):
            while len(self.answers.done) < count:
                data = await self.reader.read(65536)
                assert data, f"closed after {self.answers.done}"
                self.answers.feed(data)
        return self.answers.done

    async def rest(self) -> bytes:
        """All until the other side closes."""
        return await asyncio.wait_for(self.reader.read(), 20)


@contextlib.asynccontextmanager
async def connect(made: Cluster) -> AsyncIterator[Client]:
    reader, writer = await asyncio.open_connection("127.0.0.1", made.router.port)
    try:
        yield Client(reader, writer)
    finally:
        writer.transport.abort()


def text_of(events: bytes) -> str:
    lines = [line[6:] for line in events.decode().split("\n") if line.startswith("data: {")]
    return "".join(choice["text"] for line in lines for choice in json.loads(line)["choices"])


@pytest.mark.parametrize("seed", range(3))
async def test_requests_in_line_cut_anywhere_are_answered_in_order(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    async with cluster(tmp_path, say("hello there")) as made, connect(made) as client:
        sent, kinds = b"", []
        for number in range(24):
            name = f"r{number}"
            header = f"x-request-id: {name}\r\n".encode()
            kind = rng.choice(("whole", "stream", "h2c", "query", "get", "bad"))
            kinds.append(kind)
            if kind == "get":
                sent += b"GET /v1/models HTTP/1.1\r\nhost: x\r\n%b\r\n" % header
            elif kind == "bad":
                sent += post({"model": 7}, header)
            else:
                more = {"h2c": H2C}.get(kind, b"")
                path = b"/v1/completions?a=b" if kind == "query" else b"/v1/completions"
                sent += post(BODY | {"stream": kind == "stream"}, header + more, path)
        while sent:
            size = rng.choice((1, 7, 100, 1000, 5000))
            client.writer.write(sent[:size])
            sent = sent[size:]
            if rng.random() < 0.3:
                await asyncio.sleep(0.002)
        answers = await client.got(24)
        assert [name for _, name, _ in answers] == [f"r{number}" for number in range(24)]
        for kind, (status, _, body) in zip(kinds, answers, strict=True):
            assert status == (400 if kind == "bad" else 200), kind
            if kind == "stream":
                assert text_of(body) == "hello there"
            elif kind in ("whole", "h2c", "query"):
                assert json.loads(body)["choices"][0]["text"] == "hello there"


async def test_a_head_that_waits_for_the_first_text_stays_with_its_answer(tmp_path: Path) -> None:
    """The first token is no text yet; the next request comes before the second."""
    ids = tokenizer().encode("€ and more")
    assert len(tokenizer().token_bytes(ids[0])) < len("€".encode())
    async with cluster(tmp_path, lambda request: Script([ids], delay_s=0.1)) as made, connect(made) as client:
        client.writer.write(post(BODY | {"stream": True}, b"x-request-id: one\r\n"))
        await until(lambda: bool(made.worker.entries) and bool(made.worker.entries[1].rows))
        client.writer.write(post(BODY, b"x-request-id: two\r\n"))
        first, second = await client.got(2)
        assert (first[0], first[1], text_of(first[2])) == (200, "one", "€ and more")
        assert second[:2] == (200, "two")


async def test_an_unread_head_behind_running_requests_costs_them_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "HEAD_TIMEOUT_S", 0.2)
    async with cluster(tmp_path, say("hello", delay_s=0.3)) as made, connect(made) as client:
        client.writer.write(post(BODY | {"stream": True}) + post(BODY) + b"POST /v1/compl")
        answers = await client.got(2)
        assert text_of(answers[0][2]) == "hello"
        assert [status for status, _, _ in answers] == [200, 200]
        assert await client.rest() == b"", "half a head is waited for no longer than before"


@pytest.mark.parametrize("cut", [0, 60, 200, -5])
async def test_another_protocol_is_declined_by_not_speaking_it(tmp_path: Path, cut: int) -> None:
    """As Java's client asks; the body follows in HTTP/1.1, and so does the next request."""
    async with cluster(tmp_path, say("hello")) as made, connect(made) as client:
        data = post(BODY, H2C)
        client.writer.write(data[:cut])
        await asyncio.sleep(0.05)
        client.writer.write(data[cut:] + post(BODY))
        for status, _, body in await client.got(2):
            assert (status, json.loads(body)["choices"][0]["text"]) == (200, "hello")
        client.writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n" * 3)
        assert [status for status, _, _ in await client.got(5)] == [200] * 5
        client.writer.write(b"CONNECT elsewhere:443 HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await client.rest()).startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize("stream", [True, False])
async def test_garbage_behind_a_request_is_no_part_of_its_answer(tmp_path: Path, stream: bool) -> None:
    """Neither within the stream nor in the place of an answer that is still being made."""
    async with cluster(tmp_path, say("Hello, world! " * 9, delay_s=0.02)) as made:
        async with connect(made) as client:
            client.writer.write(post(BODY | {"stream": stream}))
            await until(lambda: bool(made.worker.entries) and bool(made.worker.entries[1].rows))
            client.writer.write(b"no http at all\r\n\r\n")
            assert b"HTTP/1.1 400" not in await client.rest()
            await until(lambda: bool(made.worker.entries[1].cancelled_at))
        async with connect(made) as client:
            client.writer.write(post(BODY | {"stream": stream}) + b"no http at all\r\n\r\n")
            assert await client.rest() == b""
        async with connect(made) as client:
            client.writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n5\r\n")
            await asyncio.sleep(0.05)
            client.writer.write(b"hello?")
            assert (await client.rest()).startswith(b"HTTP/1.1 400"), "its own body is another matter"


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        (b"POST /v1/completions HTTP/1.1\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\nabcd", "Invalid HTTP"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "Invalid HTTP"),
        (b"GET /health HTTP/1.1\r\nx: " + b"y" * 2**18, "headers are too large"),
    ],
)
async def test_what_cannot_be_read_gets_an_error_like_all_others(tmp_path: Path, sent: bytes, why: str) -> None:
    async with cluster(tmp_path, say("hello there")) as made, connect(made) as client:
        client.writer.write(sent)
        await client.got(1)
        ((status, request_id, body),) = client.answers.done
        assert (status, len(request_id)) == (400, 32)
        error = json.loads(body)["error"]
        assert (why in error["message"], error["type"]) == (True, "invalid_request_error")


async def test_who_asks_before_a_large_body_is_told_before(tmp_path: Path) -> None:
    asks = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: %d\r\n\r\n"
    async with cluster(tmp_path, say("hello there"), max_body_bytes=2**20) as made:
        async with connect(made) as client:
            client.writer.write(asks % (2**20 + 1))
            assert (await client.rest()).startswith(b"HTTP/1.1 413 ")
        async with connect(made) as client:
            body = json.dumps(BODY).encode()
            client.writer.write(asks % len(body))
            go_on = b"HTTP/1.1 100 Continue\r\n\r\n"
            assert await asyncio.wait_for(client.reader.readexactly(len(go_on)), 20) == go_on
            client.writer.write(body)
            assert (await client.got(1))[0][0] == 200


async def test_a_packed_body_is_declined_by_name(tmp_path: Path) -> None:
    data = gzip.compress(json.dumps(BODY).encode())
    async with cluster(tmp_path, say("hi")) as made:
        for coding, status in (("gzip", 400), ("identity", 200)):
            content = data if coding == "gzip" else json.dumps(BODY).encode()
            answer = await made.http.post("/v1/completions", content=content, headers={"content-encoding": coding})
            assert answer.status_code == status
            assert (status == 200) or "Content-Encoding gzip is not supported" in answer.json()["error"]["message"]


async def test_a_client_of_http_1_0_gets_no_chunks(tmp_path: Path) -> None:
    async with cluster(tmp_path, say("hello")) as made, connect(made) as client:
        client.writer.write(post(BODY | {"stream": True}, version=b"1.0"))
        head, _, body = (await client.rest()).partition(b"\r\n\r\n")
        assert b"transfer-encoding" not in head
        assert body.startswith(b"data: ")
        assert body.endswith(b"data: [DONE]\n\n")
        assert text_of(body) == "hello"


async def test_what_follows_a_chunked_body_is_bounded_and_no_header(tmp_path: Path) -> None:
    data = json.dumps(BODY).encode()
    chunked = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n"
    request = chunked % (len(data), data)
    async with cluster(tmp_path, say("hello")) as made:
        async with connect(made) as client:
            client.writer.write(request[:-3])
            await asyncio.sleep(0.05)
            client.writer.write(b"0\r\nx-request-id: forged\r\n\r\n")
            ((status, name, _),) = await client.got(1)
            assert (status, name == "forged") == (200, False)
        async with connect(made) as client:
            client.writer.write(request)
            answer = b""
            with contextlib.suppress(ConnectionError):
                for _ in range(100):
                    client.writer.write(b"x-more: %b\r\n" % (b"a" * 8000))
                    await client.writer.drain()
                    await asyncio.sleep(0.002)
                answer = await client.rest()
            assert not answer or answer.startswith(b"HTTP/1.1 400")
            await until(lambda: made.router.gateway is not None and not made.router.gateway.in_flight)
            assert not made.worker.entries or len(made.worker.entries) == 1


async def test_empty_lines_do_not_keep_an_idle_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.router.server.KEEP_ALIVE_S", 0.2)
    async with cluster(tmp_path, say("hello")) as made, connect(made) as client:
        client.writer.write(post(BODY))
        await client.got(1)
        client.writer.write(b"\r\n")
        assert await client.rest() == b""


async def test_a_request_whose_head_began_before_the_last_answer_ended_has_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.router.server.KEEP_ALIVE_S", 0.2)
    async with cluster(tmp_path, say("hello", delay_s=0.2)) as made, connect(made) as client:
        next_one = post(BODY, b"x-request-id: two\r\n")
        client.writer.write(post(BODY) + next_one[:30])
        await client.got(1)
        client.writer.write(next_one[30:])
        assert (await client.got(2))[1][:2] == (200, "two")


async def test_a_request_in_line_starts_without_the_fields_of_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before: list[dict[str, Any]] = []
    call = RawEndpoint.__call__

    async def noted(self: RawEndpoint, scope: Any, receive: Any, send: Any) -> None:
        before.append(dict(bound_fields()))
        await call(self, scope, receive, send)

    monkeypatch.setattr(RawEndpoint, "__call__", noted)
    async with cluster(tmp_path, say("hello")) as made, connect(made) as client:
        client.writer.write(post(BODY, b"x-request-id: one\r\n") + post(BODY, b"x-request-id: two\r\n"))
        assert [name for _, name, _ in await client.got(2)] == ["one", "two"]
    assert before == [{}, {}]


@pytest.mark.parametrize("whole", [False, True])
async def test_a_client_gone_while_its_next_request_is_in_line(
    tmp_path: Path, whole: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async with cluster(tmp_path, say("Hello, world! " * 9, delay_s=0.02)) as made:
        async with connect(made) as client:
            client.writer.write(post(BODY | {"stream": not whole}) + post(BODY))
            await until(lambda: bool(made.worker.entries))
        await until(lambda: bool(made.worker.entries[1].cancelled_at))
        await until(lambda: made.router.gateway is not None and not made.router.gateway.in_flight)
        await asyncio.sleep(0.05)
        assert len(made.worker.entries) == 1, "the one in line is not begun"
    assert "ASGI" not in caplog.text


# -- clients that do not read ------------------------------------------------------------------------------------------


def much(request: GenerationRequest) -> Script:
    ids = tokenizer().encode("Hello, world! " * 12)
    return Script([ids * 100] * request.sampling.n, step_tokens=50)


@contextlib.asynccontextmanager
async def deaf(made: Cluster, body: dict[str, Any]) -> AsyncIterator[socket.socket]:
    """Asks and reads nothing: some ten megabytes are on their way, far fewer tokens than the buffer's limit."""
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(raw, ("127.0.0.1", made.router.port))
        await loop.sock_sendall(raw, post(BODY | {"n": 4, "logprobs": 20} | body))
        yield raw


async def test_a_deaf_client_has_the_time_of_its_request_and_no_more(tmp_path: Path) -> None:
    async with cluster(tmp_path, much, stream_buffer_tokens=100_000, request_timeout_s=1.5) as made:
        async with deaf(made, {"stream": True}):
            gateway = made.router.gateway
            assert gateway is not None
            await until(lambda: gateway.in_flight == 1)
            await until(lambda: not gateway.in_flight)


async def test_the_end_of_a_stream_waits_for_a_deaf_client_but_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.router.exchange.TAKE_TIMEOUT_S", 0.3)
    async with cluster(tmp_path, much) as made, deaf(made, {}) as raw:
        gateway = made.router.gateway
        assert gateway is not None
        loop = asyncio.get_running_loop()
        await until(lambda: bool(made.worker.entries) and not gateway.in_flight)
        await loop.sock_sendall(raw, post(BODY))  # answered where the first answer fills the connection
        await until(lambda: len(made.worker.entries) == 2)
        await until(lambda: not gateway.in_flight)
        with contextlib.suppress(ConnectionError):
            await asyncio.wait_for(_read_all(raw), 10)


async def test_an_answer_that_nobody_reads_does_not_keep_its_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "_PROBES", (("TCP_USER_TIMEOUT", 500),))
    async with cluster(tmp_path, much) as made, deaf(made, {}):
        server = made.router._server
        assert server is not None
        await until(lambda: bool(made.worker.entries) and not server.server_state.connections)


async def _read_all(raw: socket.socket) -> None:
    while await asyncio.get_running_loop().sock_recv(raw, 1 << 20):
        pass
