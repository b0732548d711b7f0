"""An ideal queue: one server, first come first served, the same time for every prompt. Pure."""

from __future__ import annotations

from collections.abc import Sequence


def first_come(arrivals_s: Sequence[float], service_s: float) -> list[float]:
    """Seconds from each arrival to the end of its service."""
    free, waits = float("-inf"), []
    for arrival in sorted(arrivals_s):
        free = max(free, arrival) + service_s
        waits.append(free - arrival)
    return waits
