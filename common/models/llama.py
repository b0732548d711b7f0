"""Llama (Touvron et al. 2023; Llama 3.1 rope): pre-norm, grouped-query attention with rotary positions, SwiGLU.

SmolLM2 is this with tied embeddings.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from common.layers.attention import Attention, AttentionShape
from common.layers.base import Build, Layer
from common.layers.mlp import SwiGLU
from common.layers.residual import ResidualStream
from common.layers.rms_norm import RMSNorm
from common.layers.step import Step
from common.models.cache_spec import KV_REGION, WINDOW_REGION
from common.models.decoder import DecoderModel
from common.models.spec import ModelSpec


class LlamaLayer(Layer):
    """Checkpoint names under `model.layers.N.`."""

    def __init__(self, spec: ModelSpec, build: Build, layer_idx: int) -> None:
        self.input_layernorm = RMSNorm(build, spec.hidden_size, spec.rms_norm_eps)
        self.self_attn = make_attention(spec, build, layer_idx)
        self.post_attention_layernorm = RMSNorm(build, spec.hidden_size, spec.rms_norm_eps)
        self.mlp: Callable[[Tensor], Tensor] = SwiGLU(
            build, spec.hidden_size, spec.intermediate_size, bias=spec.mlp_bias
        )

    def __call__(self, stream: ResidualStream, step: Step) -> None:
        stream.add(self.self_attn(stream.normed(self.input_layernorm), step))
        stream.add(self.mlp(stream.normed(self.post_attention_layernorm)))


def make_attention(spec: ModelSpec, build: Build, layer_idx: int, *, qk_norm: bool = False) -> Attention:
    """The grouped-query attention that a spec asks for, over the region that its layer has."""
    places = spec.cache.places(layer_idx)
    shape = AttentionShape(
        hidden_size=spec.hidden_size,
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        bias=spec.attention_bias,
        qk_norm_eps=spec.rms_norm_eps if qk_norm else 0.0,
    )
    return Attention(build, shape, places.get(KV_REGION) or places[WINDOW_REGION])


class LlamaForCausalLM(DecoderModel):
    def make_layer(self, spec: ModelSpec, build: Build, layer_idx: int) -> LlamaLayer:
        return LlamaLayer(spec, build, layer_idx)
