"""Recorded passes of the draft layer without a GPU: when replayed, a recording computes again what it was made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from common.engine.build import BuiltEngine
from common.engine.draft_graphs import DraftGraphs, DraftLimits
from common.engine.draft_runner import DraftRunner
from common.engine.drafting import FIRST
from common.engine.graphs import GraphShape, _Recorded
from common.kvcache.pool import KVPool

PADDING = -1  # the sequence whose block is the padding block


@dataclass
class Rerun:
    replay: Callable[[], Tensor]


class Padded:
    """A CPU's pool with a padding block, which a sequence holds."""

    def __init__(self, pool: KVPool, block_id: int) -> None:
        self._pool = pool
        self._block_id = block_id

    def padding_block(self, group: str) -> int:
        return self._block_id

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)


class RerunGraphs(DraftGraphs):
    """`replayed`: sequences and tokens of each of every pass."""

    def record_all(self) -> None:
        self.replayed: list[tuple[int, int]] = []
        self._recorded = {(n, q): self._again(n, q) for n in self._sizes for q in self._query_lens}

    def _again(self, size: int, query_len: int) -> _Recorded:
        arrays = self._padding(size, query_len)
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        ctx = self._context(tensors, size, query_len)

        def compute() -> Tensor:
            self.replayed.append((size, query_len))
            return self._compute(tensors, replace(ctx, scratch={}))

        graph: Any = Rerun(compute)
        return _Recorded(graph, torch.empty(0), ctx, self._drawn_R, arrays)


def hold_padding(built: BuiltEngine) -> int:
    """A block that no sequence of a request gets. `let_padding_go` before the engine is to be idle."""
    cache, (group, *_) = built.parts.cache, built.parts.layout.groups
    cache.open(PADDING, "padding")
    assert cache.reserve(PADDING, group.block_size)
    return cache.block_table(PADDING, group.name)[0]


def let_padding_go(built: BuiltEngine) -> None:
    built.parts.cache.close(PADDING)


def record(built: BuiltEngine, sizes: tuple[int, ...], max_new: int) -> RerunGraphs:
    """Give an engine recorded passes."""
    drafting = built.parts.drafting
    assert drafting is not None
    runner = drafting._model
    assert isinstance(runner, DraftRunner)
    pool: Any = Padded(runner._pool, hold_padding(built))
    shape = GraphShape(runner._groups, (), built.ready.max_model_len, FIRST)
    limits = DraftLimits(max_new, runner._hidden_size, torch.float32, runner._sampler.vocab_size)
    graphs = RerunGraphs(runner._model, pool, runner._backend, runner._inputs, shape, sizes, limits)
    graphs.record_all()
    runner.graphs = graphs
    return graphs
