"""The router alone: what it adds to a request, and how many requests and streamed tokens one process carries.

Three processes: the real router (`python -m services.router`) on one core; on the other a worker that answers with
made-up tokens over the real gRPC contract, a step every 2 ms for all its requests, and the load, raw HTTP sockets.
Nothing else is simulated: template, tokenizer, policy, relay, detokenizer and SSE are the product's.

    latency    one-token answers, whole and streamed: send -> first byte of the answer, beside the same request sent
               to the worker directly over gRPC; the difference is the router's. From 1 and from 16 connections that
               ask again at once (16 keep everything busy: what is added there is mostly waiting in line), and from
               16 that ask ten times a second each
    requests   one-token answers at concurrency 64: answers per second
    tokens     streams of 256 tokens at concurrency 64: every token is an event of its own, counted by the client

    python benchmarks/router/alone.py [--quick] [--part latency|requests|tokens] [--profile FILE]

Writes benchmarks/results/router.json, but for a quick or partial run. The figures are of a machine that is shared
with its own load: `loop_ms`, the time of sum(range(10**6)), says how fast plain Python ran meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import uvloop
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


from benchmarks import report  # noqa: E402
from benchmarks.router.direct import direct  # noqa: E402
from benchmarks.router.load import drink, load, write_tokenizer  # noqa: E402
from benchmarks.router.pinned import cpu_of, free_port, process  # noqa: E402

PARTS = ("latency", "requests", "tokens")
RESULTS = ROOT / "benchmarks" / "results"
PACED_S = 0.1


# -- the run -------------------------------------------------------------------------------------------


async def wait_ready(port: int) -> None:
    for _ in range(300):
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /ready HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            answer = await reader.read()
            writer.close()
            if answer.startswith(b"HTTP/1.1 200"):
                return
        except OSError:
            pass
        await asyncio.sleep(0.1)
    raise TimeoutError("the router did not become ready")


def loop_ms() -> float:
    start = time.perf_counter()
    sum(range(10**6))
    return 1000 * (time.perf_counter() - start)


async def measure(router_port: int, worker_port: int, pid: int, seconds: float, parts: set[str]) -> dict[str, Any]:
    results: dict[str, Any] = {"loop_ms": statistics.median(loop_ms() for _ in range(9))}
    await load(router_port, 8, 1.0, 8, stream=True)  # warm
    if "latency" in parts:
        results |= await measure_latency(router_port, worker_port, seconds)
    cpu = psutil.Process(pid)
    if "requests" in parts:
        with cpu_of(cpu) as used:
            results["requests"] = await load(router_port, 64, seconds, 1, stream=False)
        per_cpu_s = results["requests"]["requests_per_s"] / used[0]
        results["requests"] |= {"router_cpu": used[0], "requests_per_cpu_s": per_cpu_s}
    if "tokens" in parts:
        with cpu_of(cpu) as used:
            results["tokens"] = drink(router_port, 64, 2 * seconds, 256)
        results["tokens"] |= {"router_cpu": used[0], "tokens_per_cpu_s": results["tokens"]["tokens_per_s"] / used[0]}
    results["router_rss_mb"] = cpu.memory_info().rss / 1e6
    return results


async def measure_latency(router_port: int, worker_port: int, seconds: float) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, concurrency, every_s in (("1", 1, 0.0), ("16", 16, 0.0), ("16_paced", 16, PACED_S)):
        base = await direct(worker_port, concurrency, seconds, every_s)
        whole = await load(router_port, concurrency, seconds, 1, stream=False, every_s=every_s)
        stream = await load(router_port, concurrency, seconds, 1, stream=True, every_s=every_s)
        results[f"latency_{name}"] = {
            "direct": base,
            "whole": whole,
            "stream": stream,
            "added_p50_ms": stream["first_byte_p50_ms"] - base["p50_ms"],
            "added_p99_ms": stream["first_byte_p99_ms"] - base["p99_ms"],
        }
    return results


def environment(load_before: float) -> dict[str, object]:
    return report.environment("grpcio", load_before=round(load_before, 2), prompt="chat, about 100 tokens")


def show(results: dict[str, Any]) -> None:
    table = Table("part", "concurrency", "requests/s", "tokens/s", "first byte p50 / p99 ms", "added p50 / p99 ms")
    for name in [name for name in results if name.startswith("latency")]:
        part = results[name]
        for kind in ("whole", "stream"):
            row = part[kind]
            added = f"{part['added_p50_ms']:.2f} / {part['added_p99_ms']:.2f}" if kind == "stream" else ""
            table.add_row(f"{name} {kind}", *_cells(row), added)
    for name in ("requests", "tokens"):
        if name in results:
            table.add_row(name, *_cells(results[name]), "")
    Console(width=120).print(table)
    if tokens := results.get("tokens"):
        print(f"tokens per second of router CPU: {tokens['tokens_per_cpu_s']:.0f} (busy {tokens['router_cpu']:.0%})")
    if requests := results.get("requests"):
        busy, rate = requests["router_cpu"], requests["requests_per_cpu_s"]
        print(f"requests per second of router CPU: {rate:.0f} (busy {busy:.0%})")
    print(f"router memory: {results['router_rss_mb']:.0f} MB; plain Python loop: {results['loop_ms']:.1f} ms")


def _cells(row: dict[str, float]) -> tuple[str, ...]:
    return (
        f"{row['concurrency']:.0f}",
        f"{row['requests_per_s']:.0f}",
        f"{row['tokens_per_s']:.0f}",
        f"{row['first_byte_p50_ms']:.2f} / {row['first_byte_p99_ms']:.2f}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a quarter of the time; nothing is written")
    parser.add_argument("--part", choices=PARTS, help="this one alone; nothing is written")
    parser.add_argument("--profile", metavar="FILE", help="write a cProfile of the router")
    arguments = parser.parse_args()
    load_before = os.getloadavg()[0]
    with contextlib.suppress(PermissionError):
        os.nice(-15)
    cores = sorted(os.sched_getaffinity(0))
    here, there = cores[0], cores[-1]
    os.sched_setaffinity(0, {here})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tokenizer(folder)
        worker_port, router_port = free_port(), free_port()
        config = folder / "config.yaml"
        section = f"{{port: {router_port}, controllers: ['127.0.0.1:{worker_port}']}}"
        config.write_text(f"log: {{level: info}}\nrouter: {section}\n")
        profile = ["-m", "cProfile", "-o", arguments.profile] if arguments.profile else []
        router = [sys.executable, *profile, "-m", "services.router", "--config", str(config)]
        worker = [sys.executable, str(Path(__file__).with_name("worker.py")), str(worker_port), str(folder)]
        with process(worker, here, folder / "worker.log"), process(router, there, folder / "router.log") as child:

            async def run() -> dict[str, Any]:
                await wait_ready(router_port)
                seconds = 1.0 if arguments.quick else 4.0
                parts = {arguments.part} if arguments.part else set(PARTS)
                return await measure(router_port, worker_port, child.pid, seconds, parts)

            results = uvloop.run(run())
    show(results)
    if not arguments.quick and not arguments.part:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / "router.json"
        path.write_text(json.dumps({"environment": environment(load_before), **results}, indent=1) + "\n")
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
