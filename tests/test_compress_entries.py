"""Which tokens of a step complete compressed entries."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from common.attention.reference import ReferenceBackend
from common.engine.batch import BatchRow, build_batch
from common.engine.inputs import HostInputs, arrays_of, context_of
from common.layers.compressor import completed
from common.layers.step import Step

SIZE = 16
NO_KV: Any = None
GROUPS = {"input": (SIZE, 0), "entries": (SIZE, 0)}
WAITS = ("nonzero", "item", "tolist", "cpu")


def waited(*_: object) -> None:
    raise AssertionError("the host waits")


@pytest.mark.parametrize(("ratio", "num_pooled"), [(4, 8), (8, 8)])
def test_they_are_found_without_waiting_for_the_device(
    ratio: int, num_pooled: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the lengths on the host, where the step before may still run: the same ones as from positions there."""
    rng = random.Random()
    for _ in range(50):
        rows = []
        for s in range(rng.randrange(1, 5)):
            start, new = rng.randrange(40), rng.randrange(1, 30)
            table = list(range(10 * s, 10 * s - (-(start + new) // SIZE)))
            rows.append(BatchRow([0] * new, start, dict.fromkeys(GROUPS, table)))
        batch = build_batch(rows, GROUPS)
        tensors = HostInputs().put(arrays_of(batch))
        ctx = context_of(batch, tensors, NO_KV, ReferenceBackend(), lambda: None)
        step = Step(tensors["input_ids"], tensors["positions"], ctx, {})
        inputs, entries = ctx.groups["input"], ctx.groups["entries"]
        slow = replace(step, ctx=replace(ctx, host=None), shared={})
        want = completed(slow, ratio, num_pooled, inputs, entries)
        with monkeypatch.context() as patch:
            for name in WAITS:
                patch.setattr(torch.Tensor, name, waited)
            got = completed(step, ratio, num_pooled, inputs, entries)
        for name in ("tokens_N", "slots_NL", "block_ids_N", "offsets_N"):
            assert torch.equal(getattr(got, name), getattr(want, name)), name
