"""What a layer of DeepSeek-V4 remembers beyond its window: entries, and which of them a token sees (section 2.3).

Both kinds take a step the same way: store what their compressors need of the new tokens, write the entries that are
complete now, then say what each token sees: (entries, tables, selection), as `common.attention.compressed.attend`
takes it. Nothing here is split over ranks.

Shape letters: T new tokens, H heads of the indexer, D their width.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from common.attention.compressed import Entries, entries_of
from common.attention.context import GroupTables, Selection
from common.kvcache.layout import KVPlace
from common.layers.base import Build, Layer
from common.layers.compress_spec import (
    HEAVY_ENTRIES,
    HEAVY_INPUT,
    SPARSE_ENTRIES,
    SPARSE_INPUT,
    SPARSE_KEYS,
    CompressSpec,
)
from common.layers.compressor import Completed, Compressor, completed, turn_tail_
from common.layers.fp8_weight import exact
from common.layers.linear import ColumnLinear
from common.layers.step import Step

COMPRESS_ROPE = "compress"
"""Rotation of the tokens of layers with entries."""
SPARSE_ROPE, HEAVY_ROPE = "sparse entries", "heavy entries"
"""Rotations of tokens by the position of the first token of their entry."""

Places = Mapping[str, KVPlace]
Seen = tuple[Tensor, GroupTables, Selection]


class HeavyEntries(Layer):
    """HCA: all entries are seen. Checkpoint names under `compressor.`."""

    transparent = True

    def __init__(
        self, build: Build, hidden_size: int, head_dim: int, spec: CompressSpec, places: Places, eps: float
    ) -> None:
        ratio = self._ratio = spec.heavy_ratio
        self._input, self._place = places[HEAVY_INPUT], places[HEAVY_ENTRIES]
        parts = {"compressor.wkv": (1, head_dim), "compressor.wgate": (1, head_dim)}
        self.input_proj = ColumnLinear(exact(build), hidden_size, parts, bias=False)
        self.compressor = Compressor(build, head_dim, ratio, self._place, 0, eps, overlap=False)

    def __call__(self, x_TD: Tensor, q_TR: Tensor, step: Step) -> Seen:
        rows, tables = step.cache(self._input), step.tables(self._input)
        step.ctx.backend.write_rows(self.input_proj(x_TD), rows, tables)
        done = completed(step, self._ratio, self._ratio, tables, step.tables(self._place))
        self.compressor(rows[:, 0, 0], done, step.rope[HEAVY_ROPE], step)
        entries = entries_in(step, self._place, self._ratio)
        return self.compressor.entries(step), entries.tables, entries.all


class SparseEntries(Layer):
    """CSA: of each token the indexer's best. Checkpoint names under `compressor.` and `indexer.`."""

    transparent = True

    def __init__(
        self, build: Build, hidden_size: int, head_dim: int, spec: CompressSpec, places: Places, eps: float
    ) -> None:
        ratio = self._ratio = spec.sparse_ratio
        self._input, self._place = places[SPARSE_INPUT], places[SPARSE_ENTRIES]
        self._columns = 4 * (head_dim + spec.index_dim)
        parts = {
            "compressor.wkv": (1, 2 * head_dim),
            "compressor.wgate": (1, 2 * head_dim),
            "indexer.compressor.wkv": (1, 2 * spec.index_dim),
            "indexer.compressor.wgate": (1, 2 * spec.index_dim),
            "indexer.weights_proj": (1, spec.index_heads),
        }
        self.input_proj = ColumnLinear(exact(build), hidden_size, parts, bias=False)
        self.compressor = Compressor(build, head_dim, ratio, self._place, 0, eps, overlap=True)
        self.indexer = EntryIndexer(build, spec, places[SPARSE_KEYS], 4 * head_dim, eps)

    def __call__(self, x_TD: Tensor, q_TR: Tensor, step: Step) -> Seen:
        rows, tables = step.cache(self._input), step.tables(self._input)
        input_T = self.input_proj(x_TD)
        step.ctx.backend.write_rows(input_T[:, : self._columns], rows, tables)
        done = completed(step, self._ratio, 2 * self._ratio, tables, step.tables(self._place))
        self.compressor(rows[:, 0, 0], done, step.rope[SPARSE_ROPE], step)
        self.indexer.add(rows[:, 0, 0], done, step)
        entries = entries_in(step, self._place, self._ratio)
        chosen = self.indexer.choose(q_TR, input_T[:, self._columns :].float(), entries, step)
        return self.compressor.entries(step), entries.tables, chosen


class EntryIndexer(Layer):
    """The lightning indexer over compressed keys: score = sum over heads of weight * max(0, q . key)."""

    def __init__(self, build: Build, spec: CompressSpec, place: KVPlace, column: int, eps: float) -> None:
        self._heads, self._width, self._top_k = spec.index_heads, spec.index_dim, spec.index_topk
        self.q_b_proj = ColumnLinear(build, spec.q_rank, {"wq_b": (1, self._heads * self._width)}, bias=False)
        self.compressor = Compressor(build, self._width, spec.sparse_ratio, place, column, eps, overlap=True)

    def add(self, rows: Tensor, done: Completed, step: Step) -> None:
        """Write the keys of the entries that the step completes."""
        self.compressor(rows, done, step.rope[SPARSE_ROPE], step)

    def choose(self, q_TR: Tensor, weights_TH: Tensor, entries: Entries, step: Step) -> Selection:
        """`q_TR`: the latent that the layer's own queries come from; `weights_TH`: fp32."""
        if entries.most <= self._top_k:
            return entries.all
        q_THD = self.q_b_proj(q_TR).view(-1, self._heads, self._width)
        turn_tail_(q_THD, step.rope[COMPRESS_ROPE])
        scale = (self._width * self._heads) ** -0.5
        keys = self.compressor.entries(step)
        return entries.select(q_THD, weights_TH, keys, scale, self._top_k)


def entries_in(step: Step, place: KVPlace, ratio: int) -> Entries:
    """The entries of a ratio in this step, worked out once for all layers."""
    key = f"entries {ratio}"
    found: Entries | None = step.shared.get(key)
    if found is None:
        found = step.shared[key] = entries_of(step.ctx, step.positions_T, step.tables(place), ratio)
    return found
