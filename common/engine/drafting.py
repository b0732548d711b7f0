"""Drafts by the model's own multi-token-prediction layer, behind each step (`common.models.mtp`).

    step -> tokens that stand are known -> rows of the layer for all new tokens -> drafts of those that go on

The layer has a row at each position but the first: from the token there and the hidden row before it. A step that has
computed positions [a, b) gives it rows a + 1 to b. The hidden row before a, which is of an earlier step, is needed
where a sequence starts: after a hand-off it is the tail row; behind a cached prefix it is kept in the cache, as is
every last row of 16 tokens. Drafts are chained: each is drawn with the noise of its place, as if it were a token, and
with the row that it was drawn from gives the next one.

Where no draft is wanted, rows wait: those of a block are made in one pass when it is full, so that a layer that is
always wrong costs little. The next step may be under way then (`Engine._may_go_ahead`): it has no drafts.

A sequence that goes back (`Engine._advance`) has no rows for that: its next step, which has no drafts, computes the
same positions again and brings them.

Rows of drafts are written over by the next step. A row that is missing or wrong (an optional region that a peer does
not have) may make drafts wrong, and nothing else.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from common.engine.batch import SampleRow
from common.engine.samples import sample_row
from common.engine.sequence import Phase, Sequence
from common.engine.speculative import MadeAhead
from common.kvcache.layout import FULL_GROUP
from common.kvcache.manager import KVCacheManager
from common.types import FinishReason
from common.types.prefix import UNIT

FIRST = 1  # position of a sequence's first row


class Moved(NamedTuple):
    """What a step did to a sequence: positions from `start` on are computed, the first of them in row `row` of the
    step; `num_tokens` were appended, and if it `goes_on`, more will follow; `finish`: why none will. If it `goes_back`,
    nothing is computed: the next step begins at `start` again.
    """

    seq: Sequence
    start: int
    row: int
    num_tokens: int
    goes_on: bool
    finish: FinishReason | None = None
    goes_back: bool = False


@dataclass(frozen=True)
class KeptRow:
    """Where the cache keeps the hidden row of the last of 16 tokens: place `unit` of a block."""

    block_id: int
    unit: int


@dataclass
class Held:
    """Hidden rows of positions [start, end) of a sequence, on the device: rows of the layer that wait."""

    start: int
    end: int
    parts: list[object]


@dataclass
class DraftRow:
    """Rows for `token_ids` from position `start`: their hidden rows are those of the step from `row` on, but the first
    ones are `before` where that is given. `num_drafts` are wanted behind the last.
    """

    seq: Sequence
    token_ids: Tokens[int]
    start: int
    row: int
    table: Tokens[int]
    before: KeptRow | int | Held | None = None  # one in the cache, one in a tail block, or those that waited
    num_drafts: int = 0

    def sample(self, drafts: Tokens[int]) -> SampleRow:
        """How the draft behind `drafts` is drawn."""
        return sample_row(self.seq, drafts)


@dataclass
class DraftWork:
    """`kept[i]`: row of the step, and where to keep it."""

    rows: list[DraftRow] = field(default_factory=list)
    kept: list[tuple[int, KeptRow]] = field(default_factory=list)


class DraftModel(Protocol):
    """Runs the layer (`common.engine.draft_runner`). `hidden`: the step's rows, on the device; None if it had none."""

    def take(self, hidden: object, row: int, count: int) -> object:
        """Rows of the step that outlive it."""

    def run(self, hidden: object, work: DraftWork) -> list[tuple[int, ...]]:
        """The drafts of each row."""


class Drafting:
    """`speculator` is None on a worker that only keeps rows for others."""

    def __init__(self, model: DraftModel, cache: KVCacheManager, block_size: int, speculator: MadeAhead | None) -> None:
        self._model = model
        self._cache = cache
        self._block_size = block_size
        self._speculator = speculator
        self._held: weakref.WeakKeyDictionary[Sequence, Held] = weakref.WeakKeyDictionary()

    def follow(self, hidden: object, moved: Tokens[Moved]) -> bool:
        """Bring the layer up to what a step did, and give sequences the drafts for their next step.

        True if the device may still be writing to blocks: a draft is waited for, with all before it; what is only kept
        for later is not.
        """
        work = DraftWork()
        seqs: list[Sequence] = []
        running = [m for m in moved if m.seq.phase is Phase.RUNNING]
        for m in running:
            m.seq.drafts = ()
            if m.goes_back:
                continue
            self._keep(m, work)
            row = self._row(hidden, m, len(running))
            if row is not None:
                work.rows.append(row)
                seqs.append(m.seq)
        if work.rows or work.kept:
            for seq, drafts in zip(seqs, self._model.run(hidden, work), strict=True):
                seq.drafts = drafts
        has_drawn = any(row.num_drafts for row in work.rows)
        return bool(work.rows or work.kept) and not has_drawn

    def _keep(self, moved: Moved, work: DraftWork) -> None:
        seq, start = moved.seq, moved.start
        last = start // UNIT * UNIT + UNIT - 1
        for position in range(last, seq.num_computed, UNIT):
            work.kept.append((moved.row + position - start, self._kept(seq, position)))

    def _kept(self, seq: Sequence, position: int) -> KeptRow:
        table = self._cache.block_table(seq.seq_id, FULL_GROUP)
        return KeptRow(table[position // self._block_size], position % self._block_size // UNIT)

    def _row(self, hidden: object, moved: Moved, num_running: int) -> DraftRow | None:
        seq, start = moved.seq, moved.start
        first, end = max(seq.num_drafted, FIRST), min(seq.num_computed + 1, seq.num_tokens)
        held = self._held.pop(seq, None)
        if held is None or (held.start, held.end) != (first - 1, start):
            held = None  # if there was one, the sequence was preempted meanwhile
            first = max(first, start)
        if moved.num_tokens and not moved.goes_on:
            end = min(end, seq.num_computed)  # nothing follows the last token
            if self._may_wait(seq, first):
                return None
        count = 0
        if moved.goes_on and self._speculator is not None:
            if not seq.steps_under_way:  # else it is in the next step already, without drafts
                count = self._speculator.count(seq, self._speculator.max_drafts, num_running)
            if not count and self._may_wait(seq, first) and (held is not None or first > start):
                self._held[seq] = self._with(held, hidden, moved, first)
                return None
        if end > seq.num_computed and not self._cache.reserve(seq.seq_id, end + max(count - 1, 0)):
            count = 0
            if not self._cache.reserve(seq.seq_id, end):
                end -= 1  # no room: the row of the next block's first token waits for the next step
        before: KeptRow | int | Held | None = held
        if first == start and held is None:
            tail = self._cache.snapshots.tail_block(seq.seq_id) if seq.tail_ready else None
            if tail is not None:
                before = tail
            elif first % UNIT == 0:
                before = self._kept(seq, first - 1)
            else:
                first += 1
        if first >= end:
            return None
        seq.num_drafted = end
        return DraftRow(
            seq=seq,
            token_ids=seq.token_ids[first:end],
            start=first,
            row=moved.row + first - 1 - start,
            table=self._cache.block_table(seq.seq_id, FULL_GROUP),
            before=before,
            num_drafts=count if end == seq.num_tokens else 0,
        )

    def _may_wait(self, seq: Sequence, first: int) -> bool:
        """Are all blocks that are full now complete without the rows from `first` on?"""
        return first >= seq.num_computed // self._block_size * self._block_size

    def _with(self, held: Held | None, hidden: object, moved: Moved, first: int) -> Held:
        begin, end = (moved.start if held is not None else first - 1), moved.seq.num_computed
        held = held or Held(begin, end, [])
        held.parts.append(self._model.take(hidden, moved.row + begin - moved.start, end - begin))
        held.end = end
        return held
