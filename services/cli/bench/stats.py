"""What a run measured, and its percentiles. Pure.

ttft       request sent -> first text
tpot       (last text - first text) / (tokens - 1), of each request
gap        between two pieces of text of one stream; a piece may hold several tokens
latency    request sent -> last text
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

QUANTILES = (50, 90, 95, 99)


@dataclass
class Sample:
    """One request. Times in seconds on the client's monotonic clock; `error` empty when it was answered whole."""

    started_s: float
    arrivals_s: list[float] = field(default_factory=list)  # of each piece of text
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    error: str = ""


def percentile(ordered: Sequence[float], q: float) -> float:
    """The q-th percentile (0 to 100) of sorted values, between neighbours by proportion."""
    place = (len(ordered) - 1) * q / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def distribution_ms(values_s: Sequence[float]) -> dict[str, float]:
    """Mean, percentiles and maximum in milliseconds; empty for no values."""
    if not values_s:
        return {}
    ordered = sorted(values_s)
    result = {"mean": sum(ordered) / len(ordered)}
    result |= {f"p{q}": percentile(ordered, q) for q in QUANTILES}
    result["max"] = ordered[-1]
    return {name: round(value * 1e3, 3) for name, value in result.items()}


def summarise(samples: Sequence[Sample], duration_s: float) -> dict[str, Any]:
    """Counts, rates and distributions of a run. Failed requests count as failed and nowhere else."""
    good = [s for s in samples if not s.error and s.arrivals_s]
    tokens = sum(s.completion_tokens for s in good)
    return {
        "duration_s": round(duration_s, 3),
        "completed": len(good),
        "failed": len(samples) - len(good),
        "errors": dict(Counter(s.error or "no text came" for s in samples if s.error or not s.arrivals_s)),
        "prompt_tokens": sum(s.prompt_tokens for s in good),
        "cached_tokens": sum(s.cached_tokens for s in good),
        "completion_tokens": tokens,
        "requests_per_s": round(len(good) / duration_s, 3),
        "output_tokens_per_s": round(tokens / duration_s, 2),
        "total_tokens_per_s": round((tokens + sum(s.prompt_tokens for s in good)) / duration_s, 2),
        "ttft_ms": distribution_ms([s.arrivals_s[0] - s.started_s for s in good]),
        "tpot_ms": distribution_ms(
            [(s.arrivals_s[-1] - s.arrivals_s[0]) / (s.completion_tokens - 1) for s in good if s.completion_tokens > 1]
        ),
        "gap_ms": distribution_ms([b - a for s in good for a, b in zip(s.arrivals_s, s.arrivals_s[1:], strict=False)]),
        "latency_ms": distribution_ms([s.arrivals_s[-1] - s.started_s for s in good]),
    }


def table(summary: Mapping[str, Any]) -> Table:
    """The distributions as a table for people; the counts are its caption."""
    columns = ("mean", *(f"p{q}" for q in QUANTILES), "max")
    result = Table(title="Latency, ms", caption=_caption(summary), caption_justify="left", caption_style="")
    result.add_column("")
    for column in columns:
        result.add_column(column, justify="right")
    titles = {
        "ttft_ms": "time to first token",
        "tpot_ms": "time per output token",
        "gap_ms": "gap between pieces",
        "latency_ms": "whole request",
    }
    for key, title in titles.items():
        values = summary[key]
        result.add_row(title, *(f"{values[c]:.1f}" if values else "-" for c in columns))
    return result


def _caption(summary: Mapping[str, Any]) -> str:
    lines = [
        f"{summary['completed']} requests in {summary['duration_s']} s, {summary['failed']} failed; "
        f"{summary['requests_per_s']} requests/s",
        f"{summary['prompt_tokens']} prompt tokens ({summary['cached_tokens']} cached), "
        f"{summary['completion_tokens']} output tokens; {summary['output_tokens_per_s']} output tokens/s",
    ]
    lines += [f"{count} x {message}" for message, count in summary["errors"].items()]
    return "\n".join(lines)
