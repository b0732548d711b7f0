"""Kernels of NVIDIA GPUs, written in Triton: one module for each concern, imported when it is first used.

    if gpu.enabled(x):
        return gpu.norms.rms_norm(x, weight, eps)

A machine without Triton never imports one of them: there `enabled` is false, and plain torch does the work.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:  # what `__getattr__` finds, for the type checker
    from common.kernels.gpu import compress as compress
    from common.kernels.gpu import delta as delta
    from common.kernels.gpu import digest as digest
    from common.kernels.gpu import experts as experts
    from common.kernels.gpu import fixed as fixed
    from common.kernels.gpu import fixed_attention as fixed_attention
    from common.kernels.gpu import fp8 as fp8
    from common.kernels.gpu import gather as gather
    from common.kernels.gpu import index_keys as index_keys
    from common.kernels.gpu import indexer as indexer
    from common.kernels.gpu import linear as linear
    from common.kernels.gpu import masks as masks
    from common.kernels.gpu import norms as norms
    from common.kernels.gpu import paged_attention as paged_attention
    from common.kernels.gpu import pointwise as pointwise
    from common.kernels.gpu import qkv as qkv
    from common.kernels.gpu import rope as rope
    from common.kernels.gpu import routing as routing
    from common.kernels.gpu import rows as rows
    from common.kernels.gpu import sampling as sampling
    from common.kernels.gpu import sparse_latent as sparse_latent


def enabled(x: Tensor) -> bool:
    """Do the kernels of this package compute on `x`?"""
    return x.is_cuda and not unavailable()


@functools.cache
def unavailable() -> str:
    """Why the kernels cannot run on this machine's GPUs; empty if they can."""
    return "" if importlib.util.find_spec("triton") else "triton is not installed"


def __getattr__(name: str) -> ModuleType:
    full_name = f"{__name__}.{name}"
    try:
        return importlib.import_module(full_name)
    except ModuleNotFoundError as error:
        if error.name != full_name:
            raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
