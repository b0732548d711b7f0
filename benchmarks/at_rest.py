"""What a cluster costs that nobody uses: the way to the first token, idle CPU and memory, process by process.

    first token    `nanodeploy up` in a prepared checkout -> `up` says ready, after a token of its own -> the first
                   streamed token that a client gets
    idle CPU       of all processes over a while, by thread, in nanoseconds from /proc/PID/task/*/schedstat, with
                   how often each thread was woken: a timer shows as wake-ups
    memory         RSS, and PSS (shared pages divided) which adds up to what the cluster really takes

    python benchmarks/at_rest.py [--seconds 30] [--prefill 1] [--starts 3] [--explain] [--quick]

`up` runs on a terminal of its own, so that its live table is part of the cost. --explain samples the stacks of the
busiest processes with py-spy afterwards, where it is installed. Writes benchmarks/results/at_rest.json.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import cluster, report  # noqa: E402
from services.cli.bench.client import BenchClient  # noqa: E402
from services.cli.demo_model import ensure_demo_model  # noqa: E402
from services.cli.state import cache_root  # noqa: E402

NAME = "at_rest"
FIRST_TOKEN_S, IDLE_CORE, ROUTER_MB, CONTROLLER_MB = 20.0, 0.03, 250.0, 100.0
SETTLE_S = 5.0
EXPLAIN_S, EXPLAIN_HZ, TOP = 10, 200, 8
WAITS = ("Runner.run", "Thread.run", "EpollSelector.select", "_worker", "ThreadedChildWatcher._do_waitpid", "wait")
"""Innermost frames of threads that sleep in C, which py-spy takes for running ones now and then."""

console = Console(width=None if sys.stdout.isatty() else 140)


@dataclass(frozen=True)
class Thread:
    """One thread between two looks: share of a core, and wake-ups a second."""

    name: str
    core: float
    wakeups_per_s: float


@dataclass(frozen=True)
class Idle:
    """One process: share of a core, wake-ups a second, memory in MB, and its threads that ran."""

    name: str
    pid: int
    core: float
    wakeups_per_s: float
    rss_mb: float
    pss_mb: float
    threads: list[Thread]


async def first_client_token(url: str, model: str) -> None:
    client = BenchClient(url)
    body = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, "stream": True}
    try:
        sample = await client.stream("/v1/chat/completions", body, 60.0)
    finally:
        client.close()
    if sample.error:
        raise SystemExit(f"the first request failed: {sample.error}")


@contextlib.contextmanager
def started(flags: list[str]) -> Iterator[tuple[cluster.Cluster, dict[str, float]]]:
    """A cluster and how long it took. The processes of `up` are warm in the page cache after the first start."""
    with cluster.running(flags, terminal=True) as up:
        began = time.perf_counter()
        asyncio.run(first_client_token(up.url, up.state.model))
        token_s = up.ready_s + time.perf_counter() - began
        figures = {"ready_s": up.ready_s, "client_token_s": token_s, "cpu_s": up.cpu_s()}
        yield up, {name: round(value, 2) for name, value in figures.items()}


def look(process: psutil.Process) -> dict[int, tuple[str, int, int]]:
    """Thread id -> (name, nanoseconds on a core, times it gave the core up by itself), as of now."""
    found = {}
    for task in Path(f"/proc/{process.pid}/task").glob("*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            status = (task / "status").read_text(encoding="utf-8")
            slept = next(line for line in status.splitlines() if line.startswith("voluntary_ctxt_switches"))
            busy_ns = int((task / "schedstat").read_text(encoding="ascii").split()[0])
            name = (task / "comm").read_text(encoding="utf-8").strip()
            found[int(task.name)] = (name, busy_ns, int(slept.split()[1]))
    return found


def watch(processes: Mapping[str, psutil.Process], seconds: float) -> list[Idle]:
    """All processes over `seconds`, in the order given."""
    began = time.perf_counter()
    before = {name: look(process) for name, process in processes.items()}
    time.sleep(seconds)
    after = {name: look(process) for name, process in processes.items()}
    took = time.perf_counter() - began
    idle = []
    for name, process in processes.items():
        threads = []
        for task, (thread, busy_ns, slept) in after[name].items():
            _, busy_before, slept_before = before[name].get(task, ("", 0, 0))
            core, wakeups = (busy_ns - busy_before) / 1e9 / took, (slept - slept_before) / took
            if slept > slept_before:
                threads.append(Thread(thread, round(core, 6), round(wakeups, 2)))
        threads.sort(key=lambda t: -t.core)
        memory = process.memory_full_info()
        core, wakeups = sum(t.core for t in threads), sum(t.wakeups_per_s for t in threads)
        figures = (round(core, 6), round(wakeups, 2), round(memory.rss / 1e6, 1), round(memory.pss / 1e6, 1))
        idle.append(Idle(name, process.pid, *figures, threads))
    return idle


def explain(process: psutil.Process) -> list[str]:
    """Where its Python was when it ran: the commonest stacks, innermost call last, with their share of the time."""
    tool = shutil.which("py-spy", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if tool is None:
        return ["py-spy is not installed"]
    command = [tool, "record", "--pid", str(process.pid), "--duration", str(EXPLAIN_S), "--rate", str(EXPLAIN_HZ)]
    command += ["--threads", "--format", "raw", "--output", "/dev/stdout"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=EXPLAIN_S * 6)
    stacks: Counter[str] = Counter()
    for line in done.stdout.splitlines():
        stack, _, count = line.rpartition(" ")
        if count.isdigit() and ";" in stack and not stack.rpartition(";")[2].startswith(WAITS):
            stacks[" > ".join(stack.split(";")[-4:])] += int(count)
    total = EXPLAIN_S * EXPLAIN_HZ
    return [f"{count / total:.2%} {stack}" for stack, count in stacks.most_common(TOP)] or [done.stderr[-300:]]


def judge(starts: list[dict[str, float]], idle: list[Idle]) -> list[dict[str, Any]]:
    rss = {process.name: process.rss_mb for process in idle}
    figures = (
        ("seconds to a client's first token (median)", statistics.median(s["client_token_s"] for s in starts)),
        ("cores of the idle cluster", sum(process.core for process in idle)),
        ("router, MB", rss["router"]),
        ("controller, MB", rss["controller"]),
    )
    limits = (FIRST_TOKEN_S, IDLE_CORE, ROUTER_MB, CONTROLLER_MB)
    return [
        {"goal": what, "below": limit, "got": round(got, 4), "met": got < limit}
        for (what, got), limit in zip(figures, limits, strict=True)
    ]


def show(idle: list[Idle], goals: list[dict[str, Any]]) -> None:
    table = Table(title="The idle cluster")
    for column in ("process", "% of a core", "wake-ups/s", "RSS MB", "PSS MB"):
        table.add_column(column, justify="left" if column == "process" else "right")
    table.add_column("threads by name: number, % of a core", overflow="fold")
    for p in idle:
        by_name: dict[str, list[float]] = {}
        for thread in p.threads:
            by_name.setdefault(thread.name, []).append(100 * thread.core)
        threads = ", ".join(f"{name} {len(cores)}: {sum(cores):.2f}" for name, cores in by_name.items())
        figures = (f"{100 * p.core:.2f}", f"{p.wakeups_per_s:.1f}", f"{p.rss_mb:.0f}", f"{p.pss_mb:.0f}")
        table.add_row(p.name, *figures, threads)
    core, wakeups, pss = sum(p.core for p in idle), sum(p.wakeups_per_s for p in idle), sum(p.pss_mb for p in idle)
    table.add_section()
    table.add_row("all", f"{100 * core:.2f}", f"{wakeups:.1f}", "", f"{pss:.0f}", "")
    console.print(table)
    for goal in goals:
        verdict = "[green]met[/green]" if goal["met"] else "[red]missed[/red]"
        console.print(f"{verdict}: {goal['goal']}: {goal['got']}, wanted below {goal['below']}", highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0, help="of watching the idle cluster")
    parser.add_argument("--prefill", type=int, default=1)
    parser.add_argument(
        "--starts", type=int, default=3, help="clusters started one after the other; the last is watched"
    )
    parser.add_argument("--explain", action="store_true", help="sample the stacks of processes above 0.2 %% of a core")
    parser.add_argument("--quick", action="store_true", help="one start, 10 s; nothing is written")
    arguments = parser.parse_args()
    cluster.stop_on_sigterm()
    if arguments.quick:
        arguments.seconds, arguments.starts = 10.0, 1
    environment = report.environment("grpcio", "torch", "uvicorn", prefill=arguments.prefill)
    model = ensure_demo_model(cache_root(os.environ), lambda text: console.print(f"demo model: {text}"))
    flags = ["--model", str(model), "--prefill", str(arguments.prefill)]
    starts: list[dict[str, float]] = []
    stacks: dict[str, list[str]] = {}
    idle: list[Idle] = []
    for number in range(1, arguments.starts + 1):
        with started(flags) as (up, took):
            starts.append(took)
            console.print(
                f"start {number}: ready after {took['ready_s']} s, a client's token after {took['client_token_s']} s, "
                f"{took['cpu_s']} s of CPU",
                highlight=False,
            )
            if number < arguments.starts:
                continue
            time.sleep(SETTLE_S)
            processes = up.processes()
            console.print(f"watching {len(processes)} idle processes for {arguments.seconds:.0f} s")
            idle = watch(processes, arguments.seconds)
            if arguments.explain:
                busy = [p.name for p in sorted(idle, key=lambda p: -p.core) if p.core > 0.002]
                stacks = {name: explain(processes[name]) for name in busy}
    goals = judge(starts, idle)
    show(idle, goals)
    for name, lines in stacks.items():
        console.print(f"[bold]{name}[/bold]")
        for line in lines:
            console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
    if not arguments.quick:
        content = {"environment": environment, "starts": starts, "goals": goals, "idle": [asdict(p) for p in idle]}
        path = report.write_json(NAME, content | ({"stacks": stacks} if stacks else {}))
        console.print(f"wrote {path.relative_to(ROOT)}", highlight=False)


if __name__ == "__main__":
    main()
