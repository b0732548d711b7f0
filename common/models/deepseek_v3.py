"""DeepSeek-V3 and R1 (DeepSeek-AI 2024), Kimi-K2, Moonlight: latent attention, and many small experts.

A layer is pre-norm: multi-head latent attention, then a SwiGLU in the first layers and a mixture of experts in the
others. Router: sigmoid scores; a bias per expert is added for choosing only; groups of experts compete by their two
best, experts within the groups left; weights are divided by their sum and scaled. Shared experts see every token.
"""

from __future__ import annotations

from common.layers.base import Build, Layer
from common.layers.mla import MLA
from common.layers.mlp import SwiGLU
from common.layers.moe import MoE
from common.layers.residual import ResidualStream
from common.layers.rms_norm import RMSNorm
from common.layers.step import Step
from common.models.cache_spec import LATENT_REGION
from common.models.decoder import DecoderModel
from common.models.mtp import MTPLayer
from common.models.spec import ModelSpec


class DeepseekV3Layer(Layer):
    """Checkpoint names under `model.layers.N.`."""

    def __init__(self, spec: ModelSpec, build: Build, layer_idx: int) -> None:
        self.input_layernorm = RMSNorm(build, spec.hidden_size, spec.rms_norm_eps)
        self.self_attn = self.make_attention(spec, build, layer_idx)
        self.post_attention_layernorm = RMSNorm(build, spec.hidden_size, spec.rms_norm_eps)
        assert spec.moe is not None
        self.mlp: SwiGLU | MoE = (
            MoE(build, spec.hidden_size, spec.moe)
            if spec.moe.is_moe_layer[layer_idx]
            else SwiGLU(build, spec.hidden_size, spec.intermediate_size)
        )

    def make_attention(self, spec: ModelSpec, build: Build, layer_idx: int) -> MLA:
        assert spec.mla is not None
        place = spec.cache.places(layer_idx)[LATENT_REGION]
        return MLA(build, spec.hidden_size, spec.num_heads, spec.mla, place)

    def __call__(self, stream: ResidualStream, step: Step) -> None:
        stream.add(self.self_attn(stream.normed(self.input_layernorm), step))
        stream.add(self.mlp(stream.normed(self.post_attention_layernorm)))


class DeepseekV3ForCausalLM(DecoderModel):
    def __init__(self, spec: ModelSpec, build: Build, max_positions: int) -> None:
        super().__init__(spec, build, max_positions)
        # layers behind the last one predict further tokens; with drafts, the first of them is read
        mtp = range(spec.num_layers, spec.num_layers + max(spec.mtp_layers, 1))
        left = [rf"model\.layers\.{i}\..*" for i in mtp[1 if spec.has_drafts else 0 :]]
        if spec.has_drafts:
            parts = (*MTPLayer.ignored, r"self_attn\.indexer\..*")
            left += [rf"model\.layers\.{spec.num_layers}\.{part}" for part in parts]
        self.ignored = (*self.ignored, *left)

    def make_layer(self, spec: ModelSpec, build: Build, layer_idx: int) -> DeepseekV3Layer:
        return DeepseekV3Layer(spec, build, layer_idx)

    def make_draft_layer(self, spec: ModelSpec, build: Build) -> DeepseekV3Layer:
        return DeepseekV3Layer(spec, build, spec.num_layers)
