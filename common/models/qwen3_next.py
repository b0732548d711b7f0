"""Qwen3-Next (Qwen Team 2025): three layers of gated delta net to one of gated attention, each followed by a mixture
of experts with a gated shared expert; all norms are zero-centred but the one inside the delta net.

What predicts further tokens is a layer that attends (`common.models.mtp` has the formula).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from common.layers.attention import AttentionShape
from common.layers.base import Build, Layer
from common.layers.fp8_weight import exact
from common.layers.gated_attention import GatedAttention
from common.layers.gated_delta import GatedDeltaNet
from common.layers.linear import ColumnLinear
from common.layers.mlp import SwiGLU
from common.layers.moe import MoE, MoENames
from common.layers.residual import ResidualStream
from common.layers.rms_norm import RMSNorm
from common.layers.step import Step
from common.models.cache_spec import KV_REGION
from common.models.decoder import DecoderModel
from common.models.spec import ModelSpec

_NAMES = MoENames(shared="shared_expert")


class Qwen3NextLayer(Layer):
    """Checkpoint names under `model.layers.N.`: `linear_attn` or `self_attn`, and `mlp`."""

    fused_projection: ClassVar[bool] = True
    """Is the delta net's projection kept key head by key head?"""

    def __init__(self, spec: ModelSpec, build: Build, layer_idx: int) -> None:
        assert spec.delta is not None
        hidden_size, eps, places = spec.hidden_size, spec.rms_norm_eps, spec.cache.places(layer_idx)
        self.input_layernorm = RMSNorm(build, hidden_size, eps, zero_centred=True)
        self._mixer: GatedDeltaNet | GatedAttention
        if spec.delta.is_delta_layer[layer_idx]:
            fused = self.fused_projection
            self._mixer = self.linear_attn = GatedDeltaNet(build, hidden_size, spec.delta, places, eps, fused=fused)
        else:
            shape = AttentionShape(
                hidden_size, spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.attention_bias, eps
            )
            self._mixer = self.self_attn = GatedAttention(build, shape, places[KV_REGION])
        self.post_attention_layernorm = RMSNorm(build, hidden_size, eps, zero_centred=True)
        self.mlp: SwiGLU | MoE
        if spec.moe is not None and spec.moe.is_moe_layer[layer_idx]:
            self.mlp = MoE(build, hidden_size, spec.moe, _NAMES)
        else:
            self.mlp = SwiGLU(build, hidden_size, spec.intermediate_size)

    def __call__(self, stream: ResidualStream, step: Step) -> None:
        stream.add(self._mixer(stream.normed(self.input_layernorm), step))
        stream.add(self.mlp(stream.normed(self.post_attention_layernorm)))


class Qwen3NextMTP(Layer):
    """Checkpoint names under `mtp.`. The embedding and the head are the model's."""

    ignored = (
        r"mtp\.(embed_tokens|lm_head)\.weight",
        r"mtp\.layers\.[1-9]\d*\..+",
        r"mtp\.layers\.0\.self_attn\..*[kv]_scale",  # its cache is in the model's own type
    )

    def __init__(self, spec: ModelSpec, build: Build, layer: Qwen3NextLayer) -> None:
        size, eps = spec.hidden_size, spec.rms_norm_eps
        self.pre_fc_norm_embedding = RMSNorm(build, size, eps, zero_centred=True)
        self.pre_fc_norm_hidden = RMSNorm(build, size, eps, zero_centred=True)
        self.fc = ColumnLinear(exact(build), 2 * size, {"fc": (1, size)}, bias=False)
        self.layers = [layer]
        self.norm = RMSNorm(build, size, eps, zero_centred=True)

    def __call__(self, rows_TD: Tensor, embeds_TD: Tensor, step: Step) -> Tensor:
        """As `common.models.mtp.MTPLayer`'s."""
        hidden_TD = self.fc(torch.cat((self.pre_fc_norm_embedding(embeds_TD), self.pre_fc_norm_hidden(rows_TD)), -1))
        stream = ResidualStream(hidden_TD)
        self.layers[0](stream, step)
        return stream.normed(self.norm)


class Qwen3NextForCausalLM(DecoderModel):
    can_record = GatedDeltaNet.can_record

    mtp_prefix = "mtp."

    def __init__(self, spec: ModelSpec, build: Build, max_positions: int) -> None:
        super().__init__(spec, build, max_positions)
        self.ignored = (*self.ignored, *(Qwen3NextMTP.ignored if spec.has_drafts else (r"mtp\..+",)))

    def make_layer(self, spec: ModelSpec, build: Build, layer_idx: int) -> Qwen3NextLayer:
        return Qwen3NextLayer(spec, build, layer_idx)

    def make_mtp(self, spec: ModelSpec, build: Build) -> Qwen3NextMTP:
        return Qwen3NextMTP(spec, build, self.make_layer(spec, build, spec.num_layers))
