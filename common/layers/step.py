"""What the layers of one forward share: an argument of each, never a global.

Shape letters: T new tokens, S sequences.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from common.attention.context import AttentionContext, GroupTables
from common.kvcache.layout import KVPlace

Rotation = tuple[Tensor, Tensor]
"""(cos, signed sin) rows of the tokens, each [T, 1, D], as `common.layers.rope` makes them."""

MAIN_ROPE = "main"


@dataclass(frozen=True)
class Step:
    """`input_ids_T` and `positions_T` are int64. `rope`: the model's rotations by name, `MAIN_ROPE` at least.

    `shared`: what one layer leaves for later ones of the same forward.
    """

    input_ids_T: Tensor
    positions_T: Tensor
    ctx: AttentionContext
    rope: Mapping[str, Rotation]
    shared: dict[str, Any] = field(default_factory=dict)
    _views: dict[str, tuple[Tensor, ...]] = field(default_factory=dict, repr=False)

    def cache(self, place: KVPlace) -> Tensor:
        """A layer's view of a region: [num_blocks, parts, units, block_size, width]."""
        views = self._views.get(place.region)
        if views is None:
            views = self._views[place.region] = self.ctx.kv.region(place.region).unbind(1)
        return views[place.index]

    def tables(self, place: KVPlace) -> GroupTables:
        """Where the positions of a region of a full or window group lie."""
        return self.ctx.groups[place.group]

    def states(self, place: KVPlace) -> Tensor:
        """int64 [S]: the block of a snapshot group that each sequence's state lies in, updated in place."""
        return self.ctx.states[place.group]
