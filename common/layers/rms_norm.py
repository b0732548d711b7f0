"""Root mean square norm (Zhang and Sennrich 2019): x / rms(x) * weight, in fp32 inside."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from common.layers.base import Build, Init, Layer, Slot


class RMSNorm(Layer):
    def __init__(self, build: Build, width: int, eps: float) -> None:
        self._width = (width,)
        self._eps = eps
        self.weight = build.empty(width)

    def own_slots(self) -> Iterator[Slot]:
        yield Slot("weight", self.weight, self._width, init=Init.ONES)

    def __call__(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self._width, self.weight, self._eps)


class QKNorm(Layer):
    """Per-head norm of queries and keys in one pass; they lie side by side and differ in the weight alone."""

    transparent = True

    def __init__(self, build: Build, num_heads: int, num_kv_heads: int, head_dim: int, eps: float) -> None:
        self._width = (head_dim,)
        self._eps = eps
        self._kind_H = torch.tensor([0] * num_heads + [1] * num_kv_heads, device=build.device)
        self.weight_2D = build.empty(2, head_dim)

    def own_slots(self) -> Iterator[Slot]:
        yield Slot("q_norm.weight", self.weight_2D[0], self._width, init=Init.ONES)
        yield Slot("k_norm.weight", self.weight_2D[1], self._width, init=Init.ONES)

    def __call__(self, qk_THD: Tensor) -> Tensor:
        """`qk_THD`: query heads, then key heads; the same shape comes back, contiguous."""
        return functional.rms_norm(qk_THD, self._width, None, self._eps).mul_(
            self.weight_2D.index_select(0, self._kind_H)
        )
