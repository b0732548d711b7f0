"""The bytes of a model's declared cache: its layout, and how many blocks a budget buys. No torch.

Beside what the model declares (`common.models.cache_spec`) there is the last hidden row of a prompt: region
`last_hidden` of the tail group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from common.errors import ConfigError
from common.kvcache.layout import (
    DTYPE_NBYTES,
    TAIL_GROUP,
    GroupSpec,
    KVLayout,
    RegionSpec,
    Retention,
    Sharding,
)
from common.kvcache.packing import RowPacking
from common.kvcache.scales import SCALE_FORMAT, KVScales, scales_hash
from common.models.cache_spec import CacheGroup, CacheRegion
from common.models.kv_scales import FLOAT8
from common.models.spec import ModelSpec

TAIL_REGION = "last_hidden"
MAX_STATE_SHARE = 0.5  # of the budget, for the states of sequences and their snapshots


@dataclass(frozen=True)
class KVTypes:
    """`kv_dtype`: of regions that leave it open. `dtype`: what the model computes in, hidden rows included.

    `scales`: by layer, for a `kv_dtype` of 8 bits. An optional region (drafts) without any stays in `dtype`.
    """

    kv_dtype: str
    dtype: str
    scales: Mapping[int, KVScales] = field(default_factory=dict)

    def packing_of(self, region: CacheRegion) -> RowPacking | None:
        """Of rows that carry their own scales."""
        return region.packing if self.kv_dtype == FLOAT8 else None

    def of(self, region: CacheRegion) -> str:
        """ConfigError for layers without scales that need them."""
        if self.packing_of(region) is not None:
            return "uint8"
        if region.dtype != "kv" or self.kv_dtype != FLOAT8:
            return {"kv": self.kv_dtype, "model": self.dtype}.get(region.dtype, region.dtype)
        missing = [layer for layer in region.layers if layer not in self.scales]
        if missing and not region.required:
            return self.dtype
        if missing:
            raise ConfigError(
                f"layers {', '.join(map(str, missing[:10]))} have no scales for an 8-bit KV cache", param="kv_dtype"
            )
        return FLOAT8

    def scales_of(self, region: CacheRegion) -> tuple[KVScales, ...]:
        """Of a region's layers in order; empty where numbers are stored as they are."""
        return tuple(self.scales[layer] for layer in region.layers) if self.of(region) == FLOAT8 else ()


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
    scales: Mapping[int, KVScales] | None = None,
) -> KVLayout:
    """Layout of one rank. `dtype` is that of the hidden rows; `num_blocks` by group (see `size_num_blocks`).

    `scales`: by layer, where `kv_dtype` needs them. ConfigError where a row is not a whole number of 8-byte words
    (digests need that) or heads do not divide.
    """
    types = KVTypes(kv_dtype, dtype, scales or {})
    if kv_dtype == FLOAT8:
        _check_forms(spec)
    if spec.hidden_size * DTYPE_NBYTES[dtype] % 8:
        raise ConfigError(
            f"hidden_size {spec.hidden_size} in {dtype} is not a multiple of 8 bytes", param="hidden_size"
        )
    groups = [_group(g, block_size, num_blocks[g.name]) for g in spec.cache.groups]
    groups.append(
        GroupSpec(name=TAIL_GROUP, retention=Retention.SNAPSHOT, block_size=1, num_blocks=num_blocks[TAIL_GROUP])
    )
    regions = [_region(r, types, tp_size) for r in spec.cache.regions]
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


def region_scales(spec: ModelSpec, layout: KVLayout, scales: Mapping[int, KVScales]) -> dict[str, tuple[KVScales, ...]]:
    """By region of `layout` that is declared with scales, those of its layers."""
    scaled = {r.name for r in layout.regions if r.scales_hash}
    return {r.name: tuple(scales[i] for i in r.layers) for r in spec.cache.regions if r.name in scaled}


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
    scales: Mapping[int, KVScales] | None = None,
) -> dict[str, int]:
    """Blocks per group that fit into `budget_nbytes` on one rank.

    `num_tails`: blocks of the tail group, each one hidden row; snapshot groups of the model get as many if that is
    at most `MAX_STATE_SHARE` of the budget and leaves room for one sequence, and two at least. Full and window groups
    cover the same number of tokens, since short sequences use both alike, but a window group no more than twice what
    `max_num_seqs` sequences can hold live; the full groups take the rest. ConfigError, with both numbers, if not even
    one sequence of `max_model_len` tokens fits.
    """
    one = {TAIL_GROUP: 1} | {g.name: 1 for g in spec.cache.groups}
    layout = kv_layout(
        spec,
        kv_dtype=kv_dtype,
        dtype=dtype,
        block_size=block_size,
        num_blocks=one,
        tp_size=tp_size,
        scales=scales,
    )
    block = {g.name: layout.block_nbytes(g.name) for g in layout.groups}
    out = {TAIL_GROUP: num_tails}
    rest = budget_nbytes - num_tails * block[TAIL_GROUP]
    windows = [g for g in layout.groups if g.retention is Retention.WINDOW]
    full = [g for g in layout.groups if g.retention is Retention.FULL]
    need = {g.name: math.ceil(max_model_len / g.block_size) for g in full}
    for g in windows:
        whole = math.ceil(max_model_len / g.block_size)
        need[g.name] = min(whole, math.ceil((g.window + max_num_batched_tokens) / g.block_size) + 1)
    least = sum(need[g] * block[g] for g in need)
    states = [g.name for g in spec.cache.groups if g.retention is Retention.SNAPSHOT]
    out |= dict.fromkeys(states, 2)
    rest -= sum(2 * block[name] for name in states)
    if rest < least:
        raise ConfigError(
            f"a KV cache of {budget_nbytes} bytes cannot hold one sequence of {max_model_len} tokens, which takes "
            f"{least + budget_nbytes - rest}: give it more memory or lower max_model_len",
            param="kv_cache_memory_bytes",
        )
    for name in states:
        share = int(MAX_STATE_SHARE / len(states) * budget_nbytes) // block[name]
        more = max(0, min(num_tails - 2, share - 2, (rest - least) // block[name]))
        out[name] += more
        rest -= more * block[name]
    even = _even(rest, [*full, *windows], block)
    spare = _even(rest - least, windows, block)
    for g in windows:
        useful = 2 * max_num_seqs * need[g.name] if full else even[g.name]
        out[g.name] = max(need[g.name], min(even[g.name], useful, need[g.name] + spare[g.name]))
        rest -= out[g.name] * block[g.name]
    out |= _even(rest, full, block)
    return out


def _even(budget_nbytes: int, groups: list[GroupSpec], block_nbytes: Mapping[str, int]) -> dict[str, int]:
    """Blocks of each group, all covering the same number of tokens."""
    unit = math.lcm(1, *(g.block_size for g in groups))  # tokens
    unit_nbytes = sum(block_nbytes[g.name] * (unit // g.block_size) for g in groups)
    num_units = max(budget_nbytes, 0) // unit_nbytes if groups else 0
    return {g.name: num_units * (unit // g.block_size) for g in groups}


def _check_forms(spec: ModelSpec) -> None:
    bare = [r.name for r in spec.cache.regions if r.dtype == "kv" and not r.holds_kv and r.packing is None]
    if bare:
        raise ConfigError(
            f"kv_dtype fp8_e4m3 is not possible for {spec.model_type}: windows and compressed entries "
            f"({', '.join(bare)}) have no form in 8 bits, since an entry lies over the rows of its tokens and those "
            "are whole 8-byte words; use auto or bfloat16",
            param="kv_dtype",
        )


def _group(group: CacheGroup, block_size: int, num_blocks: int) -> GroupSpec:
    size = 1 if group.retention is Retention.SNAPSHOT else math.lcm(block_size, group.block_multiple)
    return GroupSpec(
        name=group.name, retention=group.retention, block_size=size, num_blocks=num_blocks, window=group.window
    )


def _region(region: CacheRegion, types: KVTypes, tp_size: int) -> RegionSpec:
    dtype, scales, packing = types.of(region), types.scales_of(region), types.packing_of(region)
    width = region.width if packing is None else packing.nbytes
    if width * DTYPE_NBYTES[dtype] % 8:
        raise ConfigError(f"rows of {region.name}: {width} in {dtype} is not a multiple of 8 bytes")
    sharding = Sharding.REPLICATED
    if region.per_head:
        sharding = Sharding.GROUPED if tp_size > region.num_units else Sharding.SPLIT
    return RegionSpec(
        name=region.name,
        group=region.group,
        dtype=dtype,
        num_layers=len(region.layers),
        num_parts=region.num_parts,
        num_units=region.num_units,
        width=width,
        sharding=sharding,
        scale_format=packing.scale_format if packing is not None else SCALE_FORMAT if scales else "",
        required=region.required,
        scales_hash=scales_hash(scales) if scales else b"",
    )
