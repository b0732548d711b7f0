"""Engines of several ranks: the tokens of one rank alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine_support import Solo, greedy, llama, prompts, reference_tokens

__all__ = ["llama"]


@pytest.mark.parametrize("size", [2])
def test_ranks_make_the_tokens_of_one(llama: Path, size: int) -> None:
    solo = Solo(llama, tensor_parallel_size=size)
    asked = prompts(7, [20, 50, 3])
    answers = [solo.submit(p, greedy(8)) for p in asked]
    solo.run()
    for prompt, answer in zip(asked, answers, strict=True):
        assert answer.tokens[0] == reference_tokens(llama, prompt, 8)
    solo.check_idle()
    solo.decode.close()
