"""Our router beside sglang-router and vllm-router, the same load on each, one process on one core.

    python benchmarks/router/compare.py [--seconds 8] [--only NAME ...] [--others FOLDER]

Workers and load share the other core: made-up workers that give a token a step to all their requests, over HTTP for
the others (`http_mock.cpp`), over gRPC for ours (`worker.py`); the load is `http_mock.cpp`'s for all. Chat prompts of
about 512 tokens, all different, 14 tokens out, streamed, SmolLM2's tokenizer and template. The others copy bytes and
leave template, tokenizer and detokenizer to workers; ours does that work.

    most      256 connections that ask again at once: requests/s and streamed tokens/s of the router's CPU second
    half      requests due at half of ours' most, evenly: the time to the first token, and what the router adds to it:
              less that of the same requests sent to the worker directly, over HTTP or gRPC, from the router's core

`--others`: a virtual environment with both routers (sglang-router 0.3.2, vllm-router 0.1.17); made if it is not there.
Writes benchmarks/results/router_compare.json and .png, if all three were run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import urllib.request
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import report  # noqa: E402
from benchmarks.router.pinned import cpu_of, free_port, process  # noqa: E402
from common.text import Tokenizer  # noqa: E402
from services.cli.demo_model import ensure_demo_model  # noqa: E402
from services.cli.state import cache_root  # noqa: E402

HERE = Path(__file__).parent
PACKAGES = ("sglang-router==0.3.2", "vllm-router==0.1.17")
NAMES = ("nanodeploy", "sglang-router", "vllm-router")
PROMPT_TOKENS, TOKENS_OUT, CONNECTIONS, STEP_US = 512, 14, 256, 1600
READY_S = 30.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each part")
    parser.add_argument("--rate", type=float, default=1500.0, help="requests a second of the second part")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--others", type=Path, default=cache_root(os.environ) / "router-contenders")
    arguments = parser.parse_args()
    about = report.environment("fastokens", "tokenizers", "grpcio", prompt_tokens=PROMPT_TOKENS, tokens_out=TOKENS_OUT)
    model = ensure_demo_model(cache_root(os.environ), print)
    if set(arguments.only) != {"nanodeploy"}:
        install_others(arguments.others)
    cores = sorted(os.sched_getaffinity(0))
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        mock, bodies = folder / "http_mock", folder / "bodies"
        build = ["g++", "-O2", "-std=c++17", "-o", str(mock), str(HERE / "http_mock.cpp")]
        subprocess.run(build, check=True)
        write_bodies(bodies, Tokenizer.load(model))
        os.sched_setaffinity(0, {cores[0]})
        for contender in arguments.only:
            with started(contender, folder, model, mock, cores[0], cores[-1], arguments.others) as (port, worker, pid):
                found = results[contender] = measure(mock, port, pid, bodies, arguments.seconds, arguments.rate)
                if contender == "nanodeploy":
                    found["direct"] = direct(worker, cores[-1], arguments.seconds / 2, arguments.rate)
                else:
                    found["direct"] = direct_http(mock, worker, bodies, arguments.seconds / 2, arguments.rate)
            results[contender]["worker"] = of_worker(folder / "worker.log")
    show(results, about)


def install_others(folder: Path) -> None:
    if not (folder / "bin" / "vllm-router").exists():
        venv.create(folder, with_pip=True)
        subprocess.run([folder / "bin" / "pip", "install", "--quiet", *PACKAGES], check=True)


def write_bodies(path: Path, tokenizer: Tokenizer) -> None:
    """Requests whose prompts are words of our own documents, drawn at random, cut to `PROMPT_TOKENS`."""
    words = " ".join(p.read_text(encoding="utf-8") for p in sorted((ROOT / "docs").glob("*.md"))).split()
    drawn = random.Random(0)
    with path.open("wb") as file:
        for _ in range(1000):
            ids = tokenizer.encode(" ".join(drawn.choices(words, k=PROMPT_TOKENS)), add_special_tokens=False)
            content = tokenizer.decode(ids[: PROMPT_TOKENS - 12])
            body = {"model": "bench", "messages": [{"role": "user", "content": content}], "stream": True}
            raw = json.dumps(body | {"max_tokens": TOKENS_OUT}, separators=(",", ":")).encode()
            file.write(f"{len(raw)}\n".encode() + raw)


# -- processes -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def started(
    name: str, folder: Path, model: Path, mock: Path, here: int, there: int, others: Path
) -> Iterator[tuple[int, int, int]]:
    """(port, worker's port, process id) of a router that answers, with a worker behind it."""
    worker_port, port, metrics_port = free_port(), free_port(), free_port()
    log = folder / "router.log"
    if name == "nanodeploy":
        worker = [sys.executable, str(HERE / "worker.py"), str(worker_port), str(model)]
        config = folder / "config.yaml"
        config.write_text(f"router: {{port: {port}, controllers: ['127.0.0.1:{worker_port}']}}\n")
        router = [sys.executable, "-m", "services.router", "--config", str(config)]
    else:
        worker = [str(mock), "serve", str(worker_port), str(STEP_US)]
        module = {
            "sglang-router": ["bin/python", "-m", "sglang_router.launch_router"],
            "vllm-router": ["bin/vllm-router"],
        }
        first, *rest = module[name]
        router = [str(others / first), *rest, "--host", "127.0.0.1", "--port", str(port)]
        router += ["--worker-urls", f"http://127.0.0.1:{worker_port}", "--policy", "cache_aware"]
        router += ["--log-level", "warn" if name == "sglang-router" else "warning"]
        router += ["--prometheus-port", str(metrics_port)]
    with process(worker, here, folder / "worker.log"), process(router, there, log) as child:
        wait_ready(port, "/ready" if name == "nanodeploy" else "/health", child, log)
        time.sleep(1.0)
        yield port, worker_port, child.pid


def wait_ready(port: int, path: str, child: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline and child.poll() is None:
        with contextlib.suppress(OSError):
            if urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=1).status == 200:
                return
        time.sleep(0.1)
    raise SystemExit(f"a router does not answer:\n{log.read_text(errors='replace')[-2000:]}")


# -- figures -------------------------------------------------------------------------------------------


def measure(mock: Path, port: int, pid: int, bodies: Path, seconds: float, rate: float) -> dict[str, Any]:
    cpu = psutil.Process(pid)
    load(mock, port, bodies, 1.0, 0.0)  # warm
    found: dict[str, Any] = {}
    for part, due in (("most", 0.0), ("half", rate)):
        with cpu_of(cpu) as used:
            got = load(mock, port, bodies, seconds, due)
        per_s = {
            name: got[key] / got["seconds"]
            for name, key in (("requests_per_s", "requests"), ("tokens_per_s", "events"))
        }
        found[part] = got | per_s | {"router_cpu": used[0]}
    found["rss_mb"] = cpu.memory_info().rss / 1e6
    return found


def load(mock: Path, port: int, bodies: Path, seconds: float, rate: float) -> dict[str, Any]:
    command = [str(mock), "load", str(port), str(CONNECTIONS), str(seconds), str(rate), str(bodies)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 60, check=False)
    if done.returncode:
        raise SystemExit(f"the load failed: {done.stderr[-1000:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def direct(port: int, core: int, seconds: float, rate: float) -> dict[str, float]:
    numbers = (port, rate, seconds, PROMPT_TOKENS, TOKENS_OUT)
    command = ["taskset", "-c", str(core), sys.executable, str(HERE / "direct.py"), *map(str, numbers)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 60, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def direct_http(mock: Path, port: int, bodies: Path, seconds: float, rate: float) -> dict[str, float]:
    got = load(mock, port, bodies, seconds, rate)
    return {"p50_ms": got["first_p50_ms"], "p99_ms": got["first_p99_ms"]}


def of_worker(log: Path) -> dict[str, Any]:
    """How long the worker let requests wait for their first token, by its own clock."""
    last = log.read_text(encoding="utf-8").strip().splitlines()[-1:]
    found: dict[str, Any] = json.loads(last[0]) if last and last[0].startswith("{") else {}
    return found


def show(results: dict[str, Any], about: dict[str, object]) -> None:
    table = Table("router", "requests/s", "tokens/s", "busy", "first token p50 / p99 at half", "added p50 / p99", "MB")
    for name, found in results.items():
        most, half, bare = found["most"], found["half"], found["direct"]
        for part in ("p50_ms", "p99_ms"):
            found[f"added_{part}"] = half[f"first_{part}"] - bare[part]
        table.add_row(
            name,
            f"{most['requests_per_s']:.0f}",
            f"{most['tokens_per_s']:.0f}",
            f"{most['router_cpu']:.0%}",
            f"{half['first_p50_ms']:.2f} / {half['first_p99_ms']:.2f} ms at {half['requests_per_s']:.0f}/s",
            f"{found['added_p50_ms']:.2f} / {found['added_p99_ms']:.2f} ms",
            f"{found['rss_mb']:.0f}",
        )
    Console(width=140).print(table)
    if set(results) != set(NAMES):
        return
    print(f"wrote {report.write_json('router_compare', {'environment': about, 'results': results})}")
    figures = {name: [f["most"]["requests_per_s"], f["most"]["tokens_per_s"]] for name, f in results.items()}
    path = report.write_bars("router_compare", "One process on one core", "per second", ["requests", "tokens"], figures)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
