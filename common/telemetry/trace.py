"""W3C trace context (https://www.w3.org/TR/trace-context/), the part that travels: `traceparent`.

A request gets a context where it enters (its caller's, or a new one); each hop passes a child on. Spans are
not recorded here: ids join the logs of all hops and whatever tracer stands in front of the router.
"""

from __future__ import annotations

import re
from random import Random
from typing import NamedTuple

_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


class TraceContext(NamedTuple):
    """`trace_id` is 32 hex digits, `span_id` 16; both are never all zeros."""

    trace_id: str
    span_id: str
    sampled: bool

    @property
    def traceparent(self) -> str:
        return f"00-{self.trace_id}-{self.span_id}-{'01' if self.sampled else '00'}"

    def child(self, random: Random) -> TraceContext:
        """The same trace with a span of its own, for the next hop."""
        return TraceContext(self.trace_id, _span_id(random), self.sampled)


def new_trace(random: Random, *, sampled: bool = False) -> TraceContext:
    return TraceContext(f"{random.getrandbits(128) or 1:032x}", _span_id(random), sampled)


def parse_traceparent(header: str) -> TraceContext | None:
    """The context of a `traceparent` header; None when it is empty or not valid (then start a new trace)."""
    match = _TRACEPARENT.fullmatch(header.strip())
    if match is None:
        return None
    version, trace_id, span_id, flags, rest = match.groups()
    if version == "ff" or (version == "00" and rest) or not int(trace_id, 16) or not int(span_id, 16):
        return None
    return TraceContext(trace_id, span_id, bool(int(flags, 16) & 1))


def _span_id(random: Random) -> str:
    return f"{random.getrandbits(64) or 1:016x}"
