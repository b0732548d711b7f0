"""Many small copies in one launch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("aligned", [True, False])
def test_pieces_of_all_sizes(kernel_device: torch.device, aligned: bool) -> None:
    from common.kernels.gpu import gather

    rng = np.random.default_rng()
    step = 2 if aligned else 1
    sizes = [*(rng.integers(1, 300, 40) * step).tolist(), 20000 * step, 8192, 8194, 1 * step]
    source = torch.from_numpy(rng.integers(-(2**62), 2**62, sum(sizes) * 2)).to(kernel_device)
    target = torch.zeros(sum(sizes) + 50 * step, dtype=torch.int64, device=kernel_device)
    anchor = torch.zeros(2, dtype=torch.int64, device=kernel_device)
    expected, pieces, at = target.clone(), [], 0
    for size in sizes:
        start = int(rng.integers(0, len(source) - size)) // step * step
        at += int(rng.integers(0, 2)) * step
        expected[at : at + size] = source[start : start + size]
        pieces.append((start, at, size))
        at += size
    table = np.array(pieces, np.int64)
    table[:, 0] += (source.data_ptr() - anchor.data_ptr()) // 8
    table[:, 1] += (target.data_ptr() - anchor.data_ptr()) // 8
    items = torch.from_numpy(gather.cut(table)).to(kernel_device)
    gather.gather(anchor, items, aligned)
    assert torch.equal(target, expected)


def test_long_pieces_become_items() -> None:
    pytest.importorskip("triton")
    from common.kernels.gpu import gather

    items = gather.cut(np.array([(0, 100, 10), (1000, 50000, 20000), (5, 7, 8192)], np.int64))
    assert items.tolist() == [
        [0, 100, 10],
        [1000, 50000, 8192],
        [9192, 58192, 8192],
        [17384, 66384, 3616],
        [5, 7, 8192],
    ]
