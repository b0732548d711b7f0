"""Weights that stay in FP8 on a GPU: values in E4M3, and a scale for each block of 128 x 128 beside them.

A layer asks for them where `Build` says so and all of its parts, and a rank's share of each, begin on a block boundary;
its other weights have the model's type. A checkpoint that has just such blocks, or one scale for a tensor, fills them
as they are. Which of the rest are quantised when they are loaded `common.models.fp8_choice` says.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from common.kernels.fp8_ops import BLOCK, LARGEST, linear_fp8, linear_fp8_silu_mul, quantise_weight
from common.kernels.ops import linear, linear_silu_mul
from common.layers.base import Build, Slot

BLOCK_SHAPE = (BLOCK, BLOCK)

_DRAWN_STD = 32.0  # of random values as they are stored: far from the smallest and from the largest


def fits_blocks(*sizes: int) -> bool:
    return all(size % BLOCK == 0 for size in sizes)


def empty_weight(build: Build, in_fp8: bool, *shape: int) -> tuple[Tensor, Tensor | None]:
    """Values [..., N, K] and scales fp32 [..., ceil(N / 128), ceil(K / 128)]; in the model's type without scales."""
    if not in_fp8:
        return build.empty(*shape), None
    grid = (*shape[:-2], -(-shape[-2] // BLOCK), -(-shape[-1] // BLOCK))
    values = torch.empty(shape, dtype=torch.float8_e4m3fn, device=build.device)
    return values, torch.empty(grid, dtype=torch.float32, device=build.device)


def exact(build: Build) -> Build:
    """The same with all linear weights in the model's type: for a layer that reads them itself."""
    return replace(build, fp8_linears=False, exact=True)


def blocks_of(scales: Tensor | None, dim: int, part: slice) -> Tensor | None:
    """Scales of a part of a weight in dimension `dim`, which begins on a boundary."""
    if scales is None:
        return None
    first = part.start // BLOCK
    return scales.narrow(dim, first, -(-part.stop // BLOCK) - first)


def product(
    x_TK: Tensor, weight_NK: Tensor, scales: Tensor | None, bias_N: Tensor | None = None, *, fixed: bool = False
) -> Tensor:
    """Rows of x times a weight of either kind: [T, N] of x's type. `fixed`: see `Build`."""
    if scales is None:
        return linear(x_TK, weight_NK, bias_N, fixed=fixed)
    return linear_fp8(x_TK, weight_NK, scales, bias_N, fixed=fixed)


def gated_product(
    x_TK: Tensor, weight_LK: Tensor, scales: Tensor | None, bias_L: Tensor | None, limit: float, *, fixed: bool = False
) -> Tensor:
    """Of `product` with [gate | up] silu(gate) * up: [T, L / 2]."""
    if scales is None:
        return linear_silu_mul(x_TK, weight_LK, bias_L, limit, fixed=fixed)
    return linear_fp8_silu_mul(x_TK, weight_LK, scales, bias_L, limit, fixed=fixed)


def fill_quantised(slot: Slot, values: Tensor) -> None:
    """Quantise numbers of the target's shape into it."""
    assert slot.scales is not None
    for target, scales, some in zip(*(_matrices(t) for t in (slot.target, slot.scales, values)), strict=True):
        quantised = quantise_weight(some.to(target.device))
        target.copy_(quantised[0])
        scales.copy_(quantised[1])


def fill_drawn(target: Tensor, scales: Tensor, values: Tensor, std: float) -> None:
    """Random numbers of deviation `std` into a part of a target, all of whose blocks get the scale for that."""
    target.copy_((values.float() * (_DRAWN_STD / std)).clamp_(-LARGEST, LARGEST))
    scales.fill_(std / _DRAWN_STD)


def _matrices(t: Tensor) -> list[Tensor]:
    return [t] if t.dim() == 2 else list(t)
