"""What the tests of GPU kernels share."""

from __future__ import annotations

import torch
from torch import Tensor


def spacing(got: Tensor) -> float:
    """The largest relative error of one rounding to `got`'s type, with some room for fp32's before it.

    Triton's interpreter cuts bfloat16 off where a GPU rounds.
    """
    if got.dtype == torch.bfloat16:
        return 2.0**-8 if got.is_cuda else 2.0**-7
    return {torch.float32: 2.0**-20, torch.float16: 2.0**-10}[got.dtype]


def check(got: Tensor, want: Tensor, magnitude: Tensor | None = None) -> None:
    """Equal but for one rounding of the result. `magnitude`: of what was added up in fp32, if more than the result."""
    assert got.shape == want.shape
    off, magnitude = (got.double() - want).abs(), want.abs() if magnitude is None else magnitude
    bound = want.abs() * spacing(got) + magnitude * 2.0**-18 + 1e-6
    assert bool((off <= bound).all()), f"off by {off.max()}"
