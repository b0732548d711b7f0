"""The frame of a decoder-only transformer: embed, layers with residual sums, final norm and head.

What a family adds is its layer. `forward` ends before the final norm: that row is what one worker hands to
another, and `logits` goes on from it.

Shape letters: T new tokens, R rows, D hidden size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Protocol

from torch import Tensor

from common.attention.context import AttentionContext, GroupTables
from common.layers.base import Build, Layer
from common.layers.embedding import Embedding, Head
from common.layers.rms_norm import RMSNorm
from common.layers.rope import Rope
from common.models.kv import kv_places
from common.models.spec import ModelSpec


class DecoderLayer(Protocol):
    def __call__(
        self,
        hidden_TD: Tensor,
        rope: tuple[Tensor, Tensor],
        cache: Tensor,
        tables: GroupTables,
        ctx: AttentionContext,
    ) -> None:
        """Add this layer's output to `hidden_TD` in place."""


class DecoderBody(Layer):
    """Checkpoint names under `model.`."""

    def __init__(self, spec: ModelSpec, build: Build, layers: list[DecoderLayer]) -> None:
        self.embed_tokens = Embedding(build, spec.vocab_size, spec.hidden_size)
        self.layers = layers
        self.norm = RMSNorm(build, spec.hidden_size, spec.rms_norm_eps)


class DecoderModel(Layer, ABC):
    """`max_positions`: tokens in the longest sequence it will see (rows of the rotary table)."""

    ignored: ClassVar[tuple[str, ...]] = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)
    """Tensors (regular expressions) that old checkpoints hold and nobody reads."""

    def __init__(self, spec: ModelSpec, build: Build, max_positions: int) -> None:
        self.model = DecoderBody(spec, build, [self.make_layer(spec, build) for _ in range(spec.num_layers)])
        self.lm_head = Head(
            build, spec.vocab_size, spec.hidden_size, self.model.embed_tokens if spec.tie_word_embeddings else None
        )
        self._rope = Rope(build, spec.rope, spec.head_dim, max_positions)
        self._places = kv_places(spec)
        self._regions = sorted({p.region for p in self._places})

    @abstractmethod
    def make_layer(self, spec: ModelSpec, build: Build) -> DecoderLayer:
        """One layer of the family, with empty tensors."""

    def forward(
        self,
        input_ids_T: Tensor,
        positions_T: Tensor,
        ctx: AttentionContext,
        inputs_embeds_TD: Tensor | None = None,
    ) -> Tensor:
        """Write the new tokens' keys and values; return their hidden rows [T, D] before the final norm.

        `input_ids_T` and `positions_T` are int64. `inputs_embeds_TD` takes the place of the embedding's rows.
        """
        if inputs_embeds_TD is None:
            hidden_TD = self.model.embed_tokens(input_ids_T)
        else:
            hidden_TD = inputs_embeds_TD.to(self.model.embed_tokens.weight.dtype, copy=True)
        rope = self._rope(positions_T)
        caches = {region: ctx.kv.region(region).unbind(1) for region in self._regions}
        for layer, place in zip(self.model.layers, self._places, strict=True):
            layer(hidden_TD, rope, caches[place.region][place.index], ctx.groups[place.group], ctx)
        return hidden_TD

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """Final norm and head over rows of `forward`: float32 [R, vocab]."""
        return self.lm_head(self.model.norm(hidden_RD))
