"""Token embedding and language model head. Both are whole on every rank; tied, they are one tensor."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from common.kernels.ops import linear
from common.layers.base import Build, Layer, Slot


class Embedding(Layer):
    def __init__(self, build: Build, vocab_size: int, hidden_size: int) -> None:
        self._shape = (vocab_size, hidden_size)
        self.weight = build.empty(vocab_size, hidden_size)

    def own_slots(self) -> Iterator[Slot]:
        yield Slot("weight", self.weight, self._shape)

    def __call__(self, input_ids_T: Tensor) -> Tensor:
        """A new [T, hidden] that the caller may add to in place."""
        return self.weight.index_select(0, input_ids_T)


class Head(Layer):
    """`tied`: the embedding whose matrix it shares. A checkpoint may hold that matrix a second time."""

    def __init__(self, build: Build, vocab_size: int, hidden_size: int, tied: Embedding | None) -> None:
        self._shape = (vocab_size, hidden_size)
        self._is_tied = tied is not None
        self.weight = tied.weight if tied is not None else build.empty(vocab_size, hidden_size)

    def own_slots(self) -> Iterator[Slot]:
        yield Slot("weight", self.weight, self._shape, twin=self._is_tied)

    def __call__(self, x_RD: Tensor) -> Tensor:
        """Logits in float32: [R, vocab]."""
        return linear(x_RD, self.weight, out_dtype=torch.float32)
