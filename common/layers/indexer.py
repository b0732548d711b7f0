"""The lightning indexer of sparse attention (DeepSeek-V3.2, section 2.1): which positions a query attends to.

    score(t, s) = sum over heads h of  w[t, h] * relu(q[t, h] . k[s] / sqrt(d))      k: one key that all heads share

Queries come from attention's own query latent, keys and weights from the hidden state; keys have a cache region of
their own. The best `top_k` positions up to a query's own are taken, exactly; of equal scores the lower positions (the
reference implementation in transformers takes those that torch.topk happens to take, which is not specified). The
Hadamard rotation of the released code is left out: it turns queries and keys alike and changes no product. In an 8-bit
cache keys have 8 bits too, as released: at 256 bytes beside a row of 656 they would take away most of what is saved.
There as well nothing is rotated: float8 loses the same share of a number whatever its neighbours are. Queries keep
their type.

Only sequences longer than `top_k` are scored. What is selected for them is left in `Step.shared`, for layers that share
it. The indexer is whole on every rank: all ranks must select the same.

Shape letters: T new tokens, N tokens of long sequences, H indexer heads, D indexer head width, R query latent width.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from common.attention.context import Selection
from common.attention.latent import Part
from common.kernels import gpu
from common.kernels.ops import linear
from common.kvcache.layout import KVPlace
from common.layers.base import Build, Layer
from common.layers.fp8_weight import exact
from common.layers.layer_norm import LayerNorm
from common.layers.linear import ColumnLinear
from common.layers.mla_spec import IndexerSpec
from common.layers.rope import apply_rope_
from common.layers.step import MAIN_ROPE, Step

SELECTION = "selection"


class Indexer(Layer):
    """Checkpoint names under `self_attn.indexer.`. `place`: where keys lie, one part and unit of width D."""

    def __init__(self, build: Build, hidden_size: int, q_lora_rank: int, spec: IndexerSpec, place: KVPlace) -> None:
        self._spec = spec
        self._place = place
        heads, width = spec.num_heads, spec.head_dim
        self._scale = width**-0.5
        self._fixed = build.fixed
        self.wq_b = ColumnLinear(build, q_lora_rank, {"wq_b": (1, heads * width)}, bias=False)
        self.wk = ColumnLinear(build, hidden_size, {"wk": (1, width)}, bias=False)
        self.k_norm = LayerNorm(build, width, spec.norm_eps)
        in_fp32 = replace(exact(build), dtype=torch.float32)
        self.weights_proj = ColumnLinear(in_fp32, hidden_size, {"weights_proj": (1, heads)}, bias=False)

    def __call__(self, x_TD: Tensor, q_TR: Tensor, step: Step, sparse: Part | None) -> None:
        """Store the new tokens' keys; leave a selection for the tokens of `sparse`, or None, in `Step.shared`."""
        cache = step.cache(self._place)
        self._store(self.wk(x_TD), cache, step)
        step.shared[SELECTION] = None if sparse is None else self._select(x_TD, q_TR, step, sparse, cache)

    def _store(self, k_TD: Tensor, cache: Tensor, step: Step) -> None:
        spec, tables, (cos, sin) = self._spec, step.tables(self._place), step.rope[MAIN_ROPE]
        packing = spec.packing if cache.dtype == torch.uint8 else None
        if gpu.enabled(k_TD):
            gpu.index_keys.store_keys(
                k_TD,
                (self.k_norm.weight, self.k_norm.bias, spec.norm_eps),
                (cos, sin),
                cache,
                tables.slots_T,
                interleaved=spec.interleaved,
                packed=packing is not None,
            )
            return
        k_TD = self.k_norm(k_TD)
        apply_rope_(k_TD[:, None, : spec.rope_dim], cos, sin, interleaved=spec.interleaved)
        step.ctx.backend.write_rows(k_TD, cache, tables, packing)

    def _select(self, x_TD: Tensor, q_TR: Tensor, step: Step, sparse: Part, cache: Tensor) -> Selection:
        spec = self._spec
        cos, sin = (sparse.take(row) for row in step.rope[MAIN_ROPE])
        q_NHD = self.wq_b(sparse.take(q_TR)).view(-1, spec.num_heads, spec.head_dim)
        apply_rope_(q_NHD[..., : spec.rope_dim], cos, sin, interleaved=spec.interleaved)
        x_ND, weight_HD = sparse.take(x_TD), self.weights_proj.weight
        weights_NH = linear(x_ND, weight_HD, out_dtype=torch.float32, fixed=self._fixed)
        weights_NH *= spec.num_heads**-0.5
        packing = spec.packing if cache.dtype == torch.uint8 else None
        return sparse.ctx.backend.select(
            q_NHD, weights_NH, cache[:, 0, 0], sparse.tables, sparse.ctx, self._scale, spec.top_k, packing
        )
