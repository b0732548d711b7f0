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

    def bands(self, max_tokens: int) -> tuple[Part, ...]:
        """The part in steps of so many tokens, each of them a slice of the part's. Sequences may be cut."""
        key = (Part.bands, max_tokens)
        found: tuple[Part, ...] | None = self.ctx.scratch.get(key)
        if found is None:
            starts = self.ctx.query_starts_S1.tolist()
            found = tuple(
                self._band(starts, first, min(first + max_tokens, starts[-1]))
                for first in range(0, starts[-1], max_tokens)
            )
            self.ctx.scratch[key] = found
        return found

    def _band(self, starts: list[int], first: int, last: int) -> Part:
        if last - first == starts[-1]:
            return replace(self, tokens=slice(0, last))
        spans = [(s, max(first, a), min(last, b)) for s, (a, b) in enumerate(itertools.pairwise(starts))]
        return _cut(self.tables, self.ctx, [span for span in spans if span[1] < span[2]], slice(first, last))

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
        return Gathered(block_ids_N, GroupTables(in_order, self.tables.slots_T[:0], size, first=self.tables.first))


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
    pieces = [(s, starts[s], starts[s + 1]) for s in rows]
    tokens: slice | Tensor = slice(pieces[0][1], pieces[-1][2])
    if any(one[2] != other[1] for one, other in itertools.pairwise(pieces)):
        device = tables.slots_T.device
        tokens = torch.cat([torch.arange(first, last, device=device) for _, first, last in pieces])
    return _cut(tables, ctx, pieces, tokens)


def _cut(
    tables: GroupTables, ctx: AttentionContext, pieces: list[tuple[int, int, int]], tokens: slice | Tensor
) -> Part:
    """`pieces`: (sequence, its first token, the one behind its last), in tokens of `ctx`, which `tokens` are all of."""
    device = tables.slots_T.device
    starts, lens = ctx.query_starts_S1.tolist(), ctx.seq_lens_S.tolist()
    counts = [last - first for _, first, last in pieces]
    new_lens = [lens[s] - (starts[s + 1] - last) for s, _, last in pieces]
    rows_S = torch.tensor([s for s, _, _ in pieces], device=device)
    return Part(
        tokens,
        replace(tables, block_tables_SB=tables.block_tables_SB[rows_S], slots_T=tables.slots_T[tokens]),
        replace(
            ctx,
            query_starts_S1=torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32, device=device),
            seq_lens_S=torch.tensor(new_lens, dtype=torch.int32, device=device),
            max_query_len=max(counts),
            max_seq_len=max(new_lens),
            scratch={},
        ),
    )
