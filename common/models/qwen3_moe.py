"""Qwen3-MoE (Qwen Team 2025): Qwen3 whose feed-forward is a mixture of experts, in all layers or in some.

Router: softmax over all experts, the best k, their weights divided by their sum where the config says so.
"""

from __future__ import annotations

from common.layers.base import Build
from common.layers.mlp import SwiGLU
from common.layers.moe import MoE
from common.layers.rms_norm import RMSNorm
from common.models.decoder import DecoderModel
from common.models.llama import LlamaLayer, make_attention
from common.models.spec import ModelSpec


class Qwen3MoeLayer(LlamaLayer):
    """Checkpoint names under `model.layers.N.`; computed like Llama's."""

    def __init__(self, spec: ModelSpec, build: Build, layer_idx: int) -> None:
        assert spec.moe is not None
        self.input_layernorm = RMSNorm(build, spec.hidden_size, spec.rms_norm_eps)
        self.self_attn = make_attention(spec, build, layer_idx, qk_norm=True)
        self.post_attention_layernorm = RMSNorm(build, spec.hidden_size, spec.rms_norm_eps)
        self.mlp: SwiGLU | MoE = (
            MoE(build, spec.hidden_size, spec.moe)
            if spec.moe.is_moe_layer[layer_idx]
            else SwiGLU(build, spec.hidden_size, spec.intermediate_size)
        )


class Qwen3MoeForCausalLM(DecoderModel):
    def make_layer(self, spec: ModelSpec, build: Build, layer_idx: int) -> Qwen3MoeLayer:
        return Qwen3MoeLayer(spec, build, layer_idx)
