"""A whole cluster of `nanodeploy up` under the load of `nanodeploy bench`, on one GPU or with prefill on another.

The cluster's engines load random weights; the tokenizer is made up (`shapes.with_tokenizer`). Prompts are token ids of
their own for every request, so no prefix is cached.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from benchmarks import cluster
from benchmarks.gpu.ideal import first_come
from services.cli.bench.client import BenchClient
from services.cli.bench.load import LoadOptions, make_bodies, run_load
from services.cli.bench.stats import Sample, percentile, summarise

READY_S = 150.0


@dataclass(frozen=True)
class Sizes:
    """Requests by load. `rates`: arrivals a second and for how many seconds."""

    http: tuple[tuple[int, int], ...] = ((1, 8), (16, 64), (64, 192), (256, 512))  # clients, requests
    http_lengths: tuple[int, int] = (1024, 128)
    apart_lengths: tuple[int, int] = (4096, 128)
    one_at_a_time: int = 12
    rates: tuple[tuple[float, float], ...] = ((4.0, 20.0), (8.0, 30.0), (10.0, 20.0))
    max_num_seqs: int = 512
    token_ids: range = range(300, 10_000)  # of prompts; those below are single bytes


DRY = Sizes(
    http=((1, 2), (4, 8)),
    http_lengths=(32, 8),
    apart_lengths=(64, 8),
    one_at_a_time=3,
    rates=((4.0, 1.0),),
    max_num_seqs=16,
    token_ids=range(300, 500),
)


@contextlib.contextmanager
def serving(folder: Path, *, apart: bool, dry_run: bool) -> Iterator[cluster.Cluster]:
    """`up` with one decode worker; if `apart` that is on the second device, and a prefill worker on the first.

    So all prompts are computed by the same card, alone and apart: two of one host may differ by some percent.
    """
    sizes = DRY if dry_run else Sizes()
    devices = {"decode": int(apart), "prefill": 0}
    engine: dict[str, Any] = {
        "load_format": "dummy",
        "dtype": "bfloat16",
        "device": "cpu" if dry_run else "cuda",
        "max_model_len": 512 if dry_run else sum(sizes.apart_lengths) + 64,
        "max_num_seqs": sizes.max_num_seqs,
        "enable_prefix_caching": apart,  # a reader finds handed-over blocks by their prefix
    }
    if dry_run:
        engine |= {"kv_cache_memory_bytes": 64 << 20, "max_num_batched_tokens": 256}
    config: dict[str, Any] = {
        role: {"engine": engine | ({} if dry_run else {"devices": [device]})} for role, device in devices.items()
    }
    if apart:
        config["router"] = {"separation": "always"}  # by itself it would let an idle decode worker do both
    path = folder / "cluster.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    flags = ["--model", str(folder), "--config", str(path), "--prefill", str(int(apart)), "--decode", "1"]
    with cluster.running(flags, limit_s=READY_S) as running:
        yield running


def load(
    running: cluster.Cluster, options: LoadOptions, token_ids: range, warmups: int = 4
) -> tuple[list[Sample], dict[str, Any]]:
    """The samples and their summary, after a few requests that do not count."""

    async def both() -> tuple[list[Sample], float]:
        client = BenchClient(running.url)
        try:
            first = LoadOptions(
                options.model, warmups, 2, 0.0, options.input_len, options.output_len, seed=options.seed + 1
            )
            await run_load(client, first, make_bodies(first, token_ids), lambda: None)
            return await run_load(client, options, make_bodies(options, token_ids), lambda: None)
        finally:
            client.close()

    samples, seconds = asyncio.run(both())
    summary = summarise(samples, seconds)
    if not summary["completed"]:
        raise RuntimeError(f"all requests failed: {next(iter(summary['errors']))}")
    return samples, summary


def http(folder: Path, *, dry_run: bool) -> dict[str, Any]:
    """Closed loops of clients against one worker."""
    sizes, found = DRY if dry_run else Sizes(), {}
    with serving(folder, apart=False, dry_run=dry_run) as running:
        for clients, requests in sizes.http:
            options = LoadOptions(
                folder.name, requests, clients, 0.0, *sizes.http_lengths, seed=clients, timeout_s=120.0
            )
            found[str(clients)] = short(load(running, options, sizes.token_ids, min(clients, 32))[1])
        found["ready_s"] = running.ready_s
    return found


def apart(folder: Path, service_ms: float, loaded_ms: float, *, dry_run: bool) -> dict[str, Any]:
    """One at a time on a plain worker and with prefill apart; then Poisson arrivals, beside two ideal queues.

    `service_ms`: of one prompt on an engine alone; 0 takes the plain worker's time to first token. `loaded_ms`: the
    same in a row without a pause, when the card is at the limit of its power; 0 takes `service_ms`.
    """
    sizes, found = DRY if dry_run else Sizes(), {}
    one = LoadOptions(folder.name, sizes.one_at_a_time, 1, 0.0, *sizes.apart_lengths, seed=1, timeout_s=120.0)
    with serving(folder, apart=False, dry_run=dry_run) as running:
        found["plain, one at a time"] = short(load(running, one, sizes.token_ids)[1])
        found["waterfall, plain"] = waterfall(running, folder.name, sizes)
    service_s = (service_ms or found["plain, one at a time"]["ttft_p50_ms"]) / 1e3
    loaded_s = loaded_ms / 1e3 or service_s
    with serving(folder, apart=True, dry_run=dry_run) as running:
        found["ready_s"] = running.ready_s
        found["one at a time"] = short(load(running, one, sizes.token_ids)[1])
        found["waterfall"] = waterfall(running, folder.name, sizes)
        for rate, seconds in sizes.rates:
            options = LoadOptions(
                folder.name, round(rate * seconds), 0, rate, *sizes.apart_lengths, seed=round(rate), timeout_s=120.0
            )
            samples, summary = load(running, options, sizes.token_ids)
            loaded = {f"loaded_{name}": ms for name, ms in beside_ideal(samples, loaded_s).items()}
            found[f"{rate:g}/s"] = short(summary) | beside_ideal(samples, service_s) | loaded
    found |= {"service_ms": 1e3 * service_s, "loaded_service_ms": 1e3 * loaded_s}
    return found


def beside_ideal(samples: Sequence[Sample], service_s: float) -> dict[str, float]:
    """Times to first token of a first-come queue with the same arrivals."""
    waits = sorted(first_come([s.started_s for s in samples], service_s))
    return {"ideal_p50_ms": 1e3 * percentile(waits, 50), "ideal_p99_ms": 1e3 * percentile(waits, 99)}


def short(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What tables show of a summary."""
    found = {
        "tokens_per_s": summary["output_tokens_per_s"],
        "failed": summary["failed"],
        "completed": summary["completed"],
    }
    for name in ("ttft", "tpot", "gap"):
        for q in ("p50", "p99"):
            found[f"{name}_{q}_ms"] = summary[f"{name}_ms"].get(q)
    if summary["errors"]:
        found["errors"] = summary["errors"]
    return found


def waterfall(running: cluster.Cluster, model: str, sizes: Sizes, count: int = 8) -> list[dict[str, Any]]:
    """Where the time of single requests went: `client_ttft_ms`, and by the server's own word queue, prefill and so on.

    `first_token_ms` is a decode worker's, from a request's arrival there: the client's time holds the ways to and fro.
    """
    found = []
    options = LoadOptions(model, count, 1, 0.0, *sizes.apart_lengths, seed=99)
    with httpx.Client(timeout=60.0, headers={"x-nanodeploy-timings": "1"}) as client:
        for body in make_bodies(options, sizes.token_ids):
            began, first_s, last = time.perf_counter(), None, ""
            with client.stream("POST", f"{running.url}/v1/completions", json=body) as answer:
                answer.raise_for_status()
                for line in answer.iter_lines():
                    if line.startswith("data: {"):
                        first_s, last = first_s or time.perf_counter() - began, line
            assert first_s is not None
            (request,) = json.loads(last.removeprefix("data: "))["nanodeploy"]["requests"]
            found.append({"client_ttft_ms": 1e3 * first_s} | request)
    return found
