"""Gated attention (Qwen3-Next): grouped-query attention whose output, head by head, is let through by a sigmoid of
its own projection of the input; a part of each head turns, and the norms of queries and keys are zero-centred.

`q_proj` holds, for each query head, its query and then its gate.
"""

from __future__ import annotations

from torch import Tensor

from common.kernels.ops import sigmoid_mul
from common.kvcache.layout import KVPlace
from common.layers.attention import AttentionShape
from common.layers.base import Build, Layer
from common.layers.linear import ColumnLinear, RowLinear
from common.layers.qkv import store_in_one
from common.layers.rms_norm import RMSNorm
from common.layers.rope import apply_rope_
from common.layers.step import MAIN_ROPE, Step


class GatedAttention(Layer):
    """`place`: where keys and values lie, two parts of a region of a full group. Heads turn as far as the rotation is
    wide.
    """

    def __init__(self, build: Build, shape: AttentionShape, place: KVPlace) -> None:
        self._place = place
        heads, kv_heads, width = shape.num_heads, shape.num_kv_heads, shape.head_dim
        self._width = width
        self._scale = width**-0.5
        num_heads, num_kv_heads = build.tp.share(heads)[1], build.tp.share(kv_heads)[1]
        self._sizes = (2 * num_heads * width, num_kv_heads * width, num_kv_heads * width)
        parts = {"q_proj": (heads, 2 * width), "k_proj": (kv_heads, width), "v_proj": (kv_heads, width)}
        self.qkv_proj = ColumnLinear(build, shape.hidden_size, parts, bias=shape.bias)
        self.q_norm = RMSNorm(build, width, shape.qk_norm_eps, zero_centred=True)
        self.k_norm = RMSNorm(build, width, shape.qk_norm_eps, zero_centred=True)
        self.o_proj = RowLinear(build, heads, width, shape.hidden_size, bias=shape.bias)

    def __call__(self, x_TD: Tensor, step: Step) -> Tensor:
        ctx, cache, tables = step.ctx, step.cache(self._place), step.tables(self._place)
        num_tokens = len(x_TD)
        q_TE, k_TE, v_TE = self.qkv_proj(x_TD).split_with_sizes(self._sizes, 1)
        q_THD, gate_THD = q_TE.view(num_tokens, -1, 2, self._width).unbind(2)
        k_TUD, v_TUD = (x.view(num_tokens, -1, self._width) for x in (k_TE, v_TE))
        q_THD = self._store(q_THD, k_TUD, v_TUD, step)
        out_THD = ctx.backend.attend(q_THD, cache, tables, ctx, self._scale, step.scales(self._place))
        out_TD = sigmoid_mul(out_THD.reshape(num_tokens, -1), gate_THD.reshape(num_tokens, -1))
        return self.o_proj(out_TD)

    def _store(self, q_THD: Tensor, k_TUD: Tensor, v_TUD: Tensor, step: Step) -> Tensor:
        """Put keys and values in the cache; the queries, [T, H, D]."""
        weights = self.q_norm.weight, self.k_norm.weight
        stored = store_in_one(q_THD, k_TUD, v_TUD, weights, self.q_norm.eps, step, self._place, self.o_proj.weight)
        if stored is not None:
            return stored
        q_THD, k_TUD = self.q_norm(q_THD), self.k_norm(k_TUD)
        cos_T1D, sin_T1D = step.rope[MAIN_ROPE]
        for heads in (q_THD, k_TUD):
            apply_rope_(heads[..., : cos_T1D.shape[-1]], cos_T1D, sin_T1D, interleaved=False)
        cache, tables, scales = step.cache(self._place), step.tables(self._place), step.scales(self._place)
        step.ctx.backend.write(k_TUD, v_TUD, cache, tables, scales)
        return q_THD
