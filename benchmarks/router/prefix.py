"""Routing by prefix: one trace through our router, sglang-router and vllm-router, to workers that have caches.

    python benchmarks/router/prefix.py [--seconds 12] [--rate 60] [--only NAME ...] [--others FOLDER]

Eight workers in one process (`caching_workers.py`), the same for all but for the protocol: the real scheduler and a
cache of bounded size each, steps that only take time. A token is a byte of the rendered chat (`trace.py`). Requests
come when the trace says, whether or not others are answered. The router has a core, workers and load share the other.

    conversations  questions of many conversations, each on top of what was said, over a few system prompts
    hot            one system prompt in 80 % of the requests, conversations in the others

By the workers' own books: the hit rate, cached tokens of the prompts' tokens, and its share of what one cache that
forgets nothing would have; the busiest worker over the mean, in computed prompt tokens and in requests. By the client:
the time from when a request was due to its first token.

Writes benchmarks/results/router_prefix.json and .png, but for a run with `--only`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import report  # noqa: E402
from benchmarks.router.compare import PACKAGES, install_others, wait_ready  # noqa: E402
from benchmarks.router.pinned import cpu_of, free_port, process  # noqa: E402
from benchmarks.router.trace import ANSWER, BLOCK, Best, Mixture, Request, write_tokenizer  # noqa: E402
from services.cli.state import cache_root  # noqa: E402

HERE = Path(__file__).parent
NUM_WORKERS = 8
ANSWER_S = 90.0  # an answer that takes longer is lost
TRIES = 3
LOST_S = 0.5  # of all workers together
CONTENT = f'"content":"{ANSWER}'.encode()


class Contender(NamedTuple):
    router: str
    policy: str

    def __str__(self) -> str:
        return f"{self.router} {self.policy}"


CONTENDERS = (
    Contender("nanodeploy", "cost"),
    Contender("nanodeploy", "prefix"),
    Contender("sglang-router", "cache_aware"),
    Contender("sglang-router", "power_of_two"),
    Contender("vllm-router", "cache_aware"),
    Contender("vllm-router", "kv_aware"),
    Contender("vllm-router", "round_robin"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=12.0, help="of each trace")
    parser.add_argument("--rate", type=float, default=60.0, help="requests a second")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=[str(each) for each in CONTENDERS])
    parser.add_argument("--trace", choices=("conversations", "hot"), help="this one alone")
    parser.add_argument("--others", type=Path, default=cache_root(os.environ) / "router-contenders")
    arguments = parser.parse_args()
    shared = {"workers": NUM_WORKERS, "block_tokens": BLOCK, "rate": arguments.rate, "seed": arguments.seed}
    about = report.environment("grpcio", others=PACKAGES, **shared)
    chosen = [each for each in CONTENDERS if not arguments.only or str(each) in arguments.only]
    if any(each.router != "nanodeploy" for each in chosen):
        install_others(arguments.others)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[0]})
    results: dict[str, Any] = {}
    for name, hot_share in (("conversations", 0.0), ("hot", 0.8)):
        if arguments.trace in (None, name):
            mixture = Mixture(arguments.rate, arguments.seconds, arguments.seed, hot_share)
            played = Played(mixture.requests(), cores[0], cores[-1], arguments.others)
            results[name] = {
                "requests": len(played.requests),
                "prompt_tokens": played.best.prompt_tokens,
                "best_hit_rate": played.best.hit_rate,
                "routers": {str(each): played.undisturbed(each) for each in chosen},
            }
    show(results)
    if not arguments.only and not arguments.trace:
        print(f"wrote {report.write_json('router_prefix', {'environment': about, 'results': results})}")
        print(f"wrote {draw(results)}")


# -- one router ------------------------------------------------------------------------------------------


@dataclass
class Played:
    """A trace, to be played through one router after the other."""

    requests: Sequence[Request]
    here: int  # core of workers and load
    there: int  # core of the router
    others: Path

    def __post_init__(self) -> None:
        self.best = Best.of(self.requests)

    def undisturbed(self, contender: Contender) -> dict[str, Any]:
        """Again, if others had the cores for so long that workers fell behind."""
        for _ in range(TRIES - 1):
            if (found := self.through(contender))["workers_lost_s"] <= LOST_S:
                return found
        return self.through(contender)

    def through(self, contender: Contender) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            with started(contender, folder, self.here, self.there, self.others) as (port, pid):
                with cpu_of(psutil.Process(pid)) as used:
                    answers = asyncio.run(play(port, self.requests))
            books = json.loads((folder / "workers.log").read_text(encoding="utf-8").strip().splitlines()[-1])
        found = figures(books, answers, self.best)
        return found | {"router_cpu": used[0]}


@contextlib.contextmanager
def started(contender: Contender, folder: Path, here: int, there: int, others: Path) -> Iterator[tuple[int, int]]:
    """(port, process id) of a router that answers, with workers behind it."""
    write_tokenizer(folder)
    ports, port, metrics_port = [free_port() for _ in range(NUM_WORKERS)], free_port(), free_port()
    ours, log = contender.router == "nanodeploy", folder / "router.log"
    if ours:
        config = folder / "config.yaml"
        section = f"port: {port}, policy: {contender.policy}, controllers: ['127.0.0.1:{ports[0]}']"
        config.write_text(f"router: {{{section}}}\n")
        router = [sys.executable, "-m", "services.router", "--config", str(config)]
    else:
        words = {
            "sglang-router": ["bin/python", "-m", "sglang_router.launch_router", "--log-level", "warn"],
            "vllm-router": ["bin/vllm-router", "--log-level", "warning"],
        }
        first, *rest = words[contender.router]
        router = [str(others / first), *rest, "--host", "127.0.0.1", "--port", str(port)]
        router += ["--policy", contender.policy, "--prometheus-port", str(metrics_port), "--worker-urls"]
        router += [f"http://127.0.0.1:{worker_port}" for worker_port in ports]
    addresses = [str(worker_port) for worker_port in ports]
    if contender.policy == "kv_aware":
        router += ["--kv-event-block-size", str(BLOCK), "--kv-event-model", "bench"]
        for i, worker_port in enumerate(ports):
            events_port = free_port()
            addresses[i] += f":{events_port}"
            router += ["--kv-event-source", f"http://127.0.0.1:{worker_port}=tcp://127.0.0.1:{events_port}"]
    workers = [sys.executable, str(HERE / "caching_workers.py"), "grpc" if ours else "http", str(folder), *addresses]
    with process(workers, here, folder / "workers.log"), process(router, there, log) as child:
        wait_ready(port, "/ready" if ours else "/health", child, log)
        time.sleep(1.0)
        yield port, child.pid


# -- the client ------------------------------------------------------------------------------------------


class Answer(NamedTuple):
    """`first_s`: from when the request was due to its first token; None: it failed."""

    first_s: float | None
    tokens: int


class Client(asyncio.Protocol):
    """A keep-alive connection: one streamed answer at a time."""

    def __init__(self) -> None:
        self._done: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self.transport = transport

    async def ask(self, body: bytes, due_s: float) -> Answer:
        self._done = asyncio.get_running_loop().create_future()
        self._in, self._first_s = b"", 0.0
        head = "POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\ncontent-length: "
        self.transport.write(f"{head}{len(body)}\r\n\r\n".encode() + body)
        async with asyncio.timeout(ANSWER_S):
            await self._done
        return Answer(self._first_s - due_s if self._in.startswith(b"HTTP/1.1 200") else None, self._in.count(CONTENT))

    def data_received(self, data: bytes) -> None:
        self._in += data
        if not self._first_s and CONTENT in self._in:
            self._first_s = time.perf_counter()
        over = self._in.endswith(b"0\r\n\r\n") or (not self._in.startswith(b"HTTP/1.1 200") and self._in.endswith(b"}"))
        if over and self._done is not None and not self._done.done():
            self._done.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(ConnectionError("the router closed the connection"))


async def play(port: int, requests: Sequence[Request]) -> list[Answer]:
    """Each at its time. A connection takes the next request when its answer is over."""
    loop, idle, bodies = asyncio.get_running_loop(), [], [request.body for request in requests]
    start = time.perf_counter()

    async def one(request: Request, body: bytes) -> Answer:
        due = start + request.at_s
        await asyncio.sleep(max(due - time.perf_counter(), 0))
        client = idle.pop() if idle else (await loop.create_connection(Client, "127.0.0.1", port))[1]
        try:
            answer = await client.ask(body, due)
        except (OSError, TimeoutError):
            client.transport.abort()
            return Answer(None, 0)
        idle.append(client)
        return answer

    answers = await asyncio.gather(*map(one, requests, bodies))
    for client in idle:
        client.transport.close()
    await asyncio.sleep(0)  # a loop that ends at once would leave their sockets open
    return answers


# -- figures ---------------------------------------------------------------------------------------------


def figures(books: Sequence[dict[str, float]], answers: Sequence[Answer], best: Best) -> dict[str, Any]:
    """Of one run, from the workers' books and the client's answers."""
    prompt, cached = (sum(int(book[name]) for book in books) for name in ("prompt_tokens", "cached_tokens"))
    failed = sum(answer.first_s is None for answer in answers)
    if not failed and prompt != best.prompt_tokens:
        raise SystemExit(f"the workers had {prompt} prompt tokens, the trace has {best.prompt_tokens}")
    first_ms = sorted(1e3 * answer.first_s for answer in answers if answer.first_s is not None)
    computed = [book["prompt_tokens"] - book["cached_tokens"] for book in books]
    return {
        "hit_rate": cached / max(prompt, 1),
        "of_best": cached / max(best.cached_tokens, 1),
        "computed_spread": spread(computed),
        "request_spread": spread([book["requests"] for book in books]),
        "busy_spread": spread([book["busy_s"] for book in books]),
        "first_p50_ms": quantile(first_ms, 0.5),
        "first_p99_ms": quantile(first_ms, 0.99),
        "first_mean_ms": sum(first_ms) / max(len(first_ms), 1),
        "first_mean_at_worker_ms": 1e3 * sum(book["waited_s"] for book in books) / max(len(first_ms), 1),
        "workers_lost_s": sum(book["lost_s"] for book in books),
        "failed": failed,
        "tokens": sum(answer.tokens for answer in answers),
        "workers": list(books),
    }


def spread(loads: Sequence[float]) -> float:
    """The busiest over the mean."""
    return max(loads) * len(loads) / max(sum(loads), 1e-9)


def quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else 0.0


def show(results: dict[str, Any]) -> None:
    for name, trace in results.items():
        title = f"{name}: {trace['requests']} requests, best possible hit rate {trace['best_hit_rate']:.1%}"
        table = Table(
            "router", "hit rate", "of the best", "busiest: computed", "requests", "first token p50 / p99", "failed"
        )
        table.title = title
        for router, found in trace["routers"].items():
            table.add_row(
                router,
                f"{found['hit_rate']:.1%}",
                f"{found['of_best']:.1%}",
                f"{found['computed_spread']:.2f}",
                f"{found['request_spread']:.2f}",
                f"{found['first_p50_ms']:.0f} / {found['first_p99_ms']:.0f} ms",
                str(found["failed"]),
            )
        Console(width=120).print(table)


def draw(results: dict[str, Any]) -> Path:
    columns = {
        "hits, % of the best": "of_best",
        "busiest / mean": "computed_spread",
        "first token p99, s": "first_p99_ms",
    }
    groups = [f"{trace}: {column}" for trace in results for column in columns]
    factor = {"of_best": 100.0, "first_p99_ms": 1e-3}
    names = list(next(iter(results.values()))["routers"])
    series = {
        name: [
            trace["routers"][name][column] * factor.get(column, 1.0)
            for trace in results.values()
            for column in columns.values()
        ]
        for name in names
    }
    return report.write_bars("router_prefix", f"One trace, {NUM_WORKERS} workers with caches", "", groups, series)


if __name__ == "__main__":
    main()
