"""The multi-token-prediction layer (DeepSeek-V3 report, section 2.2): from a token and the row before it, the next row.

    row of token t's place = shared_head.norm(block(eh_proj([enorm(embedding of t) | hnorm(row before)])))

The row before the first such row is the model's own, after its final norm; further rows are made by chaining. The head
makes a row the scores of the token that follows t: a draft. Embedding and head are the model's; a checkpoint may hold
them again. A row's cache lies at t's position and depends on the tokens up to t alone, like every other cache; the
first token of a sequence has no row before it, and nothing at its position.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from common.layers.base import Build, Layer, Slot
from common.layers.fp8_weight import exact
from common.layers.linear import ColumnLinear
from common.layers.residual import ResidualStream
from common.layers.rms_norm import RMSNorm
from common.layers.step import Step
from common.models.spec import ModelSpec

FIRST_POSITION = 1


class SharedHead(Layer):
    """Checkpoint names under `shared_head.`: the norm is the layer's own, the head is the model's."""

    def __init__(self, spec: ModelSpec, build: Build) -> None:
        self.norm = RMSNorm(build, spec.hidden_size, spec.rms_norm_eps)


class DraftBlock(Protocol):
    """A layer of the family, as `common.models.decoder` has them."""

    def slots(self) -> Iterator[Slot]: ...

    def derive(self) -> None: ...

    def __call__(self, stream: ResidualStream, step: Step, /) -> None: ...


class DraftLayer(Protocol):
    """A multi-token-prediction layer as a family has it; `MTPLayer` is that of most."""

    def slots(self, prefix: str = "") -> Iterator[Slot]: ...

    def derive(self) -> None: ...

    def __call__(self, rows_TD: Tensor, embeds_TD: Tensor, step: Step, /) -> Tensor: ...


class MTPLayer(Layer):
    """Checkpoint names under `model.layers.N.` for the N of the model's layers; `block`'s are among them."""

    ignored = (r"embed_tokens\.weight", r"shared_head\.head\.weight")

    def __init__(self, spec: ModelSpec, build: Build, block: DraftBlock) -> None:
        size = spec.hidden_size
        self.enorm = RMSNorm(build, size, spec.rms_norm_eps)
        self.hnorm = RMSNorm(build, size, spec.rms_norm_eps)
        self.eh_proj = ColumnLinear(exact(build), 2 * size, {"eh_proj": (1, size)}, bias=False)
        self.shared_head = SharedHead(spec, build)
        self._block = block

    def own_slots(self) -> Iterator[Slot]:
        return self._block.slots()

    def derive_own(self) -> None:
        self._block.derive()

    def __call__(self, rows_TD: Tensor, embeds_TD: Tensor, step: Step) -> Tensor:
        """`rows_TD`: after a norm, of the token before each of `embeds_TD`. A new [T, D], after the layer's norm."""
        hidden_TD = self.eh_proj(torch.cat((self.enorm(embeds_TD), self.hnorm(rows_TD)), dim=-1))
        stream = ResidualStream(hidden_TD)
        self._block(stream, step)
        return stream.normed(self.shared_head.norm)
