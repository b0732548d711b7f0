"""Checks as columns are the checks they stand for, in their order."""

from __future__ import annotations

import numpy as np
from kvtransfer_support import region, small_layout, tail_region

from common.kvcache.layout import FULL_GROUP
from common.kvtransfer.checks import Checks
from common.kvtransfer.orders import OrderExtent
from common.kvtransfer.plan import block_checks, plan_extent
from common.kvtransfer.transport import DigestCheck


def random_checks(rng: np.random.Generator, count: int) -> list[DigestCheck]:
    """Of three shapes, with one to three segments."""
    checks = []
    for _ in range(count):
        shape = [(2, 2, 512, 256, 16, 16), (3, 1, 512, 512, 32, 32), (2, 2, 512, 256, 16, 8)][rng.integers(3)]
        segments = tuple((int(a), int(a) % 97, int(a) % 16 + 1) for a in rng.integers(0, 2**50, rng.integers(1, 4)) * 8)
        checks.append(DigestCheck(segments, *shape, int(rng.integers(0, 2**64, dtype=np.uint64)), 16))
    return checks


def test_any_checks_become_tables_and_come_back() -> None:
    rng = np.random.default_rng(1)
    checks = random_checks(rng, 40)
    columns, places_N = Checks.of(checks)
    assert (len(columns), len(columns.tables)) == (40, 3)
    assert sorted(places_N.tolist()) == list(range(40))
    assert [checks[place] for place in places_N] == list(columns)
    assert columns[3:5] == (columns[3], columns[4])
    again, same = Checks.of(columns)
    assert again is columns
    assert same.tolist() == list(range(40))


def test_no_checks() -> None:
    columns, places_N = Checks.of([])
    assert (len(columns), list(columns), len(places_N)) == (0, [], 0)


def test_a_plan_checks_what_each_of_its_blocks_holds() -> None:
    """Two regions, whose digests lie one after the other; the last block is covered in part."""
    layout = small_layout(regions=(region(num_units=4), region("more", FULL_GROUP, num_parts=1), tail_region()))
    count = layout.num_digests(FULL_GROUP)
    digests = tuple(range(2**63, 2**63 + 3 * count))
    extent = OrderExtent(
        order_id=1,
        lease_id=2,
        group=FULL_GROUP,
        start_position=0,
        num_tokens=40,
        block_ids=(5, 2, 9),
        prefix_hash=b"",
        digests=digests,
    )
    plan = plan_extent(layout, layout, extent, [7, 1, 3], 4096, 40)
    want = []
    for number, (block, tokens) in enumerate(((7, 16), (1, 16), (3, 8))):
        for i, check in enumerate(block_checks(layout, FULL_GROUP, 4096, block, 16 * number, tokens)):
            want.append((check.segments, check.layer_stride, check.num_parts, digests[number * count + i]))
    found = [(c.segments, c.layer_stride, c.num_parts, c.expected) for c in plan.checks]
    assert sorted(found) == sorted(want)
    assert len(plan.checks) == 3 * count
