"""Runs the multi-token-prediction layer on the device, and draws drafts from it: see `common.engine.drafting`.

Rows of few tokens go through recorded passes where there are some (`common.engine.draft_graphs`): drafts come to the
host all at once. The others go through passes as they are run, and each draft is waited for before the next.

Shape letters: T tokens of the step, N tokens of the layer's pass, R rows that drafts are drawn from, D hidden size,
Q tokens of each row in a recorded pass, B blocks, U places of kept rows in a block.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from common.attention.context import AttentionBackend, AttentionContext
from common.engine.batch import Batch, BatchRow, build_batch
from common.engine.draft_graphs import DraftGraphs, source_rows
from common.engine.drafting import FIRST, DraftRow, DraftWork, Held, KeptRow
from common.engine.inputs import Inputs, arrays_of, context_of
from common.engine.results import Fetched
from common.engine.sampler import Sampler
from common.kvcache.pool import KVPool
from common.models.cache_spec import DRAFT_ROWS_REGION
from common.types.prefix import UNIT

FEW_ROWS = 64


class DraftingModel(Protocol):
    """A model with its multi-token-prediction layer; see `common.models.decoder.DecoderModel`."""

    def norm(self, hidden_RD: Tensor) -> Tensor: ...

    def draft(self, rows_TD: Tensor, input_ids_T: Tensor, positions_T: Tensor, ctx: AttentionContext) -> Tensor: ...

    def draft_logits(self, rows_RD: Tensor) -> Tensor: ...


class DraftRunner:
    """`groups` are those of the layer's cache: (block size, window)."""

    def __init__(
        self,
        model: DraftingModel,
        pool: KVPool,
        backend: AttentionBackend,
        sampler: Sampler,
        inputs: Inputs,
        hidden_size: int,
        groups: Mapping[str, tuple[int, int]],
        on_progress: Callable[[], None],
    ) -> None:
        self._model = model
        self._pool = pool
        self._backend = backend
        self._sampler = sampler
        self._inputs = inputs
        self._groups = groups
        self._hidden_size = hidden_size
        rows = pool.region(DRAFT_ROWS_REGION)[:, 0, 0, 0]
        self._kept_BUD = rows.view(rows.shape[0], -1, UNIT * rows.shape[2])
        self._on_progress = on_progress
        self.graphs: DraftGraphs | None = None

    def take(self, hidden: object, row: int, count: int) -> Tensor:
        """Rows of the step that outlive it: where these are few, all of them do."""
        assert isinstance(hidden, Tensor)
        rows = hidden[row : row + count]
        return rows if len(hidden) <= FEW_ROWS else rows.clone()

    @torch.inference_mode()
    def run(self, hidden: object, work: DraftWork) -> list[tuple[int, ...]]:
        """Bring the layer up to the step, draw the drafts of each of `work.rows`, and keep rows."""
        hidden_TD = hidden if isinstance(hidden, Tensor) else None
        rows = work.rows
        drafts: list[tuple[int, ...]] = [()] * len(rows)
        lots = self._lots(rows)
        drawn = [self._launch(hidden_TD, [rows[i] for i in lot]) for lot in lots]
        self._keep(hidden_TD, work.kept)  # behind what is waited for most, before what is waited for
        others = sorted(set(range(len(rows))).difference(*lots))
        for i, found in zip(others, self._run_eagerly(hidden_TD, [rows[i] for i in others]), strict=True):
            drafts[i] = found
        if not any(rows[i].num_drafts for lot in lots for i in lot):
            return drafts  # what is under way is not waited for
        fetched = Fetched.start(drawn).get()  # behind all that was launched
        for lot, drawn_KR in zip(lots, fetched, strict=True):
            for i, token_ids in zip(lot, drawn_KR.T.tolist(), strict=True):
                drafts[i] = _up_to_failed(token_ids[: rows[i].num_drafts])
        return drafts

    @torch.inference_mode()
    def compute(self, num_new: int, start: int, table: Sequence[int]) -> None:
        """The layer over `num_new` tokens of one sequence from position `start`; they lie in `table` afterwards."""
        row = BatchRow([0] * num_new, start, dict.fromkeys(self._groups, table))
        rows_ND = self._kept_BUD.new_zeros(num_new, self._hidden_size)
        self._pass(self._model.norm(rows_ND), build_batch([row], self._groups))

    def _lots(self, rows: Sequence[DraftRow]) -> list[list[int]]:
        """Those of `rows` that recorded passes take, in lots of one chain of passes; most drafts first."""
        graphs = self.graphs
        if graphs is None:
            return []
        taken = sorted((i for i, r in enumerate(rows) if graphs.takes(r)), key=lambda i: -rows[i].num_drafts)
        return [taken[n : n + graphs.max_sequences] for n in range(0, len(taken), graphs.max_sequences)]

    def _launch(self, hidden_TD: Tensor | None, rows: Sequence[DraftRow]) -> Tensor:
        """A chain of recorded passes: drafts [K, R] on the device, the k-th of those rows that have so many."""
        assert self.graphs is not None
        graphs, query_len = self.graphs, max(len(r.token_ids) for r in rows)
        before_ND = self._model.norm(self._before_padded(hidden_TD, rows, query_len))
        graphs.rows_ND[: len(before_ND)].copy_(before_ND)
        token_ids_R = graphs.first(rows, query_len)
        drafts_KR = token_ids_R.new_empty(rows[0].num_drafts, len(rows))
        for k in range(rows[0].num_drafts):
            going = sum(r.num_drafts > k for r in rows)
            if k:
                token_ids_R = graphs.next(rows[:going], k)
            drafts_KR[k, :going].copy_(token_ids_R[:going])
        return drafts_KR

    def _before_padded(self, hidden_TD: Tensor | None, rows: Sequence[DraftRow], query_len: int) -> Tensor:
        """As `_before`, for `query_len` tokens of each row: [R * Q, D]."""
        counts = [len(r.token_ids) for r in rows]
        if hidden_TD is not None and all(r.before is None for r in rows):
            rows_ND, firsts = hidden_TD, [r.row for r in rows]
        else:
            rows_ND, firsts = self._before(hidden_TD, rows), [0, *itertools.accumulate(counts)][:-1]
        index = self._inputs.put({"index": source_rows(firsts, counts, query_len)})["index"]
        return rows_ND.index_select(0, index)

    def _run_eagerly(self, hidden_TD: Tensor | None, rows: Sequence[DraftRow]) -> list[tuple[int, ...]]:
        if not rows:
            return []
        rows_ND = self._model.norm(self._before(hidden_TD, rows))
        batch = self._batch(rows, [r.token_ids for r in rows], [r.start for r in rows])
        rows_ND = self._pass(rows_ND, batch)
        drafts: list[list[int]] = [[] for _ in rows]
        going = [i for i, r in enumerate(rows) if r.num_drafts]
        rows_RD = rows_ND.index_select(0, self._index([batch.last_rows[i] for i in going])) if going else rows_ND[:0]
        while going:
            drawn = self._draw(rows_RD, rows, going, drafts)
            for i, token_id in zip(going, drawn, strict=True):
                if token_id >= 0:
                    drafts[i].append(token_id)
            on = [r for r, i in enumerate(going) if drawn[r] >= 0 and len(drafts[i]) < rows[i].num_drafts]
            if not on:
                break
            rows_RD, going = rows_RD.index_select(0, self._index(on)), [going[r] for r in on]
            last = [drafts[i][-1:] for i in going]
            starts = [rows[i].start + len(rows[i].token_ids) + len(drafts[i]) - 1 for i in going]
            rows_RD = self._pass(rows_RD, self._batch([rows[i] for i in going], last, starts))
        return [tuple(d) for d in drafts]

    def _draw(
        self, rows_RD: Tensor, rows: Sequence[DraftRow], going: Sequence[int], drafts: Sequence[Sequence[int]]
    ) -> list[int]:
        """A token for each row, -1 where none can be drawn."""
        samples = [rows[i].sample(drafts[i]) for i in going]
        result = self._sampler.sample(self._model.draft_logits(rows_RD), samples)
        token_ids: list[int] = result.token_ids_R.tolist()
        return token_ids

    def _pass(self, rows_ND: Tensor, batch: Batch) -> Tensor:
        tensors = self._inputs.put(arrays_of(batch))
        ctx = context_of(batch, tensors, self._pool, self._backend, self._on_progress, FIRST)
        self._backend.plan(ctx)
        return self._model.draft(rows_ND, tensors["input_ids"], tensors["positions"], ctx)

    def _batch(self, rows: Sequence[DraftRow], token_ids: Sequence[Sequence[int]], starts: Sequence[int]) -> Batch:
        vocab_size = self._sampler.vocab_size
        return build_batch(
            [
                BatchRow([t if t < vocab_size else 0 for t in ids], start, dict.fromkeys(self._groups, row.table))
                for row, ids, start in zip(rows, token_ids, starts, strict=True)
            ],
            self._groups,
        )

    def _before(self, hidden_TD: Tensor | None, rows: Sequence[DraftRow]) -> Tensor:
        """The hidden rows before all tokens of `rows`: [N, D]."""
        if hidden_TD is not None and all(r.before is None for r in rows):
            index = [i for r in rows for i in range(r.row, r.row + len(r.token_ids))]
            return hidden_TD.index_select(0, self._index(index))
        parts: list[Tensor] = []
        for r in rows:
            others = len(r.token_ids)
            earlier = self._earlier(r.before)
            num_earlier = sum(len(part) for part in earlier)
            parts += earlier
            if others > num_earlier:
                assert hidden_TD is not None
                parts.append(hidden_TD[r.row + num_earlier : r.row + others])
        return torch.cat(parts)

    def _earlier(self, before: KeptRow | int | Held | None) -> list[Tensor]:
        if isinstance(before, KeptRow):
            return [self._kept_BUD[before.block_id, before.unit, : self._hidden_size].unsqueeze(0)]
        if isinstance(before, Held):
            return [part for part in before.parts if isinstance(part, Tensor)]
        return [] if before is None else [self._pool.read_tail(self._index([before]))]

    def _keep(self, hidden_TD: Tensor | None, kept: Sequence[tuple[int, KeptRow]]) -> None:
        if not kept:
            return
        assert hidden_TD is not None
        numbers = np.array([(row, place.block_id, place.unit) for row, place in kept], np.int64)
        index = self._inputs.put({"index": numbers.T})["index"]
        rows_RD = hidden_TD.index_select(0, index[0]).to(self._kept_BUD.dtype)
        self._kept_BUD[index[1], index[2], : self._hidden_size] = rows_RD

    def _index(self, numbers: Sequence[int]) -> Tensor:
        return self._inputs.put({"index": np.array(numbers, np.int64)})["index"]


def _up_to_failed(token_ids: Sequence[int]) -> tuple[int, ...]:
    return tuple(itertools.takewhile(lambda token_id: token_id >= 0, token_ids))
