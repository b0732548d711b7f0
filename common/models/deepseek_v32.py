"""DeepSeek-V3.2 (DeepSeek-AI 2025) and GLM-5: DeepSeek-V3 with native sparse attention.

A lightning indexer in each layer scores a query against all positions up to its own, cheaply, and latent attention
looks at the best `index_topk` of them. Up to that many tokens of context, and with sparse attention switched off, it
is DeepSeek-V3. GLM-5 lets layers share the choice of an earlier layer; those have no indexer, in the checkpoint and in
the cache.
"""

from __future__ import annotations

from common.layers.base import Build
from common.layers.indexer import Indexer
from common.layers.mla import MLA
from common.models.cache_spec import INDEXER_REGION, LATENT_REGION
from common.models.deepseek_v3 import DeepseekV3ForCausalLM, DeepseekV3Layer
from common.models.spec import ModelSpec


class DeepseekV32Layer(DeepseekV3Layer):
    """Checkpoint names under `model.layers.N.`; computed like DeepSeek-V3's."""

    def make_attention(self, spec: ModelSpec, build: Build, layer_idx: int) -> MLA:
        assert spec.mla is not None
        assert spec.indexer is not None
        if spec.indexer.dense:
            return super().make_attention(spec, build, layer_idx)
        places = spec.cache.places(layer_idx)
        indexer = None
        if spec.indexer.owners[layer_idx]:
            rank = spec.mla.q_lora_rank
            indexer = Indexer(build, spec.hidden_size, rank, spec.indexer, places[INDEXER_REGION])
        return MLA(
            build,
            spec.hidden_size,
            spec.num_heads,
            spec.mla,
            places[LATENT_REGION],
            indexer=indexer,
            top_k=spec.indexer.top_k,
        )


class DeepseekV32ForCausalLM(DeepseekV3ForCausalLM):
    def __init__(self, spec: ModelSpec, build: Build, max_positions: int) -> None:
        super().__init__(spec, build, max_positions)
        assert spec.indexer is not None
        if spec.indexer.dense:
            self.ignored = (*self.ignored, r"model\.layers\.\d+\.self_attn\.indexer\..*")

    def make_layer(self, spec: ModelSpec, build: Build, layer_idx: int) -> DeepseekV32Layer:
        return DeepseekV32Layer(spec, build, layer_idx)
