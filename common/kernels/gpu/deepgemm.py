"""DeepGEMM: matrix products in block-scaled FP8, of one weight or of many experts.

It compiles a kernel when it first meets a weight's shape with a number of rows for which it cuts the product in a way
of its own, or finds it in its folder on disk. `common.engine.fp8_kernels` has all of a model compiled beforehand.
Folder and compiler are what its own variables say: DG_JIT_CACHE_DIR, DG_JIT_NVCC_COMPILER and CUDA_HOME.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
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


def folder() -> Path:
    """Where it keeps what it has compiled."""
    return Path(os.environ.get("DG_JIT_CACHE_DIR") or Path(os.environ.get("HOME", "")) / ".deep_gemm")


def compiler() -> str:
    """What it calls to compile. FileNotFoundError if there is none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = os.environ.get("DG_JIT_NVCC_COMPILER") or (f"{home}/bin/nvcc" if home else shutil.which("nvcc"))
    found = found or "/usr/local/cuda/bin/nvcc"
    if not os.access(found, os.X_OK):
        raise FileNotFoundError(f"there is no {found}: DeepGEMM's kernels need the CUDA toolkit")
    return found


def compile_with(program: Path) -> None:
    """Let it call that to compile, from now on: before it has compiled anything in this process."""
    os.environ["DG_JIT_NVCC_COMPILER"] = str(program)


def version() -> str:
    """Its own and its compiler's, both of which are in the names of what it keeps; of one that is not there nothing."""
    own = str(_library().__version__) if importlib.util.find_spec("deep_gemm") else ""
    try:
        return own + subprocess.run([compiler(), "--version"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return own


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


def idle_product(n: int, k: int, experts: int, rows: int) -> Callable[[int], None]:
    """Multiplies some of up to `rows` rows of nothing by a weight [n, k], or by those of `experts`, on this GPU."""
    lead = (experts,) if experts else ()
    x_RK, weight = (torch.zeros(*shape, dtype=torch.uint8, device="cuda") for shape in ((rows, k), (*lead, n, k)))
    scales = torch.ones(*lead, -(-n // 128), k // 128, device="cuda")
    out_RN = torch.empty(rows, n, dtype=torch.bfloat16, device="cuda")
    experts_R = torch.full((rows,), -1, dtype=torch.int32, device="cuda")
    both = weight.view(torch.float8_e4m3fn), scales

    def multiply(some: int) -> None:
        x_scales = torch.ones(k // 128, -(-some // 4) * 4, device="cuda").t()[:some]
        x = x_RK[:some].view(torch.float8_e4m3fn), x_scales
        if experts:
            grouped_fp8(x, both, out_RN[:some], experts_R[:some])
        else:
            linear_fp8(x, both, out_RN[:some])

    return multiply
