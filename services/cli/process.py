"""One service process of a launcher.

    spawned -> running -> (died by itself | asked to stop: SIGTERM, then SIGKILL) -> ended

Each is the leader of a session of its own: Ctrl-C in the terminal reaches the launcher alone, and what a
service has started (an engine) is killed with it. It ends when the launcher ends, see `child`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import UnavailableError
from services.cli import child
from services.cli.state import ProcessId, ServiceState

KILL_LIMIT_S = 10.0
KILL_POLL_S = 0.02


@dataclass(frozen=True)
class ServiceSpec:
    """How to start one service and how to see that it is ready."""

    name: str
    role: str  # storage, controller, prefill, decode, router
    argv: tuple[str, ...]
    env: Mapping[str, str]
    cwd: Path
    log: Path
    address: str  # host:port of what it serves
    ready_url: str = ""  # answers 200 when ready; empty: a TCP connection to `address` is enough


class ServiceProcess:
    """A started service. Make it with `spawn`."""

    def __init__(self, spec: ServiceSpec, process: asyncio.subprocess.Process, restarts: int) -> None:
        self.spec = spec
        self.restarts = restarts
        self.identity = ProcessId.of(process.pid)
        self._process = process

    @classmethod
    async def spawn(cls, spec: ServiceSpec, restarts: int = 0) -> ServiceProcess:
        argv = (sys.executable, "-I", "-S", child.__file__, str(os.getpid()), *spec.argv)
        with spec.log.open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=dict(spec.env),
                cwd=spec.cwd,
                start_new_session=True,
            )
        return cls(spec, process, restarts)

    @property
    def returncode(self) -> int | None:
        """None while it runs; negative is the number of the signal that ended it."""
        return self._process.returncode

    @property
    def state(self) -> ServiceState:
        return ServiceState(
            name=self.spec.name,
            role=self.spec.role,
            process=self.identity,
            address=self.spec.address,
            log=str(self.spec.log),
            restarts=self.restarts,
        )

    async def wait(self) -> int:
        return await self._process.wait()

    async def stop(self, grace_s: float) -> bool:
        """SIGTERM, wait up to `grace_s`, then SIGKILL to its whole process group. True: it ended by itself."""
        if self.returncode is not None:
            self.kill()
            return True
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        try:
            await asyncio.wait_for(self._process.wait(), grace_s)
            by_itself = True
        except TimeoutError:
            by_itself = False
        self.kill()
        await self._process.wait()
        return by_itself

    def kill(self) -> None:
        """SIGKILL to the process and to all that is left of its group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def describe_end(self) -> str:
        code = self.returncode
        if code is None:
            return "is running"
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def end_leftovers(processes: Sequence[ProcessId]) -> None:
    """Kill what a launcher that was killed has left, and see it gone. Raises `UnavailableError` if one stays.

    The next launcher wants their ports, and two storages must never write to the same files.
    """
    for process in processes:
        kill_service(process)
    deadline = time.monotonic() + KILL_LIMIT_S
    while left := [process for process in processes if process.alive]:
        if time.monotonic() > deadline:
            pids = ", ".join(str(process.pid) for process in left)
            raise UnavailableError(f"processes of the cluster's run before cannot be killed: {pids}")
        time.sleep(KILL_POLL_S)  # they are no children of ours: nobody tells us


def kill_service(process: ProcessId) -> None:
    """SIGKILL to the process group of a service that a launcher left behind."""
    if process.alive:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def last_words(log: Path) -> str:
    """Why a service of ours says that it ends; empty when it did not get to say."""
    for line in reversed(tail(log).splitlines()):
        said, _, cause = line.partition(": ")
        if said in ("error", "controller", "router"):
            return cause
    return ""


def tail(log: Path, lines: int = 20) -> str:
    """The last lines of a log file; empty when there is none."""
    try:
        with open(log, encoding="utf-8", errors="replace") as file:
            return "".join(deque(file, maxlen=lines)).rstrip()
    except FileNotFoundError:
        return ""
