"""Steps of few new tokens recorded once for each number of sequences and replayed: one launch instead of hundreds.

    record (largest first, one memory pool for all) -> fits(batch) -> replay(batch) -> hidden rows

A batch smaller than what was recorded is padded. Padding sequences have nothing before their new tokens and write into
the pool's padding block, which belongs to nobody; their rows are cut off. Everything that changes from step to step
lies in one piece of memory, which a replay fills by one copy. What attention prepares on the host (`plan`) it prepares
before each replay.
"""

from __future__ import annotations

import bisect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.attention.context import AttentionBackend, AttentionContext, GroupTables, HostLengths
from common.engine.batch import Batch
from common.engine.inputs import Arrays, Inputs, Tensors, nbytes_of, states_of, view
from common.kvcache.pool import KVPool
from common.telemetry import get_logger

log = get_logger(__name__)


class Forward(Protocol):
    def __call__(self, input_ids_T: Tensor, positions_T: Tensor, ctx: AttentionContext, /) -> Tensor: ...


@dataclass(frozen=True)
class GraphShape:
    """`groups`: (block size, window) of each positional group; `max_seq_len` bounds tables. `first`: see
    `common.attention.context.GroupTables`.
    """

    groups: Mapping[str, tuple[int, int]]
    states: Sequence[str]
    max_seq_len: int
    first: int = 0


@dataclass
class _Recorded:
    """`arrays`: what the memory holds next, on the host; the sequences from `num_rows` on are padding."""

    graph: torch.cuda.CUDAGraph
    memory: Tensor
    ctx: AttentionContext
    hidden_TD: Tensor
    arrays: Arrays
    num_rows: int = 0


def graph_sizes(max_seqs: int) -> tuple[int, ...]:
    """Numbers of sequences to record: close to each other, so that little is computed for nobody."""
    sizes = [1, 2, 4, *range(8, min(max_seqs, 256) + 1, 8), *range(272, max_seqs + 1, 16), max_seqs]
    return tuple(sorted({size for size in sizes if size <= max_seqs}))


class StepGraphs(ABC):
    """Recorded steps of each of `sizes` sequences with each of `query_lens` new tokens in every one of them.

    `drawn_R`: the tokens that the step before has drawn, which replays read where a batch says so. `memory_pool`: of
    other recorded steps, for what a step needs while it runs.
    """

    def __init__(
        self,
        pool: KVPool,
        backend: AttentionBackend,
        inputs: Inputs,
        drawn_R: Tensor,
        shape: GraphShape,
        sizes: Sequence[int],
        query_lens: Sequence[int],
        memory_pool: Any = None,
    ) -> None:
        self._pool = pool
        self._backend = backend
        self._inputs = inputs
        self._drawn_R = drawn_R
        self._shape = shape
        self._sizes = sorted(sizes)
        self._query_lens = tuple(query_lens)
        self._recorded: dict[tuple[int, int], _Recorded] = {}
        self.memory_pool = memory_pool

    @torch.inference_mode()
    def record(self, progress: Callable[[int, int], None]) -> None:
        """Record all. `progress(done, total)`."""
        keys = [(n, q) for q in self._query_lens for n in reversed(self._sizes)]
        if self.memory_pool is None:
            self.memory_pool = torch.cuda.graph_pool_handle()
        for done, key in enumerate(keys):
            progress(done, len(keys))
            self._recorded[key] = self._record(*key)
        torch.cuda.synchronize()

    def size_for(self, batch: Batch) -> int:
        """Sequences of the recorded step that can take this batch; 0: none can."""
        rows, query_len = len(batch.seq_lens_S), batch.max_query_len
        if query_len not in self._query_lens or rows * query_len != len(batch.input_ids_T) or batch.media is not None:
            return 0
        return self.size_of(rows)

    def size_of(self, num_sequences: int) -> int:
        """The smallest that was recorded and holds so many; 0: none does."""
        at = bisect.bisect_left(self._sizes, num_sequences)
        return self._sizes[at] if at < len(self._sizes) else 0

    def replay(self, batch: Batch, size: int) -> Tensor:
        """What `_compute` made, [T, ...] of the batch, valid until the next replay."""
        recorded = self._recorded[size, batch.max_query_len]
        self._fill(recorded, batch)
        self._inputs.put(recorded.arrays, recorded.memory)
        self._backend.plan(self._with_host(recorded.ctx, recorded.arrays))
        recorded.graph.replay()
        return recorded.hidden_TD[: len(batch.input_ids_T)]

    def _record(self, size: int, query_len: int) -> _Recorded:
        arrays = self._padding(size, query_len)
        memory = torch.zeros(nbytes_of(arrays), dtype=torch.uint8, device=self._drawn_R.device)
        tensors = view(memory, arrays)
        self._inputs.put(arrays, memory)
        ctx = self._context(tensors, size, query_len)
        graph = torch.cuda.CUDAGraph()
        for _ in range(2):  # kernels are compiled and workspaces made
            self._run(tensors, ctx, arrays)
        torch.cuda.synchronize()
        self._backend.plan(self._with_host(ctx, arrays))
        fresh = replace(ctx, scratch={})
        with torch.cuda.graph(graph, pool=self.memory_pool, stream=_stream(self._drawn_R.device)):
            hidden_TD = self._compute(tensors, fresh)
        return _Recorded(graph, memory, ctx, hidden_TD, arrays)

    def _run(self, tensors: Tensors, ctx: AttentionContext, arrays: Arrays) -> Tensor:
        self._backend.plan(self._with_host(ctx, arrays))
        return self._compute(tensors, replace(ctx, scratch={}))

    @abstractmethod
    def _compute(self, tensors: Tensors, ctx: AttentionContext) -> Tensor:
        """What is recorded: reads `tensors`, which are those of `_padding` by name."""

    def _context(self, tensors: Tensors, size: int, query_len: int) -> AttentionContext:
        groups = {
            name: GroupTables(
                tensors[f"tables.{name}"], tensors[f"slots.{name}"], block_size, window, self._shape.first
            )
            for name, (block_size, window) in self._shape.groups.items()
        }
        return AttentionContext(
            query_starts_S1=tensors["query_starts"],
            seq_lens_S=tensors["seq_lens"],
            max_query_len=query_len,
            max_seq_len=self._shape.max_seq_len,
            groups=groups,
            kv=self._pool,
            backend=self._backend,
            states=states_of(tensors),
            graph=size,
        )

    def _with_host(self, ctx: AttentionContext, arrays: Arrays) -> AttentionContext:
        groups = {
            name: replace(tables, host_tables_SB=_int32(arrays[f"tables.{name}"]))
            for name, tables in ctx.groups.items()
        }
        host = HostLengths(_int32(arrays["query_starts"]), _int32(arrays["seq_lens"]))
        return replace(ctx, groups=groups, host=host)

    def _padding(self, size: int, query_len: int) -> Arrays:
        """A step of padding alone: what a batch does not fill stays so. Every token of it sees at least itself."""
        shape = self._shape
        tokens, places_Q = size * query_len, np.arange(shape.first, shape.first + query_len, dtype=np.int64)
        arrays: Arrays = {
            "input_ids": np.zeros(tokens, np.int64),
            "positions": np.tile(places_Q, size),
            "query_starts": np.arange(0, tokens + 1, query_len, dtype=np.int32),
            "seq_lens": np.full(size, shape.first + query_len, np.int32),
            "pending": np.full(tokens, -1, np.int64),
        }
        for name, (block_size, _) in shape.groups.items():
            block = self._pool.padding_block(name)
            width = -(-shape.max_seq_len // block_size)
            arrays[f"tables.{name}"] = np.full((size, width), block, np.int32)
            arrays[f"slots.{name}"] = np.tile(block * block_size + places_Q, size)
        for name in shape.states:
            arrays[f"states.{name}"] = np.full(size, self._pool.padding_block(name), np.int64)
        return arrays

    def _fill(self, recorded: _Recorded, batch: Batch) -> None:
        arrays, query_len = recorded.arrays, batch.max_query_len
        tokens, rows, before = len(batch.input_ids_T), len(batch.seq_lens_S), recorded.num_rows
        arrays["input_ids"][:tokens] = batch.input_ids_T
        arrays["positions"][:tokens] = batch.positions_T
        arrays["seq_lens"][:rows] = batch.seq_lens_S
        arrays["pending"][:tokens] = -1 if batch.pending_T is None else batch.pending_T
        for name, group in batch.groups.items():
            arrays[f"tables.{name}"][:rows, : group.tables_SB.shape[1]] = group.tables_SB
            arrays[f"slots.{name}"][:tokens] = group.slots_T
        for name, ids in batch.states_S.items():
            arrays[f"states.{name}"][:rows] = ids
        if rows < before:
            padding = self._padding(before - rows, query_len)
            for name, rest in padding.items():
                if name != "query_starts":
                    first = len(rest) // (before - rows) * rows
                    arrays[name][first : first + len(rest)] = rest
        recorded.num_rows = rows


class DecodeGraphs(StepGraphs):
    """Recorded steps of a model. A replay gives hidden rows [T, D]."""

    def __init__(
        self,
        forward: Forward,
        pool: KVPool,
        backend: AttentionBackend,
        inputs: Inputs,
        drawn_R: Tensor,
        shape: GraphShape,
        sizes: Sequence[int],
        query_lens: Sequence[int] = (1,),
    ) -> None:
        super().__init__(pool, backend, inputs, drawn_R, shape, sizes, query_lens)
        self._forward = forward

    def _compute(self, tensors: Tensors, ctx: AttentionContext) -> Tensor:
        input_ids_T = known_or_drawn(tensors["input_ids"], tensors["pending"], self._drawn_R)
        return self._forward(input_ids_T, tensors["positions"], ctx)


def known_or_drawn(input_ids_T: Tensor, pending_T: Tensor, drawn_R: Tensor) -> Tensor:
    """`input_ids_T`, but where `pending_T` names a draw, its token; a draw that failed gives token 0."""
    drawn_T = drawn_R.index_select(0, pending_T.clamp(min=0)).clamp_(min=0)
    return torch.where(pending_T < 0, input_ids_T, drawn_T)


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Where steps are recorded: one for a GPU, since memory is shared within a stream. torch has one for a process,
    of the GPU that it records on first.
    """
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _int32(array: NDArray[np.generic]) -> NDArray[np.int32]:
    assert array.dtype == np.int32
    return array  # type: ignore[return-value]
