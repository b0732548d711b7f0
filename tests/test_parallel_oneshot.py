"""Sums of few rows in one kernel, under Triton's interpreter: ranks are processes, their memory is files."""

from __future__ import annotations

import multiprocessing
import os
import threading
from multiprocessing.queues import Queue
from pathlib import Path

import numpy as np
import pytest
import torch

from common.parallel.oneshot import MOST_NBYTES, PART_NBYTES, OneShot, layout_of

SIZES = (3000, 64, 1, 2048, 3000, 1024)  # elements


def inputs(call: int, size: int) -> list[torch.Tensor]:
    torch.manual_seed(call)
    dtype = torch.float32 if call % 2 else torch.float16
    return [torch.randn(SIZES[call]).to(dtype) for _ in range(size)]


def run_rank(paths: list[Path], rank: int, results: Queue) -> None:  # type: ignore[type-arg]
    memory = [torch.from_numpy(np.memmap(path, dtype=np.uint8, mode="r+")) for path in paths]
    sums = OneShot([m.data_ptr() for m in memory], rank, len(paths), torch.device("cpu"))
    results.put((rank, [sums.all_reduce(inputs(call, len(paths))[rank]).tolist() for call in range(len(SIZES))]))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_get_the_same_sum(size: int, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    paths = [tmp_path / f"rank{rank}" for rank in range(size)]
    for path in paths:
        path.write_bytes(bytes(layout_of(size)[2]))
    context = multiprocessing.get_context("spawn")
    results: Queue = context.Queue()  # type: ignore[type-arg]
    ranks = [context.Process(target=run_rank, args=(paths, rank, results), daemon=True) for rank in range(size)]
    for process in ranks:
        process.start()
    found = dict(results.get(timeout=60) for _ in ranks)
    for call in range(len(SIZES)):
        want = torch.stack([x.float() for x in inputs(call, size)]).sum(0)
        tolerance = 1e-5 if call % 2 else 1e-2
        assert torch.allclose(torch.tensor(found[0][call]), want, atol=tolerance)
        assert all(found[rank][call] == found[0][call] for rank in range(size))


@pytest.mark.parametrize("size", MOST_NBYTES)
def test_parts_of_a_rank_s_memory_do_not_touch(size: int) -> None:
    flags_at, slots_at, nbytes = layout_of(size)
    programs = MOST_NBYTES[size] // PART_NBYTES
    assert 4 * programs <= flags_at
    assert flags_at + 4 * programs * size <= slots_at
    assert slots_at % 256 == flags_at % 256 == 0
    assert nbytes == slots_at + 2 * MOST_NBYTES[size]


def test_a_sum_without_the_others_ends_when_it_is_told_to() -> None:
    """On a GPU the kernel would spin for ever, and the host with it; so would every sum behind it."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs TRITON_INTERPRET=1")
    memory = [np.zeros(layout_of(2)[2], np.uint8) for _ in range(2)]
    sums = OneShot([m.ctypes.data for m in memory], 0, 2, torch.device("cpu"))
    x = torch.randn(64)

    def sum_up() -> None:
        for _ in range(3):
            sums.all_reduce(x.clone())

    thread = threading.Thread(target=sum_up, daemon=True)
    thread.start()
    thread.join(1.0)
    assert thread.is_alive()
    sums.abort()
    thread.join(60.0)
    assert not thread.is_alive()
