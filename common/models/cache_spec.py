"""What a model keeps of the tokens it has seen, declared by layer and by name. No torch, no bytes.

`common.models.kv` turns it into a layout. A region belongs to some layers and to one group; a group has one
retention rule. Three shapes of state fit:

    rows per token         a full or a window group: keys and values, latents, indexer keys
    an entry per r tokens  a region of width / r per token: the rows of r tokens in a row, [r, width / r], are one
                           entry, and a block's rows are [block_size / r, width]. Its group's blocks are whole
                           multiples of r tokens (`block_multiple`), so no entry changes once its block is sealed
    a state per sequence   a snapshot group: updated in place at each token, and copied where others may go on

Names: `kv` (full) and `kv_window` (window) for keys and values; `mla_latent` (full) for the rows of latent attention
and `indexer_key` (full) for the keys that sparse attention's indexers score; `draft_` before the name of what a
multi-token-prediction layer keeps, and `draft_hidden` (full) for every 16th hidden row, with which it can go on where
a cached prefix ends.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from common.kvcache.layout import FULL_GROUP, KVPlace, Retention
from common.kvcache.packing import RowPacking
from common.types.prefix import UNIT

WINDOW_GROUP = "window"
STATE_GROUP = "state"
KV_REGION = "kv"
WINDOW_REGION = "kv_window"
LATENT_REGION = "mla_latent"
INDEXER_REGION = "indexer_key"
DRAFT_PREFIX = "draft_"
DRAFT_ROWS_REGION = "draft_hidden"


@dataclass(frozen=True)
class CacheGroup:
    """`window` in tokens, a query's own included, for a window group. `block_multiple` in tokens."""

    name: str
    retention: Retention = Retention.FULL
    window: int = 0
    block_multiple: int = UNIT


@dataclass(frozen=True)
class CacheRegion:
    """`width` elements per token (per snapshot), layer, part and unit.

    `layers`: the model's layers that have it; a layer's place among them is its index. `dtype`: "kv" is the cache's
    (--kv-dtype), "model" what the model computes in, else a name of `common.kvcache.layout.DTYPE_NBYTES`.
    `per_head`: units are heads, dealt to the ranks; without it every rank holds all. `packing`: how a row lies in an
    8-bit cache, where it carries its own scales.
    """

    name: str
    group: str
    layers: tuple[int, ...]
    width: int
    num_parts: int = 1
    num_units: int = 1
    dtype: str = "kv"
    per_head: bool = False
    required: bool = True
    packing: RowPacking | None = None

    @property
    def holds_kv(self) -> bool:
        """Keys and values of heads: what scales of an 8-bit cache are made for."""
        return self.per_head and self.num_parts == 2


@dataclass(frozen=True)
class CacheSpec:
    groups: tuple[CacheGroup, ...]
    regions: tuple[CacheRegion, ...]

    @cached_property
    def has_windows(self) -> bool:
        return any(g.retention is Retention.WINDOW for g in self.groups)

    @cached_property
    def has_states(self) -> bool:
        """Is there something that cannot be cut back to an earlier position?"""
        return any(g.retention is Retention.SNAPSHOT for g in self.groups)

    def places(self, layer_idx: int) -> dict[str, KVPlace]:
        """By region, where a layer keeps what it keeps; names of a multi-token-prediction layer without `draft_`."""
        return {
            r.name.removeprefix(DRAFT_PREFIX): KVPlace(r.name, r.group, r.layers.index(layer_idx))
            for r in self.regions
            if layer_idx in r.layers
        }

    def with_drafts(self, layer_idx: int, hidden_size: int) -> CacheSpec:
        """Adds what a multi-token-prediction layer keeps: the same as the others in the full group, but no indexer's.

        A worker can do without; hidden rows lie like entries, a row in the room of 16 tokens.
        """
        like = [r for r in self.regions if r.group == FULL_GROUP and r.name != INDEXER_REGION]
        drafts = [replace(r, name=DRAFT_PREFIX + r.name, layers=(layer_idx,), required=False) for r in like]
        width = -(-hidden_size // UNIT // 8) * 8  # whole words in every type
        rows = CacheRegion(DRAFT_ROWS_REGION, FULL_GROUP, (layer_idx,), width, dtype="model", required=False)
        return replace(self, regions=(*self.regions, *drafts, rows))


def attention_cache(windows: tuple[int, ...], num_kv_heads: int, head_dim: int) -> CacheSpec:
    """Keys and values of grouped-query attention. `windows[i]`: tokens that layer i sees; 0 is all.

    ValueError for two different windows: sliding layers share one group.
    """
    lengths = {w for w in windows if w}
    if len(lengths) > 1:
        raise ValueError(f"sliding layers of one model share a window, got {sorted(lengths)}")
    groups: list[CacheGroup] = []
    regions: list[CacheRegion] = []
    for window in sorted(set(windows)):
        group = CacheGroup(WINDOW_GROUP, Retention.WINDOW, window) if window else CacheGroup(FULL_GROUP, Retention.FULL)
        groups.append(group)
        layers = tuple(i for i, w in enumerate(windows) if w == window)
        name = WINDOW_REGION if window else KV_REGION
        regions.append(CacheRegion(name, group.name, layers, head_dim, 2, num_kv_heads, per_head=True))
    return CacheSpec(tuple(groups), tuple(regions))


def latent_cache(
    num_layers: int, rows: RowPacking, indexer_layers: tuple[int, ...] = (), keys: RowPacking | None = None
) -> CacheSpec:
    """One row per token and layer, the same on every rank; and the keys of the layers that have an indexer.

    `rows` and `keys`: their forms in an 8-bit cache. Indexer keys stay in the model's own type in every other one:
    what is selected depends on them.
    """
    regions = [CacheRegion(LATENT_REGION, FULL_GROUP, tuple(range(num_layers)), rows.dim, packing=rows)]
    if keys is not None:
        regions.append(CacheRegion(INDEXER_REGION, FULL_GROUP, indexer_layers, keys.dim, dtype="model", packing=keys))
    return CacheSpec((CacheGroup(FULL_GROUP),), tuple(regions))
