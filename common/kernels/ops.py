"""Operations of layers that have a kernel of their own on CPU, with torch's as the fallback elsewhere.

The CPU kernels add in fixed orders: a row's result is bitwise the same whatever else is in the batch and however
many threads there are. Which instruction set runs is the library's choice; tests force one by `isa`.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor
from torch.nn import functional

from common.kernels import cpu

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # nd::Dtype

_LINEAR = struct.Struct("@10q3i4x")  # nd::LinearCall


def linear(
    x_TK: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    isa: cpu.Isa = cpu.Isa.BEST,
) -> Tensor:
    """Matrix product x @ weight^T + bias, summed in fp32 and rounded once: [T, N] of `out_dtype` (x's if None).

    Rows of `x_TK` and `weight_NK` must be contiguous for the kernel; what it cannot do goes to torch.
    """
    lib = cpu.library()
    out_dtype = out_dtype or x_TK.dtype
    if lib is None or not _fits(x_TK, weight_NK, bias_N):
        return functional.linear(x_TK, weight_NK, bias_N).to(out_dtype)
    m, k = x_TK.shape
    n = weight_NK.shape[0]
    out_TN = torch.empty(m, n, dtype=out_dtype)
    call = _LINEAR.pack(
        x_TK.data_ptr(),
        weight_NK.data_ptr(),
        0 if bias_N is None else bias_N.data_ptr(),
        out_TN.data_ptr(),
        x_TK.stride(0),
        weight_NK.stride(0),
        n,
        m,
        n,
        k,
        DTYPES[x_TK.dtype],
        DTYPES[weight_NK.dtype],
        DTYPES[out_dtype],
    )
    lib.nd_linear(isa, torch.get_num_threads(), call)
    return out_TN


def _fits(x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> bool:
    return (
        x_TK.device.type == "cpu"
        and x_TK.dim() == 2
        and x_TK.dtype in DTYPES
        and weight_NK.dtype in DTYPES
        and x_TK.stride(1) == 1
        and weight_NK.stride(1) == 1
        and (bias_N is None or (bias_N.dtype == weight_NK.dtype and bias_N.stride(0) == 1))
    )
