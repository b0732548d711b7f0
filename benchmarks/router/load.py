"""HTTP load for `alone.py` that costs the core it shares as little as can be: raw sockets, no parsing."""

from __future__ import annotations

import asyncio
import json
import socket
import statistics
import time
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = "Because molecules scatter blue light more than red light, the sky looks blue. "
PROMPT_REPEATS = 6  # about 100 tokens
POLL_S = 0.005


class Client(asyncio.Protocol):
    """One keep-alive connection: a request at a time; counts events, notes the first byte."""

    def __init__(self) -> None:
        self._done: asyncio.Future[int] | None = None
        self._stream = False
        self._left = b""
        self.first_s = 0.0
        self.events = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(ConnectionError("the router closed the connection"))

    async def ask(self, request: bytes, *, stream: bool) -> int:
        """Send and wait for the end; returns the events of a stream, 1 for a whole answer."""
        self._done = asyncio.get_running_loop().create_future()
        self._stream, self._left, self.first_s, self.events = stream, b"", 0.0, 0
        self._transport.write(request)  # type: ignore[attr-defined]
        return await self._done

    def data_received(self, data: bytes) -> None:
        if not self.first_s:
            self.first_s = time.perf_counter()
            if not data.startswith(b"HTTP/1.1 200"):
                raise SystemExit(f"unexpected answer: {data[:500]!r}")
        assert self._done is not None
        if self._stream:
            self.events += data.count(b'"finish_reason":null')
            self._left = (self._left + data)[-32:]
            if self._left.endswith(b"0\r\n\r\n"):
                self._done.set_result(self.events)
        elif b"\r\n\r\n{" in data or data.endswith(b"}"):
            self._done.set_result(1)


def request_bytes(max_tokens: int, *, stream: bool) -> bytes:
    body = {
        "model": "bench",
        "messages": [{"role": "user", "content": TEXT * PROMPT_REPEATS}],
        "max_tokens": max_tokens,
        "stream": stream,
    }
    raw = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\ncontent-length: {len(raw)}\r\n\r\n"
    return head.encode() + raw


async def pause(number: int, concurrency: int, every_s: float) -> None:
    """Until it is time for a connection to ask again: connections take turns within `every_s`; 0 is at once."""
    if every_s:
        phase = (time.perf_counter() / every_s - number / concurrency) % 1.0
        await asyncio.sleep((1.0 - phase) * every_s)


async def load(
    port: int, concurrency: int, seconds: float, max_tokens: int, *, stream: bool, every_s: float = 0.0
) -> dict[str, float]:
    """Each connection asks again as soon as it has its answer, or every `every_s` seconds."""
    loop = asyncio.get_running_loop()
    request = request_bytes(max_tokens, stream=stream)
    clients = [(await loop.create_connection(Client, "127.0.0.1", port))[1] for _ in range(concurrency)]
    first_ms: list[float] = []
    answers = events = 0
    start = time.perf_counter()
    end = start + seconds

    async def one(number: int, client: Client) -> None:
        nonlocal answers, events
        while time.perf_counter() < end:
            await pause(number, concurrency, every_s)
            sent = time.perf_counter()
            got = await client.ask(request, stream=stream)
            events += got
            first_ms.append(1000 * (client.first_s - sent))
            answers += 1

    await asyncio.gather(*(one(number, client) for number, client in enumerate(clients)))
    wall = time.perf_counter() - start
    for client in clients:
        client._transport.close()
    return {
        "concurrency": concurrency,
        "requests_per_s": answers / wall,
        "tokens_per_s": (events - answers if stream else events) / wall,  # the role's event is no token
        "first_byte_p50_ms": statistics.median(first_ms),
        "first_byte_p99_ms": sorted(first_ms)[int(0.99 * len(first_ms))],
        "answers": answers,
    }


class Drinker:
    """One connection that asks for stream after stream and takes what has come whenever it is looked at."""

    _event = b'"finish_reason":null'
    _end = b"0\r\n\r\n"

    def __init__(self, port: int, request: bytes) -> None:
        self._sock = socket.create_connection(("127.0.0.1", port))
        self._request = request
        self._left = b""
        self._sent = 0.0
        self.events = 0
        self.streams = 0
        self.first_ms: list[float] = []
        self.busy = False

    def ask(self) -> None:
        self._sock.setblocking(True)
        self._sock.sendall(self._request)
        self._sock.setblocking(False)
        self._sent, self.busy = time.perf_counter(), True

    def look(self) -> None:
        try:
            data = self._sock.recv(1 << 18)
        except BlockingIOError:
            return
        if not data or not (self._left or data.startswith(b"HTTP/1.1 200")):
            raise SystemExit(f"unexpected answer: {data[:500]!r}")
        if not self._left:
            self.first_ms.append(1000 * (time.perf_counter() - self._sent))
        data = self._left + data
        self.events += data.count(self._event)
        self._left = data[1 - len(self._event) :]
        if data.endswith(self._end):
            self.streams += 1
            self._left, self.busy = b"", False

    def close(self) -> None:
        self._sock.close()


def drink(port: int, concurrency: int, seconds: float, max_tokens: int) -> dict[str, float]:
    """Streams in a closed loop, read every `POLL_S`: a client that costs the shared core as little as can be.

    Every event is counted; the time to the first byte is `POLL_S` coarse.
    """
    request = request_bytes(max_tokens, stream=True)
    drinkers = [Drinker(port, request) for _ in range(concurrency)]
    start = now = time.perf_counter()
    end = start + seconds
    while any(drinker.busy for drinker in drinkers) or now < end:
        for drinker in drinkers:
            if drinker.busy:
                drinker.look()
            elif now < end:
                drinker.ask()
        time.sleep(POLL_S)
        now = time.perf_counter()
    wall = now - start
    for drinker in drinkers:
        drinker.close()
    streams = sum(drinker.streams for drinker in drinkers)
    events = sum(drinker.events for drinker in drinkers) - streams  # the role's event is no token
    if events != streams * max_tokens:  # the event that ends a stream says so, and has no text
        raise SystemExit(f"{streams} streams of {max_tokens} tokens brought {events} events")
    first_ms = sorted(ms for drinker in drinkers for ms in drinker.first_ms)
    return {
        "concurrency": concurrency,
        "requests_per_s": streams / wall,
        "tokens_per_s": events / wall,
        "first_byte_p50_ms": statistics.median(first_ms),
        "first_byte_p99_ms": first_ms[int(0.99 * len(first_ms))],
        "answers": streams,
    }


def write_tokenizer(folder: Path) -> None:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([TEXT], trainer)
    raw.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, "eos_token": "<|im_end|>"}))
