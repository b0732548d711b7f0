"""Attention in plain torch, on any device: what the other backends are tested against.

Rows with one new token are gathered into padded batches, by the power of two of their number of blocks, so that
one long sequence does not pad all the others; longer chunks are computed one sequence at a time. Positions that
a query must not see are zeroed after the gather and masked as well: stale bytes of a block, whatever they are,
reach no result.

Shape letters as in `common.attention.context`; also R decode rows, W blocks of a row, L positions (W * block
size), G query heads per key head, N tokens of a chunk.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from common.attention.capability import Capability
from common.attention.context import AttentionContext, GroupTables

_FLOATS = ("float32", "bfloat16", "float16")


def capability() -> Capability:
    return Capability("reference", devices=("cpu", "cuda"), dtypes=_FLOATS, kv_dtypes=_FLOATS)


@dataclass(frozen=True)
class _Decode:
    """Rows with one new token. `tokens_R`: their tokens; None if they are all tokens of the step, in order."""

    tokens_R: Tensor | None
    num_rows: int
    block_ids_RW: Tensor
    seen_RL: Tensor
    unseen: Tensor  # flat indices in [R * L]


@dataclass(frozen=True)
class _Chunk:
    """One sequence's new tokens. `mask_NL`: None is the causal square."""

    first_token: int
    num_tokens: int
    block_ids_W: Tensor
    num_positions: int
    mask_NL: Tensor | None


_Plan = tuple[list[_Decode], list[_Chunk]]


class ReferenceBackend:
    name = "reference"

    def write(self, k_TUD: Tensor, v_TUD: Tensor, cache: Tensor, tables: GroupTables) -> None:
        """Store new keys and values, cast to the cache's type. `cache`: [num_blocks, 2, U, block_size, D]."""
        place = (tables.new_block_ids, tables.new_offsets)
        for part, rows_TUD in enumerate((k_TUD, v_TUD)):
            cache[:, part].transpose(1, 2).index_put_(place, rows_TUD.to(cache.dtype))

    def attend(self, q_THD: Tensor, cache: Tensor, tables: GroupTables, ctx: AttentionContext, scale: float) -> Tensor:
        """Causal attention of the new tokens over the cache: a new [T, H, D]."""
        key = (ReferenceBackend, id(tables))
        plan: _Plan | None = ctx.scratch.get(key)
        if plan is None:
            plan = ctx.scratch[key] = _plan(tables, ctx)
        decodes, chunks = plan
        if len(decodes) == 1 and decodes[0].tokens_R is None:
            return _attend_decode(q_THD, cache, decodes[0], scale)
        out_THD = torch.empty_like(q_THD, memory_format=torch.contiguous_format)
        for decode in decodes:
            assert decode.tokens_R is not None
            out_THD[decode.tokens_R] = _attend_decode(q_THD[decode.tokens_R], cache, decode, scale)
        for chunk in chunks:
            tokens = slice(chunk.first_token, chunk.first_token + chunk.num_tokens)
            out_THD[tokens] = _attend_chunk(q_THD[tokens], cache, chunk, scale)
        return out_THD


def _attend_decode(q_RHD: Tensor, cache: Tensor, plan: _Decode, scale: float) -> Tensor:
    num_heads, width, kv_heads = q_RHD.shape[1], q_RHD.shape[2], cache.shape[2]
    rows, positions = plan.seen_RL.shape
    kv = _gather(cache, plan.block_ids_RW.flatten()).index_fill_(2, plan.unseen, 0.0).to(q_RHD.dtype)
    k_RULD, v_RULD = kv.view(2, kv_heads, rows, positions, width).transpose(1, 2)
    q_RUGD = q_RHD.reshape(rows, kv_heads, num_heads // kv_heads, width)
    mask = plan.seen_RL[:, None, None]
    out = functional.scaled_dot_product_attention(q_RUGD, k_RULD, v_RULD, attn_mask=mask, scale=scale)
    return out.reshape(rows, num_heads, width)


def _attend_chunk(q_NHD: Tensor, cache: Tensor, plan: _Chunk, scale: float) -> Tensor:
    num_tokens, num_heads, width = q_NHD.shape
    kv_heads = cache.shape[2]
    group = num_heads // kv_heads
    kv = _gather(cache, plan.block_ids_W)[:, :, : plan.num_positions].to(q_NHD.dtype)
    k_UGLD, v_UGLD = kv.unsqueeze(2).expand(-1, -1, group, -1, -1)
    q_UGND = q_NHD.transpose(0, 1).reshape(kv_heads, group, num_tokens, width)
    causal = plan.mask_NL is None
    out = functional.scaled_dot_product_attention(
        q_UGND, k_UGLD, v_UGLD, attn_mask=plan.mask_NL, is_causal=causal, scale=scale
    )
    return out.reshape(num_heads, num_tokens, width).transpose(0, 1)


def _gather(cache: Tensor, block_ids: Tensor) -> Tensor:
    """[2, U, all positions of the blocks in order, D], contiguous."""
    return cache.permute(1, 2, 0, 3, 4).index_select(2, block_ids).flatten(2, 3)


def _plan(tables: GroupTables, ctx: AttentionContext) -> _Plan:
    starts = ctx.query_starts_S1.tolist()
    seq_lens = ctx.seq_lens_S.tolist()
    size, window = tables.block_size, tables.window
    buckets: dict[int, list[int]] = defaultdict(list)
    chunks: list[_Chunk] = []
    for s, seq_len in enumerate(seq_lens):
        count = starts[s + 1] - starts[s]
        if count > 1:
            chunks.append(_plan_chunk(tables, s, starts[s], count, seq_len))
        elif count == 1:
            first = max(0, seq_len - window) // size if window else 0
            buckets[((seq_len - 1) // size - first).bit_length()].append(s)
    whole = not chunks and len(buckets) == 1 and len(seq_lens) == starts[-1]
    return [_plan_decode(tables, rows, starts, seq_lens, whole) for rows in buckets.values()], chunks


def _plan_decode(tables: GroupTables, rows: list[int], starts: list[int], seq_lens: list[int], whole: bool) -> _Decode:
    device = tables.block_tables_SB.device
    size = tables.block_size
    rows_R = torch.tensor(rows, device=device)
    lens_R1 = torch.tensor([seq_lens[s] for s in rows], device=device)[:, None]
    low_R1 = (lens_R1 - tables.window).clamp_(min=0) if tables.window else torch.zeros_like(lens_R1)
    first_R1 = low_R1 // size
    width = int(((lens_R1 - 1) // size - first_R1).max()) + 1
    columns_RW = first_R1 + torch.arange(width, device=device)
    columns_RW.clamp_(max=tables.block_tables_SB.shape[1] - 1)
    block_ids_RW = tables.block_tables_SB[rows_R[:, None], columns_RW].long()
    positions_RL = first_R1 * size + torch.arange(width * size, device=device)
    seen_RL = (positions_RL < lens_R1) & (positions_RL >= low_R1)
    unseen = (~seen_RL).flatten().nonzero().flatten()
    tokens_R = None if whole else torch.tensor([starts[s] for s in rows], device=device)
    return _Decode(tokens_R, len(rows), block_ids_RW, seen_RL, unseen)


def _plan_chunk(tables: GroupTables, row: int, first_token: int, count: int, seq_len: int) -> _Chunk:
    """A chunk sees positions from the window of its first token on."""
    size, window = tables.block_size, tables.window
    start = seq_len - count
    first_block = max(0, start + 1 - window) // size if window else 0
    block_ids_W = tables.block_tables_SB[row, first_block : (seq_len - 1) // size + 1].long()
    low = first_block * size
    num_positions = seq_len - low
    mask_NL = None
    if low < start or (window and window < count):
        device = block_ids_W.device
        query_N1 = torch.arange(start, seq_len, device=device)[:, None]
        position_L = torch.arange(low, seq_len, device=device)
        mask_NL = position_L <= query_N1
        if window:
            mask_NL &= position_L > query_N1 - window
    return _Chunk(first_token, count, block_ids_W, num_positions, mask_NL)
