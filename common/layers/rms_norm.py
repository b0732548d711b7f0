"""Root mean square norm (Zhang and Sennrich 2019): x / rms(x) * weight, in fp32 inside."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from common.kernels.ops import rms_norm
from common.layers.base import Build, Init, Layer, Slot


class RMSNorm(Layer):
    def __init__(self, build: Build, width: int, eps: float) -> None:
        self._width = (width,)
        self._eps = eps
        self.weight = build.empty(width)

    def own_slots(self) -> Iterator[Slot]:
        yield Slot("weight", self.weight, self._width, init=Init.ONES)

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self._eps)


class QKNorm(Layer):
    """Per-head norm of queries and keys in one pass; they lie side by side and differ in the weight alone."""

    transparent = True

    def __init__(self, build: Build, num_heads: int, num_kv_heads: int, head_dim: int, eps: float) -> None:
        self._width = (head_dim,)
        self._eps = eps
        self._num_heads = num_heads
        self.weight_2D = build.empty(2, head_dim)

    def own_slots(self) -> Iterator[Slot]:
        yield Slot("q_norm.weight", self.weight_2D[0], self._width, init=Init.ONES)
        yield Slot("k_norm.weight", self.weight_2D[1], self._width, init=Init.ONES)

    def __call__(self, qk_THD: Tensor) -> Tensor:
        """`qk_THD`: query heads, then key heads; the same shape comes back, contiguous."""
        return rms_norm(qk_THD, self.weight_2D, self._eps, split=self._num_heads)
