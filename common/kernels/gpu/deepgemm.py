"""DeepGEMM: matrix products in block-scaled FP8, of one weight or of many experts.

It compiles a kernel for each shape of a weight when it first meets it, or finds it in its cache on disk.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType

import torch
from torch import Tensor

GROUP_ROWS = 128
"""Rows of one expert begin at multiples of this."""


@functools.cache
def unavailable() -> str:
    """Why it cannot be used on this machine's GPUs; empty if it can."""
    if importlib.util.find_spec("deep_gemm") is None:
        return "deep_gemm is not installed"
    major, minor = torch.cuda.get_device_capability()
    if major != 9:
        return f"deep_gemm is used on compute capability 9, and this is {major}.{minor}"
    try:
        _library()
    except (ImportError, OSError, AssertionError, RuntimeError) as error:  # no compiler, another torch
        return f"deep_gemm cannot be loaded: {error!r}"
    return ""


@functools.cache
def _library() -> ModuleType:
    return importlib.import_module("deep_gemm")


def linear_fp8(x: tuple[Tensor, Tensor], weight: tuple[Tensor, Tensor], out_TN: Tensor) -> None:
    """Rows times a weight, in bf16. E4M3 [T, K], [N, K]; scales fp32 [T, K / 128] by columns, [N / 128, K / 128]."""
    _library().fp8_gemm_nt(x, weight, out_TN)


def grouped_fp8(
    x_RK: tuple[Tensor, Tensor], weight_ENK: tuple[Tensor, Tensor], out_RN: Tensor, experts_R: Tensor
) -> None:
    """Rows times their experts' weights, in bf16. Values and scales as in `linear_fp8`.

    `experts_R` int32: the same for the `GROUP_ROWS` rows from each multiple of that, but -1 where half of them or all
    are of no account.
    """
    _library().m_grouped_fp8_gemm_nt_contiguous(x_RK, weight_ENK, out_RN, experts_R)
