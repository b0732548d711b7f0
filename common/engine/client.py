"""The one face of an engine, wherever it runs. No torch here.

    start -> (EngineProgress ...) -> EngineReady | EngineFatal -> messages both ways -> stop

`ProcessEngine` keeps the engine in a process of its own, reached over a socket pair; the child ends when its
parent does. When it dies, `on_death` is called once, after all its messages were delivered; the owner fails
what was running and may `start` again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Protocol

import msgspec

from common.config import LogConfig, WorkerConfig
from common.engine.channel import MAX_BACKLOG, FrameDecoder, frame
from common.engine.messages import FromEngine, Setup, Shutdown, ToEngine
from common.telemetry import get_logger
from common.types import Role

log = get_logger(__name__)

EXIT_S = 5  # from the end of its messages to the end of its process
KILL_S = 10  # from SIGKILL to the end of its process


class EngineClient(Protocol):
    async def start(self, on_message: Callable[[FromEngine], None], on_death: Callable[[str], None]) -> None: ...

    def send(self, message: ToEngine) -> None:
        """Never blocks; dropped when the engine is dead. An engine that takes nothing any more is ended."""

    @property
    def alive(self) -> bool: ...

    @property
    def pid(self) -> int: ...

    def kill(self) -> None:
        """End it at once, hung or not; `on_death` follows."""

    async def stop(self, timeout_s: float) -> None:
        """Ask the engine to end, then make it."""


class ProcessEngine:
    """An engine in a child process. All methods belong to the event loop that called `start`."""

    def __init__(
        self,
        role: Role,
        config: WorkerConfig,
        log: LogConfig,
        environ: Mapping[str, str],
        max_backlog: int = MAX_BACKLOG,
    ) -> None:
        self._setup = Setup(role.value, config.model_dump_json().encode(), log.model_dump_json().encode())
        self._environ = {"OMP_WAIT_POLICY": "PASSIVE"} | dict(environ)  # torch's threads must not spin beside ours
        if config.engine.num_threads:
            self._environ["OMP_NUM_THREADS"] = str(config.engine.num_threads)
        self._max_backlog = max_backlog
        self._gave_up = False
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(FromEngine)
        self._process: subprocess.Popen[bytes] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def alive(self) -> bool:
        return self._writer is not None

    @property
    def pid(self) -> int:
        return self._process.pid if self._process is not None else 0

    async def start(self, on_message: Callable[[FromEngine], None], on_death: Callable[[str], None]) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            theirs.set_inheritable(True)
            self._process = subprocess.Popen(  # noqa: ASYNC220 - returns after fork; waited for in a thread
                [sys.executable, "-m", "common.engine.process", str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=self._environ,
            )
        reader, self._writer = await asyncio.open_connection(sock=ours, limit=1 << 20)
        self._gave_up = False
        self.send(self._setup)
        self._task = asyncio.create_task(self._read(reader, on_message, on_death))

    def send(self, message: ToEngine) -> None:
        if self._writer is None or self._gave_up or self._writer.is_closing():
            return  # its end is told, or will be: what it has not taken ended with it
        self._writer.write(frame(self._encoder.encode(message)))
        if self._writer.transport.get_write_buffer_size() > self._max_backlog and self._process is not None:
            log.error("the engine takes no messages and is ended", pid=self._process.pid)
            self._gave_up = True
            self.kill()

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()

    async def stop(self, timeout_s: float) -> None:
        process, task = self._process, self._task
        if process is None:
            return
        self.send(Shutdown())
        try:
            await asyncio.wait_for(asyncio.to_thread(process.wait, timeout_s), timeout_s + 1)
        except (subprocess.TimeoutExpired, TimeoutError):
            if not await _killed(process):
                log.error("the engine process cannot be ended", pid=process.pid)
                return
        if task is not None:
            await task

    async def _read(
        self,
        reader: asyncio.StreamReader,
        on_message: Callable[[FromEngine], None],
        on_death: Callable[[str], None],
    ) -> None:
        frames = FrameDecoder()
        try:
            while data := await reader.read(1 << 20):
                for raw in frames.feed(data):
                    on_message(self._decoder.decode(raw))
        except ConnectionError:
            pass
        except Exception as error:  # what was lost cannot be told: all that runs there has failed
            log.error("a message of the engine could not be taken", exc_info=error)
            self.kill()
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
        on_death(await self._exit_reason())

    async def _exit_reason(self) -> str:
        process = self._process
        assert process is not None
        try:
            code = await asyncio.to_thread(process.wait, EXIT_S)
        except subprocess.TimeoutExpired:
            if not await _killed(process):
                return f"engine process {process.pid} went silent and cannot be ended"
            return f"engine process {process.pid} went silent and was ended after {EXIT_S} s"
        return f"engine process {process.pid} ended with {_exit_name(code)}"


async def _killed(process: subprocess.Popen[bytes]) -> bool:
    """False if the kernel does not let go of it: a driver that hangs must not hang us as well."""
    process.kill()
    try:
        await asyncio.to_thread(process.wait, KILL_S)
    except subprocess.TimeoutExpired:
        return False
    return True


def _exit_name(code: int) -> str:
    if code < 0:
        with contextlib.suppress(ValueError):
            return signal.Signals(-code).name
    return f"exit code {code}"
