"""What an engine on a GPU runs before it serves: all that would be compiled later, when requests come together."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from engine_support import Solo, llama

from common.engine.batch import Batch
from common.engine.gpu_memory import FEW_ROWS, run_largest_step
from common.engine.runner import ModelRunner, Pending

__all__ = ["llama"]

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(("max_seqs", "counts"), [(48, [1, 2, 16, 32, 48]), (16, [1, 2, 16]), (1, [1])])
def test_the_head_has_been_computed_for_few_rows_before_it_serves(
    max_seqs: int, counts: list[int], llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("reset_peak_memory_stats", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    solo = Solo(llama)
    runner = solo.decode.parts.runner
    assert isinstance(runner, ModelRunner)
    forward = runner.forward
    seen: list[tuple[int, int]] = []

    def observed(batch: Batch) -> Pending:
        pending = forward(batch)
        assert pending.logits_RV is not None
        seen.append((len(batch.input_ids_T), len(pending.logits_RV)))
        return pending

    runner.forward = observed  # type: ignore[method-assign]
    run_largest_step(runner, solo.decode.parts.layout, max_tokens=100, max_seqs=max_seqs, max_model_len=60)
    assert seen == [(120, 2), *((count, count) for count in counts)]


def test_few_rows_are_one_for_each_kernel() -> None:
    """Of `common.kernels.gpu.linear`: one for each number up to the first limit, then for each power of two."""
    text = (ROOT / "common/kernels/gpu/linear.py").read_text(encoding="utf-8")
    in_registers, most = (
        int(re.search(rf"^{name} = (\d+)", text, re.MULTILINE)[1])  # type: ignore[index]
        for name in ("MAX_ROWS_IN_REGISTERS", "MAX_ROWS")
    )
    kernels = {rows if rows <= in_registers else max(16, 1 << (rows - 1).bit_length()) for rows in range(1, most + 1)}
    assert kernels == set(FEW_ROWS)
