"""Block-scaled FP8: rows quantised as they come, and products with weights that stay in E4M3.

A weight [N, K] has a scale for each block of 128 x 128, a row one for each 128 elements: its largest magnitude over
448, the largest that E4M3 holds. Scales of rows lie by columns, [T, K / 128] with a stride of 1 along T.
"""

from __future__ import annotations

import functools

import structlog
import torch
import triton
import triton.language as tl
from torch import Tensor

from common.kernels.gpu import deepgemm, pointwise, products
from common.kernels.gpu.launch import let_next_start, pdl, wait
from common.kernels.gpu.pointwise import silu_times
from common.kernels.gpu.products import Rows

_log = structlog.stdlib.get_logger(__name__)


def linear(x_TK: Tensor, weight_NK: Tensor, scales: Tensor, out_dtype: torch.dtype, *, fixed: bool = False) -> Tensor:
    """Rows times a weight in E4M3: [T, N]. `scales` fp32 [ceil(N / 128), K / 128].

    `fixed`: by the same kernel whatever the number of rows.
    """
    tokens = x_TK.shape[0]
    x, x_scales = quantise(x_TK)
    if not fixed and not _why_not(x_TK.dtype, weight_NK.shape):
        out_TN = torch.empty(tokens, weight_NK.shape[0], dtype=torch.bfloat16, device=x_TK.device)
        if tokens:
            deepgemm.linear_fp8((x, x_scales), (weight_NK, scales), out_TN)
        return out_TN.to(out_dtype)
    out_TN = torch.empty(tokens, weight_NK.shape[0], dtype=out_dtype, device=x_TK.device)
    tile = products.tile_for(tokens, fp8=True, fixed=fixed)
    products.multiply(x, weight_NK[None], out_TN, Rows(), tile, scales=(x_scales, scales[None]))
    return out_TN


def linear_silu_mul(x_TK: Tensor, weight_LK: Tensor, scales: Tensor, limit: float, *, fixed: bool = False) -> Tensor:
    """Of `linear` with [gate | up] silu(gate) * up: [T, L / 2]."""
    tokens, size = x_TK.shape[0], weight_LK.shape[0] // 2
    if size % 128 or (not fixed and not _why_not(x_TK.dtype, weight_LK.shape)):
        return pointwise.silu_mul(linear(x_TK, weight_LK, scales, x_TK.dtype, fixed=fixed), limit)
    x, x_scales = quantise(x_TK)
    out_TI = torch.empty(tokens, size, dtype=x_TK.dtype, device=x_TK.device)
    tile = products.tile_for(tokens, fp8=True, fixed=fixed)
    both = x_scales, scales[None]
    products.multiply(x, weight_LK[None], out_TI, Rows(), tile, scales=both, gated=True, limit=limit)
    return out_TI


def quantise(x_TK: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 values [T, K], and scales fp32 [T, K / 128] by columns."""
    return _quantise(x_TK, x_TK.shape[1], None, gated=False, limit=0.0)


def silu_mul_quantise(gate_up_TL: Tensor, limit: float, experts_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`quantise` of silu(gate) * up, which is not rounded in between. Rows of an expert below 0 are left out."""
    return _quantise(gate_up_TL, gate_up_TL.shape[1] // 2, experts_T, gated=True, limit=limit)


def _quantise(x: Tensor, width: int, experts_T: Tensor | None, *, gated: bool, limit: float) -> tuple[Tensor, Tensor]:
    assert x.stride(1) == 1
    assert width % 128 == 0
    tokens, device = x.shape[0], x.device
    out = torch.empty(tokens, width, dtype=torch.float8_e4m3fn, device=device)
    padded = triton.cdiv(tokens, 4) * 4  # DeepGEMM reads columns of whole 16 bytes
    scales = torch.empty(width // 128, padded, dtype=torch.float32, device=device).t()[:tokens]
    if tokens:
        block = 1024 if tokens >= 64 else 256
        use_pdl = pdl(device)
        _quantise_rows[(tokens, triton.cdiv(width, block))](
            x,
            x if experts_T is None else experts_T,
            out,
            scales,
            x.stride(0),
            scales.stride(1),
            width,
            float(limit),
            GATED=gated,
            LIMITED=limit > 0,
            SOME=experts_T is not None,
            BLOCK=block,
            PDL=use_pdl,
            launch_pdl=use_pdl,
            num_warps=block // 256,
        )
    return out, scales


@functools.cache
def _why_not(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    """Why DeepGEMM does not multiply by a weight of this shape, empty if it does; said once."""
    reason = ""
    if dtype != torch.bfloat16 or shape[0] % 64 or shape[1] % 128:
        reason = f"rows of {dtype} and a weight of {list(shape)}: it takes bfloat16 and multiples of 64 x 128"
    reason = reason or deepgemm.unavailable()
    _log.debug("FP8 products", shape=list(shape), by="triton" if reason else "deep_gemm", reason=reason)
    return reason


@triton.jit(do_not_specialize=["scales_stride"])
def _quantise_rows(
    x_ptr,
    experts_ptr,
    out_ptr,
    scales_ptr,
    x_stride,
    scales_stride,
    width,
    limit,
    GATED: tl.constexpr,
    LIMITED: tl.constexpr,
    SOME: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_start(PDL)
    wait(PDL)
    t = tl.program_id(0).to(tl.int64)
    if SOME and tl.load(experts_ptr + t) < 0:
        return
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = d < width
    x = tl.load(x_ptr + t * x_stride + d, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        up = tl.load(x_ptr + t * x_stride + width + d, mask=mask, other=0.0).to(tl.float32)
        x = silu_times(x, up, limit, LIMITED)
    x_G = x.reshape(BLOCK // 128, 128)
    scale = tl.maximum(tl.max(tl.abs(x_G), 1), 1e-10) / 448.0
    g = tl.program_id(1) * (BLOCK // 128) + tl.arange(0, BLOCK // 128)
    tl.store(scales_ptr + g.to(tl.int64) * scales_stride + t, scale, mask=g < width // 128)
    out = (x_G * (1.0 / scale)[:, None]).to(tl.float8e4nv).reshape(BLOCK)
    tl.store(out_ptr + t * width + d, out, mask=mask)
