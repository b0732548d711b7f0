"""Layouts, memory and a cache of fakes for the tests of common/kvtransfer."""

from __future__ import annotations

import ctypes
import select
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

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
from common.kvtransfer.memory import MemoryTransport
from common.types.prefix import extend_chain, root_hash

MODEL = b"m" * 16


def is_readable(fd: int, timeout_s: float = 0.0) -> bool:
    """Whatever its number, which `select` limits to 1023. Waits at most `timeout_s`."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(1000 * timeout_s))


class FakeClock:
    def __init__(self) -> None:
        self.time = 1000.0

    def now(self) -> float:
        return self.time


def region(name: str = "kv", group: str = FULL_GROUP, **changes: object) -> RegionSpec:
    fields: dict[str, object] = {
        "name": name,
        "group": group,
        "dtype": "bfloat16",
        "num_layers": 2,
        "num_parts": 2,
        "num_units": 2,
        "width": 8,
        "sharding": Sharding.SPLIT,
    }
    return RegionSpec(**(fields | changes))  # type: ignore[arg-type]


def tail_region(**changes: object) -> RegionSpec:
    fields = {"num_layers": 1, "num_parts": 1, "num_units": 1, "width": 32, "sharding": Sharding.REPLICATED}
    return region("hidden", TAIL_GROUP, **(fields | changes))


def small_layout(block_size: int = 16, num_blocks: int = 24, window: int = 0, **changes: object) -> KVLayout:
    """A full group and a tail, with a window group where `window` says so."""
    groups = [
        GroupSpec(name=FULL_GROUP, retention=Retention.FULL, block_size=block_size, num_blocks=num_blocks),
        GroupSpec(name=TAIL_GROUP, retention=Retention.SNAPSHOT, block_size=1, num_blocks=8),
    ]
    regions = [region(), tail_region()]
    if window:
        groups.append(
            GroupSpec(
                name="local", retention=Retention.WINDOW, block_size=block_size, num_blocks=num_blocks, window=window
            )
        )
        regions.append(region("local_kv", "local"))
    fields: dict[str, object] = {"model_hash": MODEL, "groups": tuple(groups), "regions": tuple(regions)}
    return KVLayout(**(fields | changes))  # type: ignore[arg-type]


def memory_view(address: int, nbytes: int) -> NDArray[np.uint8]:
    """Writable bytes at an address."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))


def rows_of(
    layout: KVLayout, name: str, base: int, block_id: int, layer: int, part: int, unit: int
) -> NDArray[np.uint8]:
    """[block_size, token bytes] view of one unit of a block; `unit` counts over all ranks."""
    spec = next(r for r in layout.regions if r.name == name)
    place = layout.place(name)
    size = layout.group(spec.group).block_size
    address = base + block_id * layout.block_nbytes(spec.group) + place.offset
    address += layer * place.layer_stride + part * place.part_stride + (unit - place.first_unit) * place.unit_stride
    return memory_view(address, size * place.token_stride).reshape(size, place.token_stride)


def token_nbytes(spec: RegionSpec) -> int:
    return spec.width * DTYPE_NBYTES[spec.dtype]


class FakeCache:
    """A CacheView that holds every block in exactly one state and asserts each change of it."""

    def __init__(self, layout: KVLayout) -> None:
        self.layout = layout
        self.state = {g.name: ["free"] * g.num_blocks for g in layout.groups}
        self.tables: dict[int, dict[str, list[int]]] = {}
        self.reads: dict[int, tuple[str, tuple[int, ...]]] = {}
        self.pins: dict[int, list[tuple[str, int]]] = {}
        self.digests: dict[tuple[str, int], tuple[int, ...]] = {}

    def open(self, seq_id: int, num_tokens: int, first_held: int = 0) -> None:
        """Hold blocks for positions [0, num_tokens) and a tail; window groups none before `first_held`."""
        assert seq_id not in self.tables
        tables: dict[str, list[int]] = {}
        for g in self.layout.groups:
            count = 1 if g.retention is Retention.SNAPSHOT else -(-num_tokens // g.block_size)
            skip = first_held // g.block_size if g.retention is Retention.WINDOW else 0
            tables[g.name] = [-1] * skip + [self._take(g.name) for _ in range(count - skip)]
        self.tables[seq_id] = tables

    def _take(self, group: str) -> int:
        block = self.state[group].index("free")
        self.state[group][block] = "live"
        return block

    def close(self, seq_id: int) -> None:
        for group, table in self.tables.pop(seq_id).items():
            for block in table:
                if block >= 0:
                    self._settle(group, block)

    def _settle(self, group: str, block: int) -> None:
        held = any(block in t[group] for t in self.tables.values())
        pinned = any((group, block) in p for p in self.pins.values())
        reading = any(group == g and block in ids for g, ids in self.reads.values())
        self.state[group][block] = "in flight" if reading else "live" if held else "leased" if pinned else "free"
        if self.state[group][block] == "free":
            self.digests.pop((group, block), None)

    def block_table(self, seq_id: int, group: str) -> list[int]:
        return self.tables[seq_id][group]

    def begin_read(self, read_id: int, group: str, block_ids: Sequence[int]) -> None:
        assert read_id not in self.reads
        assert block_ids
        assert len(set(block_ids)) == len(block_ids)
        for block in block_ids:
            assert self.state[group][block] == "live", "only a live block may be read into"
            self.state[group][block] = "in flight"
        self.reads[read_id] = (group, tuple(block_ids))

    def end_read(self, read_id: int) -> None:
        group, block_ids = self.reads.pop(read_id)
        for block in block_ids:
            assert self.state[group][block] == "in flight"
            self._settle(group, block)

    def lease_pin(self, lease_id: int, group: str, block_ids: Sequence[int]) -> None:
        for block in block_ids:
            assert self.state[group][block] in ("live", "leased")
            self.pins.setdefault(lease_id, []).append((group, block))

    def lease_unpin(self, lease_id: int) -> None:
        for group, block in self.pins.pop(lease_id, []):
            self._settle(group, block)

    def block_digests(self, group: str, block_id: int) -> tuple[int, ...] | None:
        return self.digests.get((group, block_id))

    def set_block_digests(self, group: str, block_id: int, digests: tuple[int, ...]) -> None:
        assert self.state[group][block_id] == "live"
        assert (group, block_id) not in self.digests, "digested once"
        self.digests[group, block_id] = digests

    def count(self, state: str) -> int:
        return sum(s.count(state) for s in self.state.values())

    @property
    def is_idle(self) -> bool:
        return self.count("free") == sum(g.num_blocks for g in self.layout.groups) and not self.reads


def allocate(transport: MemoryTransport, layout: KVLayout, seed: int) -> dict[str, int]:
    """Register every group's pool, filled with random bytes."""
    rng = np.random.default_rng(seed)
    bases = {}
    for g in layout.groups:
        nbytes = layout.block_nbytes(g.name) * g.num_blocks
        bases[g.name] = transport.allocate(g.name, nbytes)
        memory_view(bases[g.name], nbytes)[:] = rng.integers(0, 256, nbytes, dtype=np.uint8)
    return bases


def prompt(num_tokens: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(int(t) for t in np.random.default_rng(seed).integers(0, 50000, num_tokens))


def chain_of(token_ids: Sequence[int], media: Sequence[tuple[int, bytes]] = ()) -> list[bytes]:
    chain = [root_hash(MODEL)]
    extend_chain(chain, token_ids, media)
    return chain
