"""Qwen3 dense (Qwen Team 2025): Llama with a norm on every query and key head, no MLP bias, and, where the
config says so, layers that see a sliding window (their keys lie in the window group).
"""

from __future__ import annotations

from common.layers.base import Build
from common.layers.mlp import SwiGLU
from common.layers.rms_norm import RMSNorm
from common.models.decoder import DecoderModel
from common.models.llama import LlamaLayer, make_attention
from common.models.spec import ModelSpec


class Qwen3Layer(LlamaLayer):
    """Checkpoint names under `model.layers.N.`; computed like Llama's."""

    def __init__(self, spec: ModelSpec, build: Build, layer_idx: int) -> None:
        self.input_layernorm = RMSNorm(build, spec.hidden_size, spec.rms_norm_eps)
        self.self_attn = make_attention(spec, build, layer_idx, qk_norm=True)
        self.post_attention_layernorm = RMSNorm(build, spec.hidden_size, spec.rms_norm_eps)
        self.mlp = SwiGLU(build, spec.hidden_size, spec.intermediate_size)


class Qwen3ForCausalLM(DecoderModel):
    def make_layer(self, spec: ModelSpec, build: Build, layer_idx: int) -> Qwen3Layer:
        return Qwen3Layer(spec, build, layer_idx)
