"""Rotary positions: what `common.kernels.ops.rope` says."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.kernels.gpu.launch import let_next_start, pdl, wait

_TILE = 2048  # elements that a program turns at once


@triton.jit
def _rope(
    x_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    x_token_stride,
    x_head_stride,
    out_token_stride,
    out_head_stride,
    cos_stride,
    sin_stride,
    heads,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_start(PDL)
    wait(PDL)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    i = tl.arange(0, BLOCK)[None, :]
    mask = (head < heads) & (i < HALF)
    x_row = x_ptr + token * x_token_stride + head * x_head_stride
    if INTERLEAVED:
        pair = 2 * i[:, :, None] + tl.arange(0, 2)[None, None, :]
        low, high = tl.split(tl.load(x_row[:, :, None] + pair, mask=mask[:, :, None], other=0.0).to(tl.float32))
    else:
        low = tl.load(x_row + i, mask=mask, other=0.0).to(tl.float32)
        high = tl.load(x_row + HALF + i, mask=mask, other=0.0).to(tl.float32)
    cos, sin = cos_ptr + token * cos_stride + i, sin_ptr + token * sin_stride + i
    in_row = i < HALF
    turned_low = low * tl.load(cos, mask=in_row, other=0.0) + high * tl.load(sin, mask=in_row, other=0.0)
    turned_high = high * tl.load(cos + HALF, mask=in_row, other=0.0) + low * tl.load(sin + HALF, mask=in_row, other=0.0)
    if INTERLEAVED:
        tl.debug_barrier()  # in place, what one thread writes another reads
    out_row = out_ptr + token * out_token_stride + head * out_head_stride
    tl.store(out_row + i, turned_low.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out_row + HALF + i, turned_high.to(out_ptr.dtype.element_ty), mask=mask)


def rope(x_THD: Tensor, cos_T1D: Tensor, sin_T1D: Tensor, interleaved: bool, out_THD: Tensor | None) -> Tensor:
    """As `common.kernels.ops.rope`, for heads and tables that are contiguous."""
    tokens, heads, width = x_THD.shape
    if out_THD is None:
        out_THD = torch.empty(x_THD.shape, dtype=x_THD.dtype, device=x_THD.device)
    block = triton.next_power_of_2(width // 2)
    at_once = min(triton.next_power_of_2(heads), max(1, _TILE // (2 * block)))
    use_pdl = pdl(x_THD.device)
    _rope[(tokens, triton.cdiv(heads, at_once))](
        x_THD,
        cos_T1D,
        sin_T1D,
        out_THD,
        x_THD.stride(0),
        x_THD.stride(1),
        out_THD.stride(0),
        out_THD.stride(1),
        cos_T1D.stride(0),
        sin_T1D.stride(0),
        heads,
        HALF=width // 2,
        BLOCK=block,
        HEADS=at_once,
        INTERLEAVED=interleaved,
        PDL=use_pdl,
        launch_pdl=use_pdl,
    )
    return out_THD
