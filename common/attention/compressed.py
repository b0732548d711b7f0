"""Attention over a window of rows and over compressed entries at once, with sinks (DeepSeek-V4, section 2.3).

The two are attended to apart, by the backend, and joined with the sink by the logarithms of their sums.

Entries are addressed as positions of a group with smaller blocks: entry e of a sequence is position e where a block of
`block_size` tokens is one of `block_size / ratio` entries. A token need not see one entry more than the one before it,
so the indexer's choice is made as if each token were a sequence of its own.

Shape letters as in `common.attention.context`; also K entries that a token sees.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from common.attention.context import AttentionContext, GroupTables, HostLengths, Selection
from common.kernels.compress_ops import join_parts


@dataclass(frozen=True)
class Entries:
    """The entries of one ratio in a step. `counts_T`: int32, how many are complete at each token, its own included;
    `most`: no token sees more, whatever a recorded step is replayed with. `ratio`: tokens of an entry.
    """

    ctx: AttentionContext
    tables: GroupTables
    counts_T: Tensor
    most: int
    ratio: int

    @cached_property
    def all(self) -> Selection:
        """Every entry that a token sees; of one that sees none the first is named, for 0 times."""
        positions_K = torch.arange(max(self.most, 1), dtype=torch.int32, device=self.counts_T.device)
        return Selection(positions_K.repeat(self.counts_T.shape[0], 1), self.counts_T)

    def select(self, q_THD: Tensor, weights_TH: Tensor, keys: Tensor, scale: float, top_k: int) -> Selection:
        """Of each token the best `top_k` of its entries, as `AttentionBackend.select` chooses among positions."""
        tables, ctx = self._alone
        chosen = ctx.backend.select(q_THD, weights_TH, keys, tables, ctx, scale, top_k)
        return Selection(chosen.positions_TK.clamp_(min=0), chosen.counts_T)

    @cached_property
    def _alone(self) -> tuple[GroupTables, AttentionContext]:
        """Each token as a sequence of its own, of as many positions as it sees entries."""
        num_tokens, ctx, tables = self.counts_T.shape[0], self.ctx, self.tables
        num_blocks = max(-(-self.most // tables.block_size), 1)
        table_TB = tables.block_tables_SB[sequence_of_tokens(ctx, num_tokens), :num_blocks]
        starts = torch.arange(num_tokens + 1, dtype=torch.int32, device=self.counts_T.device)
        host = None
        if ctx.host is not None:
            host = HostLengths(np.arange(num_tokens + 1, dtype=np.int32), ctx.host.seen() // self.ratio)
        alone = replace(
            ctx,
            query_starts_S1=starts,
            seq_lens_S=self.counts_T,
            max_query_len=1,
            max_seq_len=self.most,
            groups={},
            scratch={},
            host=host,
        )
        return replace(tables, block_tables_SB=table_TB), alone


def entries_of(ctx: AttentionContext, positions_T: Tensor, tables: GroupTables, ratio: int) -> Entries:
    """`tables`: those of the tokens' group, whose blocks are whole multiples of `ratio` tokens."""
    counts_T = ((positions_T + 1) // ratio).int()
    most = ctx.max_seq_len // ratio
    entry_tables = GroupTables(tables.block_tables_SB, tables.slots_T // ratio, tables.block_size // ratio)
    return Entries(ctx, entry_tables, counts_T, most, ratio)


def attend(
    q_THD: Tensor,
    window: Tensor,
    window_tables: GroupTables,
    sinks_H: Tensor,
    ctx: AttentionContext,
    scale: float,
    entries: tuple[Tensor, GroupTables, Selection] | None = None,
) -> Tensor:
    """[T, H, D] of q's type. Keys are values, and all heads share them.

    `window`: [num_blocks, block_size, D]; `entries`: [num_blocks, entries per block, D], their tables, and which ones
    each token sees, maybe none, as `Entries` says it; `sinks_H`: fp32.
    """
    num_tokens, num_heads, width = q_THD.shape
    sums_2TH = torch.empty(2, num_tokens, num_heads, device=q_THD.device)
    values = slice(0, width)
    out_THD = ctx.backend.attend_rows(
        q_THD, window[:, None], values, window_tables, ctx, scale, log_sums_TH=sums_2TH[0]
    )
    if entries is None:
        join_parts(out_THD, sums_2TH[0], sinks_H)
        return out_THD
    rows, tables, chosen = entries
    some = Selection(chosen.positions_TK, chosen.counts_T.clamp(min=1))
    more_THD = ctx.backend.attend_rows(q_THD, rows[:, None], values, tables, ctx, scale, some, sums_2TH[1])
    join_parts(out_THD, sums_2TH[0], sinks_H, more_THD, sums_2TH[1], chosen.counts_T)
    return out_THD


def sequence_of_tokens(ctx: AttentionContext, num_tokens: int) -> Tensor:
    """int64 [T]: the sequence that each new token belongs to."""
    counts_S = ctx.query_starts_S1.diff()
    ids_S = torch.arange(counts_S.shape[0], device=counts_S.device)
    return torch.repeat_interleave(ids_S, counts_S, output_size=num_tokens)
