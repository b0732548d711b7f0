"""The table of a soak, as JSON and Markdown, with a chart of memory over time."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from soak_client import Outcome
from soak_faults import Fault
from soak_watch import Growth, Life


def by_kind(outcomes: Iterable[Outcome]) -> dict[str, dict[str, int]]:
    table: dict[str, Counter[str]] = defaultdict(Counter)
    for outcome in outcomes:
        table[outcome.kind][outcome.result] += 1
    return {kind: dict(table[kind]) for kind in sorted(table)}


def fault_rows(faults: Sequence[Fault], outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """How long each was away, and how many requests of that time ended in an error."""
    rows = []
    for fault in faults:
        began, ended = fault.window
        near = [o for o in outcomes if o.began <= ended and o.ended >= began]
        bad = sum(o.result in ("error", "lost") for o in near)
        rows.append(
            {"killed": " and ".join(fault.targets), "back_s": round(fault.back_at - fault.at, 1), "errors": bad}
        )
    return rows


def growth_rows(growths: Sequence[Growth]) -> list[dict[str, Any]]:
    return [
        {
            "process": growth.name,
            "seconds": round(growth.seconds),
            "rss_mb": [round(growth.before.rss_mb, 1), round(growth.after.rss_mb, 1)],
            "descriptors": [growth.before.descriptors, growth.after.descriptors],
            "threads": [growth.before.threads, growth.after.threads],
            "judged": growth.judged,
            "quiet_rss_mb": growth.quiet_rss_mb,
        }
        for growth in sorted(growths, key=lambda g: (g.name, g.before.at_s))
    ]


def write(path: Path, title: str, result: dict[str, Any], lives: Sequence[Life]) -> None:
    """`path` with .json, .md and .png."""
    path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(_markdown(path, title, result), encoding="utf-8")
    _chart(path.with_suffix(".png"), title, lives)


def _markdown(path: Path, title: str, result: dict[str, Any]) -> str:
    figures = {name: value for name, value in result.items() if not isinstance(value, dict | list)}
    results = sorted({name for row in result["requests"].values() for name in row})
    requests = [[kind, *(row.get(name, 0) for name in results)] for kind, row in result["requests"].items()]
    parts = [
        f"# {title}",
        _table(["", ""], [[name, value] for name, value in {**result["environment"], **figures}.items()]),
        "Requests, by what was asked and how it ended:",
        _table(["kind", *results], requests),
        "Processes at quiet points, the most in the first quarter of a life (40 s at least) -> its end:",
        _table(
            ["process", "seconds", "RSS MB", "descriptors", "threads", "judged"],
            [
                [row["process"], row["seconds"], *(f"{a} -> {b}" for a, b in _pairs(row)), row["judged"]]
                for row in result["processes"]
            ],
        ),
    ]
    if result["faults"]:
        rows = [list(row.values()) for row in result["faults"]]
        parts += ["Killed, seconds until whole again, requests of that time that ended in an error:"]
        parts += [_table(list(result["faults"][0]), rows)]
    for name, title in (
        ("fallbacks", "Prompts that the decode worker computed itself"),
        ("warnings", "Warnings logged"),
    ):
        if result[name]:
            parts += [f"{title}, and how often:", _table(["", "times"], list(result[name].items()))]
    parts.append(f"![memory]({path.with_suffix('.png').name})")
    return "\n\n".join(parts) + "\n"


def _pairs(row: dict[str, Any]) -> list[list[Any]]:
    return [row["rss_mb"], row["descriptors"], row["threads"]]


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _chart(path: Path, title: str, lives: Sequence[Life]) -> None:
    """RSS of each process over time; lives of one name share a colour."""
    figure = Figure(figsize=(9.0, 5.0), layout="constrained")
    axes = figure.subplots()
    names = sorted({life.name for life in lives})
    for life in lives:
        first = next(other for other in lives if other.name == life.name) is life
        axes.plot(
            [look.at_s for look in life.looks],
            [look.rss_mb for look in life.looks],
            color=f"C{names.index(life.name) % 10}",
            linestyle="-" if names.index(life.name) < 10 else "--",
            linewidth=1.0,
            label=life.name if first else None,
        )
    axes.set_xlabel("seconds")
    axes.set_ylabel("RSS, MB")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=110)
