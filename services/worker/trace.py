"""The ids that join one request's log lines over all hops."""

from __future__ import annotations

from common.telemetry import parse_traceparent


def trace_fields(request_id: str, traceparent: str) -> dict[str, str]:
    """`request_id`, and `trace_id` where the caller sent one."""
    trace = parse_traceparent(traceparent)
    return {"request_id": request_id} | ({"trace_id": trace.trace_id} if trace is not None else {})
