"""Engines for very short sequences: the self-test fits into them, or the real reason is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engine_support import Solo, greedy, llama, prompts, reference_tokens, windowed

from common.config import EngineConfig, HandoffConfig, WorkerConfig
from common.engine.build import build_engine
from common.errors import ConfigError
from common.types import MonotonicClock, Role
from nanodeploy import LLM

__all__ = ["llama", "windowed"]

OPTIONS: dict[str, Any] = {"dtype": "float32", "num_threads": 1, "kv_cache_memory_bytes": 8 << 20}


def build(folder: Path, role: Role, max_model_len: int) -> int:
    engine = EngineConfig(model=str(folder), max_model_len=max_model_len, check_ledger=True, **OPTIONS)
    config = WorkerConfig(engine=engine, handoff=HandoffConfig(transports=("memory",)))
    built = build_engine(config, role, MonotonicClock(), lambda *progress: None)
    built.close()
    return built.ready.max_model_len


@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
@pytest.mark.parametrize("max_model_len", [3, 15, 16, 18, 21])
def test_short_engines_start(llama: Path, role: Role, max_model_len: int) -> None:
    assert build(llama, role, max_model_len) == max_model_len


def test_a_short_engine_answers(llama: Path) -> None:
    with LLM(llama, max_model_len=8, **OPTIONS) as llm:
        (output,) = llm.generate([(5, 6, 7)], greedy(4))
    assert list(output.outputs[0].token_ids) == reference_tokens(llama, (5, 6, 7), 4)


@pytest.mark.parametrize("max_model_len", [1, 2])
def test_too_short_is_said(llama: Path, max_model_len: int) -> None:
    with pytest.raises(ConfigError, match=f"max_model_len is {max_model_len}; the least is 3"):
        build(llama, Role.DECODE, max_model_len)


def test_an_engine_with_one_block_starts_and_answers(llama: Path) -> None:
    """It holds one sequence, which is what its settings ask for; the test does not ask for two."""
    block = Solo(llama).decode.parts.layout.block_nbytes("full")
    solo = Solo(llama, max_model_len=16, max_num_seqs=1, kv_cache_memory_bytes=block + 2048)
    assert solo.decode.parts.layout.group("full").num_blocks == 1
    (prompt,) = prompts(9, (9,))
    answer = solo.submit(prompt, greedy(5))
    solo.run()
    assert answer.tokens[0] == reference_tokens(llama, prompt, 5)


def test_few_blocks_of_a_window_do_for_the_self_test(windowed: Path) -> None:
    """As many as a sequence needs that is computed a few tokens at a time; the test holds two."""
    solo = Solo(windowed, max_model_len=256, max_num_batched_tokens=8, max_num_seqs=1, kv_cache_memory_bytes=105_000)
    window = next(g for g in solo.decode.parts.layout.groups if g.name == "window")
    assert window.num_blocks == 3
    (prompt,) = prompts(8, (100,))
    answer = solo.submit(prompt, greedy(5))
    solo.run()
    assert answer.tokens[0] == reference_tokens(windowed, prompt, 5)
