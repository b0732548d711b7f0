"""What a launcher leaves on disk about one cluster, and what other commands read of it.

    <root>/<name>/lock             held (flock) for as long as the launcher lives
                  state.json       written whole at every change: pids with start times, addresses, phase
                  config/*.yaml    one generated file per service
                  logs/*.log       one per service; those of the run before end in .1
                  storage/         what the cluster's own storage keeps from one run to the next

A pid alone may have been given to somebody else meanwhile, so a process is named by pid and start time.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import msgspec

from common.errors import ConfigError, UnavailableError
from services.cli.hint import hint

STORAGE_FOLDER = "storage"

Phase = Literal["starting", "ready", "stopping", "stopped", "failed"]


class ProcessId(msgspec.Struct, frozen=True):
    """One process, told apart from a later one of the same pid. `started` is in clock ticks since boot."""

    pid: int
    started: int

    @classmethod
    def of(cls, pid: int) -> ProcessId:
        """Of a running process; one that is gone already gets `started` 0 and is never alive."""
        return cls(pid, _start_ticks(pid) or 0)

    @property
    def alive(self) -> bool:
        return self.started != 0 and _start_ticks(self.pid) == self.started


def _start_ticks(pid: int) -> int | None:
    """Field 22 of /proc/PID/stat (proc(5)); None for no process and for a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text[text.rindex(")") + 2 :].split()  # the command name before may hold anything
    return None if fields[0] in "ZX" else int(fields[19])


class ServiceState(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    role: str
    process: ProcessId
    address: str
    log: str
    restarts: int = 0


class ClusterState(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    phase: Phase
    launcher: ProcessId
    url: str
    controller: str  # host:port of its gRPC server
    model: str
    version: str
    services: tuple[ServiceState, ...] = ()
    detail: str = ""  # why it failed
    stop_limit_s: float = 150.0  # an orderly stop takes no longer


def state_root(environ: Mapping[str, str]) -> Path:
    """`$NANODEPLOY_STATE_DIR`, or `nanodeploy` in the XDG state folder."""
    if given := environ.get("NANODEPLOY_STATE_DIR"):
        return Path(given)
    home = environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(home) / "nanodeploy"


def cache_root(environ: Mapping[str, str]) -> Path:
    """`$NANODEPLOY_CACHE_DIR`, or `nanodeploy` in the XDG cache folder: prepared models live there."""
    if given := environ.get("NANODEPLOY_CACHE_DIR"):
        return Path(given)
    home = environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "nanodeploy"


def service_of(root: Path, pid: int) -> str:
    """`router of cluster 'NAME'` for a process that a launcher of this user started; empty for any other."""
    for file in root.glob("*/state.json"):
        state = StateFolder(root, file.parent.name).running()
        for service in state.services if state is not None else ():
            if service.process.pid == pid:
                return f"the {service.name} of cluster {file.parent.name!r}"
    return ""


class StateFolder:
    """One cluster's folder."""

    def __init__(self, root: Path, name: str) -> None:
        if not name or not name.replace("-", "").replace("_", "").isalnum():
            raise ConfigError(f"cluster name {name!r} must be letters, digits, - and _", param="name")
        self.name = name
        self.path = root / name
        self.config_path = self.path / "config"
        self.logs_path = self.path / "logs"
        self.storage_path = self.path / STORAGE_FOLDER
        self._file = self.path / "state.json"

    def prepare(self) -> None:
        """Make the folders and set the logs of the run before aside."""
        for folder in (self.config_path, self.logs_path, self.storage_path):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for log in self.logs_path.glob("*.log"):
            log.replace(log.with_suffix(".log.1"))

    @contextlib.contextmanager
    def hold(self) -> Iterator[int]:
        """Own the cluster; a process that inherits the descriptor given owns it as well, until the last one ends.

        Raises `UnavailableError` when another launcher owns it.
        """
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        with open(self.path / "lock", "a+", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UnavailableError(self._held()) from None
            yield lock.fileno()

    def _held(self) -> str:
        state = self.running()
        if state is None or state.phase == "starting":
            return f"cluster {self.name!r} is just being started by another command: wait, or choose another --name"
        if state.phase != "ready":
            return f"cluster {self.name!r} is still stopping (launcher pid {state.launcher.pid}): try again in a moment"
        where = f"at {state.url} (launcher pid {state.launcher.pid})"
        return f"cluster {self.name!r} is up already {where}: run `{hint('down', self.name)}` or choose another --name"

    def write(self, state: ClusterState) -> None:
        temporary = self._file.with_suffix(".tmp")
        temporary.write_bytes(msgspec.json.format(msgspec.json.encode(state), indent=2))
        temporary.replace(self._file)

    def read(self) -> ClusterState | None:
        """The last state written; None when there never was one or another version wrote it."""
        try:
            return msgspec.json.decode(self._file.read_bytes(), type=ClusterState)
        except (FileNotFoundError, msgspec.DecodeError):
            return None

    def running(self) -> ClusterState | None:
        """The state if its launcher lives."""
        state = self.read()
        return state if state is not None and state.launcher.alive else None
