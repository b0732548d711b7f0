"""What runs of the whole matrix found: kept in benchmarks/results/families-<date>.json, shown in docs/models.md.

A run replaces the cells that it ran and keeps the others of the newest file, each with its own date and commit; cells
of configurations that are no longer in `families.py` go. The table between the marks in the document is written by
the run alone, and a test compares it with the newest file.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from families import FAMILIES
from family_modes import MODES

from benchmarks.report import RESULTS, ROOT, write_json

DOCS = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- families: written by make test-exact -->", "<!-- /families -->"
PROCESSES = "processes"  # handed over between processes, over UCX
COLUMNS = (*MODES, PROCESSES)

Row = dict[str, Any]


def newest() -> dict[str, list[Row]]:
    """Sections of the newest file: `cells` of the matrix, `kv` of quantised caches."""
    files = sorted(RESULTS.glob("families-*.json"))
    found: dict[str, Any] = json.loads(files[-1].read_text(encoding="utf-8")) if files else {}
    return {name: found.get(name, []) for name in ("cells", "kv")}


def record(environment: dict[str, object], cells: Sequence[Row] = (), kv: Sequence[Row] = ()) -> Path:
    """Add a run's rows to what is known, and write both the file of its day and the table."""
    known = newest()
    run = {"date": str(environment["date"])[:10], "commit": environment["commit"]}
    current = {(f.name, c) for f in FAMILIES for c in f.configurations}
    merged = {_key(row): row for row in [*known["cells"], *(row | run for row in cells)]}
    sections = {
        "cells": [row for _, row in sorted(merged.items()) if (row["family"], row["configuration"]) in current],
        "kv": list({row["name"]: row for row in [*known["kv"], *(row | run for row in kv)]}.values()),
    }
    path = write_json(f"families-{run['date']}", {"environment": environment, **sections})
    before, rest = DOCS.read_text(encoding="utf-8").split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    DOCS.write_text(before + BEGIN + table(sections) + END + after, encoding="utf-8")
    return path


def section(text: str) -> str:
    """What lies between the marks in a document."""
    return text.split(BEGIN, 1)[1].split(END, 1)[0]


def table(sections: dict[str, list[Row]]) -> str:
    """Families in their order, modes in theirs: the largest error of a logit (of a logprob for processes)."""
    head = ["family", "configurations", *COLUMNS, "tokens compared", "run"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for family in FAMILIES:
        rows = [row for row in sections["cells"] if row["family"] == family.name]
        if rows:
            runs = sorted({(row["date"], row["commit"]) for row in rows})
            by_mode = [_summary([row for row in rows if row["mode"] == mode]) for mode in COLUMNS]
            tokens = sum(row["tokens"] for row in rows)
            line = [f"`{family.name}`", str(len({row["configuration"] for row in rows})), *by_mode, f"{tokens:,}"]
            lines.append(f"| {' | '.join([*line, ', '.join(' '.join(run) for run in runs)])} |")
    if sections["kv"]:
        lines += ["", "| KV cache | model | perplexity | with bf16 KV | change | blocks in the same memory | run |"]
        lines.append("|---" * 7 + "|")
        lines += [_kv_line(row) for row in sections["kv"]]
    return "\n" + "\n".join(lines) + "\n"


def _summary(rows: Sequence[Row]) -> str:
    if not rows:
        return "not run"
    words = [f"{max(row['error'] for row in rows):.1e}"]
    for name, what in (("mismatches", "wrong"), ("near_ties", "near ties")):
        count = sum(len(row[name]) for row in rows)
        words += [f"{count} {what}"] if count else []
    return ", ".join(words)


def _kv_line(row: Row) -> str:
    change = row["perplexity"] / row["reference_perplexity"] - 1
    values = [f"`{row['kv_dtype']}`", row["model"], f"{row['perplexity']:.3f}", f"{row['reference_perplexity']:.3f}"]
    values += [f"{change:+.2%}", f"{row['blocks_ratio']:.2f} x", f"{row['date']} {row['commit']}"]
    return f"| {' | '.join(values)} |"


def _key(row: Row) -> tuple[int, int, int]:
    names = [f.name for f in FAMILIES]
    family = names.index(row["family"]) if row["family"] in names else len(names)
    configurations = list(FAMILIES[family].configurations) if family < len(names) else []
    configuration = row["configuration"]
    place = configurations.index(configuration) if configuration in configurations else len(configurations)
    return family, place, COLUMNS.index(row["mode"])
