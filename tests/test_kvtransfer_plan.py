from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import pytest
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
    small_layout,
    tail_region,
    token_nbytes,
)
from numpy.typing import NDArray

from common.errors import InternalError, KVTransferError
from common.kvcache.digest import digest_reference
from common.kvcache.layout import (
    FULL_GROUP,
    TAIL_GROUP,
    GroupSpec,
    KVLayout,
    RegionSpec,
    Retention,
    Sharding,
    compare,
)
from common.kvtransfer.memory import MemoryNetwork, MemoryTransport, numpy_digest
from common.kvtransfer.orders import OrderExtent
from common.kvtransfer.plan import (
    ExtentPlan,
    block_checks,
    of_rank,
    plan_extent,
    shares,
    supplied_groups,
    window_start,
)
from common.kvtransfer.publish import Publisher, PublishOrder
from common.types.prefix import hash_at

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


def one_extent(layout: KVLayout, **changes: object) -> OrderExtent:
    fields: dict[str, object] = {
        "order_id": 1,
        "lease_id": 2,
        "group": FULL_GROUP,
        "start_position": 0,
        "num_tokens": 48,
        "block_ids": (3, 4, 5),
        "prefix_hash": b"",
        "digests": (0,) * (3 * layout.num_digests(FULL_GROUP)),
    }
    return OrderExtent(**(fields | changes))  # type: ignore[arg-type]


def test_adjacent_blocks_of_equal_layouts_become_one_copy() -> None:
    layout = small_layout()
    nbytes = layout.block_nbytes(FULL_GROUP)
    plan = plan_extent(layout, layout, one_extent(layout), [7, 8, 10], 4096, 48)
    copies = [(p.remote_offset, p.local_address, p.nbytes) for p in plan.pieces]
    assert copies == [(3 * nbytes, 4096 + 7 * nbytes, 2 * nbytes), (5 * nbytes, 4096 + 10 * nbytes, nbytes)]
    assert plan.block_ids == (7, 8, 10)


def test_part_of_a_block_is_copied_whole_only_where_nothing_valid_can_follow() -> None:
    layout = small_layout()
    nbytes = layout.block_nbytes(FULL_GROUP)
    digests = (0,) * layout.num_digests(FULL_GROUP)
    head = one_extent(layout, num_tokens=10, block_ids=(3,), digests=digests)
    last = plan_extent(layout, layout, head, [7], 0, 10)
    assert [(p.local_address, p.nbytes) for p in last.pieces] == [(7 * nbytes, nbytes)]
    middle = plan_extent(layout, layout, head, [7], 0, 12)
    rest = one_extent(layout, start_position=10, num_tokens=2, block_ids=(3,), digests=digests)
    end = plan_extent(layout, layout, rest, [7], 0, 12)
    per_run = 2 * 2 * 2  # layers, parts, units
    assert [p.nbytes for p in middle.pieces] == [10 * 16] * per_run
    assert [p.nbytes for p in end.pieces] == [2 * 16] * per_run
    written = [range(p.local_address, p.local_address + p.nbytes) for p in (*middle.pieces, *end.pieces)]
    assert len(set().union(*written)) == sum(map(len, written)) == 12 * 16 * per_run


def test_units_that_lie_together_on_both_sides_become_one_copy() -> None:
    source = small_layout(regions=(region(num_units=4), tail_region()))
    reader = small_layout(regions=(region(num_units=4), tail_region()), tp_size=2, tp_rank=1)
    extent = one_extent(source, num_tokens=16, block_ids=(3,), digests=(11, 12, 13, 14))
    plan = plan_extent(source, reader, extent, [0], 0, 16)
    assert len(plan.pieces) == 2 * 2, "one for each layer and part"
    assert {p.nbytes for p in plan.pieces} == {2 * 16 * 16}
    assert [c.expected for c in plan.checks] == [13, 14]


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("group", {"group": "nonsense"}),
        ("num_tokens", {"start_position": -1}),
        ("num_tokens", {"num_tokens": 0}),
        ("num_tokens", {"num_tokens": -5}),
        ("num_tokens", {"start_position": 32, "num_tokens": 48}),
        ("block_ids", {"block_ids": (3, 4)}),
        ("block_ids", {"block_ids": (3, 4, 24)}),
        ("block_ids", {"block_ids": (3, -1, 5)}),
        ("block_ids", {"block_ids": (3, 4, 2**63)}),
        ("block_ids", {"start_position": 8}),
        ("digests", {"digests": (0,) * 5}),
        ("digests", {"digests": ()}),
        ("num_tokens", {"group": TAIL_GROUP, "num_tokens": 2, "block_ids": (0, 1), "digests": (0, 0)}),
        ("block_ids", {"group": TAIL_GROUP, "num_tokens": 1, "block_ids": (8,), "digests": (0,)}),
        ("block_table", {"num_tokens": 64, "block_ids": (3, 4, 5, 6), "digests": (0,) * 8}),
    ],
)
def test_an_extent_that_cannot_be_is_refused_and_names_the_field(field: str, changes: dict[str, object]) -> None:
    layout = small_layout()
    with pytest.raises(KVTransferError) as refused:
        plan_extent(layout, layout, one_extent(layout, **changes), [7, 8, 9, -1], 0, 64)
    assert refused.value.param == field


def test_layouts_that_do_not_convert_are_refused() -> None:
    layout = small_layout()
    other = small_layout(model_hash=b"n" * 16)
    with pytest.raises(KVTransferError, match="model_hash") as refused:
        plan_extent(other, layout, one_extent(layout), [7, 8, 9], 0, 48)
    assert refused.value.param == "layout"


def test_window_blocks_that_the_reader_does_not_need_are_not_read() -> None:
    layout = small_layout(window=20)
    digests = tuple(range(8))
    extent = one_extent(layout, group="local", num_tokens=64, block_ids=(0, 1, 2, 3), digests=digests)
    plan = plan_extent(layout, layout, extent, [-1, -1, 5, 6], 0, 64)
    assert plan.first_position == 32
    assert plan.block_ids == (5, 6)
    assert [c.expected for c in plan.checks] == [4, 5, 6, 7]
    nothing = plan_extent(layout, layout, extent, [-1] * 4 + [5] * 8, 0, 64 + 128)
    assert nothing == ExtentPlan((), (), (), 64)


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


@pytest.mark.parametrize("sharding", Sharding)
def test_ranks_of_equal_numbers_read_from_their_counterparts(sharding: Sharding) -> None:
    for rank in range(4):
        layout = small_layout(
            regions=(region(num_units=1 if sharding is Sharding.GROUPED else 4, sharding=sharding), tail_region()),
            tp_size=4,
            tp_rank=rank,
        )
        (share,) = shares(layout, layout)
        assert share.rank == rank


def test_what_a_pair_supplies() -> None:
    draft = GroupSpec(name="draft", retention=Retention.FULL, block_size=16, num_blocks=4)
    plain = small_layout()
    more = msgspec.structs.replace(
        plain, groups=(*plain.groups, draft), regions=(*plain.regions, region("d", "draft", required=False))
    )
    assert supplied_groups(plain, more) == (FULL_GROUP, TAIL_GROUP)
    assert supplied_groups(more, more) == (FULL_GROUP, TAIL_GROUP, "draft")


def test_numpy_digest_is_the_reference_over_raw_addresses() -> None:
    rows = np.random.default_rng(5).integers(0, 2**64, (3, 2, 40, 4), dtype=np.uint64)
    layout = small_layout(block_size=48, regions=(region(num_layers=3, num_units=1, width=16), tail_region()))
    clock = FakeClock()
    transport = MemoryTransport(MemoryNetwork(clock))
    bases = allocate(transport, layout, seed=0)
    for layer, part in itertools.product(range(3), range(2)):
        raw = rows_of(layout, "kv", bases[FULL_GROUP], 2, layer, part, 0)
        raw[4:44] = rows[layer, part].view(np.uint8).reshape(40, 32)
    (check,) = block_checks(layout, FULL_GROUP, bases[FULL_GROUP], 2, 1000, 40, first_token=4)
    assert numpy_digest(check) == digest_reference(rows, 1000)
    transport.close()


def test_publisher_digests_a_sealed_block_once_and_a_partial_one_each_time() -> None:
    layout = small_layout()
    transport = MemoryTransport(MemoryNetwork(FakeClock()))
    bases = allocate(transport, layout, seed=0)
    cache = FakeCache(layout)
    calls = []
    publisher = Publisher(layout, bases, cache, lambda check: calls.append(check) or len(calls))
    token_ids = prompt(40)
    for seq_id in (1, 2):
        cache.tables[seq_id] = {FULL_GROUP: [4, 2, 3], TAIL_GROUP: [seq_id]}
        for group, blocks in cache.tables[seq_id].items():
            for block in blocks:
                cache.state[group][block] = "live"
        order = PublishOrder(seq_id, 10 + seq_id, 20 + seq_id, token_ids, chain_of(token_ids), 0)
        calls.clear()
        extents = publisher.publish(order, 0, 20) + publisher.publish(order, 20, 40)
        assert len(calls) == (2 * 2 + 2 + 1 if seq_id == 1 else 2 + 1)
        spans = [(e.group, e.start_position, e.num_tokens, e.block_ids) for e in extents]
        assert spans == [(FULL_GROUP, 0, 16, (4,)), (FULL_GROUP, 16, 24, (2, 3)), (TAIL_GROUP, 39, 1, (seq_id,))]
        assert [e.prefix_hash for e in extents] == [hash_at(order.chain, token_ids, n) for n in (16, 40, 40)]
        assert {(e.order_id, e.lease_id) for e in extents} == {(10 + seq_id, 20 + seq_id)}
    assert publisher.publish(order, 40, 40) == []
    transport.close()


def test_publisher_never_announces_what_is_not_held() -> None:
    layout = small_layout()
    transport = MemoryTransport(MemoryNetwork(FakeClock()))
    publisher = Publisher(layout, allocate(transport, layout, seed=0), cache := FakeCache(layout), numpy_digest)
    token_ids = prompt(32)
    order = PublishOrder(1, 1, 1, token_ids, chain_of(token_ids), 0)
    for tables in (
        {FULL_GROUP: [0, -1], TAIL_GROUP: [0]},
        {FULL_GROUP: [0], TAIL_GROUP: [0]},
        {FULL_GROUP: [0, 1], TAIL_GROUP: []},
    ):
        cache.tables[1] = tables
        cache.state[FULL_GROUP][:2] = ["live", "live"]
        cache.digests.clear()
        with pytest.raises(InternalError, match="sequence 1"):
            publisher.publish(order, 0, 32)
    with pytest.raises(ValueError, match="33"):
        publisher.publish(order, 0, 33)
    transport.close()


def test_long_prefixes_are_published_in_pieces() -> None:
    layout = small_layout(num_blocks=600, regions=(region(num_layers=1, num_parts=1), tail_region()))
    transport = MemoryTransport(MemoryNetwork(FakeClock()))
    cache = FakeCache(layout)
    cache.open(1, 9000)
    publisher = Publisher(layout, allocate(transport, layout, seed=0), cache, lambda check: 0)
    token_ids = prompt(9000)
    extents = publisher.publish(PublishOrder(1, 1, 1, token_ids, chain_of(token_ids), 16), 0, 9000)
    spans = [(e.start_position, e.num_tokens) for e in extents if e.group == FULL_GROUP]
    assert spans == [(16, 4096), (4112, 4096), (8208, 792)]
    transport.close()
