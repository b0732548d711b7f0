"""What every benchmark says beside its figures: the machine, versions, commit and date; and how results are kept.

A benchmark writes `results/<name>.json`, with a chart of the same name. `Load` says how much of the machine was
used by others meanwhile: on a shared machine a figure means little without it.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import psutil
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def environment(*packages: str, **more: object) -> dict[str, object]:
    """Call it before the work starts: `load_before` is the machine's load of the last minute.

    `packages` are named with their versions; `more` is added as it is, and wins.
    """
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "load_before": round(os.getloadavg()[0], 2),
        "nice": os.nice(0),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
        **more,
    }


def cpu_name() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def commit() -> str:
    """What NANODEPLOY_COMMIT says; else the short hash, with a + when tracked sources differ from it."""
    if told := os.environ.get("NANODEPLOY_COMMIT"):
        return told
    sources = ["*.py", "*.cpp", "*.h", "*.proto", "pyproject.toml"]
    head = _git("rev-parse", "--short", "HEAD")
    if not head:
        return ""
    return head + ("+" if _git("status", "--porcelain", "-uno", "--", *sources) else "")


def _git(*words: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
    return done.stdout.strip()


class Load:
    """CPU time of the whole machine from its making on, against what the measured processes took of it."""

    def __init__(self) -> None:
        self._busy = _busy_s()
        self._began = time.perf_counter()

    def others(self, own_cpu_s: float) -> float:
        """Share of the machine (0 to 1) that was busy with something else, stolen time included."""
        wall_s = (time.perf_counter() - self._began) * (os.cpu_count() or 1)
        return max(0.0, min(1.0, (_busy_s() - self._busy - own_cpu_s) / wall_s))


def _busy_s() -> float:
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice)


def write_json(name: str, content: Mapping[str, object]) -> Path:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


def write_bars(
    name: str, title: str, label: str, groups: Sequence[str], series: Mapping[str, Sequence[float | None]]
) -> Path:
    """A chart of grouped bars, one panel a group (their scales differ); None leaves a bar out."""
    figure = Figure(figsize=(max(7.0, 3.6 * len(groups) + 0.8), 4.2), layout="constrained")
    panels = figure.subplots(1, len(groups), squeeze=False)[0]
    colours = [f"C{i}" for i in range(len(series))]
    for index, (axes, group) in enumerate(zip(panels, groups, strict=True)):
        values = [column[index] for column in series.values()]
        drawn = axes.barh(range(len(series)), [value or 0 for value in values], color=colours)
        axes.bar_label(drawn, [f"{v:.3g}" if v is not None else "-" for v in values], padding=3, fontsize=8)
        axes.set_yticks(range(len(series)), list(series) if index == 0 else [""] * len(series))
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.set_title(group, fontsize=10)
        axes.set_xlabel(label)
        axes.grid(axis="x", alpha=0.3)
    figure.suptitle(title, fontsize=11)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.png"
    figure.savefig(path, dpi=120)
    return path
