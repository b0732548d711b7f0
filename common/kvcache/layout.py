"""What the KV cache of one worker looks like, to the byte. Pure data, no torch.

A *group* is a pool of equal blocks with one retention rule; a *region* is one kind of bytes inside
every block of its group. A block of region r is the row-major array

    [num_layers, num_parts, local_units, block_size, width]   of dtype

(parts: 2 for keys and values; units: the KV heads this rank holds), and a block of a group is its
regions one after the other in declared order, each start aligned to `ALIGN` bytes. Block b of a group
begins at b * block_nbytes(group): all layers of a block are contiguous and are read in place.

The *tail* group (snapshot, one position) carries the last hidden row of a prompt, before the final
norm, from the worker that computed it to the worker that samples.
"""

from __future__ import annotations

import enum
import hashlib
import math

import msgspec

from common.types.prefix import UNIT

SCHEMA_VERSION = 1
ALIGN = 64
TAIL_GROUP = "tail"
FULL_GROUP = "full"

DTYPE_NBYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "uint8": 1}


class Retention(enum.StrEnum):
    FULL = "full"  # every position is kept
    WINDOW = "window"  # the last `window` positions are kept
    SNAPSHOT = "snapshot"  # a state at one position; a block is one snapshot


class Sharding(enum.StrEnum):
    REPLICATED = "replicated"  # every rank holds all units
    SPLIT = "split"  # units are dealt in order to ranks
    GROUPED = "grouped"  # more ranks than units: neighbours hold the same unit


class RegionSpec(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    group: str
    dtype: str
    num_layers: int
    num_parts: int
    num_units: int  # over all ranks
    width: int  # elements per token, layer, part and unit
    sharding: Sharding
    scale_format: str = ""
    required: bool = True
    scales_hash: bytes = b""


class GroupSpec(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    retention: Retention
    block_size: int  # tokens; 1 for snapshots
    num_blocks: int
    window: int = 0  # tokens; WINDOW only


class RegionPlace(msgspec.Struct, frozen=True):
    """Where a region lies in a block of its group."""

    offset: int  # bytes from the block's start
    nbytes: int
    first_unit: int
    local_units: int
    token_stride: int  # bytes: width * itemsize
    unit_stride: int
    part_stride: int
    layer_stride: int


class KVPlace(msgspec.Struct, frozen=True):
    """Where a layer of a model keeps one kind of state: `index` counts the layers of its region."""

    region: str
    group: str
    index: int


class KVLayout(msgspec.Struct, frozen=True, kw_only=True):
    """Regions and groups of one rank. Equal fingerprints mean equal bytes at equal places."""

    model_hash: bytes
    groups: tuple[GroupSpec, ...]
    regions: tuple[RegionSpec, ...]
    adapter_id: str = ""
    tp_size: int = 1
    tp_rank: int = 0
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        names = [g.name for g in self.groups]
        if len(set(names)) != len(names):
            raise ValueError(f"groups must have unique names, got {names}")
        for g in self.groups:
            if g.retention is Retention.SNAPSHOT:
                if g.block_size != 1:
                    raise ValueError(f"group {g.name}: a snapshot block holds one position, got {g.block_size}")
            elif g.block_size % UNIT:
                raise ValueError(f"group {g.name}: block size {g.block_size} is not a multiple of {UNIT} tokens")
            if (g.retention is Retention.WINDOW) != (g.window > 0):
                raise ValueError(f"group {g.name}: window {g.window} does not fit retention {g.retention}")
        seen: set[str] = set()
        for r in self.regions:
            if r.group not in names:
                raise ValueError(f"region {r.name}: unknown group {r.group!r}")
            if r.name in seen:
                raise ValueError(f"region {r.name} is declared twice")
            seen.add(r.name)
            if r.dtype not in DTYPE_NBYTES:
                raise ValueError(f"region {r.name}: unknown dtype {r.dtype!r}")
            row_nbytes = r.width * DTYPE_NBYTES[r.dtype]
            if row_nbytes % 8:
                raise ValueError(f"region {r.name}: rows of {row_nbytes} bytes are not whole 64-bit words")
            self._local_units(r)

    def group(self, name: str) -> GroupSpec:
        for g in self.groups:
            if g.name == name:
                return g
        raise KeyError(name)

    def regions_of(self, group: str) -> tuple[RegionSpec, ...]:
        return tuple(r for r in self.regions if r.group == group)

    def _local_units(self, r: RegionSpec) -> tuple[int, int]:
        if r.sharding is Sharding.REPLICATED or self.tp_size == 1:
            return 0, r.num_units
        if r.sharding is Sharding.SPLIT:
            if r.num_units % self.tp_size:
                raise ValueError(f"region {r.name}: {r.num_units} units do not split over {self.tp_size} ranks")
            n = r.num_units // self.tp_size
            return self.tp_rank * n, n
        if self.tp_size % r.num_units:
            raise ValueError(f"region {r.name}: {self.tp_size} ranks do not group over {r.num_units} units")
        return self.tp_rank * r.num_units // self.tp_size, 1

    def place(self, region: str) -> RegionPlace:
        """Byte geometry of a region inside a block of its group on this rank."""
        spec = next(r for r in self.regions if r.name == region)
        offset = 0
        for r in self.regions_of(spec.group):
            place = self._geometry(r, offset)
            if r.name == region:
                return place
            offset = _align(offset + place.nbytes)
        raise AssertionError("unreachable")

    def _geometry(self, r: RegionSpec, offset: int) -> RegionPlace:
        first, local = self._local_units(r)
        token = r.width * DTYPE_NBYTES[r.dtype]
        unit = token * self.group(r.group).block_size
        part = unit * local
        layer = part * r.num_parts
        return RegionPlace(offset, layer * r.num_layers, first, local, token, unit, part, layer)

    def block_nbytes(self, group: str) -> int:
        offset = 0
        for r in self.regions_of(group):
            offset = _align(offset + self._geometry(r, offset).nbytes)
        return offset

    def num_digests(self, group: str) -> int:
        """Digests per block: one for each region and local shard unit, in that order."""
        return sum(self._local_units(r)[1] for r in self.regions_of(group))

    def fingerprint(self) -> bytes:
        """16 bytes over everything but the number of blocks and the rank."""
        plain = msgspec.json.encode(
            (
                self.schema_version,
                self.model_hash,
                self.adapter_id,
                self.tp_size,
                [(g.name, g.retention, g.block_size, g.window) for g in self.groups],
                self.regions,
            )
        )
        return hashlib.blake2b(plain, digest_size=16).digest()


class Compatibility(msgspec.Struct, frozen=True):
    """Verdict on a pair of layouts. `cold_regions`: optional regions the source lacks (named in metrics)."""

    ok: bool
    reason: str = ""  # the field at fault, with both values
    equal: bool = False  # same bytes at the same places: blocks are read whole
    cold_regions: tuple[str, ...] = ()


def compare(source: KVLayout, reader: KVLayout) -> Compatibility:
    """Can `reader` use blocks of `source`? Block size and TP degree convert; nothing else does."""
    for field in ("schema_version", "model_hash", "adapter_id"):
        a, b = getattr(source, field), getattr(reader, field)
        if a != b:
            return Compatibility(False, f"{field}: source has {_show(a)}, reader has {_show(b)}")
    source_groups = {g.name: g for g in source.groups}
    source_regions = {r.name: r for r in source.regions}
    cold: list[str] = []
    for want in reader.regions:
        have = source_regions.get(want.name)
        if have is None:
            if want.required:
                return Compatibility(False, f"region {want.name}: required by the reader, absent at the source")
            cold.append(want.name)
            continue
        for field in ("group", "dtype", "scale_format", "num_layers", "num_parts", "num_units", "width", "scales_hash"):
            a, b = getattr(have, field), getattr(want, field)
            if a != b:
                why = f"region {want.name}.{field}: source has {_show(a)}, reader has {_show(b)}"
                return Compatibility(False, why)
        g, h = source_groups[want.group], reader.group(want.group)
        for field in ("retention", "window"):
            a, b = getattr(g, field), getattr(h, field)
            if a != b:
                return Compatibility(False, f"group {g.name}.{field}: source has {_show(a)}, reader has {_show(b)}")
    for name, have in source_regions.items():
        if have.required and all(r.name != name for r in reader.regions):
            return Compatibility(False, f"region {name}: required at the source, absent at the reader")
    equal = source.fingerprint() == reader.fingerprint() and source.tp_rank == reader.tp_rank
    return Compatibility(True, "", equal, tuple(cold))


def _align(n: int) -> int:
    return math.ceil(n / ALIGN) * ALIGN


def _show(value: object) -> str:
    return value.hex() if isinstance(value, bytes) else repr(value)
