"""Answers under a grammar, in real engines: they follow it to their end, whatever happens to them on the way."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from engine_support import Answer, Solo, llama, prompts
from structured_support import check, random_schema, schema_grammar, text_of, under

from common.types import FinishReason, SamplingParams

__all__ = ["llama"]

MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "overlap": {"async_scheduling": "on"},
    "speculation": {"speculative_config": {"method": "ngram", "num_speculative_tokens": 4}},
    "preemption": {"max_model_len": 480, "kv_cache_memory_bytes": 448 << 10, "max_num_seqs": 8},
    "ranks": {"tensor_parallel_size": 2},
}


def run(solo: Solo, params: list[SamplingParams], seed: int = 0) -> list[Answer]:
    texts = prompts(seed, [random.Random(seed + i).randrange(1, 40) for i in range(len(params))])
    got = [solo.submit(text, one) for text, one in zip(texts, params, strict=True)]
    solo.run(limit=50_000)
    solo.check_idle()
    return got


@pytest.mark.parametrize("mode", MODES)
def test_answers_validate(mode: str, llama: Path) -> None:
    rng = random.Random(mode)
    schemas = [random_schema(rng) for _ in range(24)]
    params = [under(schema_grammar(s), seed=i, temperature=rng.choice([0.0, 1.0])) for i, s in enumerate(schemas)]
    ended = 0
    for schema, answer in zip(schemas, run(Solo(llama, **MODES[mode]), params), strict=True):
        assert answer.failure is None, (schema, answer.failure)
        check(schema, text_of(llama, answer.tokens[0]), answer.finish[0])
        ended += answer.finish[0] is FinishReason.STOP
    assert ended > 18
