"""`nanodeploy simulate`: policies compared on one trace, in a table and a chart."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from common.config.schema import RouterConfig, RoutingPolicy
from common.errors import ConfigError
from services.simulator.machine import PROFILES
from services.simulator.run import Cluster, Outcome, simulate
from services.simulator.trace import Mixture, TraceRequest, load_trace

BAR = 40  # characters of the longest bar


@dataclass(frozen=True)
class SimulateOptions:
    trace: str
    mixture: Mixture
    policies: str  # separated by commas
    num_decode: int
    num_prefill: int
    profile: str
    rate_scale: float
    json_file: str


def run_simulate(options: SimulateOptions, console: Console) -> int:
    if options.profile not in PROFILES:
        raise ConfigError(f"--profile: one of {', '.join(PROFILES)}, got {options.profile!r}", param="profile")
    policies = [_policy(name) for name in options.policies.split(",")]
    requests = load_trace(Path(options.trace)) if options.trace else options.mixture.requests()
    if options.rate_scale != 1.0:
        requests = [dataclasses.replace(r, at_s=r.at_s / options.rate_scale) for r in requests]
    cluster = Cluster(options.num_decode, options.num_prefill, PROFILES[options.profile])
    outcomes = []
    for policy in policies:
        with console.status(f"{policy}: {len(requests)} requests"):
            outcomes.append(simulate(cluster, policy, requests, options.mixture.seed))
    if options.json_file:
        text = json.dumps(
            {"requests": _facts(requests), "policies": [dataclasses.asdict(o) for o in outcomes]}, indent=1
        )
        if options.json_file == "-":
            print(text)
            return 0
        Path(options.json_file).write_text(text + "\n")
    _show(outcomes, requests, cluster, console)
    return 0


def _policy(name: str) -> RoutingPolicy:
    try:
        given: Any = name.strip()
        return RouterConfig(policy=given).policy
    except ValueError as error:
        raise ConfigError(f"--policy: {name.strip()!r} is none that the router has", param="policy") from error


def _facts(requests: Sequence[TraceRequest]) -> dict[str, float]:
    seconds = max(requests[-1].at_s - requests[0].at_s, 1e-9)
    return {
        "count": len(requests),
        "seconds": seconds,
        "per_second": len(requests) / seconds,
        "prompt_tokens": sum(r.input_tokens for r in requests),
        "output_tokens": sum(r.output_tokens for r in requests),
    }


def _show(outcomes: Sequence[Outcome], requests: Sequence[TraceRequest], cluster: Cluster, console: Console) -> None:
    facts, first = _facts(requests), outcomes[0]
    console.print(
        f"{facts['count']:.0f} requests, {facts['per_second']:.1f} a second, "
        f"{facts['prompt_tokens']:.0f} prompt tokens; "
        f"{cluster.num_decode} decode and {cluster.num_prefill} prefill workers; "
        f"a cache that forgets nothing would hit {100 * first.best_hit_rate:.1f} %",
        highlight=False,
    )
    roles = list(first.spread)
    table = Table(
        "policy", "hit rate", "of best", "TTFT p50", "p90", "p99", "total p50", "p99", box=None, pad_edge=False
    )
    for role in roles:
        table.add_column(f"{role} max/mean")
    table.add_column("separated")
    for o in outcomes:
        table.add_row(
            o.policy,
            f"{100 * o.hit_rate:.1f} %",
            f"{100 * o.hit_rate / o.best_hit_rate:.0f} %" if o.best_hit_rate else "-",
            *(f"{1e3 * s:.0f} ms" for s in o.ttft_s),
            *(f"{s:.2f} s" for s in o.total_s),
            *(f"{o.spread[role]:.2f}" for role in roles),
            f"{100 * o.separated:.0f} %",
        )
    console.print(table)
    charts: list[tuple[str, Callable[[Outcome], float], str]] = [
        ("TTFT p99, ms", lambda o: 1e3 * o.ttft_s[2], ".0f"),
        ("prompt tokens computed, %", lambda o: 100 * (1 - o.hit_rate), ".1f"),
    ]
    for title, value, shape in charts:
        console.print(f"\n[bold]{title}[/bold] (less is better)")
        longest = max(map(value, outcomes)) or 1.0
        for o in outcomes:
            bar = "█" * max(round(BAR * value(o) / longest), 1)
            console.print(f"{o.policy:>12} {bar} {value(o):{shape}}", highlight=False)
