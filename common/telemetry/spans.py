"""Spans of requests, sent to an OpenTelemetry collector. Off until a `__main__` calls `configure_tracing`.

    router: POST /v1/...  (its parent is the caller's span, if there was one)
      |- decode worker: decode
      |    |- queue, prefill, first step   (from the request's waterfall)
      `- prefill worker: prefill

The ids are those that travel in `traceparent` (`trace.TraceContext`), with or without a collector: a span is made from
them when its work has ended, in one call, and put into a bounded queue that a thread of the SDK empties. A collector
that is slow or gone costs the spans that do not fit, never a request.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from common.config.schema import LogConfig
from common.errors import ConfigError
from common.telemetry.trace import TraceContext, new_trace, parse_traceparent

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

Kind = Literal["server", "internal"]
Attributes = Mapping[str, str | int | float | bool]

_random = random.Random()
_sink: _Sink | None = None


class _Sink:
    def __init__(self, exporter: SpanExporter, service: str, ratio: float) -> None:
        from opentelemetry import trace as api
        from opentelemetry.sdk import trace as sdk
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        self.api = api
        self.sdk = sdk
        self.ratio = ratio
        self.resource = Resource.create({"service.name": f"nanodeploy-{service}"})
        self.processor: Any = BatchSpanProcessor(exporter)

    def put(
        self,
        name: str,
        own: TraceContext,
        parent: str,
        kind: Kind,
        start_ns: int,
        end_ns: int,
        attributes: Attributes,
        error: str,
    ) -> None:
        api = self.api
        status = api.Status(api.StatusCode.ERROR, error) if error else api.Status()
        span = self.sdk.ReadableSpan(
            name,
            context=self._context(own.trace_id, own.span_id, remote=False),
            parent=self._context(own.trace_id, parent, remote=True) if parent else None,
            resource=self.resource,
            attributes=dict(attributes),
            kind=api.SpanKind.SERVER if kind == "server" else api.SpanKind.INTERNAL,
            status=status,
            start_time=start_ns,
            end_time=end_ns,
        )
        self.processor.on_end(span)

    def _context(self, trace_id: str, span_id: str, *, remote: bool) -> Any:
        flags = self.api.TraceFlags(self.api.TraceFlags.SAMPLED)
        return self.api.SpanContext(int(trace_id, 16), int(span_id, 16), remote, flags)


def configure_tracing(config: LogConfig, service: str, endpoint: str = "") -> None:
    """Send spans to `log.otlp_endpoint`, else to `endpoint` (the environment's); nothing if both are empty.

    Raises `ConfigError` where OpenTelemetry is not installed.
    """
    global _sink
    base = (config.otlp_endpoint or endpoint).rstrip("/")
    if not base:
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        exporter = OTLPSpanExporter(endpoint=f"{base}/v1/traces", timeout=5.0)
        _sink = _Sink(exporter, service, config.otlp_ratio)
    except ImportError:
        message = "traces need OpenTelemetry: install nanodeploy[otel], or unset log.otlp_endpoint"
        raise ConfigError(message, param="log.otlp_endpoint") from None


def close_tracing() -> None:
    """Send what is left, within the exporter's time limit."""
    global _sink
    sink, _sink = _sink, None
    if sink is not None:
        sink.processor.shutdown()


def tracing() -> bool:
    return _sink is not None


def begin_trace(rng: random.Random) -> TraceContext:
    """A new trace, of which the configured share is recorded."""
    sink = _sink
    return new_trace(rng, sampled=sink is not None and rng.random() < sink.ratio)


def record(
    name: str,
    own: TraceContext,
    parent: str,
    seconds: float,
    *,
    kind: Kind = "internal",
    ago_s: float = 0.0,
    attributes: Attributes | None = None,
    error: str = "",
) -> None:
    """A span that lasted `seconds` and ended `ago_s` before now. `parent` is a span id, empty for a root."""
    if _sink is not None and own.sampled:
        end_ns = time.time_ns() - int(1e9 * ago_s)
        _sink.put(name, own, parent, kind, end_ns - int(1e9 * seconds), end_ns, attributes or {}, error)


def child_of(traceparent: str) -> tuple[TraceContext, str] | None:
    """A span of one's own under a recorded `traceparent`, with its parent's span id; None: there is none to record."""
    above = parse_traceparent(traceparent) if _sink is not None else None
    return None if above is None or not above.sampled else (above.child(_random), above.span_id)
