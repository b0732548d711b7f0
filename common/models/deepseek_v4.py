"""DeepSeek-V4 (DeepSeek-AI 2026): compressed attention beside a window, several residual streams, hashed experts.

    h = attn_norm(collapse(streams));  streams = expand(streams, attn(h))
    h = ffn_norm(collapse(streams));   streams = expand(streams, ffn(h))

Attention is by layer a window alone, with an entry per 4 tokens of which the best are seen (CSA), or with one per 128
(HCA). All layers are mixtures of experts; the first few choose theirs by token id. The row that is handed over, before
the final norm, is one again.

Names are those of the release, with `model.` before them. What transformers writes differs in two of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from common.layers.base import Build, Layer, Slot
from common.layers.compressed_attention import CompressedAttention, back
from common.layers.entries import COMPRESS_ROPE, HEAVY_ROPE, SPARSE_ROPE
from common.layers.hyper_connection import HyperConnection, HyperHead
from common.layers.mlp import SwiGLUNames
from common.layers.moe import MoE, MoENames
from common.layers.residual import ResidualStream
from common.layers.rms_norm import RMSNorm
from common.layers.rope import Rope
from common.layers.step import MAIN_ROPE, Rotation, Step
from common.models.decoder import DecoderModel
from common.models.spec import ModelSpec

_NAMES = MoENames(expert=SwiGLUNames("w1", "w3", "w2"), correction_bias="bias")


class DeepseekV4Layer(Layer):
    """Checkpoint names under `model.layers.N.`."""

    def __init__(self, spec: ModelSpec, build: Build, layer_idx: int) -> None:
        assert spec.compress is not None
        assert spec.streams is not None
        assert spec.moe is not None
        size, eps = spec.hidden_size, spec.rms_norm_eps
        places = spec.cache.places(layer_idx)
        self.hc_attn = HyperConnection(build, "hc_attn_", size, spec.streams, eps)
        self.attn_norm = RMSNorm(build, size, eps)
        self.attn = CompressedAttention(
            build, size, spec.num_heads, spec.head_dim, spec.compress, layer_idx, places, eps
        )
        self.hc_ffn = HyperConnection(build, "hc_ffn_", size, spec.streams, eps)
        self.ffn_norm = RMSNorm(build, size, eps)
        hash_vocab = spec.vocab_size if layer_idx < spec.moe.num_hash_layers else 0
        self.ffn = MoE(build, size, spec.moe, _NAMES, hash_vocab=hash_vocab)

    def __call__(self, stream: ResidualStream, step: Step) -> None:
        streams_TSD = stream.rows
        x_TD, post_TS, comb_TSS = self.hc_attn.collapse(streams_TSD)
        self.hc_attn.expand(streams_TSD, self.attn(self.attn_norm(x_TD), step), post_TS, comb_TSS)
        x_TD, post_TS, comb_TSS = self.hc_ffn.collapse(streams_TSD)
        y_TD = self.ffn(self.ffn_norm(x_TD), step.input_ids_T)
        self.hc_ffn.expand(streams_TSD, y_TD, post_TS, comb_TSS)


class DeepseekV4ForCausalLM(DecoderModel):
    can_record = CompressedAttention.can_record

    ignored: tuple[str, ...] = (r"mtp\..*", r"model\.mtp\..*")
    renamed: ClassVar[tuple[tuple[str, str], ...]] = (
        (r"head\.", "lm_head."),
        (r"(?:model\.)?embed(?:_tokens)?\.", "model.embed_tokens."),
        (r"(?:model\.hc_head\.)?hc_(?:head_)?(fn|base|scale)", r"model.hc_head_\1"),
        (r"(?:model\.)?(layers\.|norm\.)", r"model.\1"),
        (r"(model\.layers\.\d+\.attn\.)norm\.", r"\1kv_norm."),
    )

    def __init__(self, spec: ModelSpec, build: Build, max_positions: int) -> None:
        super().__init__(spec, build, max_positions)
        assert spec.compress is not None
        assert spec.streams is not None
        self._num_streams = spec.streams.count
        self._ratios = {SPARSE_ROPE: spec.compress.sparse_ratio, HEAVY_ROPE: spec.compress.heavy_ratio}
        self._head = HyperHead(build, "model.hc_head_", spec.hidden_size, spec.streams, spec.rms_norm_eps)

    def own_slots(self) -> Iterator[Slot]:
        return self._head.slots()

    def make_layer(self, spec: ModelSpec, build: Build, layer_idx: int) -> DeepseekV4Layer:
        return DeepseekV4Layer(spec, build, layer_idx)

    def make_ropes(self, spec: ModelSpec, build: Build, max_positions: int) -> Mapping[str, Rope]:
        assert spec.compress is not None
        width = spec.compress.rope_dim
        return {
            MAIN_ROPE: Rope(build, spec.rope, width, max_positions),
            COMPRESS_ROPE: Rope(build, spec.compress.rope, width, max_positions),
        }

    def rotations(self, positions_T: Tensor) -> Mapping[str, Rotation]:
        """Beside a token's own: those that undo them, and those of the entries that tokens belong to."""
        turns = dict(super().rotations(positions_T))
        for name, (cos_T1D, sin_T1D) in list(turns.items()):
            rows_T2D = torch.cat((cos_T1D, -sin_T1D), 1)
            turns[back(name)] = rows_T2D[:, :1], rows_T2D[:, 1:]
        compress = self._ropes[COMPRESS_ROPE]
        for name, ratio in self._ratios.items():
            turns[name] = compress(positions_T // ratio * ratio)
        return turns

    def enter(self, embeds_TD: Tensor) -> Tensor:
        return embeds_TD[:, None].repeat(1, self._num_streams, 1)

    def leave(self, hidden: Tensor) -> Tensor:
        return self._head(hidden)
