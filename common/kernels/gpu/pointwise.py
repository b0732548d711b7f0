"""Gates of feed-forward and attention: fp32 inside, one rounding at the end."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.kernels.gpu.launch import let_next_start, pdl, wait

_BLOCK = 1024


@triton.jit
def silu_times(gate, up, limit, LIMITED: tl.constexpr):
    """silu(gate) * up of fp32 numbers, cut off at `limit` first if LIMITED."""
    if LIMITED:
        gate = tl.minimum(gate, limit)
        up = tl.maximum(tl.minimum(up, limit), -limit)
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def _silu_mul(
    gate_up_ptr,
    out_ptr,
    row_stride,
    width,
    limit,
    LIMITED: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_start(PDL)
    wait(PDL)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    gate_ptr = gate_up_ptr + token * row_stride + column
    gate = tl.load(gate_ptr, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + width, mask=mask, other=0.0).to(tl.float32)
    out = silu_times(gate, up, limit, LIMITED)
    tl.store(out_ptr + token * width + column, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sigmoid_mul(
    x_ptr,
    gate_ptr,
    out_ptr,
    x_stride,
    gate_stride,
    width,
    ROW_GATE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_start(PDL)
    wait(PDL)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    x = tl.load(x_ptr + token * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    if ROW_GATE:
        gate = tl.load(gate_ptr + token * gate_stride).to(tl.float32)
    else:
        gate = tl.load(gate_ptr + token * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
    out = x / (1.0 + tl.exp(-gate))
    tl.store(out_ptr + token * width + column, out.to(out_ptr.dtype.element_ty), mask=mask)


def silu_mul(gate_up_TI: Tensor, limit: float) -> Tensor:
    """As `common.kernels.ops.silu_mul`, for rows that are contiguous."""
    tokens, width = gate_up_TI.shape[0], gate_up_TI.shape[1] // 2
    out = torch.empty((tokens, width), dtype=gate_up_TI.dtype, device=gate_up_TI.device)
    use_pdl = pdl(gate_up_TI.device)
    _silu_mul[(tokens, triton.cdiv(width, _BLOCK))](
        gate_up_TI,
        out,
        gate_up_TI.stride(0),
        width,
        float(limit),
        LIMITED=limit > 0,
        BLOCK=_BLOCK,
        PDL=use_pdl,
        launch_pdl=use_pdl,
    )
    return out


def sigmoid_mul(x_TD: Tensor, gate_TG: Tensor) -> Tensor:
    """As `common.kernels.ops.sigmoid_mul`, for rows that are contiguous."""
    tokens, width = x_TD.shape
    out = torch.empty((tokens, width), dtype=x_TD.dtype, device=x_TD.device)
    use_pdl = pdl(x_TD.device)
    _sigmoid_mul[(tokens, triton.cdiv(width, _BLOCK))](
        x_TD,
        gate_TG,
        out,
        x_TD.stride(0),
        gate_TG.stride(0),
        width,
        ROW_GATE=gate_TG.shape[1] == 1,
        BLOCK=_BLOCK,
        PDL=use_pdl,
        launch_pdl=use_pdl,
    )
    return out
