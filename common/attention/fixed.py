"""Attention on GPUs in a fixed order of operations: what `--deterministic` takes.

A query's result does not depend on the batch, on how the prompt was cut into chunks, or on how many tokens are new
(`common.kernels.gpu.fixed_attention`). Nothing is planned on the host, so a recorded step needs no more than its
tensors. Latent attention is that of `common.attention.latent_gpu`, and takes prompts as it takes decode steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.attention.capability import Capability
from common.attention.context import AttentionContext, GroupTables
from common.attention.latent_gpu import LatentBackend
from common.kernels import gpu
from common.kvcache.scales import KVScales


def capability() -> Capability:
    floats = ("float32", "bfloat16", "float16")
    return Capability(
        "fixed",
        devices=("cuda",),
        dtypes=floats,
        kv_dtypes=(*floats, "float8_e4m3fn"),
        max_group_size=64,
        latent=True,
        unavailable=gpu.unavailable(),
    )


class FixedBackend(LatentBackend):
    name = "fixed"

    def __init__(self) -> None:
        super().__init__(fixed=True)

    def attend(
        self,
        q_THD: Tensor,
        cache: Tensor,
        tables: GroupTables,
        ctx: AttentionContext,
        scale: float,
        scales: KVScales | None = None,
    ) -> Tensor:
        """Causal attention of the new tokens over the cache: a new [T, H, D]."""
        assert (scales is not None) == (cache.dtype == torch.float8_e4m3fn)
        k_scale, v_scale = (scales.k, scales.v) if scales is not None else (1.0, 1.0)
        out_THD: Tensor = gpu.fixed_attention.attend(
            q_THD,
            cache,
            tables.block_tables_SB,
            ctx.query_starts_S1,
            ctx.seq_lens_S,
            max_query_len=ctx.max_query_len,
            max_seq_len=ctx.max_seq_len,
            window=tables.window,
            first=tables.first,
            scale=scale,
            k_scale=k_scale,
            v_scale=v_scale,
        )
        return out_THD
