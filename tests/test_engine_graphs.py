"""What a recorded step is filled with, and a step's arrays in one piece of memory."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from common.engine.batch import BatchRow, build_batch
from common.engine.graphs import DecodeGraphs, GraphShape, graph_sizes, known_or_drawn
from common.engine.inputs import HostInputs, arrays_of, nbytes_of, place, view

PADDING = 9
SHAPE = GraphShape(groups={"full": (16, 0)}, states=("state",), max_seq_len=64)


class Pool:
    def padding_block(self, group: str) -> int:
        return PADDING


def graphs(*query_lens: int) -> DecodeGraphs:
    drawn = torch.zeros(8, dtype=torch.int64)
    nothing = (None, Pool(), None, HostInputs(), drawn)
    return DecodeGraphs(*nothing, SHAPE, (1, 2, 4), query_lens)  # type: ignore[arg-type]


def rows(count: int, query_len: int = 1, start: int = 20) -> list[BatchRow]:
    return [
        BatchRow([7] * query_len, start + i, {"full": [1 + i, 3 + i]}, states={"state": i}, pending=i if i % 2 else -1)
        for i in range(count)
    ]


def test_a_batch_takes_the_smallest_recorded_step_that_holds_it() -> None:
    groups = {"full": (16, 0)}
    one = graphs(1)
    assert [one.size_for(build_batch(rows(n), groups)) for n in (1, 2, 3, 4, 5)] == [1, 2, 4, 4, 0]
    assert one.size_for(build_batch(rows(2, query_len=2), groups)) == 0
    assert graphs(1, 2).size_for(build_batch(rows(2, query_len=2), groups)) == 2
    mixed = build_batch([*rows(1), *rows(1, query_len=2)], groups)
    assert graphs(1, 2).size_for(mixed) == 0


@pytest.mark.parametrize("query_len", [1, 2])
def test_what_a_batch_leaves_free_is_padding_also_after_a_larger_one(query_len: int) -> None:
    made = graphs(query_len)
    empty = made._padding(4, query_len)
    recorded = type("Recorded", (), {"arrays": made._padding(4, query_len), "num_rows": 0})()
    for count in (4, 1, 3):
        batch = build_batch(rows(count, query_len), {"full": (16, 0)})
        made._fill(recorded, batch)
        tokens = count * query_len
        arrays = recorded.arrays
        assert arrays["positions"][:tokens].tolist() == batch.positions_T.tolist()
        assert arrays["slots.full"][:tokens].tolist() == batch.groups["full"].slots_T.tolist()
        assert arrays["states.state"][:count].tolist() == list(range(count))
        for name, whole in empty.items():
            first = len(whole) // 4 * count
            if name != "query_starts":
                rest = arrays[name][first:]
                assert (rest[:, 0] == PADDING).all() if name == "tables.full" else (rest == whole[first:]).all()


def test_a_token_that_is_not_known_is_the_one_drawn() -> None:
    ids = known_or_drawn(torch.tensor([5, 0, 0, 6]), torch.tensor([-1, 2, 0, -1]), torch.tensor([-1, 8, 9]))
    assert ids.tolist() == [5, 9, 0, 6]  # a draw that failed gives token 0


def test_arrays_lie_apart_and_keep_type_and_shape() -> None:
    batch = build_batch(rows(3), {"full": (16, 0)})
    arrays = arrays_of(batch)
    assert "pending" in arrays
    memory = torch.zeros(nbytes_of(arrays), dtype=torch.uint8)
    for array, offset in zip(arrays.values(), place(arrays), strict=True):
        memory[offset : offset + array.nbytes] = torch.from_numpy(array.reshape(-1).view(np.uint8))
    for name, tensor in view(memory, arrays).items():
        assert np.array_equal(tensor.numpy(), arrays[name])


@pytest.mark.parametrize("most", [1, 3, 64, 300, 512])
def test_recorded_sizes_reach_the_largest_batch(most: int) -> None:
    sizes = graph_sizes(most)
    assert sizes[-1] == most
    assert list(sizes) == sorted(set(sizes))
    assert all(b - a <= 16 for a, b in itertools.pairwise(sizes))
