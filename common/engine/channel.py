"""Framed messages over a stream socket between a gRPC process and its engine process.

A frame is a little-endian uint32 length and that many bytes of msgpack. Writing never blocks: bytes that the
socket does not take are kept and sent when it can take more. A parent that reads nothing (it is stopped, or
swamped) must not fill the engine's memory: from `max_backlog` bytes on the channel is `congested`, and the
engine's loop makes nothing more until that is over. It is over when the parent reads on, or ends.
"""

from __future__ import annotations

import select
import socket
import struct
from collections.abc import Iterator
from typing import Any

import msgspec

HEADER = struct.Struct("<I")
MAX_FRAME = 1 << 30
MAX_BACKLOG = 64 << 20


class FrameDecoder:
    """Cuts a byte stream into frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Frames completed by `data`."""
        self._buffer += data
        while len(self._buffer) >= HEADER.size:
            (length,) = HEADER.unpack_from(self._buffer)
            if length > MAX_FRAME:
                raise ValueError(f"frame of {length} bytes; the limit is {MAX_FRAME}")
            end = HEADER.size + length
            if len(self._buffer) < end:
                return
            frame = bytes(memoryview(self._buffer)[HEADER.size : end])
            del self._buffer[:end]
            yield frame


def frame(payload: bytes) -> bytes:
    return HEADER.pack(len(payload)) + payload


class EngineChannel:
    """The engine's end: blocks only in `wait`."""

    def __init__(
        self, sock: socket.socket, decoder: msgspec.msgpack.Decoder[Any], max_backlog: int = MAX_BACKLOG
    ) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._decoder = decoder
        self._encoder = msgspec.msgpack.Encoder()
        self._frames = FrameDecoder()
        self._out = bytearray()
        self._max_backlog = max_backlog
        self._watched: list[int] = []
        self.closed = False

    @property
    def congested(self) -> bool:
        """More waits for the parent than may: send nothing that can wait."""
        return len(self._out) >= self._max_backlog

    def watch(self, fd: int) -> None:
        """Also wake up from `wait` when `fd` is readable, unless the channel is congested."""
        self._watched.append(fd)

    def wait(self, timeout_s: float) -> list[Any]:
        """Messages that have arrived; waits up to `timeout_s` for the first, for a watched fd, or for room."""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN | (select.POLLOUT if self._out else 0))
        for fd in () if self.congested else self._watched:
            poll.register(fd, select.POLLIN)
        ready = dict(poll.poll(timeout_s * 1e3))
        events = ready.get(self._sock.fileno(), 0)
        if events & select.POLLOUT:
            self._flush()
        if not events & (select.POLLIN | select.POLLHUP | select.POLLERR):
            return []
        return self._read()

    def send(self, messages: list[Any]) -> None:
        """Queue messages and write what the socket takes."""
        for message in messages:
            self._out += frame(self._encoder.encode(message))
        if self._out:
            self._flush()

    def _read(self) -> list[Any]:
        messages: list[Any] = []
        while not self.closed:
            try:
                data = self._sock.recv(1 << 20)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            if not data:
                self.closed = True
                break
            messages += [self._decoder.decode(f) for f in self._frames.feed(data)]
        return messages

    def _flush(self) -> None:
        try:
            sent = self._sock.send(self._out)
        except BlockingIOError:
            return
        except OSError:
            self.closed = True
            return
        del self._out[:sent]
