"""A clock that stands still until told, for worker and engine tests."""

from __future__ import annotations


class ManualClock:
    def __init__(self, start: float = 100.0) -> None:
        self.instant = start

    def now(self) -> float:
        return self.instant

    def advance(self, seconds: float) -> None:
        self.instant += seconds
