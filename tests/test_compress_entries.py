"""Compressed entries of a step: which it completes, and how many each token sees, without waiting for the device."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from common.attention.compressed import entries_of
from common.attention.context import AttentionContext, Selection
from common.attention.reference import ReferenceBackend
from common.engine.batch import BatchRow, build_batch
from common.engine.inputs import HostInputs, arrays_of, context_of
from common.layers.compressor import completed
from common.layers.step import Step

SIZE = 16
NO_KV: Any = None
NOTHING = torch.empty(0)
GROUPS = {"input": (SIZE, 0), "entries": (SIZE, 0)}
WAITS = ("nonzero", "item", "tolist", "cpu")


def waited(*_: object) -> None:
    raise AssertionError("the host waits")


class Backend(ReferenceBackend):
    """Remembers what it is to choose from."""

    asked: AttentionContext

    def select(self, *args: Any, **more: Any) -> Selection:
        self.asked = next(a for a in args if isinstance(a, AttentionContext))
        return Selection(torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32))


def random_step(backend: ReferenceBackend) -> Step:
    rng, rows = random.Random(), []
    for s in range(rng.randrange(1, 5)):
        start, new = rng.randrange(40), rng.randrange(1, 30)
        table = list(range(10 * s, 10 * s - (-(start + new) // SIZE)))
        rows.append(BatchRow([0] * new, start, dict.fromkeys(GROUPS, table)))
    batch = build_batch(rows, GROUPS)
    tensors = HostInputs().put(arrays_of(batch))
    ctx = context_of(batch, tensors, NO_KV, backend, lambda: None)
    return Step(tensors["input_ids"], tensors["positions"], ctx, {})


@contextmanager
def unawaited() -> Iterator[None]:
    """What waits for a GPU, where the step before may still run, fails."""
    with pytest.MonkeyPatch.context() as patch:
        for name in WAITS:
            patch.setattr(torch.Tensor, name, waited)
        yield


@pytest.mark.parametrize(("ratio", "num_pooled"), [(4, 8), (8, 8)])
@pytest.mark.parametrize("_", range(20))
def test_completed_ones_are_found_by_the_lengths_on_the_host(ratio: int, num_pooled: int, _: int) -> None:
    """The same ones as by positions on the device."""
    step = random_step(ReferenceBackend())
    groups = step.ctx.groups["input"], step.ctx.groups["entries"]
    want = completed(replace(step, ctx=replace(step.ctx, host=None), shared={}), ratio, num_pooled, *groups)
    with unawaited():
        got = completed(step, ratio, num_pooled, *groups)
    for name in ("tokens_N", "slots_NL", "block_ids_N", "offsets_N"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name


@pytest.mark.parametrize("_", range(20))
def test_the_indexer_is_told_on_the_host_how_many_each_token_sees(_: int) -> None:
    backend = Backend()
    step = random_step(backend)
    entries = entries_of(step.ctx, step.positions_T, step.ctx.groups["entries"], 4)
    with unawaited():
        entries.select(NOTHING, NOTHING, NOTHING, 1.0, 2)
    asked = backend.asked
    assert asked.host is not None
    assert asked.host.query_starts_S1.tolist() == asked.query_starts_S1.tolist()
    assert asked.host.seq_lens_S.tolist() == asked.seq_lens_S.tolist()
    assert asked.host.seq_lens_S.dtype == np.int32
