"""Which way each sequence of a step takes through latent attention, and where its rows lie.

    absorbed    few new tokens: queries are brought into latent space and attend to the cached rows as they are
    expanded    many new tokens: the sequence's rows are gathered and expanded into keys and values of every head
    sparse      absorbed, over the positions that an indexer selected: sequences longer than `top_k`

A sequence's way depends on its own lengths alone, so that no result depends on what else is in the batch. Absorbed
costs more per pair of query and key and nothing per key; expanded costs an expansion per key, which is worth it when
many queries share it.

On a GPU a sequence of few new tokens and a selection goes the sparse way whatever its length: a recorded step knows no
lengths, and one that is not recorded computes the same. Lengths are read from the host's copies.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.attention.context import AttentionContext, GroupTables, HostLengths


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
        if self.ctx.graph:
            return (self,)
        key = (Part.bands, max_tokens)
        found: tuple[Part, ...] | None = self.ctx.scratch.get(key)
        if found is None:
            starts, _ = _lengths(self.ctx)
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

    def lots(self, max_positions: int) -> tuple[Part, ...]:
        """The part in steps of whole sequences, each of up to so many positions or of one sequence."""
        key = (Part.lots, max_positions)
        found: tuple[Part, ...] | None = self.ctx.scratch.get(key)
        if found is None:
            starts, lens = _lengths(self.ctx)
            firsts, total = [0], 0
            for s, n in enumerate(lens):
                if s > firsts[-1] and total + n > max_positions:
                    firsts.append(s)
                    total = 0
                total += n
            found = tuple(self._lot(starts, first, last) for first, last in itertools.pairwise([*firsts, len(lens)]))
            self.ctx.scratch[key] = found
        return found

    def _lot(self, starts: list[int], first: int, last: int) -> Part:
        tokens = slice(starts[first], starts[last])
        if last - first == len(starts) - 1:
            return replace(self, tokens=tokens)
        return _cut(self.tables, self.ctx, [(s, starts[s], starts[s + 1]) for s in range(first, last)], tokens)

    @cached_property
    def gathered(self) -> Gathered:
        """Every block of the part's sequences, one after the other."""
        size = self.tables.block_size
        counts = [-(-n // size) for n in _lengths(self.ctx)[1]]
        table_SB = self.tables.block_tables_SB
        block_ids_N = torch.cat([table_SB[s, :n] for s, n in enumerate(counts)]).long()
        in_order_SB = np.zeros((table_SB.shape[0], max(counts)), np.int32)
        first = 0
        for s, n in enumerate(counts):
            in_order_SB[s, :n] = np.arange(first, first + n, dtype=np.int32)
            first += n
        in_order = on_device(in_order_SB, table_SB.device)
        return Gathered(block_ids_N, GroupTables(in_order, self.tables.slots_T[:0], size, first=self.tables.first))

    @cached_property
    def ragged(self) -> Ragged:
        """Every position of the part's sequences that holds something, one after the other."""
        starts, lens = _lengths(self.ctx)
        first, size = self.tables.first, self.tables.block_size
        counts_S = np.array(lens, np.int64) - first
        key_starts_S1 = np.zeros(len(lens) + 1, np.int32)
        np.cumsum(counts_S, out=key_starts_S1[1:])
        is_new = bool((np.diff(starts) == counts_S).all())
        sequence_P = np.repeat(np.arange(len(lens)), counts_S)
        position_P = np.arange(int(key_starts_S1[-1])) - key_starts_S1[sequence_P] + first
        tables_SB = self.tables.host_tables_SB
        if tables_SB is None:
            tables_SB = self.tables.block_tables_SB.cpu().numpy()
        slots_P = tables_SB[sequence_P, position_P // size].astype(np.int64) * size + position_P % size
        device = self.tables.slots_T.device
        return Ragged(
            on_device(slots_P, device),
            np.array(starts, np.int32),
            key_starts_S1,
            on_device(key_starts_S1, device),
            is_new,
        )


@dataclass(frozen=True)
class Gathered:
    """`block_ids_N`: int64, in order. `tables`: the same sequences over blocks that are numbered in that order."""

    block_ids_N: Tensor
    tables: GroupTables


@dataclass(frozen=True)
class Ragged:
    """Positions of some sequences one after the other: P of them, from `key_starts_S1[s]` on those of sequence s.

    `slots_P`: int64, block * block_size + offset of each. `query_starts_S1`, `key_starts_S1`: on the host; `starts_S1`:
    those of keys on the device. `is_new`: all are new tokens of the step, in its order.
    """

    slots_P: Tensor
    query_starts_S1: NDArray[np.int32]
    key_starts_S1: NDArray[np.int32]
    starts_S1: Tensor
    is_new: bool


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
        found = ctx.scratch[key] = _split(tables, ctx, max_absorbed, top_k)
    return found


def _split(tables: GroupTables, ctx: AttentionContext, max_absorbed: int, top_k: int) -> Parts:
    if ctx.graph:
        whole = Part(slice(0, tables.slots_T.shape[0]), tables, ctx)
        return Parts(None, None, whole) if top_k else Parts(whole, None, None)
    starts, lens = _lengths(ctx)
    counts = [b - a for a, b in itertools.pairwise(starts)]
    shortest = 0 if tables.slots_T.is_cuda else top_k  # of few new tokens that go the sparse way
    sparse = [
        s for s, n in enumerate(lens) if top_k and counts[s] and n > (top_k if counts[s] > max_absorbed else shortest)
    ]
    dense = sorted({s for s, n in enumerate(counts) if n}.difference(sparse))
    absorbed = [s for s in dense if counts[s] <= max_absorbed]
    expanded = [s for s in dense if counts[s] > max_absorbed]
    return Parts(*(_part(tables, ctx, starts, rows) for rows in (absorbed, expanded, sparse)))


def on_device(array: NDArray[np.generic], device: torch.device) -> Tensor:
    """A tensor of what is in the array, which must not change; to a GPU the host does not wait for the copy."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def _lengths(ctx: AttentionContext) -> tuple[list[int], list[int]]:
    """(query starts, sequence lengths) of a step that is not recorded."""
    assert not ctx.graph
    if ctx.host is None:
        return ctx.query_starts_S1.tolist(), ctx.seq_lens_S.tolist()
    return ctx.host.query_starts_S1.tolist(), ctx.host.seq_lens_S.tolist()


def _part(tables: GroupTables, ctx: AttentionContext, starts: list[int], rows: list[int]) -> Part | None:
    if not rows:
        return None
    if len(rows) == len(starts) - 1:
        return Part(slice(0, starts[-1]), tables, ctx)
    pieces = [(s, starts[s], starts[s + 1]) for s in rows]
    tokens: slice | Tensor = slice(pieces[0][1], pieces[-1][2])
    if any(one[2] != other[1] for one, other in itertools.pairwise(pieces)):
        tokens_N = np.concatenate([np.arange(first, last) for _, first, last in pieces])
        tokens = on_device(tokens_N, tables.slots_T.device)
    return _cut(tables, ctx, pieces, tokens)


def _cut(
    tables: GroupTables, ctx: AttentionContext, pieces: list[tuple[int, int, int]], tokens: slice | Tensor
) -> Part:
    """`pieces`: (sequence, its first token, the one behind its last), in tokens of `ctx`, which `tokens` are all of."""
    device = tables.slots_T.device
    starts, lens = _lengths(ctx)
    counts = [last - first for _, first, last in pieces]
    new_starts_S1 = np.array([0, *itertools.accumulate(counts)], np.int32)
    new_lens_S = np.array([lens[s] - (starts[s + 1] - last) for s, _, last in pieces], np.int32)
    rows = np.array([s for s, _, _ in pieces], np.int64)
    host_tables_SB = None if tables.host_tables_SB is None else tables.host_tables_SB[rows]
    return Part(
        tokens,
        replace(
            tables,
            block_tables_SB=tables.block_tables_SB[on_device(rows, device)],
            slots_T=tables.slots_T[tokens],
            host_tables_SB=host_tables_SB,
        ),
        replace(
            ctx,
            query_starts_S1=on_device(new_starts_S1, device),
            seq_lens_S=on_device(new_lens_S, device),
            max_query_len=max(counts),
            max_seq_len=int(new_lens_S.max()),
            scratch={},
            host=None if ctx.host is None else HostLengths(new_starts_S1, new_lens_S),
        ),
    )
