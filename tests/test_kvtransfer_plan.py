"""What the planner makes of given extents, and what a publisher announces."""

from __future__ import annotations

import itertools

import msgspec
import numpy as np
import pytest
from kvtransfer_support import (
    FakeCache,
    FakeClock,
    allocate,
    chain_of,
    prompt,
    region,
    rows_of,
    small_layout,
    tail_region,
)

from common.errors import InternalError, KVTransferError
from common.kvcache.digest import digest_reference
from common.kvcache.layout import FULL_GROUP, TAIL_GROUP, GroupSpec, KVLayout, Retention, Sharding
from common.kvtransfer.memory import MemoryNetwork, MemoryTransport, numpy_digest
from common.kvtransfer.orders import OrderExtent
from common.kvtransfer.plan import ExtentPlan, block_checks, plan_extent, shares, supplied_groups
from common.kvtransfer.publish import Publisher, PublishOrder
from common.types.prefix import hash_at


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
        ("digests", {"digests": (0, 0, 0, 0, 0, 2**64)}),
        ("digests", {"digests": (0, 0, 0, 0, 0, -1)}),
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
        # the tail leads at the end: a reader draws from it while the rest is on its way
        assert spans == [(FULL_GROUP, 0, 16, (4,)), (TAIL_GROUP, 39, 1, (seq_id,)), (FULL_GROUP, 16, 24, (2, 3))]
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
