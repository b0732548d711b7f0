"""The ids that join one request's log lines over all hops."""

from __future__ import annotations

from collections.abc import Mapping

from common.telemetry import parse_traceparent
from common.telemetry.spans import child_of, record
from common.types import RequestStats


def trace_fields(request_id: str, traceparent: str) -> dict[str, str]:
    """`request_id`, and `trace_id` where the caller sent one."""
    trace = parse_traceparent(traceparent)
    return {"request_id": request_id} | ({"trace_id": trace.trace_id} if trace is not None else {})


def record_decode(traceparent: str, request_id: str, stats: RequestStats | None, seconds: float, error: str) -> None:
    """A request's span, which has just ended, and those of its waterfall."""
    found = child_of(traceparent)
    if found is None:
        return
    own, parent = found
    attributes: dict[str, str | int | float | bool] = {"nanodeploy.request_id": request_id}
    if stats is not None:
        attributes |= {
            "nanodeploy.cached_tokens": stats.cached_tokens,
            "nanodeploy.computed_tokens": stats.computed_tokens,
            "nanodeploy.transferred_tokens": stats.transferred_tokens,
        }
    record("decode", own, parent, seconds, attributes=attributes, error=error)
    if stats is None:
        return
    ago_s = seconds
    steps = (("queue", stats.queue_ms), ("prefill", stats.prefill_ms), ("first step", stats.decode_queue_ms))
    for name, ms in steps:
        ago_s -= ms / 1000
        under = child_of(own.traceparent)
        if under is not None and ms > 0:
            record(name, under[0], under[1], ms / 1000, ago_s=max(ago_s, 0.0), attributes=_where(name, stats))


def _where(step: str, stats: RequestStats) -> Mapping[str, str | int | float | bool]:
    if step != "prefill" or not stats.prefill_worker:
        return {}
    return {"nanodeploy.prefill_worker": stats.prefill_worker, "nanodeploy.transfer_ms": stats.transfer_ms}


def record_prefill(traceparent: str, request_id: str, seconds: float, error: str) -> None:
    found = child_of(traceparent)
    if found is not None:
        record("prefill", *found, seconds, attributes={"nanodeploy.request_id": request_id}, error=error)
