"""Paged attention whose result for a query depends on its keys and values alone, to the bit.

Positions are cut at multiples of `SPLIT`, whatever a step holds. Within a split keys are taken 64 at a time in order;
splits are then joined in order. A program takes 64 rows, query heads of one key head side by side for some tokens, with
all splits one after the other (`lanes` 1) or some of them, whose results a second kernel joins by the same operations.
Keys that a query does not see add exactly nothing, so it does not matter which others are in its tile.

Sums of two products are written as fused operations: which of the products is rounded is not for a compiler to choose.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

SPLIT = 256
_ROWS = 64
_KEYS = 64
_MAX_PARTIAL = 256 << 20  # bytes

_NONE = tl.constexpr(float("-inf"))


@triton.jit
def _locate(
    starts_ptr, lens_ptr, index, num_seqs, uniform, PER: tl.constexpr, UNIFORM: tl.constexpr, SEQS: tl.constexpr
):
    """(sequence, which of its tiles of PER tokens, its first token, number of its new tokens, its length).

    UNIFORM: each sequence has `uniform` new tokens. The sequence is `num_seqs` for an index past the end.
    """
    if UNIFORM:
        per_seq = (uniform + PER - 1) // PER
        seq = tl.minimum(index // per_seq, num_seqs)
        tile = index % per_seq
    else:
        s = tl.arange(0, SEQS)
        first_S = tl.load(starts_ptr + s, mask=s < num_seqs, other=0)
        past_S = tl.load(starts_ptr + s + 1, mask=s < num_seqs, other=0)
        tiles_S = (past_S - first_S + PER - 1) // PER
        end_S = tl.cumsum(tiles_S, 0)
        before_S = (end_S <= index) & (s < num_seqs)
        seq = tl.sum(before_S.to(tl.int32), 0)
        tile = index - tl.sum(tl.where(before_S, tiles_S, 0), 0)
    there = seq < num_seqs
    first = tl.load(starts_ptr + seq, mask=there, other=0)
    count = tl.load(starts_ptr + seq + 1, mask=there, other=0) - first
    return seq, tile, first, count, tl.load(lens_ptr + seq, mask=there, other=0)


@triton.jit
def _attend_split(
    q,
    k_ptr,
    v_ptr,
    table,
    start,
    end,
    position,
    low,
    seq_len,
    lowest,
    scale,
    block_stride,
    row_stride,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_2: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """(largest score, sum of exponentials, sum of values) of each row over positions [start, end)."""
    d = tl.arange(0, WIDTH_2)
    top = tl.full((ROWS,), _NONE, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    out = tl.zeros((ROWS, WIDTH_2), tl.float32)
    for first in range(start, end, KEYS):
        at = first + tl.arange(0, KEYS)
        held = (at < seq_len) & (at >= lowest)
        block = tl.load(table + at // BLOCK, mask=held, other=0).to(tl.int64)
        place = block * block_stride + (at % BLOCK) * row_stride
        k = tl.load(k_ptr + place[None, :] + d[:, None], mask=held[None, :] & (d < WIDTH)[:, None], other=0.0)
        score = tl.dot(q, k.to(q.dtype), input_precision="ieee") * scale
        seen = (at[None, :] <= position[:, None]) & (at[None, :] >= low[:, None])
        score = tl.where(seen, score, _NONE)
        new_top = tl.maximum(top, tl.max(score, 1))
        zero = tl.where(new_top == _NONE, 0.0, new_top)
        weight = tl.exp2(score - zero[:, None])
        shrink = tl.exp2(top - zero)
        total = tl.fma(total, shrink, tl.sum(weight, 1))
        v = tl.load(v_ptr + place[:, None] + d[None, :], mask=held[:, None] & (d < WIDTH)[None, :], other=0.0)
        out = tl.dot(weight.to(q.dtype), v.to(q.dtype), out * shrink[:, None], input_precision="ieee")
        top = new_top
    return top, total, out


@triton.jit
def _join(top, total, more_top, more_total):
    """(largest score, sum of exponentials, factors of either's sum of values) of two such results as one."""
    new_top = tl.maximum(top, more_top)
    zero = tl.where(new_top == _NONE, 0.0, new_top)
    a, b = tl.exp2(top - zero), tl.exp2(more_top - zero)
    return new_top, tl.fma(total, a, more_total * b), a, b


@triton.jit(do_not_specialize=["num_seqs", "uniform", "lanes", "table_stride", "lowest", "num_splits"])
def _attend(
    q_ptr,
    k_ptr,
    v_ptr,
    tables_ptr,
    starts_ptr,
    lens_ptr,
    out_ptr,
    tops_ptr,
    totals_ptr,
    partial_ptr,
    num_seqs,
    uniform,
    lanes,
    scale,
    v_scale,
    q_stride,
    q_head_stride,
    block_stride,
    head_stride,
    row_stride,
    table_stride,
    window,
    lowest,
    num_splits,
    GROUP: tl.constexpr,
    GROUP_2: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_2: tl.constexpr,
    UNIFORM: tl.constexpr,
    SEQS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SPLIT: tl.constexpr,
    ALONE: tl.constexpr,
):
    TOKENS: tl.constexpr = ROWS // GROUP_2
    unit, lane = tl.program_id(1), tl.program_id(2)
    index = tl.program_id(0)
    seq, tile, first, count, seq_len = _locate(starts_ptr, lens_ptr, index, num_seqs, uniform, TOKENS, UNIFORM, SEQS)
    if seq >= num_seqs:
        return
    row, d = tl.arange(0, ROWS), tl.arange(0, WIDTH_2)
    token = tile * TOKENS + row // GROUP_2
    is_row = (token < count) & (row % GROUP_2 < GROUP)
    head = unit * GROUP + row % GROUP_2
    there = is_row[:, None] & (d < WIDTH)[None, :]
    place = (first + token).to(tl.int64)
    q = tl.load(q_ptr + (place * q_stride + head * q_head_stride)[:, None] + d[None, :], mask=there, other=0.0)
    position = tl.where(is_row, seq_len - count + token, -1)
    low = tl.maximum(position + 1 - window, lowest)
    tile_first = seq_len - count + tile * TOKENS
    tile_end = seq_len - count + tl.minimum(tile * TOKENS + TOKENS, count)
    first_split = tl.maximum(tile_first + 1 - window, lowest) // SPLIT
    k_row, v_row = k_ptr + unit * head_stride, v_ptr + unit * head_stride
    table = tables_ptr + seq.to(tl.int64) * table_stride
    top = tl.full((ROWS,), _NONE, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    out = tl.zeros((ROWS, WIDTH_2), tl.float32)
    for split in range(first_split + lane, tl.cdiv(tile_end, SPLIT), lanes):
        start = split * SPLIT
        split_top, split_total, split_out = _attend_split(
            q,
            k_row,
            v_row,
            table,
            start,
            tl.minimum(start + SPLIT, tile_end),
            position,
            low,
            seq_len,
            lowest,
            scale,
            block_stride,
            row_stride,
            BLOCK,
            WIDTH,
            WIDTH_2,
            ROWS,
            KEYS,
        )
        if ALONE:
            top, total, a, b = _join(top, total, split_top, split_total)
            out = tl.fma(out, tl.broadcast_to(a[:, None], ROWS, WIDTH_2), split_out * b[:, None])
        else:
            at = (place * HEADS + head) * num_splits + split
            tl.store(tops_ptr + at, split_top, mask=is_row)
            tl.store(totals_ptr + at, split_total, mask=is_row)
            tl.store(partial_ptr + at[:, None] * WIDTH + d[None, :], split_out, mask=there)
    if ALONE:
        total = tl.where(total > 0, total, 1.0)
        out = out / total[:, None] * v_scale
        target = out_ptr + ((place * HEADS + head) * WIDTH)[:, None] + d[None, :]
        tl.store(target, out.to(out_ptr.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["num_seqs", "uniform", "lowest", "num_splits"])
def _join_lanes(
    starts_ptr,
    lens_ptr,
    out_ptr,
    tops_ptr,
    totals_ptr,
    partial_ptr,
    num_seqs,
    uniform,
    v_scale,
    window,
    lowest,
    num_splits,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_2: tl.constexpr,
    UNIFORM: tl.constexpr,
    SEQS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    token, head = tl.program_id(0), tl.program_id(1)
    _, nth, _, count, seq_len = _locate(starts_ptr, lens_ptr, token, num_seqs, uniform, 1, UNIFORM, SEQS)
    position = seq_len - count + nth
    d = tl.arange(0, WIDTH_2)
    top = tl.full((1,), _NONE, tl.float32)
    total = tl.zeros((1,), tl.float32)
    out = tl.zeros((WIDTH_2,), tl.float32)
    row = (token.to(tl.int64) * HEADS + head) * num_splits
    one = tl.arange(0, 1)
    for split in range(tl.maximum(position + 1 - window, lowest) // SPLIT, position // SPLIT + 1):
        split_out = tl.load(partial_ptr + (row + split) * WIDTH + d, mask=d < WIDTH, other=0.0)
        split_top, split_total = tl.load(tops_ptr + row + split + one), tl.load(totals_ptr + row + split + one)
        top, total, a, b = _join(top, total, split_top, split_total)
        out = tl.fma(out, tl.broadcast_to(a, WIDTH_2), split_out * b)
    total = tl.where(total > 0, total, 1.0)
    out = out / total * v_scale
    place = out_ptr + (token.to(tl.int64) * HEADS + head) * WIDTH + d
    tl.store(place, out.to(out_ptr.dtype.element_ty), mask=d < WIDTH)


def attend(
    q_THD: Tensor,
    cache: Tensor,
    block_tables_SB: Tensor,
    query_starts_S1: Tensor,
    seq_lens_S: Tensor,
    *,
    max_query_len: int,
    max_seq_len: int,
    window: int,
    first: int,
    scale: float,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    lanes: int = 0,
) -> Tensor:
    """Causal attention of the new tokens over `cache`, [num_blocks, 2, U, block_size, D]: a new [T, H, D].

    `max_query_len` and `max_seq_len` bound what is on the device. `lanes`: programs that share a tile's splits, 0 for
    as many as fill the GPU; no result depends on it. `window`, `first`: see `GroupTables`.
    """
    (tokens, heads, width), (units, block_size), seqs = q_THD.shape, cache.shape[2:4], len(seq_lens_S)
    out_THD = torch.empty(tokens, heads, width, dtype=q_THD.dtype, device=q_THD.device)
    if tokens == 0:
        return out_THD
    assert q_THD.stride(2) == cache.stride(4) == block_tables_SB.stride(1) == 1
    group = heads // units
    per_tile = _ROWS // triton.next_power_of_2(group)
    uniform = max_query_len if max_query_len < _ROWS and tokens == seqs * max_query_len else 0
    tiles = seqs * triton.cdiv(uniform, per_tile) if uniform else seqs + tokens // per_tile
    splits = triton.cdiv(max_seq_len, SPLIT)
    lanes = min(lanes or _lanes(tiles * units, tokens * heads * splits * width * 4, q_THD.device), splits)
    shape = (tokens, heads, splits) if lanes > 1 else (1, 1, 1)
    tops = torch.empty(shape, dtype=torch.float32, device=q_THD.device)
    totals, partial = torch.empty_like(tops), tops.new_empty(*shape, width)
    window = window or 1 << 30
    kinds = {
        "HEADS": heads,
        "WIDTH": width,
        "WIDTH_2": triton.next_power_of_2(width),
        "UNIFORM": uniform > 0,
        "SEQS": max(512, triton.next_power_of_2(seqs)),  # hardly ever another kernel
        "SPLIT": SPLIT,
    }
    _attend[tiles, units, lanes](
        q_THD,
        cache[:, 0],
        cache[:, 1],
        block_tables_SB,
        query_starts_S1,
        seq_lens_S,
        out_THD,
        tops,
        totals,
        partial,
        seqs,
        uniform,
        lanes,
        scale * k_scale * math.log2(math.e),
        v_scale,
        q_THD.stride(0),
        q_THD.stride(1),
        cache.stride(0),
        cache.stride(2),
        cache.stride(3),
        block_tables_SB.stride(0),
        window,
        first,
        splits,
        GROUP=group,
        GROUP_2=triton.next_power_of_2(group),
        BLOCK=block_size,
        ROWS=_ROWS,
        KEYS=_KEYS,
        ALONE=lanes == 1,
        num_warps=8 if width > 128 else 4,
        num_stages=2 if width > 128 else 3,
        **kinds,
    )
    if lanes > 1:
        _join_lanes[tokens, heads](
            query_starts_S1,
            seq_lens_S,
            out_THD,
            tops,
            totals,
            partial,
            seqs,
            uniform,
            v_scale,
            window,
            first,
            splits,
            num_warps=1,
            **kinds,
        )
    return out_THD


def _lanes(programs: int, nbytes: int, device: torch.device) -> int:
    """`nbytes`: of what lanes hand on."""
    if nbytes > _MAX_PARTIAL or device.type != "cuda":
        return 1
    return triton.cdiv(2 * torch.cuda.get_device_properties(device).multi_processor_count, programs)
