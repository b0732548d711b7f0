"""Weights that stay in FP8: E4M3 values [N, K] with an fp32 scale for each block of 128 x 128.

Rows are quantised as they come, 128 elements with a scale of their own, as DeepSeek-V3 was trained (section 3.3.2).
That is a GPU's way; elsewhere the weight is turned into numbers of the rows' type, and torch multiplies.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from common.kernels import gpu
from common.kernels.ops import silu_mul

BLOCK = 128
"""Rows and columns of a weight that share a scale."""

LARGEST = 448.0


def linear_fp8(
    x_TK: Tensor, weight_NK: Tensor, scales: Tensor, bias_N: Tensor | None = None, *, fixed: bool = False
) -> Tensor:
    """Matrix product x @ weight^T + bias: [T, N] of x's type. `scales` [ceil(N / 128), ceil(K / 128)].

    `fixed`: a row's bits do not depend on the other rows.
    """
    if gpu.enabled(x_TK):
        out_TN = gpu.fp8.linear(x_TK, weight_NK, scales, x_TK.dtype, fixed=fixed)
        return out_TN if bias_N is None else out_TN.add_(bias_N)
    return functional.linear(x_TK, dequantise(weight_NK, scales, x_TK.dtype), bias_N)


def linear_fp8_silu_mul(
    x_TK: Tensor,
    weight_LK: Tensor,
    scales: Tensor,
    bias_L: Tensor | None = None,
    limit: float = 0.0,
    *,
    fixed: bool = False,
) -> Tensor:
    """Of `linear_fp8` with [gate | up] silu(gate) * up, `limit` as in `common.kernels.ops.silu_mul`: [T, L / 2]."""
    if bias_L is None and gpu.enabled(x_TK):
        return gpu.fp8.linear_silu_mul(x_TK, weight_LK, scales, limit, fixed=fixed)
    return silu_mul(linear_fp8(x_TK, weight_LK, scales, bias_L, fixed=fixed), limit)


def quantise_weight(values: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 and fp32 scales [..., ceil(N / 128), ceil(K / 128)] of a weight [..., N, K]: each block by its largest."""
    *lead, rows, columns = values.shape
    padded = functional.pad(values.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.reshape(*lead, -(-rows // BLOCK), BLOCK, -(-columns // BLOCK), BLOCK)
    scales = blocks.abs().amax((-3, -1)).clamp_(1e-10) / LARGEST
    scaled = (blocks / scales[..., :, None, :, None]).reshape(padded.shape)
    return scaled[..., :rows, :columns].to(torch.float8_e4m3fn), scales


def dequantise(weight: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Values times scales, rounded once."""
    spread = scales.repeat_interleave(BLOCK, -2).repeat_interleave(BLOCK, -1)
    return (weight.float() * spread[..., : weight.shape[-2], : weight.shape[-1]]).to(dtype)
