"""Several router processes on one port: a supervisor that serves nothing and starts each again when it ends.

    spawned -> serving -> (ended by itself -> pause -> spawned) | asked to stop: SIGTERM, its own grace, SIGKILL

The kernel deals connections out among those that listen (SO_REUSEPORT), so each connection stays with one process.
They share nothing but the controller. The supervisor holds the port, and each process's own, by sockets that do not
listen, which also finds out whether somebody else has them. A process whose supervisor is gone, however it went, sees
its standard input end and stops as if asked to.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from common.config.schema import RouterConfig
from common.errors import ConfigError
from common.telemetry import get_logger

WRONG_CONFIG: Final = 2  # exit code of a process that will not start however often it is tried
STEADY_S: Final = 10.0  # whoever lived this long is started again at once
MAX_PAUSE_S: Final = 5.0
MAX_QUICK_ENDS: Final = 5  # of one process in a row, while no other was ever steady: none will be
STOP_S: Final = 10.0  # beside the routers' own grace

_log = get_logger(__name__)


class Shared(NamedTuple):
    """Of one router among several on `port`: its number, from 0."""

    port: int
    number: int


class Supervisor:
    """`argv` starts one router that shares the port it is told after `--share`."""

    def __init__(self, config: RouterConfig, argv: Sequence[str]) -> None:
        self._config = config
        self._argv = argv
        self._stopping = asyncio.Event()
        self._steady = False
        self._code = 0
        self.running: dict[int, asyncio.subprocess.Process] = {}

    def stop(self, code: int = 0) -> None:
        self._code = self._code or code
        self._stopping.set()

    async def run(self) -> int:
        """Until `stop`; returns the exit code. Raises `ConfigError` if a port is taken."""
        host, workers, own = self._config.host, self._config.workers, self._config.worker_port
        with contextlib.ExitStack() as stack:
            port = stack.enter_context(hold(host, self._config.port)).getsockname()[1]
            for index in range(workers if own else 0):
                stack.enter_context(hold(host, own + index, "router.worker_port"))
            _log.info("routers share a port", host=host, port=port, workers=workers)
            await asyncio.gather(*(self._keep(index, port) for index in range(workers)))
        return self._code

    async def _keep(self, index: int, port: int) -> None:
        quick = 0
        clock = asyncio.get_running_loop().time
        while not self._stopping.is_set():
            began = clock()
            process = self.running[index] = await asyncio.create_subprocess_exec(
                *self._argv, "--share", str(port), "--index", str(index), stdin=asyncio.subprocess.PIPE
            )
            code = await self._ended(process)
            del self.running[index]
            if self._stopping.is_set():
                return
            if code == WRONG_CONFIG:
                self.stop(code)
                return
            steady = clock() - began >= STEADY_S
            self._steady |= steady
            quick = 0 if steady else quick + 1
            _log.warning("router ended and is started again", index=index, pid=process.pid, code=code)
            if quick > MAX_QUICK_ENDS and not self._steady:
                self.stop(1)
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(0.1 * 2**quick, MAX_PAUSE_S)):
                    await self._stopping.wait()

    async def _ended(self, process: asyncio.subprocess.Process) -> int:
        """Its exit code; while stopping, it has its grace and no more."""
        ended = asyncio.ensure_future(process.wait())
        told = asyncio.ensure_future(self._stopping.wait())
        await asyncio.wait((ended, told), return_when=asyncio.FIRST_COMPLETED)
        told.cancel()
        if not ended.done():
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            await asyncio.wait({ended}, timeout=self._config.drain_grace_s + STOP_S)
            if not ended.done():
                process.kill()
        return await ended


def hold(host: str, port: int, param: str = "router.port") -> socket.socket:
    """The port, bound and not listened on: routers may share it, nobody else is given it. `ConfigError` if taken."""
    return _bound(host, port, param, shared=False)


def listen(host: str, port: int, param: str = "router.port", *, shared: bool) -> socket.socket:
    """A listening socket; `shared` beside others of the same user that say so too. Raises `ConfigError`."""
    listener = _bound(host, port, param, shared=shared)
    try:
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise _taken(host, port, param, error) from error
    listener.setblocking(False)
    return listener


def _bound(host: str, port: int, param: str, *, shared: bool) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise _taken(host, port, param, error) from error
    return sock


def _taken(host: str, port: int, param: str, error: OSError) -> ConfigError:
    return ConfigError(f"cannot listen on {host}:{port}: {error}", param=param)


def stop_with_parent(stop: Callable[[], None]) -> None:
    """Call `stop` when standard input, whose other end the supervisor holds, comes to its end."""
    loop = asyncio.get_running_loop()

    def ended() -> None:
        loop.remove_reader(sys.stdin.fileno())
        stop()

    loop.add_reader(sys.stdin.fileno(), ended)
