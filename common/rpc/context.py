"""Whose call this is: request id and trace context, in logs and in the metadata of calls made meanwhile."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from common.telemetry import TraceContext, log_context, parse_traceparent
from common.telemetry.logs import bind_to_task, bound_fields, set_in_task

REQUEST_ID_KEY = "x-request-id"
TRACEPARENT_KEY = "traceparent"

_REQUEST_ID = re.compile(r"[A-Za-z0-9_.:\-]{1,128}")
_traceparent: ContextVar[str] = ContextVar("traceparent", default="")


@contextmanager
def call_context(request_id: str = "", traceparent: str = "") -> Iterator[None]:
    """Bind both to this task: to every line logged and every `client.call` made inside. Empty leaves as is."""
    trace = parse_traceparent(traceparent)
    fields = {"request_id": request_id} if request_id else {}
    if trace is not None:
        fields["trace_id"] = trace.trace_id
    with log_context(**fields), set_in_task(_traceparent, _traceparent.get() if trace is None else traceparent):
        yield


def bind_call(request_id: str, trace: TraceContext) -> None:
    """As `call_context`, until this task ends."""
    bind_to_task(request_id=request_id, trace_id=trace.trace_id)
    _traceparent.set(trace.traceparent)


def incoming(metadata: Iterable[tuple[str, str | bytes]]) -> tuple[str, str]:
    """(request id, traceparent) of a call's metadata; what is malformed is empty."""
    found = {key: value for key, value in metadata if isinstance(value, str)}
    request_id = found.get(REQUEST_ID_KEY, "")
    return request_id if _REQUEST_ID.fullmatch(request_id) else "", found.get(TRACEPARENT_KEY, "")


def outgoing_metadata() -> tuple[tuple[str, str], ...]:
    """Metadata that carries this task's request id and trace context to the next hop."""
    request_id = bound_fields().get("request_id")
    pairs = ((REQUEST_ID_KEY, request_id), (TRACEPARENT_KEY, _traceparent.get()))
    return tuple((key, value) for key, value in pairs if value)
