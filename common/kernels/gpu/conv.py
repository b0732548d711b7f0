"""Causal depthwise convolutions whose last inputs a sequence keeps in its block of a state.

Sums are fp32 and in an order of their own: a token's result has the same bits whatever else is in the step, and
wherever its prompt is cut.
"""

from __future__ import annotations

import triton
import triton.language as tl

from common.kernels.gpu.launch import let_next_start, wait


@triton.jit
def mixed_token(
    x_ptr,
    kept_ptr,
    taps_ptr,
    t,
    first,
    x_stride,
    part_stride,
    TAPS_STRIDE: tl.constexpr,
    TAPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Silu of the convolution over WIDTH channels at token `t` of a sequence that begins with `first` (int64): fp32.

    `x_ptr`: rows of inputs, a token `x_stride` apart; `kept_ptr`: the TAPS - 1 inputs before `first`, `part_stride`
    apart. All inputs of the token are one tile: of single rows the compiler would make each thread load all it needs.
    """
    TILE: tl.constexpr = triton.next_power_of_2(TAPS)
    tap, column = tl.arange(0, TILE)[:, None], tl.arange(0, BLOCK)[None, :]
    back, has = t - first + tap - (TAPS - 1), (tap < TAPS) & (column < WIDTH)
    x = tl.load(x_ptr + (first + back) * x_stride + column, mask=has & (back >= 0), other=0.0).to(tl.float32)
    place = (back + (TAPS - 1)) * part_stride
    x += tl.load(kept_ptr + place + column, mask=has & (back < 0), other=0.0).to(tl.float32)
    weight = tl.load(taps_ptr + tap * TAPS_STRIDE + column, mask=has, other=0.0)
    acc = tl.sum(x * weight, 0)
    return acc / (1.0 + tl.exp(-acc))


@triton.jit
def mixed_tile(
    x_ptr,
    kept_ptr,
    taps_ptr,
    t,
    first,
    column,
    has_token,
    has_column,
    x_stride,
    part_stride,
    TAPS_STRIDE: tl.constexpr,
    TAPS: tl.constexpr,
):
    """As `mixed_token`, of tokens `t` [N, 1] and channels `column` [1, C]: [N, C]."""
    mask = has_token & has_column
    for i in tl.static_range(TAPS):
        at = t - (TAPS - 1 - i)
        x = tl.load(x_ptr + at * x_stride + column, mask=mask & (at >= first), other=0.0).to(tl.float32)
        place = (at - first + (TAPS - 1)) * part_stride
        x += tl.load(kept_ptr + place + column, mask=mask & (at < first), other=0.0).to(tl.float32)
        weight = tl.load(taps_ptr + i * TAPS_STRIDE + column, mask=has_column, other=0.0)
        if i == 0:
            acc = x * weight
        else:
            acc += x * weight
    return acc / (1.0 + tl.exp(-acc))


@triton.jit
def _kept_of(
    x_ptr, kept_ptr, first, count, x_stride, part_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr, KEPT: tl.constexpr
):
    """Bring the kept inputs of some channels from before a step to behind it."""
    PARTS: tl.constexpr = triton.next_power_of_2(KEPT)
    part, column = tl.arange(0, PARTS)[:, None], tl.arange(0, BLOCK)[None, :]
    mask = (part < KEPT) & (column < WIDTH)
    back = part + count - KEPT  # tokens behind `first`; what is below 0 was kept before
    new = tl.load(x_ptr + (first + back) * x_stride + column, mask=mask & (back >= 0))
    old = tl.load(kept_ptr + (back + KEPT) * part_stride + column, mask=mask & (back < 0))
    tl.debug_barrier()  # in place: all is read before anything is written
    tl.store(kept_ptr + part * part_stride + column, tl.where(back >= 0, new, old), mask=mask)


@triton.jit
def keep_inputs(
    q_ptr,
    k_ptr,
    v_ptr,
    kept_ptr,
    blocks_ptr,
    starts_ptr,
    x_stride,
    qk_stride,
    v_stride,
    block_stride,
    part_stride,
    unit_stride,
    KEY_WIDTH: tl.constexpr,
    VALUES_WIDTH: tl.constexpr,
    KEPT: tl.constexpr,
    PDL: tl.constexpr,
):
    """A unit (key head) of a sequence keeps its last KEPT inputs. Behind the kernels that read what it kept before."""
    let_next_start(PDL)
    wait(PDL)
    unit, s = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first = tl.load(starts_ptr + s).to(tl.int64)
    count = tl.load(starts_ptr + s + 1) - first
    if count == 0:
        return
    kept_ptr += tl.load(blocks_ptr + s) * block_stride + unit * unit_stride
    keys: tl.constexpr = triton.next_power_of_2(KEY_WIDTH)
    values: tl.constexpr = triton.next_power_of_2(VALUES_WIDTH)
    q_ptr += unit * qk_stride
    k_ptr += unit * qk_stride
    _kept_of(q_ptr, kept_ptr, first, count, x_stride, part_stride, KEY_WIDTH, keys, KEPT)
    _kept_of(k_ptr, kept_ptr + KEY_WIDTH, first, count, x_stride, part_stride, KEY_WIDTH, keys, KEPT)
    v_ptr += unit * v_stride
    _kept_of(v_ptr, kept_ptr + 2 * KEY_WIDTH, first, count, x_stride, part_stride, VALUES_WIDTH, values, KEPT)
