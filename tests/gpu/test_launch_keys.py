"""Sizes that follow from a step choose no kernel: what Triton would look up, without a GPU to compile for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from common.kernels import gpu
from common.kernels.expert_weights import ExpertWeights
from common.kvtransfer.device_digests import DeviceGather

pytestmark = pytest.mark.gpu

Keys = set[tuple[object, ...]]


@pytest.fixture
def keys_of(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[], object]], Keys]]:
    """The kernels of a call, each by name and what makes another one of it; none is run."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter compiles nothing")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime import jit

    backend = make_backend(GPUTarget("cuda", 90, 32))
    found: Keys = set()

    def looked_up(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        more = {"debug": False, "instrumentation_mode": ""}
        options = {name: value for name, value in kwargs.items() if name != "launch_pdl"}
        bind = jit.create_function_from_signature(self.signature, self.params, backend)
        _, specialization, rest = bind(*args, **options | more)
        found.add((self.__name__, *map(str, specialization), str(sorted(rest.items()))))

    monkeypatch.setattr(jit.JITFunction, "run", looked_up)

    def keys(call: Callable[[], object]) -> Keys:
        found.clear()
        call()
        assert found
        return set(found)

    return keys


def test_rows_of_fp8_experts(keys_of: Any) -> None:
    """Each tile's range of tokens holds a power of two, and what lies between takes the same kernels."""
    experts, hidden, size, top_k = 64, 512, 256, 6
    weights = ExpertWeights(
        torch.empty(experts, 2 * size, hidden, dtype=torch.float8_e4m3fn),
        torch.empty(experts, hidden, size, dtype=torch.float8_e4m3fn),
        torch.empty(experts, 2 * size // 128, hidden // 128),
        torch.empty(experts, hidden // 128, size // 128),
    )

    def of(tokens: int) -> Any:
        x = torch.empty(tokens, hidden, dtype=torch.bfloat16)
        ids = torch.empty(tokens, top_k, dtype=torch.int64)
        return keys_of(lambda: gpu.experts.expert_rows(x, ids, weights, 0.0))

    known: Keys = set()
    for tokens in (1, 2, 3, 4, 5, 6, 7, 8, 16, 32, 64, 128, 256, 512, 1024):
        known |= of(tokens)
    for tokens in (9, 11, 17, 30, 63, 65, 86, 100, 171, 200, 333, 345, 700, 1000):
        assert of(tokens) <= known, tokens


@pytest.mark.parametrize("new", [1, 2])
def test_selections_of_any_length(keys_of: Any, new: int) -> None:
    """As entries that a token sees are, all of them: their number follows from the longest sequence."""
    sequences, heads, width = 3, 16, 64
    tokens = sequences * new
    places = gpu.sparse_latent.Places(
        torch.zeros(sequences, 64, dtype=torch.int32),
        torch.zeros(sequences + 1, dtype=torch.int32),
        torch.zeros(sequences, dtype=torch.int32),
        64,
        1 if new == 1 else 0,
        None if new == 1 else torch.zeros(tokens, dtype=torch.int32),
    )
    q, cache = torch.empty(tokens, heads, width), torch.empty(8, 64, width)

    def of(most: int) -> Any:
        chosen = torch.zeros(tokens, most, dtype=torch.int32), torch.zeros(tokens, dtype=torch.int32)
        return keys_of(lambda: gpu.sparse_latent.attend(q, cache, places, width, 0.1, most=most, selected=chosen))

    few, many = of(1), of(64)
    assert few != many  # one share of the positions is not joined
    assert of(7) == of(16) == few
    assert of(33) == of(63) == of(1000) == many


@pytest.mark.parametrize("per", [0, 1])
def test_scores_of_any_number_of_positions(keys_of: Any, per: int) -> None:
    tokens = 5
    owner = None if per else torch.zeros(tokens, dtype=torch.int32)
    lens, starts = torch.zeros(tokens, dtype=torch.int32), torch.zeros(tokens + 1, dtype=torch.int32)
    places = gpu.sparse_latent.Places(torch.zeros(tokens, 99, dtype=torch.int32), starts, lens, 64, per, owner)
    q, weights, cache = torch.empty(tokens, 4, 128), torch.empty(tokens, 4), torch.empty(8, 64, 128)

    def of(most: int) -> Any:
        return keys_of(lambda: gpu.indexer.score(q, weights, cache, places, 0.1, most=most))

    assert of(1) == of(64) == of(65) == of(6000)


def test_few_new_tokens_of_any_number(keys_of: Any) -> None:
    """Sequences, and new tokens as far as they are the rows of one tile, from any sequence of a step on."""
    own, units, width = gpu.paged_attention, 2, 128
    pool = torch.empty(8, 2, units, 64, width, dtype=torch.bfloat16)
    lens, tables = torch.zeros(70, dtype=torch.int32), torch.zeros(70, 9, dtype=torch.int32)

    def of(first: int, count: int, num_new: int) -> Any:
        q = torch.empty(count * num_new, 4 * units, width, dtype=torch.bfloat16)
        seen, some = own.Seen(num_new), slice(first, first + count)
        space = own.workspace(70, units, width, 4 * num_new, 16, q.device)

        def call() -> None:
            items = own.schedule(lens[some], seen, width, 16)
            own.attend(q, pool[:, 0], pool[:, 1], tables[some], items, seen, space, torch.empty_like(q), 0.1)

        return keys_of(call)

    assert of(0, 1, 1) == of(1, 7, 1) == of(3, 64, 1)
    assert of(0, 1, 2) == of(5, 3, 3) == of(2, 16, 4)
    assert of(0, 1, 8) == of(1, 9, 5) == of(3, 3, 7)


def test_unequal_sequences_of_any_number(keys_of: Any) -> None:
    """Attention in a fixed order, and the chunks of delta nets."""
    from common.kernels.gpu import delta_chunks

    cache = torch.empty(8, 2, 2, 64, 64, dtype=torch.bfloat16)

    def of(sequences: int, first: int) -> Any:
        tokens = sequences + 3
        q = torch.empty(tokens, 8, 64, dtype=torch.bfloat16)
        starts, lens = torch.zeros(sequences + 1, dtype=torch.int32), torch.zeros(sequences, dtype=torch.int32)
        tables = torch.zeros(sequences, 9, dtype=torch.int32)

        def call() -> None:
            sizes = {"max_query_len": 4, "max_seq_len": 5000, "window": 0, "first": first}
            gpu.fixed_attention.attend(q, cache, tables, starts, lens, **sizes, scale=0.1, lanes=2)
            delta_chunks.cut(starts, tokens, 16)

        return keys_of(call)

    assert of(2, 0) == of(70, 0) == of(400, 0) == of(3, 1)


@pytest.mark.parametrize("row", [4096, 8])
def test_small_pieces_of_a_hand_off(keys_of: Any, row: int) -> None:
    """A reader has the kernels of all before its first read, which comes amid its steps."""
    transport: Any = SimpleNamespace(hold=None, release=None)
    made: list[DeviceGather] = []
    known = keys_of(lambda: made.append(DeviceGather(transport, torch.device("cpu"), None)))
    for count in (1, 64, 1000):
        sources = np.arange(count, dtype=np.int64)[:, None] * 2 * row
        pieces = np.hstack([sources, sources + row, np.full_like(sources, row)])
        assert keys_of(lambda: made[0].gather(pieces)) <= known, count  # noqa: B023  called at once
