"""Token embedding and language model head. The embedding is whole on every rank; tied, the head is a part of it."""

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
    """`tied`: the embedding whose matrix it shares. A checkpoint may hold that matrix a second time.

    A rank has the logits of its part of the vocabulary, where that divides, and all ranks put theirs together.
    """

    def __init__(self, build: Build, vocab_size: int, hidden_size: int, tied: Embedding | None) -> None:
        gather = build.tp.all_gather if vocab_size % build.tp.size == 0 else None
        first, count = (0, vocab_size) if gather is None else build.tp.share(vocab_size)
        self._gather = gather
        self._shape = (vocab_size, hidden_size)
        self._first = first
        self._is_tied = tied is not None
        self._fixed = build.fixed
        self.weight = build.empty(count, hidden_size) if tied is None else tied.weight[first : first + count]

    def own_slots(self) -> Iterator[Slot]:
        yield Slot("weight", self.weight, self._shape, 0, self._first, twin=self._is_tied)

    def __call__(self, x_RD: Tensor) -> Tensor:
        """Logits in float32: [R, vocab]."""
        logits_RV = linear(x_RD, self.weight, out_dtype=torch.float32, fixed=self._fixed)
        if self._gather is None:
            return logits_RV
        return self._gather(logits_RV).transpose(0, 1).flatten(1)
