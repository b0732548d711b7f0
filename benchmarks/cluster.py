"""A cluster of its own for a benchmark, started by the real `nanodeploy up`.

    up (config, logs and state in a temporary folder, free ports) -> ready -> SIGTERM -> drained -> folder removed

It runs beside whatever else the machine serves: ports are free ones, and the name is known to this folder only.
"""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.report import ROOT
from services.cli.process import kill_service, tail
from services.cli.state import ClusterState, StateFolder

NAME = "bench"
POLL_S = 0.02
STOP_S = 60.0


@dataclass(frozen=True)
class Cluster:
    """A cluster that answers. `ready_s`: from the command to the first token that `up` itself asks for."""

    state: ClusterState
    ready_s: float

    @property
    def url(self) -> str:
        return self.state.url

    def processes(self) -> dict[str, psutil.Process]:
        """All processes that run now, by name: the launcher, each service, and `<service>/engine` below it."""
        found = {"launcher": psutil.Process(self.state.launcher.pid)}
        for service in self.state.services:
            process = psutil.Process(service.process.pid)
            found[service.name] = process
            for number, child in enumerate(process.children(recursive=True)):
                found[f"{service.name}/engine" + (f".{number}" if number else "")] = child
        return found

    def cpu_s(self) -> float:
        """CPU seconds of all of them so far."""
        total = 0.0
        for process in self.processes().values():
            with contextlib.suppress(psutil.NoSuchProcess):
                total += sum(process.cpu_times()[:2])
        return total


def stop_on_sigterm() -> None:
    """Let a SIGTERM unwind the benchmark, so that its clusters are stopped and its folders removed."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


@contextlib.contextmanager
def running(
    flags: Sequence[str], *, threads: int = 0, terminal: bool = False, limit_s: float = 180.0
) -> Iterator[Cluster]:
    """`nanodeploy up` with `flags`, stopped at the end. `terminal`: it draws its live table, as for a person.

    Raises RuntimeError with the end of its output when it does not become ready.
    """
    with tempfile.TemporaryDirectory(prefix="nanodeploy-bench-") as name:
        folder = StateFolder(Path(name), NAME)
        environ = os.environ | {"NANODEPLOY_STATE_DIR": name, "TERM": "xterm-256color"}
        if threads:
            environ["OMP_NUM_THREADS"] = str(threads)
        command = [sys.executable, "-m", "services.cli.main", "up", "--name", NAME, "--port", "0", *flags]
        output = Path(name) / "up.log"
        with _sink(output, terminal) as sink:
            began = time.perf_counter()
            process = subprocess.Popen(
                command, cwd=ROOT, env=environ, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink
            )
            try:
                state = _wait(folder, process, began + limit_s)
                if state is None:
                    raise RuntimeError(f"`nanodeploy up` did not become ready:\n{tail(output)}")
                yield Cluster(state, time.perf_counter() - began)
            finally:
                _stop(folder, process)


@contextlib.contextmanager
def _sink(output: Path, terminal: bool) -> Iterator[int]:
    """A descriptor whose bytes end up in `output`; a terminal of 120 columns if asked for."""
    with output.open("wb") as log:
        if not terminal:
            yield log.fileno()
            return
        ours, theirs = pty.openpty()
        os.set_inheritable(theirs, True)

        def drain() -> None:
            with contextlib.suppress(OSError):
                while data := os.read(ours, 65536):
                    log.write(data)

        reader = threading.Thread(target=drain, daemon=True)
        reader.start()
        try:
            yield theirs
        finally:
            os.close(theirs)
            reader.join(5.0)
            os.close(ours)


def _wait(folder: StateFolder, process: subprocess.Popen[bytes], deadline: float) -> ClusterState | None:
    while process.poll() is None and time.perf_counter() < deadline:
        state = folder.read()
        if state is not None and state.phase == "ready":
            return state
        time.sleep(POLL_S)
    return None


def _stop(folder: StateFolder, process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    state = folder.read()
    for service in state.services if state is not None else ():
        kill_service(service.process)
