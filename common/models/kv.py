"""The KV cache that a model needs: its layout, and how many blocks a budget buys. No torch.

Layers that see everything share region `kv` of the full group, sliding layers share region `kv_window` of the
window group, and the last hidden row of a prompt is region `last_hidden` of the tail group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from common.errors import ConfigError
from common.kvcache.layout import (
    DTYPE_NBYTES,
    FULL_GROUP,
    TAIL_GROUP,
    GroupSpec,
    KVLayout,
    RegionSpec,
    Retention,
    Sharding,
)
from common.models.spec import ModelSpec

WINDOW_GROUP = "window"
KV_REGION = "kv"
WINDOW_REGION = "kv_window"
TAIL_REGION = "last_hidden"


@dataclass(frozen=True)
class KVPlace:
    """Where a layer keeps its keys and values: `index` counts the layers of its region."""

    region: str
    group: str
    index: int


def kv_places(spec: ModelSpec) -> tuple[KVPlace, ...]:
    """One place per layer."""
    out: list[KVPlace] = []
    for window in spec.windows:
        region, group = (WINDOW_REGION, WINDOW_GROUP) if window else (KV_REGION, FULL_GROUP)
        out.append(KVPlace(region, group, sum(p.region == region for p in out)))
    return tuple(out)


def kv_layout(
    spec: ModelSpec,
    *,
    kv_dtype: str,
    dtype: str,
    block_size: int,
    num_blocks: Mapping[str, int],
    tp_size: int = 1,
    tp_rank: int = 0,
    adapter_id: str = "",
) -> KVLayout:
    """Layout of one rank. `dtype` is that of the hidden rows; `num_blocks` by group (see `size_num_blocks`).

    ConfigError where a row is not a whole number of 8-byte words (digests need that) or heads do not divide.
    """
    for name, width, kind in (("head_dim", spec.head_dim, kv_dtype), ("hidden_size", spec.hidden_size, dtype)):
        if width * DTYPE_NBYTES[kind] % 8:
            raise ConfigError(f"{name} {width} in {kind} is not a multiple of 8 bytes", param=name)
    sharding = Sharding.GROUPED if tp_size > spec.num_kv_heads else Sharding.SPLIT
    groups: list[GroupSpec] = []
    regions: list[RegionSpec] = []
    for region, group, window in _positional(spec):
        retention = Retention.WINDOW if window else Retention.FULL
        groups.append(
            GroupSpec(
                name=group, retention=retention, block_size=block_size, num_blocks=num_blocks[group], window=window
            )
        )
        regions.append(
            RegionSpec(
                name=region,
                group=group,
                dtype=kv_dtype,
                num_layers=sum(p.region == region for p in kv_places(spec)),
                num_parts=2,
                num_units=spec.num_kv_heads,
                width=spec.head_dim,
                sharding=sharding,
            )
        )
    groups.append(
        GroupSpec(name=TAIL_GROUP, retention=Retention.SNAPSHOT, block_size=1, num_blocks=num_blocks[TAIL_GROUP])
    )
    regions.append(
        RegionSpec(
            name=TAIL_REGION,
            group=TAIL_GROUP,
            dtype=dtype,
            num_layers=1,
            num_parts=1,
            num_units=1,
            width=spec.hidden_size,
            sharding=Sharding.REPLICATED,
        )
    )
    try:
        return KVLayout(
            model_hash=spec.model_hash,
            groups=tuple(groups),
            regions=tuple(regions),
            adapter_id=adapter_id,
            tp_size=tp_size,
            tp_rank=tp_rank,
        )
    except ValueError as e:
        raise ConfigError(f"no KV layout for {spec.model_type}: {e}") from None


def nbytes_per_token(layout: KVLayout) -> dict[str, float]:
    """Bytes on this rank of one cached token, by positional group, block padding included."""
    return {
        g.name: layout.block_nbytes(g.name) / g.block_size
        for g in layout.groups
        if g.retention is not Retention.SNAPSHOT
    }


def size_num_blocks(
    spec: ModelSpec,
    budget_nbytes: int,
    *,
    kv_dtype: str,
    dtype: str,
    block_size: int,
    max_model_len: int,
    max_num_seqs: int,
    num_tails: int,
    max_num_batched_tokens: int,
    tp_size: int = 1,
) -> dict[str, int]:
    """Blocks per group that fit into `budget_nbytes` on one rank.

    `num_tails`: blocks of the tail group, each one hidden row. Full and window groups get the same
    number of blocks, since short sequences use both alike, but the window group no more than twice what
    `max_num_seqs` sequences can hold live; the full group takes the rest. ConfigError, with both numbers, if
    not even one sequence of `max_model_len` tokens fits.
    """
    one = dict.fromkeys((FULL_GROUP, WINDOW_GROUP, TAIL_GROUP), 1)
    layout = kv_layout(spec, kv_dtype=kv_dtype, dtype=dtype, block_size=block_size, num_blocks=one, tp_size=tp_size)
    block = {g.name: layout.block_nbytes(g.name) for g in layout.groups}
    out = {TAIL_GROUP: num_tails}
    rest = budget_nbytes - out[TAIL_GROUP] * block[TAIL_GROUP]
    whole = math.ceil(max_model_len / block_size)
    need = {group: whole for _, group, _ in _positional(spec)}
    for _, group, window in _positional(spec):
        if window:
            need[group] = min(whole, math.ceil((window + max_num_batched_tokens) / block_size) + 1)
    even = max(rest, 0) // sum(block[g] for g in need)
    if WINDOW_GROUP in need:
        useful = 2 * max_num_seqs * need[WINDOW_GROUP] if FULL_GROUP in need else even
        out[WINDOW_GROUP] = min(even, useful)
        rest -= out[WINDOW_GROUP] * block[WINDOW_GROUP]
    if FULL_GROUP in need:
        out[FULL_GROUP] = max(rest, 0) // block[FULL_GROUP]
    if any(out[g] < need[g] for g in need):
        wanted = sum(need[g] * block[g] for g in need) + out[TAIL_GROUP] * block[TAIL_GROUP]
        raise ConfigError(
            f"a KV cache of {budget_nbytes} bytes cannot hold one sequence of {max_model_len} tokens, which takes "
            f"{wanted}: give it more memory or lower max_model_len",
            param="kv_cache_memory_bytes",
        )
    return out


def _positional(spec: ModelSpec) -> tuple[tuple[str, str, int], ...]:
    """(region, group, window) of the groups that hold keys and values."""
    windows = {w for w in spec.windows if w}
    assert len(windows) <= 1, f"sliding layers of one model share a window, got {windows}"
    out = ((KV_REGION, FULL_GROUP, 0),) if 0 in spec.windows else ()
    return out + tuple((WINDOW_REGION, WINDOW_GROUP, w) for w in windows)
