"""Attention in plain torch, on any device: what the other backends are tested against.

Rows with one new token are gathered into padded batches, by the power of two of their number of blocks, so that
one long sequence does not pad all the others; longer chunks are computed one sequence at a time. Positions that
a query must not see are zeroed after the gather and masked as well: stale bytes of a block, whatever they are,
reach no result.

Keys and values are addressed apart, as [num_blocks, U, block_size, width] views, so that rows which hold both (latent
attention) take the same way. Selected positions are gathered for each token.

Shape letters as in `common.attention.context`; also R decode rows, W blocks of a row, L positions (W * block
size), G query heads per key head, N tokens of a chunk, V value width, K selected positions.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from common.attention.capability import Capability
from common.attention.context import AttentionContext, GroupTables, Selection
from common.attention.packed import pack_rows, unpack_rows
from common.kvcache.packing import RowPacking
from common.kvcache.scales import LARGEST, KVScales

_FLOATS = ("float32", "bfloat16", "float16")
_CACHED = (*_FLOATS, "float8_e4m3fn")


def capability() -> Capability:
    return Capability("reference", devices=("cpu", "cuda"), dtypes=_FLOATS, kv_dtypes=_CACHED, latent=True)


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
    num_empty: int  # of these, the first ones, which hold nothing
    mask_NL: Tensor | None


_Plan = tuple[list[_Decode], list[_Chunk]]

_TOKENS_AT_ONCE = 64  # with selected positions
_SCORES_AT_ONCE = 1 << 26


class ReferenceBackend:
    name = "reference"
    can_record = False
    plain_writes = True

    def plan(self, ctx: AttentionContext) -> None:
        """Nothing is prepared."""

    def write(
        self, k_TUD: Tensor, v_TUD: Tensor, cache: Tensor, tables: GroupTables, scales: KVScales | None = None
    ) -> None:
        """Store new keys and values, cast to the cache's type. `cache`: [num_blocks, 2, U, block_size, D]."""
        store(k_TUD, v_TUD, cache, (tables.new_block_ids, tables.new_offsets), scales)

    def attend(
        self,
        q_THD: Tensor,
        cache: Tensor,
        tables: GroupTables,
        ctx: AttentionContext,
        scale: float,
        scales: KVScales | None = None,
    ) -> Tensor:
        """Causal attention of the new tokens over the cache: a new [T, H, D]."""
        assert (scales is not None) == (cache.dtype == torch.float8_e4m3fn)
        if scales is None:
            return _attend(q_THD, cache[:, 0], cache[:, 1], tables, ctx, scale)
        return _attend(q_THD, cache[:, 0], cache[:, 1], tables, ctx, scale * scales.k).mul_(scales.v)

    def write_rows(
        self, rows_TW: Tensor, cache: Tensor, tables: GroupTables, packing: RowPacking | None = None
    ) -> None:
        """Store a row per new token, cast to the cache's type. `cache`: [num_blocks, 1, 1, block_size, W]."""
        stored_TW = rows_TW.to(cache.dtype) if packing is None else pack_rows(rows_TW, packing)
        cache[:, 0, 0].index_put_((tables.new_block_ids, tables.new_offsets), stored_TW)

    def read_rows(
        self, cache: Tensor, block_ids_N: Tensor, dtype: torch.dtype, packing: RowPacking | None = None
    ) -> Tensor:
        """Rows of whole blocks: a new [N * block_size, W]."""
        stored_PW = cache[:, 0, 0].index_select(0, block_ids_N).flatten(0, 1)
        return stored_PW.to(dtype) if packing is None else unpack_rows(stored_PW, packing, dtype)

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
        if packing is not None:
            block_ids_N, tables = _used(tables, ctx)
            rows = unpack_rows(rows[block_ids_N], packing, q_THD.dtype)
        keys, vals = rows[..., : q_THD.shape[2]], rows[..., values]
        if selected is None and log_sums_TH is not None:
            selected = _all_seen(tables, ctx)
        if selected is None:
            return _attend(q_THD, keys, vals, tables, ctx, scale)
        sequence_T = _sequence_of_tokens(ctx)
        out = []
        for first in range(0, q_THD.shape[0], _TOKENS_AT_ONCE):
            part = slice(first, first + _TOKENS_AT_ONCE)
            chosen = _Chosen.of(selected.positions_TK[part], selected.counts_T[part], sequence_T[part], tables)
            out.append(_attend_chosen(q_THD[part], keys, vals, chosen, scale))
            if log_sums_TH is not None:
                log_sums_TH[part] = _log_sums(q_THD[part], keys, chosen, scale)
        return torch.cat(out)

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
        device = q_THD.device
        positions_TK = torch.full((q_THD.shape[0], top_k), -1, dtype=torch.int32, device=device)
        counts_T = torch.empty(q_THD.shape[0], dtype=torch.int32, device=device)
        starts, seq_lens = ctx.query_starts_S1.tolist(), ctx.seq_lens_S.tolist()
        for s, seq_len in enumerate(seq_lens):
            blocks_W = tables.block_tables_SB[s, : -(-seq_len // tables.block_size)].long()
            keys_LB = keys[blocks_W].flatten(0, 1)[:seq_len]
            keys_LD = keys_LB.float() if packing is None else unpack_rows(keys_LB, packing, torch.float32)
            for t in range(starts[s], starts[s + 1]):
                seen = seq_len - (starts[s + 1] - t) + 1
                scores_HL = (q_THD[t].float() @ keys_LD[:seen].T * scale).relu_()
                order_L = (weights_TH[t] @ scores_HL).sort(descending=True, stable=True).indices
                best_K = order_L[:top_k].sort().values
                positions_TK[t, : best_K.shape[0]] = best_K
                counts_T[t] = best_K.shape[0]
        return Selection(positions_TK, counts_T)


class RecordableBackend(ReferenceBackend):
    """The base of backends whose steps can be recorded and replayed."""

    can_record = True

    def write(
        self, k_TUD: Tensor, v_TUD: Tensor, cache: Tensor, tables: GroupTables, scales: KVScales | None = None
    ) -> None:
        """As the reference, with places worked out at each call: a recorded step must do it in each replay."""
        slots_T, size = tables.slots_T, tables.block_size
        store(k_TUD, v_TUD, cache, (slots_T // size, slots_T % size), scales)


def store(k_TUD: Tensor, v_TUD: Tensor, cache: Tensor, place: tuple[Tensor, Tensor], scales: KVScales | None) -> None:
    """Write keys and values to `place`, the block and the offset of each token."""
    assert (scales is not None) == (cache.dtype == torch.float8_e4m3fn)
    for part, rows_TUD in enumerate((k_TUD, v_TUD)):
        target = cache[:, part].transpose(1, 2)
        if scales is None:
            target.index_put_(place, rows_TUD.to(cache.dtype))
            continue
        stored = rows_TUD.float().div(scales.v if part else scales.k).clamp_(-LARGEST, LARGEST).to(cache.dtype)
        target.view(torch.uint8).index_put_(place, stored.view(torch.uint8))


def _attend(
    q_THD: Tensor, keys: Tensor, values: Tensor, tables: GroupTables, ctx: AttentionContext, scale: float
) -> Tensor:
    key = (ReferenceBackend, id(tables))
    plan: _Plan | None = ctx.scratch.get(key)
    if plan is None:
        plan = ctx.scratch[key] = _plan(tables, ctx)
    decodes, chunks = plan
    if len(decodes) == 1 and decodes[0].tokens_R is None:
        return _attend_decode(q_THD, keys, values, decodes[0], scale)
    out_THV = q_THD.new_empty(*q_THD.shape[:2], values.shape[3])
    for decode in decodes:
        assert decode.tokens_R is not None
        out_THV[decode.tokens_R] = _attend_decode(q_THD[decode.tokens_R], keys, values, decode, scale)
    for chunk in chunks:
        tokens = slice(chunk.first_token, chunk.first_token + chunk.num_tokens)
        out_THV[tokens] = _attend_chunk(q_THD[tokens], keys, values, chunk, scale)
    return out_THV


def _attend_decode(q_RHD: Tensor, keys: Tensor, values: Tensor, plan: _Decode, scale: float) -> Tensor:
    num_heads, width, kv_heads = q_RHD.shape[1], q_RHD.shape[2], keys.shape[1]
    rows, positions = plan.seen_RL.shape

    def gather(part: Tensor) -> Tensor:
        seen = _gather(part, plan.block_ids_RW.flatten()).to(q_RHD.dtype).index_fill_(1, plan.unseen, 0.0)
        return seen.view(kv_heads, rows, positions, part.shape[3]).transpose(0, 1)

    q_RUGD = q_RHD.reshape(rows, kv_heads, num_heads // kv_heads, width)
    mask = plan.seen_RL[:, None, None]
    out = _masked(q_RUGD, gather(keys), gather(values), mask, scale)
    return out.reshape(rows, num_heads, values.shape[3])


def _attend_chunk(q_NHD: Tensor, keys: Tensor, values: Tensor, plan: _Chunk, scale: float) -> Tensor:
    num_tokens, num_heads, width = q_NHD.shape
    kv_heads = keys.shape[1]
    group = num_heads // kv_heads

    def gather(part: Tensor) -> Tensor:
        seen = _gather(part, plan.block_ids_W)[:, : plan.num_positions]
        seen[:, : plan.num_empty] = 0
        seen = seen.to(q_NHD.dtype)
        return seen.unsqueeze(1).expand(-1, group, -1, -1)

    q_UGND = q_NHD.transpose(0, 1).reshape(kv_heads, group, num_tokens, width)
    k, v = gather(keys), gather(values)
    if plan.mask_NL is not None:
        out = _masked(q_UGND, k, v, plan.mask_NL, scale)
    else:
        out = functional.scaled_dot_product_attention(q_UGND, k, v, is_causal=True, scale=scale)
    return out.reshape(num_heads, num_tokens, values.shape[3]).transpose(0, 1)


@dataclass(frozen=True)
class _Chosen:
    """Where the selected positions of some tokens lie. `seen_TK`: which entries are meant."""

    block_ids_TK: Tensor
    offsets_TK: Tensor
    seen_TK: Tensor

    @classmethod
    def of(cls, positions_TK: Tensor, counts_T: Tensor, sequence_T: Tensor, tables: GroupTables) -> _Chosen:
        seen_TK = torch.arange(positions_TK.shape[1], device=positions_TK.device) < counts_T[:, None]
        safe_TK = torch.where(seen_TK, positions_TK, positions_TK[:, :1]).long()
        block_ids_TK = tables.block_tables_SB[sequence_T[:, None], safe_TK // tables.block_size].long()
        return cls(block_ids_TK, safe_TK % tables.block_size, seen_TK)

    def gather(self, part: Tensor, dtype: torch.dtype) -> Tensor:
        """[T, U, K, width] of a [num_blocks, U, block_size, width] view."""
        return part.transpose(1, 2)[self.block_ids_TK, self.offsets_TK].to(dtype).transpose(1, 2)


def _attend_chosen(q_THD: Tensor, keys: Tensor, values: Tensor, chosen: _Chosen, scale: float) -> Tensor:
    num_tokens, num_heads, width = q_THD.shape
    kv_heads = keys.shape[1]
    q_TUGD = q_THD.reshape(num_tokens, kv_heads, num_heads // kv_heads, width)
    mask = chosen.seen_TK[:, None, None]
    k_TUKD, v_TUKV = chosen.gather(keys, q_THD.dtype), chosen.gather(values, q_THD.dtype)
    out = _masked(q_TUGD, k_TUKD, v_TUKV, mask, scale)
    return out.reshape(num_tokens, num_heads, values.shape[3])


def _masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention of [..., N, D] over [..., L, D] and [..., L, V], where `mask`, [..., N or 1, L], says.

    Written out on GPUs, some queries at a time: of 257 queries torch's own kernel gave the last a wrong result.
    """
    if not q.is_cuda:
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    num_queries, num_keys = q.shape[-2], k.shape[-2]
    rows = max(1, _SCORES_AT_ONCE // (num_keys * max(1, q[..., 0, 0].numel())))
    out = []
    for first in range(0, num_queries, rows):
        part = slice(first, first + rows)
        seen = mask if mask.shape[-2] == 1 else mask[..., part, :]
        scores = torch.matmul(q[..., part, :].float(), k.float().mT).mul_(scale)
        weights = scores.masked_fill_(~seen, float("-inf")).softmax(-1)
        out.append(torch.matmul(weights, v.float()).to(q.dtype))
    return torch.cat(out, -2)


def _log_sums(q_THD: Tensor, keys: Tensor, chosen: _Chosen, scale: float) -> Tensor:
    q_TUGD = q_THD.float().reshape(q_THD.shape[0], keys.shape[1], -1, q_THD.shape[2])
    scores_TUGK = torch.matmul(q_TUGD, chosen.gather(keys, torch.float32).mT) * scale
    return scores_TUGK.masked_fill(~chosen.seen_TK[:, None, None], float("-inf")).logsumexp(-1).flatten(1)


def _all_seen(tables: GroupTables, ctx: AttentionContext) -> Selection:
    """Every position that each token sees, written out."""
    sequence_T = _sequence_of_tokens(ctx)
    token_T = torch.arange(sequence_T.shape[0], device=sequence_T.device)
    own_T = (ctx.seq_lens_S - ctx.query_starts_S1[1:])[sequence_T] + token_T
    low_T = torch.full_like(own_T, tables.first)
    if tables.window:
        low_T = (own_T + 1 - tables.window).clamp_(min=tables.first)
    counts_T = own_T - low_T + 1
    positions_TK = low_T[:, None] + torch.arange(int(counts_T.max()), device=low_T.device)
    return Selection(positions_TK.int(), counts_T.int())


def _sequence_of_tokens(ctx: AttentionContext) -> Tensor:
    counts_S = ctx.query_starts_S1.diff()
    return torch.repeat_interleave(torch.arange(counts_S.shape[0], device=counts_S.device), counts_S)


def _used(tables: GroupTables, ctx: AttentionContext) -> tuple[Tensor, GroupTables]:
    """The blocks of a step, and its tables over them alone."""
    key = (_used, id(tables))
    found: tuple[Tensor, GroupTables] | None = ctx.scratch.get(key)
    if found is None:
        block_ids_N, places_SB = torch.unique(tables.block_tables_SB, return_inverse=True)
        found = ctx.scratch[key] = (block_ids_N.long(), replace(tables, block_tables_SB=places_SB.int()))
    return found


def _gather(part: Tensor, block_ids: Tensor) -> Tensor:
    """[U, all positions of the blocks in order, width], contiguous."""
    return part.transpose(0, 1).index_select(1, block_ids).flatten(1, 2)


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
    low_R1 = torch.full_like(lens_R1, tables.first)
    if tables.window:
        low_R1 = (lens_R1 - tables.window).clamp_(min=tables.first)
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
    if low < start or tables.first or (window and window < count):
        device = block_ids_W.device
        query_N1 = torch.arange(start, seq_len, device=device)[:, None]
        position_L = torch.arange(low, seq_len, device=device)
        mask_NL = (position_L <= query_N1) & (position_L >= tables.first)
        if window:
            mask_NL &= position_L > query_N1 - window
    return _Chunk(first_token, count, block_ids_W, num_positions, max(0, tables.first - low), mask_NL)
