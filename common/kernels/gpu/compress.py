"""Operations of DeepSeek-V4 around products and attention (`common.kernels.compress_ops`): fp32 inside, one rounding.

Every row is computed alone and in one order. What shapes decide is all that is launched: a recorded step pools as many
entries as it has tokens, and those of tokens that complete none are left after one look.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.kernels.gpu.launch import let_next_start, pdl, wait

_BLOCK = 1024


@triton.jit
def _pool(
    cache_ptr,
    slots_ptr,
    bias_ptr,
    out_ptr,
    block_stride,
    row_stride,
    slots_stride,
    gate_column,
    width,
    SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    OWN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Some columns of an entry; zeros where not even its last token is there."""
    let_next_start(PDL)
    wait(PDL)
    n = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    has_column = column < width
    slots_ptr += n * slots_stride
    out = out_ptr + n * width + column
    if tl.load(slots_ptr + TOKENS - 1) < 0:
        tl.store(out, tl.zeros([BLOCK], tl.float32), mask=has_column)
        return
    peak = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK], tl.float32)
    for at in range(0, TOKENS, ROWS):
        i = at + tl.arange(0, ROWS)
        slot = tl.load(slots_ptr + i, mask=i < TOKENS, other=-1)
        has = (slot >= 0)[:, None] & has_column[None, :]
        shift = tl.where(i >= TOKENS - OWN, width, 0)
        place = slot // SIZE * block_stride + slot % SIZE * row_stride + shift
        rows = cache_ptr + place[:, None] + column[None, :]
        gate = tl.load(rows + gate_column, mask=has, other=0.0).to(tl.float32)
        gate += tl.load(bias_ptr + i[:, None] * width + column[None, :], mask=has, other=0.0)
        value = tl.load(rows, mask=has, other=0.0).to(tl.float32)
        gate = tl.where(has, gate, float("-inf"))
        top = tl.maximum(peak, tl.max(gate, 0))
        base = tl.where(top == float("-inf"), 0.0, top)  # nothing yet: no difference of infinities
        weight = tl.exp(gate - base[None, :])
        shrink = tl.exp(peak - base)
        total = total * shrink + tl.sum(weight, 0)
        acc = acc * shrink + tl.sum(weight * value, 0)
        peak = top
    tl.store(out, acc / tl.where(has_column, total, 1.0), mask=has_column)


def pool_entries(cache: Tensor, slots_NL: Tensor, bias_LD: Tensor, gate_column: int, own: int) -> Tensor:
    """As `common.kernels.compress_ops.pool_entries`, of rows with contiguous columns."""
    entries, tokens = slots_NL.shape
    width, use_pdl = bias_LD.shape[1], pdl(cache.device)
    out_ND = torch.empty((entries, width), dtype=torch.float32, device=cache.device)
    block = min(64, triton.next_power_of_2(width))
    _pool[(entries, triton.cdiv(width, block))](
        cache,
        slots_NL,
        bias_LD,
        out_ND,
        cache.stride(0),
        cache.stride(1),
        slots_NL.stride(0),
        gate_column,
        width,
        SIZE=cache.shape[1],
        TOKENS=tokens,
        OWN=own,
        ROWS=min(16, triton.next_power_of_2(tokens)),
        BLOCK=block,
        PDL=use_pdl,
        num_warps=4,
        launch_pdl=use_pdl,
    )
    return out_ND


@triton.jit(do_not_specialize=["tokens"])
def _stream_weights(
    mix_ptr,
    scale_ptr,
    base_ptr,
    pre_ptr,
    post_ptr,
    comb_ptr,
    tokens,
    eps,
    STREAMS: tl.constexpr,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_start(PDL)
    S: tl.constexpr = STREAMS
    PADDED: tl.constexpr = triton.next_power_of_2(STREAMS)
    WIDTH: tl.constexpr = (2 + STREAMS) * STREAMS
    t = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    s = tl.arange(0, PADDED)[None, :]
    has = (t < tokens)[:, None] & (s < S)
    j, k = tl.arange(0, PADDED)[None, :, None], tl.arange(0, PADDED)[None, None, :]
    inside = (j < S) & (k < S)
    has_comb = (t < tokens)[:, None, None] & inside
    scale_pre, scale_post, scale_comb = tl.load(scale_ptr), tl.load(scale_ptr + 1), tl.load(scale_ptr + 2)
    base_pre = tl.load(base_ptr + s, mask=s < S, other=0.0)
    base_post = tl.load(base_ptr + S + s, mask=s < S, other=0.0)
    base_comb = tl.load(base_ptr + 2 * S + j * S + k, mask=inside, other=0.0)
    wait(PDL)
    row = mix_ptr + t[:, None] * WIDTH + s
    pre = tl.load(row, mask=has, other=0.0) * scale_pre + base_pre
    post = tl.load(row + S, mask=has, other=0.0) * scale_post + base_post
    tl.store(pre_ptr + t[:, None] * S + s, tl.sigmoid(pre) + eps, mask=has)
    tl.store(post_ptr + t[:, None] * S + s, 2 * tl.sigmoid(post), mask=has)
    comb = tl.load(mix_ptr + t[:, None, None] * WIDTH + 2 * S + j * S + k, mask=has_comb, other=0.0)
    comb = tl.where(inside, comb * scale_comb + base_comb, float("-inf"))
    peak = tl.max(comb, 2)[:, :, None]
    comb = tl.exp(comb - tl.where(peak == float("-inf"), 0.0, peak))
    comb = comb / tl.maximum(tl.sum(comb, 2), 1e-30)[:, :, None] + eps
    comb = tl.where(inside, comb, 0.0)
    for step in range(STEPS):
        if step > 0:
            comb = comb / (tl.sum(comb, 2)[:, :, None] + eps)
        comb = comb / (tl.sum(comb, 1)[:, None, :] + eps)
    tl.store(comb_ptr + (t[:, None, None] * S + j) * S + k, comb, mask=has_comb)


def stream_weights(
    mix: Tensor, scale: Tensor, base: Tensor, streams: int, steps: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As `common.kernels.compress_ops.stream_weights`, of contiguous rows."""
    tokens, use_pdl, rows = mix.shape[0], pdl(mix.device), 8
    pre, post = mix.new_empty(tokens, streams), mix.new_empty(tokens, streams)
    comb = mix.new_empty(tokens, streams, streams)
    _stream_weights[(triton.cdiv(tokens, rows),)](
        *(mix, scale, base, pre, post, comb, tokens, eps),
        STREAMS=streams,
        STEPS=steps,
        ROWS=rows,
        PDL=use_pdl,
        num_warps=1,
        launch_pdl=use_pdl,
    )
    return pre, post, comb


@triton.jit
def _collapse(x_ptr, weights_ptr, out_ptr, width, STREAMS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    let_next_start(PDL)
    wait(PDL)
    t = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    acc = tl.zeros([BLOCK], tl.float32)
    for s in tl.static_range(STREAMS):
        x = tl.load(x_ptr + (t * STREAMS + s) * width + column, mask=mask, other=0.0).to(tl.float32)
        acc += tl.load(weights_ptr + t * STREAMS + s) * x
    tl.store(out_ptr + t * width + column, acc.to(out_ptr.dtype.element_ty), mask=mask)


def collapse_streams(x_TSD: Tensor, weights_TS: Tensor) -> Tensor:
    """As `common.kernels.compress_ops.collapse_streams`, of contiguous tensors."""
    tokens, streams, width = x_TSD.shape
    out_TD, use_pdl = x_TSD.new_empty(tokens, width), pdl(x_TSD.device)
    _collapse[(tokens, triton.cdiv(width, _BLOCK))](
        *(x_TSD, weights_TS, out_TD, width),
        STREAMS=streams,
        BLOCK=_BLOCK,
        PDL=use_pdl,
        num_warps=4,
        launch_pdl=use_pdl,
    )
    return out_TD


@triton.jit
def _mix(x_ptr, y_ptr, post_ptr, comb_ptr, width, STREAMS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """All streams of some columns of a token: what is read is written by the same program."""
    let_next_start(PDL)
    wait(PDL)
    PADDED: tl.constexpr = triton.next_power_of_2(STREAMS)
    t = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    k = tl.arange(0, PADDED)[:, None]
    mask = (column < width) & (k < STREAMS)
    y = tl.load(y_ptr + t * width + column, mask=column < width, other=0.0).to(tl.float32)
    acc = tl.load(post_ptr + t * STREAMS + k, mask=k < STREAMS, other=0.0) * y
    for j in tl.static_range(STREAMS):
        x = tl.load(x_ptr + (t * STREAMS + j) * width + column, mask=column < width, other=0.0).to(tl.float32)
        acc += tl.load(comb_ptr + (t * STREAMS + j) * STREAMS + k, mask=k < STREAMS, other=0.0) * x
    tl.debug_barrier()
    tl.store(x_ptr + (t * STREAMS + k) * width + column, acc.to(x_ptr.dtype.element_ty), mask=mask)


def mix_streams(x_TSD: Tensor, y_TD: Tensor, post_TS: Tensor, comb_TSS: Tensor) -> None:
    """As `common.kernels.compress_ops.mix_streams`, of contiguous tensors."""
    tokens, streams, width = x_TSD.shape
    use_pdl, block = pdl(x_TSD.device), _BLOCK // 2
    _mix[(tokens, triton.cdiv(width, block))](
        *(x_TSD, y_TD, post_TS, comb_TSS, width),
        STREAMS=streams,
        BLOCK=block,
        PDL=use_pdl,
        num_warps=4,
        launch_pdl=use_pdl,
    )


@triton.jit
def _join(
    a_ptr,
    sums_ptr,
    sinks_ptr,
    b_ptr,
    b_sums_ptr,
    counts_ptr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    TWO: tl.constexpr,
    PDL: tl.constexpr,
):
    """One head of a token."""
    let_next_start(PDL)
    pair = tl.program_id(0).to(tl.int64)
    sink = tl.load(sinks_ptr + pair % HEADS)
    wait(PDL)
    column = tl.arange(0, BLOCK)
    mask = column < WIDTH
    place = a_ptr + pair * WIDTH + column
    a = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    a_sum = tl.load(sums_ptr + pair)
    peak, b_sum = tl.maximum(a_sum, sink), float("-inf")
    b = tl.zeros([BLOCK], tl.float32)
    if TWO:
        has = tl.load(counts_ptr + pair // HEADS) > 0
        b_sum = tl.where(has, tl.load(b_sums_ptr + pair), float("-inf"))
        b = tl.load(b_ptr + pair * WIDTH + column, mask=mask & has, other=0.0).to(tl.float32)
        peak = tl.maximum(peak, b_sum)
    a_share, b_share = tl.exp(a_sum - peak), tl.exp(b_sum - peak)
    total = a_share + b_share + tl.exp(sink - peak)
    out = a * (a_share / total) + b * (b_share / total)
    tl.store(place, out.to(a_ptr.dtype.element_ty), mask=mask)


def join_parts(
    a_THD: Tensor,
    sums_TH: Tensor,
    sinks_H: Tensor,
    b_THD: Tensor | None,
    b_sums_TH: Tensor | None,
    counts_T: Tensor | None,
) -> None:
    """As `common.kernels.compress_ops.join_parts`, of contiguous tensors."""
    tokens, heads, width = a_THD.shape
    use_pdl, two = pdl(a_THD.device), b_THD is not None
    _join[(tokens * heads,)](
        *(a_THD, sums_TH, sinks_H),
        *((b_THD, b_sums_TH, counts_T) if two else (a_THD, sums_TH, sums_TH)),
        HEADS=heads,
        WIDTH=width,
        BLOCK=triton.next_power_of_2(width),
        TWO=two,
        PDL=use_pdl,
        num_warps=2,
        launch_pdl=use_pdl,
    )
