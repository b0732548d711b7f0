"""What a cluster's processes hold over time, and what its logs say: RSS, descriptors, threads, errors.

A process is judged by its own life: what it holds at quiet points, nothing being asked, in the first quarter of its
life (`WARM_S` at least: pools, caches and the allocator fill up) against the end of it. Lives of less than `MIN_LIFE_S`
are shown and not judged.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import psutil
from cluster_support import RunningCluster

from services.controller.store import MAX_CONNECTIONS

PERIOD_S = 1.0
MIN_LIFE_S, WARM_S = 100.0, 40.0
MAX_RSS_MB, MAX_RSS_SHARE = 8.0, 0.04  # of growth: the larger of the two
MAX_DESCRIPTORS, MAX_THREADS = 3, 2
POOLED = {"controller": MAX_CONNECTIONS}  # descriptors that a process may open late: its connections to storage
_UCX_STAMP = re.compile(r"\[(\d{10}\.\d+)\]")


@dataclass(frozen=True)
class Holding:
    at_s: float
    rss_mb: float
    descriptors: int
    threads: int


@dataclass
class Life:
    """One process from its first look to its last."""

    name: str
    pid: int
    looks: list[Holding] = field(default_factory=list)
    quiet: list[Holding] = field(default_factory=list)


@dataclass(frozen=True)
class Growth:
    name: str
    pid: int
    seconds: float
    before: Holding  # the most of each in the first quarter
    after: Holding
    judged: bool
    quiet_rss_mb: tuple[float, ...]

    @property
    def faults(self) -> list[str]:
        if not self.judged:
            return []
        rss = self.after.rss_mb - self.before.rss_mb
        found = {
            f"RSS by {rss:.1f} MB": rss > max(MAX_RSS_MB, MAX_RSS_SHARE * self.before.rss_mb),
            f"{self.after.descriptors - self.before.descriptors} descriptors": self.after.descriptors
            > self.before.descriptors + MAX_DESCRIPTORS + POOLED.get(self.name, 0),
            f"{self.after.threads - self.before.threads} threads": self.after.threads
            > self.before.threads + MAX_THREADS,
        }
        return [f"{self.name} (pid {self.pid}) grew: {what}" for what, grown in found.items() if grown]


class Watch:
    """Looks at all processes every second while it is open."""

    def __init__(self, cluster: RunningCluster) -> None:
        self._cluster = cluster
        self._lives: dict[int, Life] = {}
        self._began = time.monotonic()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="soak-watch")

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join()

    @property
    def lives(self) -> list[Life]:
        return [life for life in self._lives.values() if life.looks]

    def look_quiet(self) -> None:
        """Call it when nothing has been asked for a moment."""
        for name, process in self._processes():
            if (held := self._look(process)) is not None and process.pid in self._lives:
                life = self._lives[process.pid]
                assert life.name == name
                life.quiet.append(held)

    def deaths(self) -> Counter[str]:
        """How often each of them was seen to be another process."""
        return Counter(life.name for life in self.lives) - Counter({life.name for life in self.lives})

    def growths(self) -> list[Growth]:
        return [growth for life in self.lives if (growth := _growth(life)) is not None]

    def _run(self) -> None:
        while not self._closing.wait(PERIOD_S):
            for name, process in self._processes():
                if (held := self._look(process)) is not None:
                    self._lives.setdefault(process.pid, Life(name, process.pid)).looks.append(held)

    def _processes(self) -> Iterator[tuple[str, psutil.Process]]:
        state = self._cluster.state
        names = {"launcher": state.launcher.pid} | {s.name: s.process.pid for s in state.services}
        for name, pid in names.items():
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                yield name, process
                for child in process.children(recursive=True) if name.startswith(("prefill", "decode")) else ():
                    if "common.engine.process" in " ".join(child.cmdline()):
                        yield f"{name}/engine", child

    def _look(self, process: psutil.Process) -> Holding | None:
        try:
            with process.oneshot():
                rss, threads = process.memory_info().rss / 2**20, process.num_threads()
            return Holding(time.monotonic() - self._began, rss, process.num_fds(), threads)
        except psutil.Error:
            return None


def _growth(life: Life) -> Growth | None:
    if not life.quiet:
        return None
    began, ended = life.looks[0].at_s, life.quiet[-1].at_s
    first = [held for held in life.quiet if held.at_s <= began + max((ended - began) / 4, WARM_S)]
    first = first or life.quiet[:1]
    before = Holding(
        first[-1].at_s,
        max(held.rss_mb for held in first),
        max(held.descriptors for held in first),
        max(held.threads for held in first),
    )
    judged = ended - began >= MIN_LIFE_S and len(life.quiet) > len(first)
    rss = tuple(round(held.rss_mb, 1) for held in life.quiet)
    return Growth(life.name, life.pid, ended - began, before, life.quiet[-1], judged, rss)


# -- logs ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LogFault:
    """An error-level line, or one that is no event at all. `at` is of the line, or of the last event before it."""

    service: str
    at: float  # time.time()
    text: str


def read_logs(folder: Path) -> tuple[list[LogFault], Counter[str]]:
    """Faults of all services, and how often each warning was given."""
    faults: list[LogFault] = []
    warnings: Counter[str] = Counter()
    for path in sorted(folder.glob("*.log")):
        if path.stem != "storage":  # its own format; what matters of it shows elsewhere
            _read_log(path, faults, warnings)
    return faults, warnings


def _read_log(path: Path, faults: list[LogFault], warnings: Counter[str]) -> None:
    at = 0.0
    for line in path.read_text(errors="replace").splitlines():
        try:
            event = json.loads(line)
            at = datetime.fromisoformat(event["timestamp"]).timestamp()
        except (ValueError, KeyError, TypeError):
            if line.strip():
                stamp = _UCX_STAMP.match(line)
                faults.append(LogFault(path.stem, float(stamp[1]) if stamp else at, line[:500]))
            continue
        if event["level"] in ("error", "critical"):
            faults.append(LogFault(path.stem, at, line[:2000]))
        elif event["level"] == "warning":
            warnings[f"{path.stem}: {event['event']}"] += 1


def explained(at: float, windows: Sequence[tuple[float, float]]) -> bool:
    return any(began <= at <= ended for began, ended in windows)
