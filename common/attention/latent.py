"""Which way each sequence of a step takes through latent attention, and where its rows lie.

    absorbed    few new tokens: queries are brought into latent space and attend to the cached rows as they are
    expanded    many new tokens: the sequence's rows are gathered and expanded into keys and values of every head
    sparse      absorbed, over the positions that an indexer selected: sequences longer than `top_k`

A sequence's way depends on its own lengths alone, so that no result depends on what else is in the batch. Absorbed
costs more per pair of query and key and nothing per key; expanded costs an expansion per key, which is worth it when
many queries share it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from common.attention.context import AttentionContext, GroupTables


@dataclass(frozen=True)
class Part:
    """Some sequences of a step, as a step of their own. `tokens`: theirs, a slice of the step or int64 indices."""

    tokens: slice | Tensor
    tables: GroupTables
    ctx: AttentionContext

    def take(self, x_T: Tensor) -> Tensor:
        """Rows of the part's tokens, of a tensor over all tokens of the step."""
        return x_T[self.tokens]

    @cached_property
    def gathered(self) -> Gathered:
        """Every block of the part's sequences, one after the other."""
        size = self.tables.block_size
        counts = [-(-n // size) for n in self.ctx.seq_lens_S.tolist()]
        table_SB = self.tables.block_tables_SB
        block_ids_N = torch.cat([table_SB[s, :n] for s, n in enumerate(counts)]).long()
        in_order = torch.zeros_like(table_SB[:, : max(counts)])
        first = 0
        for s, n in enumerate(counts):
            in_order[s, :n] = torch.arange(first, first + n, dtype=torch.int32)
            first += n
        return Gathered(block_ids_N, GroupTables(in_order, self.tables.slots_T[:0], size))


@dataclass(frozen=True)
class Gathered:
    """`block_ids_N`: int64, in order. `tables`: the same sequences over blocks that are numbered in that order."""

    block_ids_N: Tensor
    tables: GroupTables


@dataclass(frozen=True)
class Parts:
    absorbed: Part | None
    expanded: Part | None
    sparse: Part | None


def split(tables: GroupTables, ctx: AttentionContext, max_absorbed: int, top_k: int = 0) -> Parts:
    """The parts of a step: `max_absorbed` new tokens of a sequence are absorbed; `top_k`: 0 is no selection."""
    key = (split, id(tables), max_absorbed, top_k)
    found: Parts | None = ctx.scratch.get(key)
    if found is None:
        starts, lens = ctx.query_starts_S1.tolist(), ctx.seq_lens_S.tolist()
        counts = [b - a for a, b in itertools.pairwise(starts)]
        sparse = [s for s, n in enumerate(lens) if top_k and n > top_k and counts[s]]
        dense = [s for s, n in enumerate(lens) if not (top_k and n > top_k) and counts[s]]
        absorbed = [s for s in dense if counts[s] <= max_absorbed]
        expanded = [s for s in dense if counts[s] > max_absorbed]
        found = Parts(*(_part(tables, ctx, starts, rows) for rows in (absorbed, expanded, sparse)))
        ctx.scratch[key] = found
    return found


def _part(tables: GroupTables, ctx: AttentionContext, starts: list[int], rows: list[int]) -> Part | None:
    if not rows:
        return None
    if len(rows) == len(starts) - 1:
        return Part(slice(0, starts[-1]), tables, ctx)
    device = tables.slots_T.device
    rows_S = torch.tensor(rows, device=device)
    tokens: slice | Tensor = slice(starts[rows[0]], starts[rows[-1] + 1])
    if rows != list(range(rows[0], rows[-1] + 1)):
        tokens = torch.cat([torch.arange(starts[s], starts[s + 1], device=device) for s in rows])
    new_starts = [0]
    for s in rows:
        new_starts.append(new_starts[-1] + starts[s + 1] - starts[s])
    lens_S = ctx.seq_lens_S[rows_S]
    part_tables = replace(tables, block_tables_SB=tables.block_tables_SB[rows_S], slots_T=tables.slots_T[tokens])
    part_ctx = replace(
        ctx,
        query_starts_S1=torch.tensor(new_starts, dtype=torch.int32, device=device),
        seq_lens_S=lens_S,
        max_query_len=max(starts[s + 1] - starts[s] for s in rows),
        max_seq_len=int(lens_S.max()),
        scratch={},
    )
    return Part(tokens, part_tables, part_ctx)
