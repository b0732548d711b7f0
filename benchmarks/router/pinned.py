"""Processes of a benchmark, each on a core of its own, and what they used of it."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@contextlib.contextmanager
def process(command: list[str], core: int, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process pinned to a core, ended by SIGTERM."""
    with log.open("wb") as output:
        child = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
        psutil.Process(child.pid).cpu_affinity([core])
        try:
            yield child
        finally:
            child.send_signal(signal.SIGTERM)
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


@contextlib.contextmanager
def cpu_of(process: psutil.Process) -> Iterator[list[float]]:
    """Its share of a core meanwhile, known at the end."""
    used: list[float] = []
    before, start = sum(process.cpu_times()[:2]), time.perf_counter()
    yield used
    used.append((sum(process.cpu_times()[:2]) - before) / (time.perf_counter() - start))
