"""A socket between rank 0 and another rank: frames in order, each a kind and bytes.

    uint32 length of what follows, uint8 kind, payload

Writing waits for room, but never longer than the link's time: a rank that takes nothing any more is lost.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct

_HEADER = struct.Struct("<IB")


class LinkClosedError(Exception):
    """The other side is gone, or takes nothing."""


class Link:
    def __init__(self, sock: socket.socket, timeout_s: float) -> None:
        sock.settimeout(timeout_s)
        self._sock = sock
        self._buffer = bytearray()

    def fileno(self) -> int:
        return self._sock.fileno()

    def send(self, kind: int, payload: bytes = b"") -> None:
        """`LinkClosedError` if it cannot be sent whole."""
        try:
            self._sock.sendall(_HEADER.pack(len(payload) + 1, kind) + payload)
        except OSError as error:
            raise LinkClosedError(str(error)) from None

    def wait(self, timeout_s: float) -> bool:
        """Is there something to `receive`?"""
        if self._next_length() >= 0:
            return True
        if self._sock.fileno() < 0:
            raise LinkClosedError("it is closed")
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        return bool(poll.poll(timeout_s * 1e3))

    def receive(self) -> tuple[int, bytes]:
        """The next frame; waits for it no longer than the link's time. `LinkClosedError` at the end."""
        while (length := self._next_length()) < 0:
            try:
                data = self._sock.recv(1 << 20)
            except OSError as error:
                raise LinkClosedError(str(error)) from None
            if not data:
                raise LinkClosedError("it has ended")
            self._buffer += data
        end = _HEADER.size - 1 + length
        kind, payload = self._buffer[_HEADER.size - 1], bytes(memoryview(self._buffer)[_HEADER.size : end])
        del self._buffer[:end]
        return kind, payload

    def end(self) -> None:
        """Wakes up the other side, and who waits on this one, in whatever thread."""
        with contextlib.suppress(OSError):  # the other side was first, or it is closed
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Nobody waits on it any more."""
        self.end()
        self._sock.close()

    def _next_length(self) -> int:
        """Of the frame that is in the buffer whole, -1 if none is."""
        if len(self._buffer) < _HEADER.size:
            return -1
        length: int = _HEADER.unpack_from(self._buffer)[0]
        return length if len(self._buffer) >= _HEADER.size - 1 + length else -1
