"""Latent attention on GPUs by kernels in Triton alone: any widths and numbers of heads, and the base of what is faster.

`fixed`: what a token gets does not depend on the others of its step: positions are not split over programs, and scores
have one kernel.

Shape letters as in `common.attention.context`; also K selected positions, W width of a row, P positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from common.attention.context import AttentionContext, GroupTables, Selection
from common.attention.latent import Part
from common.attention.reference import RecordableBackend
from common.kernels import gpu
from common.kvcache.packing import RowPacking

_SCORES = 1 << 26  # fp32 scores of an indexer at once


@dataclass(frozen=True)
class SlotSelection(Selection):
    """`slots_TK`: int32, block * block_size + offset of each position, -1 behind a row's count."""

    slots_TK: Tensor

    def take(self, tokens: slice) -> SlotSelection:
        """That of some of the tokens."""
        return SlotSelection(self.positions_TK[tokens], self.counts_T[tokens], self.slots_TK[tokens])


class LatentBackend(RecordableBackend):
    """Keys and values of heads are the reference's, and so is what no latent model asks for: units, and values that do
    not begin a row.
    """

    name = "latent"

    def __init__(self, *, fixed: bool = False) -> None:
        self._fixed = fixed

    def write_rows(
        self, rows_TW: Tensor, cache: Tensor, tables: GroupTables, packing: RowPacking | None = None
    ) -> None:
        """Store a row per new token, cast to the cache's type. `cache`: [num_blocks, 1, 1, block_size, W]."""
        latent = rows_TW.shape[1] if packing is None else packing.latent_dim
        gpu.rows.store_rows(rows_TW, cache, tables.slots_T, latent, packed=packing is not None)

    def gather_rows(self, cache: Tensor, part: Part, dtype: torch.dtype, packing: RowPacking | None = None) -> Tensor:
        """Rows of all positions of a part, as `Part.ragged` lines them up: a new [P, W]."""
        latent, rope = (packing.latent_dim, packing.rope_dim) if packing else (cache.shape[4], 0)
        slots_P = part.ragged.slots_P
        return gpu.rows.gather_rows(cache, slots_P, latent, rope, dtype, packed=packing is not None)

    def attend_rows(
        self,
        q_THD: Tensor,
        rows: Tensor,
        values: slice,
        tables: GroupTables,
        ctx: AttentionContext,
        scale: float,
        selected: Selection | None = None,
        log_sums_TH: Tensor | None = None,
        packing: RowPacking | None = None,
    ) -> Tensor:
        """Causal attention over [num_blocks, U, block_size, W] rows of key and value: a new [T, H, V]."""
        if rows.shape[1] != 1 or values.start != 0 or values.stop > q_THD.shape[2]:
            more = (selected, log_sums_TH, packing)
            return super().attend_rows(q_THD, rows, values, tables, ctx, scale, *more)
        out: Tensor = gpu.sparse_latent.attend(
            q_THD,
            rows[:, 0],
            places_of(tables, ctx, q_THD.shape[0]),
            values.stop,
            scale,
            most=_most(ctx, tables) if selected is None else selected.positions_TK.shape[1],
            selected=None if selected is None else (selected.positions_TK, selected.counts_T),
            log_sums_TH=log_sums_TH,
            packed=packing is not None,
            whole=self._fixed,
        )
        return out

    def select(
        self,
        q_THD: Tensor,
        weights_TH: Tensor,
        keys: Tensor,
        tables: GroupTables,
        ctx: AttentionContext,
        scale: float,
        top_k: int,
        packing: RowPacking | None = None,
    ) -> Selection:
        """The best `top_k` positions of each token, see the protocol. `keys`: [num_blocks, block_size, D]."""
        most, tokens = max(_most(ctx, tables), 1), q_THD.shape[0]
        at_once = tokens if ctx.graph else max(1, _SCORES // most)
        found: list[Any] = []
        part = Part(slice(0, tokens), tables, ctx)
        for band in part.bands(at_once):
            q_NHD, weights_NH = band.take(q_THD), band.take(weights_TH)
            places = places_of(band.tables, band.ctx, q_NHD.shape[0])
            scores_TL = gpu.indexer.score(
                q_NHD,
                weights_NH,
                keys,
                places,
                scale,
                most=max(_most(band.ctx, band.tables), 1),
                packed=packing is not None,
                alone=self._fixed,
            )
            found.append(gpu.indexer.top_k(scores_TL, places, top_k, with_slots=True))
        if len(found) == 1:
            return SlotSelection(found[0].positions_TK, found[0].counts_T, found[0].slots_TK)
        return SlotSelection(
            torch.cat([f.positions_TK for f in found]),
            torch.cat([f.counts_T for f in found]),
            torch.cat([f.slots_TK for f in found]),
        )


def places_of(tables: GroupTables, ctx: AttentionContext, tokens: int) -> Any:
    """Where the tokens of a step look; a `common.kernels.gpu.sparse_latent.Places`."""
    key = (places_of, id(tables))
    found = ctx.scratch.get(key)
    if found is None:
        sequences, recorded = ctx.seq_lens_S.shape[0], bool(ctx.graph)
        per_sequence = gpu.sparse_latent.few(tokens, sequences, ctx.max_query_len, recorded=recorded)
        found = ctx.scratch[key] = gpu.sparse_latent.Places(
            tables.block_tables_SB,
            ctx.query_starts_S1,
            ctx.seq_lens_S,
            tables.block_size,
            per_sequence,
            None if per_sequence else sequence_of_tokens(ctx, tokens),
            tables.first,
            tables.window,
        )
    return found


def _most(ctx: AttentionContext, tables: GroupTables) -> int:
    """No sequence of the step has more positions, whatever a recorded one is replayed with."""
    return tables.block_tables_SB.shape[1] * tables.block_size if ctx.graph else ctx.max_seq_len


def sequence_of_tokens(ctx: AttentionContext, num_tokens: int) -> Tensor:
    """int32 [T]: the sequence that each new token belongs to."""
    counts_S = ctx.query_starts_S1.diff()
    ids_S = torch.arange(counts_S.shape[0], dtype=torch.int32, device=counts_S.device)
    return torch.repeat_interleave(ids_S, counts_S, output_size=num_tokens)


def meant(selected: Selection) -> Tensor:
    """Which entries of a selection are meant: [T, K]."""
    index_K = torch.arange(selected.positions_TK.shape[1], device=selected.counts_T.device)
    return index_K < selected.counts_T[:, None]
