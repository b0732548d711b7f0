"""The multi-token-prediction layer on several ranks: every rank runs it over the same rows and draws the same drafts.

Hidden rows stay on the rank that computed them. Rows that outlive their step (`take`) have a number by which other
ranks keep theirs; they are let go when rank 0 has let go of its own.
"""

from __future__ import annotations

import itertools
import pickle
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from common.engine.batch import SampleRow
from common.engine.draft_runner import DraftRunner
from common.engine.drafting import DraftRow, DraftWork, Held, KeptRow
from common.engine.rank_runner import DRAFT, KEEP, together
from common.parallel.ranks import Ranks

_HELD = "held"


class RankedDrafts:
    """The layer of rank 0, and with it those of all ranks. See `common.engine.drafting.DraftModel`."""

    def __init__(self, inner: DraftRunner, ranks: Ranks) -> None:
        self._inner = inner
        self._ranks = ranks
        self._next = itertools.count()
        self._numbers: dict[int, int] = {}  # of rows that are kept, by the identity of ours
        self._gone: list[int] = []

    def take(self, hidden: object, row: int, count: int) -> object:
        number = next(self._next)
        self._ranks.tell(KEEP, pickle.dumps((number, row, count)))
        with together(self._ranks):
            part = self._inner.take(hidden, row, count)
        self._numbers[id(part)] = number
        weakref.finalize(part, self._let_go, id(part))
        return part

    def run(self, hidden: object, work: DraftWork) -> list[tuple[int, ...]]:
        gone, self._gone = self._gone, []
        rows = [self._sent(row) for row in work.rows]
        kept = [(row, tuple(place_of(kept))) for row, kept in work.kept]
        self._ranks.tell(DRAFT, pickle.dumps((gone, rows, kept)))
        with together(self._ranks):
            return self._inner.run(hidden, work)

    def _sent(self, row: DraftRow) -> tuple[Any, ...]:
        before: Any = row.before
        if isinstance(before, KeptRow):
            before = place_of(before)
        elif isinstance(before, Held):
            before = _HELD, before.start, before.end, [self._numbers[id(part)] for part in before.parts]
        draw = row.sample(()) if row.num_drafts else None
        return list(row.token_ids), row.start, row.row, list(row.table), before, row.num_drafts, draw

    def _let_go(self, identity: int) -> None:
        self._gone.append(self._numbers.pop(identity))


def place_of(kept: KeptRow) -> tuple[int, int]:
    return kept.block_id, kept.unit


@dataclass
class _SentRow(DraftRow):
    """A row without its sequence, which rank 0 alone has. `draw`: how its first draft is drawn."""

    draw: SampleRow | None = None

    def sample(self, drafts: Sequence[int]) -> SampleRow:
        first = self.draw
        assert first is not None
        return SampleRow(
            seed=first.seed,
            choice=first.choice,
            output_index=first.output_index + len(drafts),
            params=first.params,
            prompt_ids=first.prompt_ids,
            output_ids=[*first.output_ids, *drafts] if first.prompt_ids else (),
            stop_ids=first.stop_ids,
        )


class DraftFollower:
    """The layer of another rank. `hidden`: rows of the step that was collected last."""

    def __init__(self, inner: DraftRunner) -> None:
        self._inner = inner
        self._parts: dict[int, Tensor] = {}

    def keep(self, hidden: Tensor | None, payload: bytes) -> None:
        number, row, count = pickle.loads(payload)
        self._parts[number] = self._inner.take(hidden, row, count)

    def run(self, hidden: Tensor | None, payload: bytes) -> None:
        gone, rows, kept = pickle.loads(payload)
        for number in gone:
            del self._parts[number]
        places = [(row, KeptRow(*place)) for row, place in kept]
        self._inner.run(hidden, DraftWork([self._row(*row) for row in rows], places))

    def _row(
        self, token_ids: list[int], start: int, row: int, table: list[int], before: Any, num_drafts: int, draw: Any
    ) -> DraftRow:
        if isinstance(before, tuple):
            if before[0] == _HELD:
                _, first, end, numbers = before
                before = Held(first, end, [self._parts[number] for number in numbers])
            else:
                before = KeptRow(*before)
        nobody: Any = None
        return _SentRow(nobody, token_ids, start, row, table, before, num_drafts, draw)
