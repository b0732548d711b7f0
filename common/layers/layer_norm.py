"""Layer norm (Ba et al. 2016) with weight and bias."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from common.kernels.ops import layer_norm
from common.layers.base import Build, Init, Layer, Slot


class LayerNorm(Layer):
    def __init__(self, build: Build, width: int, eps: float) -> None:
        self._width = (width,)
        self._eps = eps
        self.weight = build.empty(width)
        self.bias = build.empty(width)

    def own_slots(self) -> Iterator[Slot]:
        yield Slot("weight", self.weight, self._width, init=Init.ONES)
        yield Slot("bias", self.bias, self._width, init=Init.ZEROS)

    def __call__(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self._eps)
