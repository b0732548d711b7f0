"""Rows of slots that no answer has named yet: a stream may bring them before its worker's answer to the Submit."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from common.types import ChoiceDelta, Failure, RequestStats, TokenLogprobs

Row = ChoiceDelta | Failure | RequestStats | TokenLogprobs

MOST_ROWS: Final = 16384
_MOST_CLOSED: Final = 4096


class Stash:
    """Of one worker. The slot that waits for longest loses its rows when there are too many."""

    def __init__(self) -> None:
        self._slots: dict[int, tuple[float, list[Row]]] = {}  # (since, rows)
        self.num_rows = 0

    def __contains__(self, slot: int) -> bool:
        return slot in self._slots

    def since(self, slot: int, now: float) -> float:
        """When its first row came; `now` if it has none."""
        return self._slots[slot][0] if slot in self._slots else now

    def keep(self, slot: int, row: Row, now: float) -> None:
        self._slots.setdefault(slot, (now, []))[1].append(row)
        self.num_rows += 1
        if self.num_rows > MOST_ROWS:
            self.take(next(iter(self._slots)))

    def take(self, slot: int) -> list[Row]:
        """Its rows, which are no longer kept."""
        _, rows = self._slots.pop(slot, (0.0, []))
        self.num_rows -= len(rows)
        return rows

    def clear(self) -> list[tuple[int, Row]]:
        """The slots there were, each with its first row."""
        slots, self._slots, self.num_rows = self._slots, {}, 0
        return [(slot, rows[0]) for slot, (_, rows) in slots.items()]


class ClosedSlots:
    """Those that were closed last: rows that still come for them are nobody's."""

    def __init__(self) -> None:
        self._slots: OrderedDict[int, None] = OrderedDict()

    def __contains__(self, slot: int) -> bool:
        return slot in self._slots

    def add(self, slot: int) -> None:
        self._slots[slot] = None
        if len(self._slots) > _MOST_CLOSED:
            self._slots.popitem(last=False)
