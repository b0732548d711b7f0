"""The frame of a decoder-only transformer: embed, layers with residual sums, final norm and head.

What a family adds is its layer. `forward` ends before the final norm: that row is what one worker hands to
another, and `logits` goes on from it.

Shape letters: T new tokens, R rows, D hidden size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import ClassVar, Protocol

from torch import Tensor

from common.attention.context import AttentionContext
from common.layers.base import Build, Layer, Slot
from common.layers.embedding import Embedding, Head
from common.layers.residual import ResidualStream
from common.layers.rms_norm import RMSNorm
from common.layers.rope import Rope
from common.layers.step import MAIN_ROPE, Rotation, Step, StepMedia
from common.models.mtp import DraftBlock, DraftLayer, MTPLayer
from common.models.spec import ModelSpec


class DecoderLayer(Protocol):
    def __call__(self, stream: ResidualStream, step: Step, /) -> None:
        """Add what this layer's blocks give to the stream."""


class DecoderBody(Layer):
    """Checkpoint names under `model.`."""

    def __init__(self, spec: ModelSpec, build: Build, layers: list[DecoderLayer]) -> None:
        self.embed_tokens = Embedding(build, spec.vocab_size, spec.hidden_size)
        self.layers = layers
        self.norm = RMSNorm(build, spec.hidden_size, spec.rms_norm_eps, zero_centred=spec.zero_centred_norm)


class DecoderModel(Layer, ABC):
    """`max_positions`: tokens in the longest sequence it will see (rows of the rotary table)."""

    ignored: tuple[str, ...] = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)
    """Tensors (regular expressions) that checkpoints hold and nobody reads."""

    renamed: ClassVar[tuple[tuple[str, str], ...]] = ()
    """Beginnings of checkpoint names (regular expressions) and what they are here, each tried in turn."""

    prefixes: ClassVar[Mapping[str, str]] = {}
    """By what a tensor's name starts with here, what it starts with in checkpoints: a text tower is a part of one."""

    can_record: ClassVar[bool] = True
    """Do its layers launch the same work for the same shapes, whatever the lengths (`common.engine.graphs`)?"""

    mtp_prefix: ClassVar[str] = ""
    """What names of the multi-token-prediction layer start with; empty: those of a layer behind the last."""

    def __init__(self, spec: ModelSpec, build: Build, max_positions: int) -> None:
        self.model = DecoderBody(spec, build, [self.make_layer(spec, build, i) for i in range(spec.num_layers)])
        self._pools = spec.pooling is not None  # then nobody asks for logits, and no head is read
        is_tied = spec.tie_word_embeddings or self._pools
        self.lm_head = Head(build, spec.vocab_size, spec.hidden_size, self.model.embed_tokens if is_tied else None)
        if self._pools:
            self.ignored = (*self.ignored, r"lm_head\..*")
        self._ropes = self.make_ropes(spec, build, max_positions)
        self._mtp_prefix = self.mtp_prefix or f"model.layers.{spec.num_layers}."
        self._mtp = self.make_mtp(spec, build) if spec.has_drafts else None

    def own_slots(self) -> Iterable[Slot]:
        return () if self._mtp is None else self._mtp.slots(self._mtp_prefix)

    def derive_own(self) -> None:
        if self._mtp is not None:
            self._mtp.derive()

    def slots(self, prefix: str = "") -> Iterator[Slot]:
        for slot in super().slots(prefix):
            if self._pools and slot.name.startswith("lm_head."):
                continue
            ours = next((p for p in self.prefixes if slot.name.startswith(p)), "")
            yield replace(slot, name=self.prefixes[ours] + slot.name[len(ours) :]) if ours else slot

    @abstractmethod
    def make_layer(self, spec: ModelSpec, build: Build, layer_idx: int) -> DecoderLayer:
        """One layer of the family, with empty tensors. `spec.cache.places(layer_idx)` is where it keeps its cache."""

    def make_mtp(self, spec: ModelSpec, build: Build) -> DraftLayer:
        """The multi-token-prediction layer, with empty tensors."""
        return MTPLayer(spec, build, self.make_draft_layer(spec, build))

    def make_draft_layer(self, spec: ModelSpec, build: Build) -> DraftBlock:
        """The layer inside of the multi-token-prediction layer; its index is `spec.num_layers`."""
        raise AssertionError(f"the reader of {spec.model_type} promised a draft layer that its model does not have")

    def make_ropes(self, spec: ModelSpec, build: Build, max_positions: int) -> Mapping[str, Rope]:
        """The rotations that layers find in `Step.rope`."""
        return {MAIN_ROPE: Rope(build, spec.rope, spec.rope.rotary_dim or spec.head_dim, max_positions)}

    def rotations(self, positions: Tensor) -> Mapping[str, Rotation]:
        """Every rotation's rows for the tokens of a step: positions [T], or [3, T] with images (`StepMedia`)."""
        return {name: rope(positions) for name, rope in self._ropes.items()}

    def enter(self, embeds_TD: Tensor) -> Tensor:
        """What the layers work on; a family with several residual streams makes them here."""
        return embeds_TD

    def leave(self, hidden: Tensor) -> Tensor:
        """Hidden rows [T, D] of what the layers worked on."""
        return hidden

    def forward(
        self, input_ids_T: Tensor, positions_T: Tensor, ctx: AttentionContext, media: StepMedia | None = None
    ) -> Tensor:
        """Write the new tokens' cache; return their hidden rows [T, D] before the final norm.

        `input_ids_T` and `positions_T` are int64; the ids of tokens that `media` embeds are any of the vocabulary.
        """
        embeds_TD = self.model.embed_tokens(input_ids_T)
        rope_positions = positions_T
        if media is not None:
            media.embed(embeds_TD)
            if media.rope_positions_3T is not None:
                rope_positions = media.rope_positions_3T
        step = Step(input_ids_T, positions_T, ctx, self.rotations(rope_positions), media)
        stream = ResidualStream(self.enter(embeds_TD))
        for layer in self.model.layers:
            ctx.on_layer()
            layer(stream, step)
        return self.leave(stream.rows)

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """Final norm and head over rows of `forward`: float32 [R, vocab]."""
        return self.lm_head(self.model.norm(hidden_RD))

    def norm(self, hidden_RD: Tensor) -> Tensor:
        """Rows of `forward` after the final norm, as `draft` takes them and as embeddings are made of them."""
        return self.model.norm(hidden_RD)

    def draft(self, rows_TD: Tensor, input_ids_T: Tensor, positions_T: Tensor, ctx: AttentionContext) -> Tensor:
        """Rows behind tokens, from `rows_TD` of the tokens before them: of `norm`, or of this. See `common.models.mtp`.

        `ctx.groups` has those of the layer's own regions, which begin at `FIRST_POSITION`.
        """
        assert self._mtp is not None, "the model was made without its multi-token-prediction layer"
        ctx.on_layer()
        step = Step(input_ids_T, positions_T, ctx, self.rotations(positions_T))
        return self._mtp(rows_TD, self.model.embed_tokens(input_ids_T), step)

    def draft_logits(self, rows_RD: Tensor) -> Tensor:
        """Float32 [R, vocab] of the tokens that follow, from rows of `draft`."""
        return self.lm_head(rows_RD)
