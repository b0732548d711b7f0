"""Passes of the multi-token-prediction layer recorded and replayed, each with the draw of a draft at its end.

    rows before -> layer over Q tokens of each sequence -> draft 1 -> layer over it -> draft 2 -> ...

A pass reads the rows before its tokens from memory that stays, and leaves the row behind each sequence's last token
there, so the next pass goes on from it; the drafts drawn stay on the device, too, and nothing waits for the host in
between. What a draft is drawn with depends on its place alone (`common.engine.samples`), so it is known before.

Sequences have different numbers of new tokens in a first pass: those that were right. All get as many as the one with
most; what is put in front computes earlier positions again, from rows that are not theirs, and writes into the pool's
padding block, so that nobody sees it.

Shape letters: N tokens of a pass, S sequences, D hidden size, K drafts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.attention.context import AttentionBackend, AttentionContext
from common.engine.adjust import edits_of
from common.engine.batch import Batch, BatchRow, build_batch
from common.engine.drafting import FIRST, DraftRow
from common.engine.graphs import GraphShape, StepGraphs, known_or_drawn
from common.engine.inputs import Arrays, Inputs, Tensors
from common.engine.sampler import packed_draws
from common.kernels.draws import COLUMNS, draw_packed
from common.kvcache.pool import KVPool
from common.models.cache_spec import DRAFT_ROWS_REGION

MAX_SEQUENCES = 256  # of a recorded pass, whose logits take memory; more are passes one after the other


class DraftLayers(Protocol):
    """What is recorded of a model; see `common.engine.draft_runner.DraftingModel`."""

    def draft(self, rows_TD: Tensor, input_ids_T: Tensor, positions_T: Tensor, ctx: AttentionContext) -> Tensor: ...

    def draft_logits(self, rows_RD: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class DraftLimits:
    """`max_new`: tokens of a sequence in a pass. `hidden_size`, `dtype`: of rows before and behind tokens."""

    max_new: int
    hidden_size: int
    dtype: torch.dtype
    vocab_size: int


class DraftGraphs(StepGraphs):
    """Recorded passes. `rows_ND`: the rows before a pass's tokens, and behind it those of its sequences."""

    def __init__(
        self,
        model: DraftLayers,
        pool: KVPool,
        backend: AttentionBackend,
        inputs: Inputs,
        shape: GraphShape,
        sizes: Sequence[int],
        limits: DraftLimits,
        memory_pool: Any = None,
    ) -> None:
        assert shape.first == FIRST
        assert not shape.states
        device = pool.region(DRAFT_ROWS_REGION).device
        sizes = [size for size in sizes if size <= MAX_SEQUENCES]
        self.max_sequences = max(sizes, default=0)
        drawn_S = torch.zeros(self.max_sequences, dtype=torch.int64, device=device)
        query_lens = range(1, limits.max_new + 1)
        super().__init__(pool, backend, inputs, drawn_S, shape, sizes, query_lens, memory_pool)
        self._model = model
        self._limits = limits
        rows = self.max_sequences * limits.max_new
        self.rows_ND = torch.zeros(rows, limits.hidden_size, dtype=limits.dtype, device=device)

    def takes(self, row: DraftRow) -> bool:
        """Can a pass be for this row? Drafts of requests that change their logits are not drawn here."""
        count, most = len(row.token_ids), self._limits.max_new
        if count > most or row.start + count < most + FIRST or not self.max_sequences:
            return False
        return not row.num_drafts or not edits_of([row.sample(())], self._limits.vocab_size)

    def first(self, rows: Sequence[DraftRow], query_len: int) -> Tensor:
        """The pass over the tokens of `rows`, `query_len` of each; what is before them lies in `rows_ND`."""
        groups = self._shape.groups
        batch = build_batch([_filled(row, query_len, groups, self._limits.vocab_size) for row in rows], groups)
        for name, (block_size, _) in groups.items():
            slots_SQ = batch.groups[name].slots_T.reshape(len(rows), query_len)
            unseen = self._pool.padding_block(name) * block_size
            for s, row in enumerate(rows):
                slots_SQ[s, : query_len - len(row.token_ids)] = unseen
        return self._pass(batch, rows, 0)

    def next(self, rows: Sequence[DraftRow], num_drafts: int) -> Tensor:
        """The pass over the last of the `num_drafts` that each of `rows` has, of which the last pass drew it."""
        groups = self._shape.groups
        new = [
            BatchRow([0], r.start + len(r.token_ids) + num_drafts - 1, dict.fromkeys(groups, r.table), pending=s)
            for s, r in enumerate(rows)
        ]
        return self._pass(build_batch(new, groups), rows, num_drafts)

    def _pass(self, batch: Batch, rows: Sequence[DraftRow], num_drafts: int) -> Tensor:
        """The tokens drawn, [S], -1 where there is none; of rows that have all their drafts they mean nothing."""
        size = self.size_for(batch)
        draws_S6 = np.zeros((len(rows), COLUMNS), np.int64)
        drawing = [s for s, row in enumerate(rows) if row.num_drafts > num_drafts]
        if drawing:
            draws_S6[drawing] = packed_draws([rows[s].sample((0,) * num_drafts) for s in drawing])
        self._recorded[size, batch.max_query_len].arrays["draws"][: len(rows)] = draws_S6
        self.replay(batch, size)
        return self._drawn_R[: len(rows)]

    def _compute(self, tensors: Tensors, ctx: AttentionContext) -> Tensor:
        input_ids_N = known_or_drawn(tensors["input_ids"], tensors["pending"], self._drawn_R)
        num_tokens, size = len(input_ids_N), ctx.graph
        rows_ND = self._model.draft(self.rows_ND[:num_tokens], input_ids_N, tensors["positions"], ctx)
        last_SD = self.rows_ND[:size]
        last_SD.copy_(rows_ND.view(size, -1, rows_ND.shape[1])[:, -1])
        token_ids_S, _ = draw_packed(self._model.draft_logits(last_SD), tensors["draws"])
        self._drawn_R[:size].copy_(token_ids_S)
        return self._drawn_R

    def _padding(self, size: int, query_len: int) -> Arrays:
        return super()._padding(size, query_len) | {"draws": np.zeros((size, COLUMNS), np.int64)}


def logits_nbytes(max_sequences: int, vocab_size: int) -> int:
    """Of the largest recorded pass, which other recorded steps have none of."""
    return 4 * min(max_sequences, MAX_SEQUENCES) * vocab_size


def _filled(row: DraftRow, query_len: int, groups: Mapping[str, tuple[int, int]], vocab_size: int) -> BatchRow:
    """The row's tokens behind as many others as are missing. A token that is none of the vocabulary counts as 0."""
    missing = query_len - len(row.token_ids)
    token_ids = [0] * missing + [t if t < vocab_size else 0 for t in row.token_ids]
    return BatchRow(token_ids, row.start - missing, dict.fromkeys(groups, row.table))


def source_rows(firsts: Sequence[int], counts: Sequence[int], query_len: int) -> NDArray[np.int64]:
    """Indices of the rows before the tokens of a first pass, where a sequence's `counts` lie from `firsts` on: [N].

    What is put in front takes the first of them.
    """
    missing_S1 = query_len - np.array(counts, np.int64)[:, None]
    rows_SQ: NDArray[np.int64] = np.maximum(np.arange(query_len) - missing_S1, 0)
    rows_SQ += np.array(firsts, np.int64)[:, None]
    return rows_SQ.reshape(-1)
