"""Root mean square norm (Zhang and Sennrich 2019): x / rms(x) * weight, in fp32 inside.

Some families (Gemma, Qwen3-Next) are *zero-centred*: their checkpoints hold w of 1 + w, which is added up in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from common.kernels.ops import add_rms_norm, rms_norm
from common.layers.base import Build, Init, Layer, Slot


class RMSNorm(Layer):
    def __init__(self, build: Build, width: int, eps: float, *, zero_centred: bool = False) -> None:
        self._width = (width,)
        self.eps = eps
        self._zero_centred = zero_centred
        self.weight = torch.empty(width, dtype=_dtype(build, zero_centred), device=build.device)

    def own_slots(self) -> Iterator[Slot]:
        yield Slot("weight", self.weight, self._width, init=_init(self._zero_centred))

    def derive_own(self) -> None:
        if self._zero_centred:
            self.weight += 1.0

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def of_sum(self, residual_TD: Tensor, delta_TD: Tensor) -> Tensor:
        """The norm of both together; `residual_TD` takes the sum."""
        return add_rms_norm(residual_TD, delta_TD, self.weight, self.eps)


class QKNorm(Layer):
    """Per-head norm of queries and keys in one pass; they lie side by side and differ in the weight alone."""

    transparent = True

    def __init__(self, build: Build, num_heads: int, num_kv_heads: int, head_dim: int, eps: float) -> None:
        self._width = (head_dim,)
        self.eps = eps
        self._num_heads = num_heads
        self.weight_2D = build.empty(2, head_dim)
        self.weights = (self.weight_2D[0], self.weight_2D[1])

    def own_slots(self) -> Iterator[Slot]:
        yield Slot("q_norm.weight", self.weight_2D[0], self._width, init=Init.ONES)
        yield Slot("k_norm.weight", self.weight_2D[1], self._width, init=Init.ONES)

    def __call__(self, qk_THD: Tensor) -> Tensor:
        """`qk_THD`: query heads, then key heads; the same shape comes back, contiguous."""
        return rms_norm(qk_THD, self.weight_2D, self.eps, split=self._num_heads)


def _dtype(build: Build, zero_centred: bool) -> torch.dtype:
    return torch.float32 if zero_centred else build.dtype


def _init(zero_centred: bool) -> Init:
    return Init.ZEROS if zero_centred else Init.ONES
