"""Random pairs of layouts: a plan moves exactly the bytes of its positions, whatever blocks and ranks there are."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kvtransfer_support import (
    MODEL,
    FakeCache,
    FakeClock,
    allocate,
    chain_of,
    memory_view,
    prompt,
    region,
    rows_of,
    tail_region,
    token_nbytes,
)
from numpy.typing import NDArray

from common.kvcache.layout import FULL_GROUP, TAIL_GROUP, GroupSpec, KVLayout, RegionSpec, Retention, Sharding, compare
from common.kvtransfer.memory import MemoryNetwork, MemoryTransport, numpy_digest
from common.kvtransfer.orders import OrderExtent
from common.kvtransfer.plan import ExtentPlan, of_rank, plan_extent, shares, window_start
from common.kvtransfer.publish import Publisher, PublishOrder

NUM_BLOCKS = 12


@dataclass(frozen=True)
class Case:
    regions: tuple[RegionSpec, ...]
    cold: tuple[RegionSpec, ...]  # only the reader has them
    source_block: int
    reader_block: int
    source_tp: int
    reader_tp: int
    window: int
    num_tokens: int
    start: int
    chunks: tuple[int, ...]
    seed: int

    def layout(self, source: bool, rank: int) -> KVLayout:
        size = self.source_block if source else self.reader_block
        groups = [
            GroupSpec(name=FULL_GROUP, retention=Retention.FULL, block_size=size, num_blocks=NUM_BLOCKS),
            GroupSpec(name=TAIL_GROUP, retention=Retention.SNAPSHOT, block_size=1, num_blocks=3),
        ]
        if self.window:
            groups.append(
                GroupSpec(
                    name="local",
                    retention=Retention.WINDOW,
                    block_size=size,
                    num_blocks=NUM_BLOCKS,
                    window=self.window,
                )
            )
        return KVLayout(
            model_hash=MODEL,
            groups=tuple(groups),
            regions=self.regions if source else self.regions + self.cold,
            tp_size=self.source_tp if source else self.reader_tp,
            tp_rank=rank,
        )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    source_tp, reader_tp = draw(st.sampled_from((1, 2, 4))), draw(st.sampled_from((1, 2, 4)))
    if draw(st.booleans()):
        reader_tp = source_tp
    most = max(source_tp, reader_tp)

    def any_region(name: str, group: str, required: bool = True) -> RegionSpec:
        sharding = draw(st.sampled_from(Sharding))
        if sharding is Sharding.SPLIT:
            num_units = most * draw(st.integers(1, 2))
        elif sharding is Sharding.GROUPED:
            num_units = 1
        else:
            num_units = draw(st.integers(1, 2))
        dtype = draw(st.sampled_from(("float32", "bfloat16", "uint8")))
        return region(
            name,
            group,
            dtype=dtype,
            num_layers=draw(st.integers(1, 3)),
            num_parts=draw(st.integers(1, 2)),
            num_units=num_units,
            width=8 * draw(st.integers(1, 2)),
            sharding=sharding,
            required=required,
        )

    window = draw(st.sampled_from((0, 0, 16, 20, 50)))
    regions = [any_region(f"r{i}", FULL_GROUP) for i in range(draw(st.integers(1, 2)))]
    if window:
        regions.append(any_region("w0", "local"))
    regions.append(tail_region())
    cold = (any_region("draft", FULL_GROUP, required=False),) if draw(st.booleans()) else ()
    source_block = draw(st.sampled_from((16, 32, 48, 64)))
    reader_block = draw(st.one_of(st.just(source_block), st.sampled_from((16, 32, 48, 64))))
    num_tokens = draw(st.integers(1, 10 * min(source_block, reader_block)))
    start = draw(st.integers(0, num_tokens - 1))
    if draw(st.booleans()):
        start = start // reader_block * reader_block
    chunks = tuple(draw(st.lists(st.integers(1, 80), min_size=1, max_size=4)))
    return Case(
        tuple(regions),
        cold,
        source_block,
        reader_block,
        source_tp,
        reader_tp,
        window,
        num_tokens,
        start,
        chunks,
        draw(st.integers(0, 2**32)),
    )


@dataclass
class Rank:
    layout: KVLayout
    transport: MemoryTransport
    bases: dict[str, int]
    tables: dict[str, list[int]]

    def rows(self, spec: RegionSpec, unit: int, layer: int, part: int, position: int) -> NDArray[np.uint8]:
        group = self.layout.group(spec.group)
        table = self.tables[spec.group]
        if group.retention is Retention.SNAPSHOT:
            return rows_of(self.layout, spec.name, self.bases[spec.group], table[-1], layer, part, unit)[0]
        block, token = divmod(position, group.block_size)
        return rows_of(self.layout, spec.name, self.bases[spec.group], table[block], layer, part, unit)[token]

    def units(self, spec: RegionSpec) -> range:
        place = self.layout.place(spec.name)
        return range(place.first_unit, place.first_unit + place.local_units)


def make_rank(case: Case, source: bool, rank: int, network: MemoryNetwork) -> Rank:
    layout = case.layout(source, rank)
    transport = MemoryTransport(network)
    bases = allocate(transport, layout, seed=case.seed + rank + 100 * source)
    rng = np.random.default_rng(case.seed + source)
    tables: dict[str, list[int]] = {}
    for g in layout.groups:
        ids = [int(b) for b in rng.permutation(g.num_blocks)]
        if rng.integers(2):
            ids.sort()
        if g.retention is Retention.SNAPSHOT:
            tables[g.name] = ids[:1]
            continue
        tables[g.name] = ids[: -(-case.num_tokens // g.block_size)]
        if g.retention is Retention.WINDOW:
            for i in range(window_start(g, case.num_tokens) // g.block_size):
                tables[g.name][i] = -1
    return Rank(layout, transport, bases, tables)


def write_truth(case: Case, ranks: list[Rank]) -> dict[tuple[str, int, int, int, int], bytes]:
    """The same random bytes per (region, unit, layer, part, position) in every source rank that holds the unit."""
    rng = np.random.default_rng(case.seed)
    truth = {}
    for spec in case.regions:
        for unit, layer, part in itertools.product(
            range(spec.num_units), range(spec.num_layers), range(spec.num_parts)
        ):
            for p in needed(case, spec, 0):
                data = rng.integers(0, 256, token_nbytes(spec), dtype=np.uint8)
                truth[spec.name, unit, layer, part, p] = data.tobytes()
                for rank in ranks:
                    if unit in rank.units(spec):
                        rank.rows(spec, unit, layer, part, p)[:] = data
    return truth


def needed(case: Case, spec: RegionSpec, start: int) -> range:
    if spec.group == TAIL_GROUP:
        return range(case.num_tokens - 1, case.num_tokens)
    if spec.group == "local":
        return range(max(start, max(0, case.num_tokens - case.window + 1) // 16 * 16), case.num_tokens)
    return range(start, case.num_tokens)


def publish(case: Case, rank: Rank) -> list[OrderExtent]:
    cache = FakeCache(rank.layout)
    cache.tables[7] = rank.tables
    for group, table in rank.tables.items():
        for block in table:
            if block >= 0:
                cache.state[group][block] = "live"
    token_ids = prompt(case.num_tokens)
    order = PublishOrder(7, 1, 9, token_ids, chain_of(token_ids), case.start)
    publisher = Publisher(rank.layout, rank.bases, cache, numpy_digest)
    extents: list[OrderExtent] = []
    done = 0
    for chunk in itertools.cycle(case.chunks):
        end = min(done + chunk, case.num_tokens)
        extents += publisher.publish(order, done, end)
        done = end
        if done == case.num_tokens:
            return extents
    raise AssertionError("unreachable")


def execute(plan: ExtentPlan, source: Rank) -> None:
    for piece in plan.pieces:
        ctypes.memmove(piece.local_address, source.bases[piece.group] + piece.remote_offset, piece.nbytes)


def passes(plan: ExtentPlan) -> bool:
    return all(numpy_digest(c) == c.expected for c in plan.checks)


def snapshot(rank: Rank) -> dict[str, NDArray[np.uint8]]:
    layout = rank.layout
    return {
        g.name: memory_view(rank.bases[g.name], layout.block_nbytes(g.name) * g.num_blocks).copy()
        for g in layout.groups
    }


def restore(rank: Rank, pools: dict[str, NDArray[np.uint8]]) -> None:
    for group, raw in pools.items():
        memory_view(rank.bases[group], raw.size)[:] = raw


def written(case: Case, before: Rank, raw: dict[str, NDArray[np.uint8]], truth: dict) -> None:  # type: ignore[type-arg]
    """Lay what a right transfer would write over the memory as it was."""
    now = snapshot(before)
    restore(before, raw)
    for spec in case.regions:
        for unit, layer, part in itertools.product(before.units(spec), range(spec.num_layers), range(spec.num_parts)):
            for p in needed(case, spec, case.start):
                data = truth[spec.name, unit, layer, part, p]
                before.rows(spec, unit, layer, part, p)[:] = np.frombuffer(data, dtype=np.uint8)
    wanted = snapshot(before)
    equal = compare(case.layout(True, before.layout.tp_rank), before.layout).equal if same_tp(case) else False
    for name, pool in now.items():
        if equal:
            forgive_whole_blocks(case, before, name, pool, wanted[name])
        assert np.array_equal(pool, wanted[name]), f"group {name}"
    restore(before, now)


def same_tp(case: Case) -> bool:
    return case.source_tp == case.reader_tp


def forgive_whole_blocks(case: Case, rank: Rank, name: str, pool: NDArray[np.uint8], wanted: NDArray[np.uint8]) -> None:
    """Equal layouts copy whole blocks: gaps between regions, and what lies past the prompt's end, may differ."""
    group = rank.layout.group(name)
    nbytes = rank.layout.block_nbytes(name)
    mask = np.zeros(nbytes, dtype=bool)
    for spec in rank.layout.regions_of(name):
        place = rank.layout.place(spec.name)
        mask[place.offset : place.offset + place.nbytes] = True
    for block in (b for b in rank.tables[name] if b >= 0):
        at = slice(block * nbytes, (block + 1) * nbytes)
        pool[at][~mask] = wanted[at][~mask]
    if group.retention is not Retention.SNAPSHOT:
        last, valid = rank.tables[name][-1], (case.num_tokens - 1) % group.block_size + 1
        for spec in rank.layout.regions_of(name):
            place = rank.layout.place(spec.name)
            rows = (spec.num_layers, spec.num_parts, place.local_units, group.block_size, place.token_stride)
            at = slice(last * nbytes + place.offset, last * nbytes + place.offset + place.nbytes)
            pool[at].reshape(rows)[..., valid:, :] = wanted[at].reshape(rows)[..., valid:, :]


EQUAL = Case((region(), tail_region()), (), 32, 32, 1, 1, 0, 75, 32, (20,), 3)


@example(EQUAL)
@given(cases())
@settings(max_examples=60, deadline=None)
def test_a_plan_moves_exactly_the_bytes_of_its_positions(case: Case) -> None:
    network = MemoryNetwork(FakeClock())
    sources = [make_rank(case, True, r, network) for r in range(case.source_tp)]
    truth = write_truth(case, sources)
    published = [publish(case, s) for s in sources]
    reader = make_rank(case, False, case.seed % case.reader_tp, network)
    before = snapshot(reader)
    plans: list[tuple[ExtentPlan, Rank]] = []
    for source, extents in zip(sources, published, strict=True):
        for extent in extents:
            table = reader.tables[extent.group]
            base = reader.bases[extent.group]
            plan = plan_extent(source.layout, reader.layout, extent, table, base, case.num_tokens)
            assert set(plan.block_ids) <= set(table)
            execute(plan, source)
            plans.append((plan, source))
    for plan, _ in plans:
        assert passes(plan)
    written(case, reader, before, truth)
    flip_every_kind_of_byte(case, reader, plans)
    for rank in (*sources, reader):
        rank.transport.close()


def flip_every_kind_of_byte(case: Case, reader: Rank, plans: list[tuple[ExtentPlan, Rank]]) -> None:
    """One flipped bit of any valid token makes a check fail, and its return makes all pass."""
    rng = np.random.default_rng(case.seed)
    for spec in case.regions:
        positions = needed(case, spec, case.start)
        unit = int(rng.choice(reader.units(spec)))
        layer, part = int(rng.integers(spec.num_layers)), int(rng.integers(spec.num_parts))
        row = reader.rows(spec, unit, layer, part, int(rng.choice(positions)))
        at, bit = int(rng.integers(row.size)), np.uint8(1 << int(rng.integers(8)))
        row[at] ^= bit
        assert not all(passes(plan) for plan, _ in plans), f"{spec.name} unit {unit} byte {at}"
        row[at] ^= bit
        assert all(passes(plan) for plan, _ in plans)


@given(cases())
@settings(max_examples=40, deadline=None)
def test_shares_take_every_unit_once(case: Case) -> None:
    """All ranks of a reader together, from what all ranks of the source publish as one."""
    network = MemoryNetwork(FakeClock())
    sources = [make_rank(case, True, r, network) for r in range(case.source_tp)]
    truth = write_truth(case, sources)
    joined = [join_extents(parts) for parts in zip(*(publish(case, s) for s in sources), strict=True)]
    reader = make_rank(case, False, case.seed % case.reader_tp, network)
    before = snapshot(reader)
    taken: dict[tuple[str, int], int] = {}
    for share in shares(sources[0].layout, reader.layout):
        source = sources[share.rank]
        for name, first, count in share.units:
            for unit in range(first, first + count):
                taken[name, unit] = taken.get((name, unit), 0) + 1
        for extent in joined:
            own = of_rank(source.layout, extent)
            table, base = reader.tables[extent.group], reader.bases[extent.group]
            plan = plan_extent(source.layout, reader.layout, own, table, base, case.num_tokens, share.units)
            execute(plan, source)
            assert passes(plan)
    wanted = {(spec.name, unit) for spec in case.regions for unit in reader.units(spec)}
    assert taken == dict.fromkeys(wanted, 1)
    written(case, reader, before, truth)
    for rank in (*sources, reader):
        rank.transport.close()


def join_extents(parts: Sequence[OrderExtent]) -> OrderExtent:
    """As the ranks of one source publish them: of each block the digests of all ranks, in their order."""
    num_blocks = len(parts[0].block_ids)
    each = [len(p.digests) // num_blocks for p in parts]
    digests = [
        d for b in range(num_blocks) for p, n in zip(parts, each, strict=True) for d in p.digests[b * n : (b + 1) * n]
    ]
    return msgspec.structs.replace(parts[0], digests=tuple(digests))
