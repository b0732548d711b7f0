"""Norms of the last dimension, with and without the residual sum before them: fp32 inside, one rounding at the end.

A program holds whole rows in registers, so a row is read once. Its sum does not depend on the other rows of the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.kernels.gpu.launch import let_next_start, pdl, wait

_TILE = 2048  # elements of narrow rows that a program takes at once


@triton.jit(do_not_specialize=["num_rows", "split"])
def _rms_norm(
    x_ptr,
    weight_ptr,
    out_ptr,
    num_rows,
    split,
    x_token_stride,
    x_head_stride,
    weight_stride,
    eps,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_start(PDL)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    head = row % HEADS
    mask = (row < num_rows) & (column < WIDTH)
    kind = tl.where(head >= split, weight_stride, 0)
    weight = tl.load(weight_ptr + kind + column, mask=mask, other=0.0).to(tl.float32)
    wait(PDL)
    place = row // HEADS * x_token_stride + head * x_head_stride + column
    x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 1) / WIDTH + eps)
    out = x * scale[:, None] * weight
    tl.store(out_ptr + row * WIDTH + column, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _add_rms_norm(
    residual_ptr,
    delta_ptr,
    weight_ptr,
    out_ptr,
    residual_stride,
    delta_stride,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_start(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < WIDTH
    weight = tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    wait(PDL)
    place = residual_ptr + row * residual_stride + column
    total = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    total += tl.load(delta_ptr + row * delta_stride + column, mask=mask, other=0.0).to(tl.float32)
    rounded = total.to(residual_ptr.dtype.element_ty)
    tl.store(place, rounded, mask=mask)
    x = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / WIDTH + eps)
    tl.store(out_ptr + row * WIDTH + column, (x * scale * weight).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _layer_norm(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    x_stride,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_start(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < WIDTH
    weight = tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=mask, other=0.0).to(tl.float32)
    wait(PDL)
    x = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    x = tl.where(mask, x - tl.sum(x, 0) / WIDTH, 0.0)
    scale = tl.rsqrt(tl.sum(x * x, 0) / WIDTH + eps)
    out = x * scale * weight + bias
    tl.store(out_ptr + row * WIDTH + column, out.to(out_ptr.dtype.element_ty), mask=mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float, split: int = 0) -> Tensor:
    """As `common.kernels.ops.rms_norm`, for `x` with contiguous rows."""
    heads, head_stride = (1, 0) if x.dim() == 2 else (x.shape[1], x.stride(1))
    width, num_rows = x.shape[-1], x.shape[0] * heads
    two = weight.dim() == 2
    block = triton.next_power_of_2(width)
    rows = max(1, _TILE // block)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    use_pdl = pdl(x.device)
    _rms_norm[(triton.cdiv(num_rows, rows),)](
        x,
        weight,
        out,
        num_rows,
        split if two else heads,
        x.stride(0),
        head_stride,
        weight.stride(0) if two else 0,
        eps,
        HEADS=heads,
        WIDTH=width,
        ROWS=rows,
        BLOCK=block,
        PDL=use_pdl,
        num_warps=_num_warps(rows * block),
        launch_pdl=use_pdl,
    )
    return out


def add_rms_norm(residual_TD: Tensor, delta_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """As `common.kernels.ops.add_rms_norm`, for rows that are contiguous."""
    tokens, width = residual_TD.shape
    block = triton.next_power_of_2(width)
    out_TD = torch.empty((tokens, width), dtype=residual_TD.dtype, device=residual_TD.device)
    use_pdl = pdl(residual_TD.device)
    _add_rms_norm[(tokens,)](
        residual_TD,
        delta_TD,
        weight_D,
        out_TD,
        residual_TD.stride(0),
        delta_TD.stride(0),
        eps,
        WIDTH=width,
        BLOCK=block,
        PDL=use_pdl,
        num_warps=_num_warps(block),
        launch_pdl=use_pdl,
    )
    return out_TD


def layer_norm(x_TD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
    """As `common.kernels.ops.layer_norm`, for rows that are contiguous."""
    tokens, width = x_TD.shape
    block = triton.next_power_of_2(width)
    out_TD = torch.empty((tokens, width), dtype=x_TD.dtype, device=x_TD.device)
    use_pdl = pdl(x_TD.device)
    _layer_norm[(tokens,)](
        x_TD,
        weight_D,
        bias_D,
        out_TD,
        x_TD.stride(0),
        eps,
        WIDTH=width,
        BLOCK=block,
        PDL=use_pdl,
        num_warps=_num_warps(block),
        launch_pdl=use_pdl,
    )
    return out_TD


def _num_warps(elements: int) -> int:
    """One access of 8 elements for each thread, of wide rows two or more."""
    return min(16, max(1, elements // 256))
