"""What the layers of one forward share: an argument of each, never a global.

Shape letters: T new tokens, S sequences, N tokens of images, D hidden size, W elements of
an image row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from common.attention.context import AttentionContext, GroupTables
from common.kvcache.layout import KVPlace
from common.kvcache.scales import KVScales
from common.layers.residual import ResidualStream

Rotation = tuple[Tensor, Tensor]
"""(cos, signed sin) rows of the tokens, each [T, 1, D], as `common.layers.rope` makes them."""

MAIN_ROPE = "main"


@dataclass(frozen=True)
class StepMedia:
    """Images in a step: tokens `rows_N` (int64, indices in T) take `embeds_NW` in place of their embeddings.

    A row is [embedding | features added after layer 0 | after layer 1 ...], D wide each (`MediaSpec`), in any
    floating type. `rope_positions_3T`: int64 (time, height, width) of every token; None where tokens turn by their
    index. N may be 0: an image in an earlier step moves the text behind it.
    """

    rows_N: Tensor
    embeds_NW: Tensor
    rope_positions_3T: Tensor | None = None

    def embed(self, hidden_TD: Tensor) -> None:
        """Put the embeddings in."""
        if len(self.rows_N):
            hidden_TD.index_copy_(0, self.rows_N, self._part(hidden_TD, 0))

    def add_features(self, stream: ResidualStream, layer_idx: int) -> None:
        """Add the features that layer `layer_idx` is followed by, if there are any."""
        if (layer_idx + 1) * stream.width < self.embeds_NW.shape[1]:
            hidden_TD = stream.rows
            hidden_TD.index_add_(0, self.rows_N, self._part(hidden_TD, layer_idx + 1))

    def _part(self, hidden_TD: Tensor, index: int) -> Tensor:
        width = hidden_TD.shape[1]
        return self.embeds_NW[:, index * width : (index + 1) * width].to(hidden_TD.dtype)


@dataclass(frozen=True)
class Step:
    """`input_ids_T` and `positions_T` are int64. `rope`: the model's rotations by name, `MAIN_ROPE` at least.

    `media` is None in a step that no image is in or before. `shared`: what one layer leaves for later ones of
    the same forward.
    """

    input_ids_T: Tensor
    positions_T: Tensor
    ctx: AttentionContext
    rope: Mapping[str, Rotation]
    media: StepMedia | None = None
    shared: dict[str, Any] = field(default_factory=dict)
    _views: dict[str, tuple[Tensor, ...]] = field(default_factory=dict, repr=False)

    def cache(self, place: KVPlace) -> Tensor:
        """A layer's view of a region: [num_blocks, parts, units, block_size, width]."""
        views = self._views.get(place.region)
        if views is None:
            views = self._views[place.region] = self.ctx.kv.region(place.region).unbind(1)
        return views[place.index]

    def scales(self, place: KVPlace) -> KVScales | None:
        """A layer's scales of a region, None where numbers are stored as they are."""
        scales = self.ctx.kv.scales(place.region)
        return None if scales is None else scales[place.index]

    def tables(self, place: KVPlace) -> GroupTables:
        """Where the positions of a region of a full or window group lie."""
        return self.ctx.groups[place.group]

    def states(self, place: KVPlace) -> Tensor:
        """int64 [S]: the block of a snapshot group that each sequence's state lies in, updated in place."""
        return self.ctx.states[place.group]
