"""A prompt that nobody waits for any more is not computed to its end: a prefill worker stops at the next chunk."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine_support import Pair, greedy, llama, prompts, reference_tokens

__all__ = ["llama"]

CHUNK = 16
COUNT = 8


@pytest.mark.parametrize("chunks", [1, 2, 5])
def test_a_prefill_worker_stops_at_the_chunk_after_a_cancel(llama: Path, chunks: int) -> None:
    pair = Pair(llama, prefill={"max_num_batched_tokens": CHUNK})
    (prompt,) = prompts(60, (400,))
    before = pair.prefill.engine.steps
    answer = pair.submit(prompt, greedy(COUNT))
    while pair.prefill.engine.steps < before + chunks:
        pair.step()
    pair.cancel(answer)
    for _ in range(5):
        pair.step()
    assert pair.prefill.engine.steps <= before + chunks + 1
    assert all(group.live == group.leased == 0 for group in pair.prefill.parts.cache.ledger())
    assert answer.ended
    pair.check_idle()


def test_a_thousand_aborts_slow_nobody_and_leave_nothing(llama: Path) -> None:
    """Steps are what a request waits for: after the storm one takes as many as before it."""
    pair = Pair(llama, prefill={"max_num_batched_tokens": CHUNK})
    first, last, *given = prompts(61, (50, 50, *(20 + i % 60 for i in range(25))))
    steps = []
    for prompt in (first, last):
        before = pair.decode.engine.steps, pair.prefill.engine.steps
        answer = pair.submit(prompt, greedy(COUNT))
        pair.run(answer)
        pair.check_idle()
        assert answer.tokens[0] == reference_tokens(llama, prompt, COUNT)
        steps.append((pair.decode.engine.steps - before[0], pair.prefill.engine.steps - before[1]))
        for number in range(40 if prompt is first else 0):
            storm = [pair.submit(p, greedy(COUNT)) for p in given]
            for _ in range(number % 4):
                pair.step()
            for aborted in storm:
                pair.cancel(aborted)
            pair.run(*storm)
    assert steps[0] == steps[1]
    pair.check_idle()
