"""With overlap, what a step gives is read when it is collected, and not while the next one is launched."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine_support import Solo, greedy, llama, prompts
from torch import Tensor

from common.engine.batch import Batch
from common.engine.logprobs import RawLogprobs
from common.engine.runner import Pending
from common.types import TokenLogprobs

__all__ = ["llama"]


def test_what_a_step_gives_is_read_when_it_is_collected(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log probabilities of a prompt too: whoever reads them sooner waits for the step before as well."""
    solo = Solo(llama, async_scheduling="on", max_num_batched_tokens=16)
    runner = solo.decode.parts.runner
    forward, of_rows = runner.forward, RawLogprobs.per_row
    launching: list[bool] = []
    read: list[bool] = []

    def launch(batch: Batch) -> Pending:
        launching.append(True)
        pending = forward(batch)
        launching.pop()
        return pending

    def per_row(self: RawLogprobs, *tensors: Tensor) -> list[TokenLogprobs | None]:
        read.append(bool(launching))
        return of_rows(self, *tensors)

    runner.forward = launch  # type: ignore[method-assign]
    monkeypatch.setattr(RawLogprobs, "per_row", per_row)
    (prompt,) = prompts(5, [40])
    answer = solo.submit(prompt, greedy(6, prompt_logprobs=2, logprobs=1))
    solo.run()
    assert answer.prompt_logprobs is not None
    assert read == [False] * (3 + 6)
