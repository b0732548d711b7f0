"""What an engine on a GPU runs before it serves: all that would be compiled later, when requests come together."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from engine_support import Solo, llama

from common.engine.batch import Batch
from common.engine.gpu_memory import powers, run_steps
from common.engine.runner import ModelRunner, Pending

__all__ = ["llama"]

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(("max_seqs", "counts"), [(48, [1, 2, 4, 8, 16, 32, 48]), (16, [1, 2, 4, 8, 16]), (1, [1])])
def test_each_range_of_sizes_has_been_computed_before_it_serves(
    max_seqs: int, counts: list[int], llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("reset_peak_memory_stats", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    solo = Solo(llama)
    runner = solo.decode.parts.runner
    assert isinstance(runner, ModelRunner)
    forward = runner.forward
    steps: list[tuple[int, int, int]] = []  # sequences, new tokens, tokens that the last one sees

    def observed(batch: Batch) -> Pending:
        pending = forward(batch)
        assert pending.logits_RV is not None
        steps.append((len(pending.logits_RV), len(batch.input_ids_T), batch.max_seq_len))
        return pending

    runner.forward = observed  # type: ignore[method-assign]
    layout = solo.decode.parts.layout
    run_steps(runner, layout, max_tokens=100, max_seqs=max_seqs, longest=60, max_model_len=130)
    assert steps == [
        (2, 120, 60),
        *((count, count, 60) for count in counts),
        *((1, num_new, 130) for num_new in (1, 2, 3, 4, 5, 6, 7, 8, 16, 32)),
        *((1, num_new, seen) for seen in (16, 32, 64, 128) for num_new in (1, 2)),
    ]


def test_each_kernel_of_few_rows_takes_a_power_of_two() -> None:
    """Of `common.kernels.gpu.linear`: one for each number up to the first limit, then for each power of two."""
    text = (ROOT / "common/kernels/gpu/linear.py").read_text(encoding="utf-8")
    in_registers, most = (
        int(re.search(rf"^{name} = (\d+)", text, re.MULTILINE)[1])  # type: ignore[index]
        for name in ("MAX_ROWS_IN_REGISTERS", "MAX_ROWS")
    )

    def kernel(rows: int) -> int:
        return rows if rows <= in_registers else max(16, 1 << (rows - 1).bit_length())

    assert {kernel(rows) for rows in range(1, most + 1)} == {kernel(rows) for rows in powers(most)}
