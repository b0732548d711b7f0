"""What lies between the projection of queries, keys and values and attention: norm, rotation, and the cache, in one.

Roundings are where they are when each is an operation of its own.

A step of few tokens leaves most of the memory's time unused in attention. The weight that is read behind it is brought
to the L2 cache meanwhile, as much as fits there beside the rest.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.kernels.gpu.launch import bring_to_l2, let_next_start, pdl, wait

_TILE = 1024  # elements that a program takes at once
_EARLY_NBYTES = 16 << 20
_EARLY_MAX_TOKENS = 4
_EARLY_PIECE = tl.constexpr(4096)
_EARLY_PIECES = tl.constexpr(128)  # of a program, one for each thread
_LARGEST = tl.constexpr(448.0)  # of float8_e4m3fn


@triton.jit
def _normed_and_turned(
    x_row,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    token,
    cos_stride,
    has_head,
    eps,
    NORM: tl.constexpr,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    TAIL_BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Heads in three parts: both halves of what turns, and the rest of the width, all rounded to the type of `x_row`.

    `wait` is behind the weights' load.
    """
    dtype: tl.constexpr = x_row.dtype.element_ty
    i = tl.arange(0, HALF_BLOCK)[None, :]
    j = 2 * HALF + tl.arange(0, TAIL_BLOCK)[None, :]
    in_half, in_tail = i < HALF, j < WIDTH
    if NORM:
        low_weight = tl.load(weight_ptr + i, mask=in_half, other=0.0).to(tl.float32)
        high_weight = tl.load(weight_ptr + HALF + i, mask=in_half, other=0.0).to(tl.float32)
        tail_weight = tl.load(weight_ptr + j, mask=in_tail, other=0.0).to(tl.float32)
    wait(PDL)
    low = tl.load(x_row + i, mask=has_head & in_half, other=0.0).to(tl.float32)
    high = tl.load(x_row + HALF + i, mask=has_head & in_half, other=0.0).to(tl.float32)
    tail = tl.load(x_row + j, mask=has_head & in_tail, other=0.0).to(tl.float32)
    if NORM:
        squares = tl.sum(low * low, 1) + tl.sum(high * high, 1)
        if 2 * HALF < WIDTH:
            squares += tl.sum(tail * tail, 1)
        scale = tl.rsqrt(squares / WIDTH + eps)[:, None]
        low = (low * scale * low_weight).to(dtype).to(tl.float32)
        high = (high * scale * high_weight).to(dtype).to(tl.float32)
        tail = tail * scale * tail_weight
    cos, sin = cos_ptr + token * cos_stride + i, sin_ptr + token * cos_stride + i
    low_cos = tl.load(cos, mask=in_half, other=0.0).to(tl.float32)
    low_sin = tl.load(sin, mask=in_half, other=0.0).to(tl.float32)
    high_cos = tl.load(cos + HALF, mask=in_half, other=0.0).to(tl.float32)
    high_sin = tl.load(sin + HALF, mask=in_half, other=0.0).to(tl.float32)
    turned_low = (low * low_cos + high * low_sin).to(dtype)
    turned_high = (high * high_cos + low * high_sin).to(dtype)
    return turned_low, turned_high, tail.to(dtype)


@triton.jit
def _stored(x, scale, dtype: tl.constexpr, SCALED: tl.constexpr):
    """As the cache holds it."""
    if SCALED:
        x = tl.div_rn(x.to(tl.float32), scale)
        x = tl.minimum(tl.maximum(x, -_LARGEST), _LARGEST)
    return x.to(dtype)


@triton.jit
def _norm_turn_store(
    q_ptr,
    k_ptr,
    v_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    slots_ptr,
    behind_ptr,
    out_ptr,
    cache_ptr,
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    cos_stride,
    block_stride,
    part_stride,
    unit_stride,
    row_stride,
    eps,
    k_scale,
    v_scale,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    UNITS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    NORM: tl.constexpr,
    SCALED: tl.constexpr,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    TAIL_BLOCK: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Programs of a token: some query heads each, some keys each, some values each; then pieces of what is behind."""
    let_next_start(PDL)
    token = tl.program_id(0).to(tl.int64)
    of_q: tl.constexpr = (HEADS + AT_ONCE - 1) // AT_ONCE
    of_k: tl.constexpr = (UNITS + AT_ONCE - 1) // AT_ONCE
    part = tl.program_id(1)
    i = tl.arange(0, HALF_BLOCK)[None, :]
    j = 2 * HALF + tl.arange(0, TAIL_BLOCK)[None, :]
    if part < of_q:
        head = part * AT_ONCE + tl.arange(0, AT_ONCE)[:, None]
        has_head = head < HEADS
        x_row = q_ptr + token * q_token_stride + head * q_head_stride
        low, high, tail = _normed_and_turned(
            x_row, q_weight_ptr, cos_ptr, sin_ptr, token, cos_stride, has_head, eps,
            NORM, WIDTH, HALF, HALF_BLOCK, TAIL_BLOCK, PDL,
        )  # fmt: skip
        out_row = out_ptr + (token * HEADS + head) * WIDTH
        tl.store(out_row + i, low, mask=has_head & (i < HALF))
        tl.store(out_row + HALF + i, high, mask=has_head & (i < HALF))
        if 2 * HALF < WIDTH:
            tl.store(out_row + j, tail, mask=has_head & (j < WIDTH))
    elif part < of_q + of_k:
        head = (part - of_q) * AT_ONCE + tl.arange(0, AT_ONCE)[:, None]
        has_head = head < UNITS
        x_row = k_ptr + token * k_token_stride + head * k_head_stride
        low, high, tail = _normed_and_turned(
            x_row, k_weight_ptr, cos_ptr, sin_ptr, token, cos_stride, has_head, eps,
            NORM, WIDTH, HALF, HALF_BLOCK, TAIL_BLOCK, PDL,
        )  # fmt: skip
        slot = tl.load(slots_ptr + token)
        place = slot // BLOCK_SIZE * block_stride + slot % BLOCK_SIZE * row_stride
        row = cache_ptr + place + head * unit_stride
        dtype: tl.constexpr = cache_ptr.dtype.element_ty
        tl.store(row + i, _stored(low, k_scale, dtype, SCALED), mask=has_head & (i < HALF))
        tl.store(row + HALF + i, _stored(high, k_scale, dtype, SCALED), mask=has_head & (i < HALF))
        if 2 * HALF < WIDTH:
            tl.store(row + j, _stored(tail, k_scale, dtype, SCALED), mask=has_head & (j < WIDTH))
    elif part < of_q + 2 * of_k:
        wait(PDL)
        head = (part - of_q - of_k) * AT_ONCE + tl.arange(0, AT_ONCE)[:, None]
        column = tl.arange(0, WIDTH_BLOCK)[None, :]
        mask = (head < UNITS) & (column < WIDTH)
        value = tl.load(v_ptr + token * v_token_stride + head * v_head_stride + column, mask=mask, other=0.0)
        slot = tl.load(slots_ptr + token)
        place = slot // BLOCK_SIZE * block_stride + slot % BLOCK_SIZE * row_stride + part_stride
        stored = _stored(value, v_scale, cache_ptr.dtype.element_ty, SCALED)
        tl.store(cache_ptr + place + head * unit_stride + column, stored, mask=mask)
    else:
        if PDL and token == 0:
            piece = (part - of_q - 2 * of_k).to(tl.int64) * _EARLY_PIECES + tl.arange(0, _EARLY_PIECES)
            bring_to_l2(behind_ptr + piece * _EARLY_PIECE, _EARLY_PIECE)


def norm_turn_store(
    q_THD: Tensor,
    k_TUD: Tensor,
    v_TUD: Tensor,
    weights: tuple[Tensor, Tensor] | None,
    eps: float,
    cos_T1R: Tensor,
    sin_T1R: Tensor,
    cache: Tensor,
    slots_T: Tensor,
    scales: tuple[float, float] | None,
    behind: Tensor | None = None,
) -> Tensor:
    """As `common.kernels.qkv_ops.norm_turn_store`, for heads, tables and rows of the cache that are contiguous."""
    tokens, heads, width = q_THD.shape
    units, half = k_TUD.shape[1], cos_T1R.shape[2] // 2
    out_THD = torch.empty((tokens, heads, width), dtype=q_THD.dtype, device=q_THD.device)
    width_block = triton.next_power_of_2(width)
    at_once = min(triton.next_power_of_2(max(heads, units)), max(1, _TILE // width_block))
    q_weight, k_weight = weights or (q_THD, q_THD)
    k_scale, v_scale = scales or (1.0, 1.0)
    use_pdl = pdl(q_THD.device)
    early = 0
    if behind is not None and use_pdl and tokens <= _EARLY_MAX_TOKENS:
        early = min(behind.nbytes, _EARLY_NBYTES) // (_EARLY_PIECE.value * _EARLY_PIECES.value)
    _norm_turn_store[(tokens, triton.cdiv(heads, at_once) + 2 * triton.cdiv(units, at_once) + early)](
        q_THD,
        k_TUD,
        v_TUD,
        q_weight,
        k_weight,
        cos_T1R,
        sin_T1R,
        slots_T,
        (out_THD if behind is None else behind).view(torch.int8),
        out_THD,
        cache,
        *q_THD.stride()[:2],
        *k_TUD.stride()[:2],
        *v_TUD.stride()[:2],
        cos_T1R.stride(0),
        *cache.stride()[:4],
        eps,
        k_scale,
        v_scale,
        BLOCK_SIZE=cache.shape[3],
        HEADS=heads,
        UNITS=units,
        AT_ONCE=at_once,
        NORM=weights is not None,
        SCALED=scales is not None,
        WIDTH=width,
        HALF=half,
        HALF_BLOCK=triton.next_power_of_2(half),
        TAIL_BLOCK=triton.next_power_of_2(max(1, width - 2 * half)),
        WIDTH_BLOCK=width_block,
        PDL=use_pdl,
        num_warps=4,
        launch_pdl=use_pdl,
    )
    return out_THD
