"""Logs, trace ids and metrics. Light enough for the router and the controller."""

from __future__ import annotations

from common.telemetry.logs import configure_logging, flush_logs, get_logger, log_context
from common.telemetry.metrics import Metrics
from common.telemetry.trace import TraceContext, new_trace, parse_traceparent

__all__ = [
    "Metrics",
    "TraceContext",
    "configure_logging",
    "flush_logs",
    "get_logger",
    "log_context",
    "new_trace",
    "parse_traceparent",
]
