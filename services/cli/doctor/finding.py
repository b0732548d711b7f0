"""The outcome of one check."""

from __future__ import annotations

import enum
from typing import Any

import msgspec


class Level(enum.StrEnum):
    OK = "ok"
    NOTE = "note"  # works, could be better
    FAIL = "fail"  # something will not work
    SKIP = "skip"  # does not apply here


class Finding(msgspec.Struct, frozen=True):
    """`fix` says what to do; empty when there is nothing to do."""

    level: Level
    detail: str
    fix: str = ""

    def as_json(self, name: str) -> dict[str, Any]:
        return {"check": name, **msgspec.to_builtins(self)}


def ok(detail: str) -> Finding:
    return Finding(Level.OK, detail)


def note(detail: str, fix: str) -> Finding:
    return Finding(Level.NOTE, detail, fix)


def fail(detail: str, fix: str) -> Finding:
    return Finding(Level.FAIL, detail, fix)


def skip(detail: str) -> Finding:
    return Finding(Level.SKIP, detail)
