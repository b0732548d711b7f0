"""What the dashboard shows, made when it asks: the members, counters since start, and the requests since it last asked.

Rates and percentiles are the page's business: it subtracts one answer from the next. So nothing is kept here for it,
no timer runs, and a router that nobody looks at does nothing.
"""

from __future__ import annotations

import os
from typing import Any, Final

from prometheus_client.metrics_core import Metric

import nanodeploy
from common.telemetry.metrics import PREFIX
from common.types import WorkerInfo
from services.router.admission.callers import Caller
from services.router.gateway import Gateway
from services.router.metrics import RouterMetrics

_COUNTS: Final = {
    PREFIX + name: name
    for name in (
        "prompt_tokens",
        "cached_tokens",
        "generation_tokens",
        "num_requests_running",
        "request_success",
        "request_failures",
    )
}
_HISTOGRAMS: Final = {
    PREFIX + "time_to_first_token_seconds": "first_token",
    PREFIX + "inter_token_latency_seconds": "inter_token",
    PREFIX + "e2e_request_latency_seconds": "whole",
}


def snapshot(gateway: Gateway, caller: Caller, since: int = 0) -> dict[str, Any]:
    """Plain data for JSON. `since` is the number of the last request of this process that the page knows."""
    recent, relay = gateway.recent, gateway.relay
    return {
        "router": {
            "epoch": recent.epoch,
            "pid": os.getpid(),
            "version": nanodeploy.__version__,
            "started": recent.started,
            "draining": gateway.draining,
            "in_flight": gateway.in_flight,
            "attached": relay.attached,
            "moves": relay.moves,
        },
        "models": _models(gateway.metrics, gateway),
        "workers": [_worker(gateway, worker) for worker in gateway.members.workers.values()],
        "last": recent.count,
        "requests": recent.seen_by(caller, since),
    }


def _worker(gateway: Gateway, worker: WorkerInfo) -> dict[str, Any]:
    load = worker.load
    return {
        "id": worker.ref.worker_id,
        "role": worker.role,
        "state": worker.state,
        "reached": gateway.relay.ready(worker),
        "model": worker.model.name,
        "device": worker.device,
        "host": worker.host,
        "transports": worker.transports,
        "slots": worker.max_num_seqs,
        "block_size": worker.kv_block_size,
        "running": load.running,
        "waiting": load.waiting,
        "waiting_tokens": load.waiting_tokens,
        "tokens_per_s": load.tokens_per_s,
        "kv": load.kv_states,
    }


def _models(metrics: RouterMetrics, gateway: Gateway) -> dict[str, dict[str, Any]]:
    """Counters and histograms since start, by model; a model that was asked for nothing yet has none."""
    found: dict[str, dict[str, Any]] = {
        worker.model.name: {"max_model_len": worker.model.max_model_len} for worker in gateway.decode_workers()
    }
    for family in metrics.base.registry.collect():
        if (name := _COUNTS.get(family.name)) is not None:
            _add_counts(found, name, family)
        elif (name := _HISTOGRAMS.get(family.name)) is not None:
            _add_histogram(found, name, family)
    return found


def _add_counts(found: dict[str, dict[str, Any]], name: str, family: Metric) -> None:
    for sample in family.samples:
        of = found.setdefault(sample.labels["model_name"], {})
        of[name] = of.get(name, 0) + sample.value


def _add_histogram(found: dict[str, dict[str, Any]], name: str, family: Metric) -> None:
    """[upper bound in seconds (None: no bound), how many are not above it], as Prometheus counts."""
    for sample in family.samples:
        if sample.name.endswith("_bucket"):
            bound = None if sample.labels["le"] == "+Inf" else float(sample.labels["le"])
            buckets = found.setdefault(sample.labels["model_name"], {}).setdefault(name, [])
            buckets.append((bound, sample.value))
