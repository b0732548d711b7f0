"""How XQA's thread blocks share the keys of a step."""

from __future__ import annotations

import pytest

from common.attention.flashinfer_xqa import BLOCKS_PER_PROCESSOR, MOST_PARTS, num_parts

H200 = 132
AT_ONCE = H200 * BLOCKS_PER_PROCESSOR


@pytest.mark.parametrize(("num", "parts"), [(8, MOST_PARTS), (64, 4), (128, 2), (136, 3), (256, 1), (2048, 1)])
def test_processors_are_filled_evenly(num: int, parts: int) -> None:
    assert num_parts(num, H200) == parts


def test_parts_fit_the_scratch_memory_and_are_never_slower_than_none() -> None:
    for num in range(1, 4097):
        parts = num_parts(num, H200)
        assert parts == 1 or num * parts <= 2 * AT_ONCE
        assert -(-num * parts // AT_ONCE) / parts <= -(-num // AT_ONCE)
