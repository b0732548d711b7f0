"""Grouped-query attention over the paged cache: project, norm, turn, store, attend, project.

q, k and v of a token are one packed row [query heads | key heads | value heads] x head width, so the norm and
the rotation of queries and keys are one operation each. How keys are stored and attended to is the backend's
business; where, the context's.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from common.kvcache.layout import KVPlace
from common.layers.base import Build, Layer
from common.layers.linear import ColumnLinear, RowLinear
from common.layers.qkv import store_in_one
from common.layers.rms_norm import QKNorm
from common.layers.rope import apply_rope
from common.layers.step import MAIN_ROPE, Step


@dataclass(frozen=True)
class AttentionShape:
    """Heads are counted over all ranks. `qk_norm_eps`: 0 is no norm. `bias`: on all four projections."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    bias: bool = False
    qk_norm_eps: float = 0.0


class Attention(Layer):
    """`place`: where keys and values lie, two parts of a region of a full or a window group."""

    def __init__(self, build: Build, shape: AttentionShape, place: KVPlace) -> None:
        self._place = place
        heads, kv_heads, width = shape.num_heads, shape.num_kv_heads, shape.head_dim
        self._heads = build.tp.share(heads)[1]
        self._kv_heads = build.tp.share(kv_heads)[1]
        self._width = width
        self._scale = width**-0.5
        parts = {"q_proj": (heads, width), "k_proj": (kv_heads, width), "v_proj": (kv_heads, width)}
        self.qkv_proj = ColumnLinear(build, shape.hidden_size, parts, bias=shape.bias)
        eps = shape.qk_norm_eps
        self.qk_norm = QKNorm(build, self._heads, self._kv_heads, width, eps) if eps else None
        self.o_proj = RowLinear(build, heads, width, shape.hidden_size, bias=shape.bias)

    def __call__(self, x_TD: Tensor, step: Step) -> Tensor:
        ctx, cache, tables = step.ctx, step.cache(self._place), step.tables(self._place)
        scales = step.scales(self._place)
        num_tokens = x_TD.shape[0]
        q_THD = self._store(self.qkv_proj(x_TD).view(num_tokens, -1, self._width), step)
        out_THD = ctx.backend.attend(q_THD, cache, tables, ctx, self._scale, scales)
        return self.o_proj(out_THD.reshape(num_tokens, -1))

    def _store(self, qkv_THD: Tensor, step: Step) -> Tensor:
        """Put keys and values in the cache; the queries, [T, H, D]."""
        num_heads, num_qk, norm = self._heads, self._heads + self._kv_heads, self.qk_norm
        q_THD, k_TUD, v_TUD = qkv_THD.tensor_split((num_heads, num_qk), 1)
        weights, eps = (None, 0.0) if norm is None else (norm.weights, norm.eps)
        stored = store_in_one(q_THD, k_TUD, v_TUD, weights, eps, step, self._place, self.o_proj.weight)
        if stored is not None:
            return stored
        qk_THD = qkv_THD[:, :num_qk]
        if norm is not None:
            qk_THD = norm(qk_THD)
        qk_THD = apply_rope(qk_THD, *step.rope[MAIN_ROPE])
        cache, tables, scales = step.cache(self._place), step.tables(self._place), step.scales(self._place)
        step.ctx.backend.write(qk_THD[:, num_heads:], v_TUD, cache, tables, scales)
        return qk_THD[:, :num_heads]
