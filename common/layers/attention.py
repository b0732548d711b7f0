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
        num_tokens, num_heads = x_TD.shape[0], self._heads
        num_qk = num_heads + self._kv_heads
        qkv_THD = self.qkv_proj(x_TD).view(num_tokens, -1, self._width)
        qk_THD = qkv_THD[:, :num_qk]
        if self.qk_norm is not None:
            qk_THD = self.qk_norm(qk_THD)
        qk_THD = apply_rope(qk_THD, *step.rope[MAIN_ROPE])
        ctx.backend.write(qk_THD[:, num_heads:], qkv_THD[:, num_qk:], cache, tables, scales)
        out_THD = ctx.backend.attend(qk_THD[:, :num_heads], cache, tables, ctx, self._scale, scales)
        return self.o_proj(out_THD.reshape(num_tokens, -1))
