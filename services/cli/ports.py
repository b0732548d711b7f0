"""TCP ports for services that are yet to start.

    take -> held by us (bound, not listening) -> the service binds and listens -> ... -> close

Linux lets a socket bind and listen where another one is bound without listening, if both set SO_REUSEADDR, as
gRPC, asyncio and Valkey do. Held so, a port is neither given to an outgoing connection nor to whoever asks for a
free one, from before its service starts until after its last restart. Two launchers tell each other's ports apart
by an abstract Unix socket of the port's name, which goes with its process.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable

import psutil

from common.errors import ConfigError

_LOCK = "\0nanodeploy-port-{}"
_NEXT = 100  # ports tried after a wanted one


class Ports:
    """Hands out ports that are free: the wanted one, else any. Never the same twice. Use as a context manager."""

    def __init__(self, whose: Callable[[int], str] = lambda pid: "") -> None:
        """`whose` names the process of a pid when it is one of ours, for messages."""
        self._whose = whose
        self._held: dict[int, tuple[socket.socket, socket.socket]] = {}

    def __enter__(self) -> Ports:
        return self

    def __exit__(self, *exception: object) -> None:
        for pair in self._held.values():
            for sock in pair:
                sock.close()
        self._held.clear()

    def take(self, host: str, wanted: int) -> int:
        for port in (wanted, 0, 0, 0, 0):
            if found := self._hold(host, port):
                return found
        raise ConfigError(f"no free TCP port on {host}")

    def take_next(self, host: str, wanted: int) -> int:
        """The wanted port, else the next free one above it."""
        for port in range(wanted, min(wanted + _NEXT, 65536)):
            if found := self._hold(host, port):
                return found
        return self.take(host, 0)

    def take_exactly(self, host: str, port: int, flag: str) -> int:
        """Raises `ConfigError` that names who holds the port."""
        found = self._hold(host, port)
        if not found:
            raise ConfigError(f"{self.in_use(host, port)}: choose another {flag}", param="port")
        return found

    def in_use(self, host: str, port: int) -> str:
        """That the port is taken, and by whom as far as this user may see it."""
        holder = _holder(port)
        if holder is None:
            return f"port {port} on {host} is in use"
        return f"port {port} on {host} is in use by {self._whose(holder.pid) or holder.name()} (pid {holder.pid})"

    def _hold(self, host: str, port: int) -> int:
        """The port, held from now on; 0 if somebody has it."""
        sock = _bind(host, port)
        if sock is None:
            return 0
        found: int = sock.getsockname()[1]
        lock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            lock.bind(_LOCK.format(found))
        except OSError:
            lock.close()
            sock.close()
            return 0
        self._held[found] = (sock, lock)
        return found


def _bind(host: str, port: int) -> socket.socket | None:
    """A bound socket, None if the port is in use. Raises `ConfigError` for a host that is not ours."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise ConfigError(f"host {host!r}: {error.strerror}", param="host") from None
    sock = socket.socket(family, kind)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            return None
        if isinstance(error, PermissionError):
            raise ConfigError(f"port {port} on {host} needs root: choose one above 1023", param="port") from None
        raise ConfigError(f"{host}:{port}: {error.strerror}", param="host") from None
    return sock


def _holder(port: int) -> psutil.Process | None:
    try:
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and port in connection.laddr[1:2] and connection.pid:
                return psutil.Process(connection.pid)
    except psutil.Error:
        pass
    return None
