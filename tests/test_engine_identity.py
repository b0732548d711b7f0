"""Greedy tokens in fp32 are those of transformers, whatever the engine does to a sequence on its way."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from engine_support import Pair, Solo, greedy, llama, prompts, reference_tokens, windowed

from common.types import SamplingParams

__all__ = ["llama", "windowed"]

LENGTHS = (1, 16, 33, 70, 150, 47)
COUNT = 24
# Blocks for half of the sequences above: running them all preempts.
TIGHT = {"llama": 175_000, "windowed": 235_000}
CHUNKED = {"max_num_batched_tokens": 7}


def options(model: str, chunked: bool, tight: bool) -> dict[str, Any]:
    few_blocks = {"max_model_len": 192, "kv_cache_memory_bytes": TIGHT[model], "max_num_seqs": 6}
    return (CHUNKED if chunked else {}) | (few_blocks if tight else {})


@pytest.mark.parametrize("model", ["llama", "windowed"])
@pytest.mark.parametrize(("chunked", "tight"), list(itertools.product([False, True], repeat=2)))
def test_solo_engine_equals_transformers(
    request: pytest.FixtureRequest, model: str, chunked: bool, tight: bool
) -> None:
    folder: Path = request.getfixturevalue(model)
    engine = Solo(folder, **options(model, chunked, tight))
    given = prompts(5, LENGTHS)
    first = [engine.submit(p, greedy(COUNT)) for p in given]
    engine.run()
    again = [engine.submit(p, greedy(COUNT)) for p in given]
    engine.run()
    for prompt, *answers in zip(given, first, again, strict=True):
        expected = reference_tokens(folder, prompt, COUNT)
        assert [a.tokens[0] for a in answers] == [expected, expected]
    if tight:
        assert sum(a.stats.preemptions for a in (*first, *again)) > 0
    else:
        assert sum(a.stats.cached_tokens for a in again) >= 16 + 16 + 32 + 64 + 144 - 16
    engine.check_idle()


@pytest.mark.parametrize("model", ["llama", "windowed"])
@pytest.mark.parametrize(("chunked", "tight"), list(itertools.product([False, True], repeat=2)))
def test_handed_over_equals_transformers(
    request: pytest.FixtureRequest, model: str, chunked: bool, tight: bool
) -> None:
    folder: Path = request.getfixturevalue(model)
    pair = Pair(folder, prefill=options(model, chunked, False), **options(model, chunked, tight))
    given = prompts(6, LENGTHS)
    first = [pair.submit(p, greedy(COUNT)) for p in given]
    pair.run()
    again = [pair.submit(p, greedy(COUNT)) for p in given]
    pair.run()
    for prompt, *answers in zip(given, first, again, strict=True):
        expected = reference_tokens(folder, prompt, COUNT)
        assert [a.tokens[0] for a in answers] == [expected, expected]
    assert all(a.stats.fallback == "" for a in first)
    assert sum(a.stats.transferred_tokens for a in first) == sum(LENGTHS)
    for answer in (*first, *again):
        s = answer.stats
        assert s.cached_tokens + s.computed_tokens + s.transferred_tokens == s.prompt_tokens
    pair.check_idle()


def test_a_prefill_worker_with_another_block_size_serves_the_same_tokens(llama: Path) -> None:
    pair = Pair(llama, prefill={"block_size": 48}, block_size=32)
    given = prompts(7, (100, 33, 150))
    shared = given[0][:64]
    answers = [pair.submit(p, greedy(COUNT)) for p in given]
    pair.run()
    answers.append(pair.submit(shared + given[1], greedy(COUNT)))
    pair.run()
    for prompt, answer in zip([*given, shared + given[1]], answers, strict=True):
        assert answer.tokens[0] == reference_tokens(llama, prompt, COUNT)
        assert answer.stats.fallback == ""
    assert answers[-1].stats.cached_tokens == 64
    pair.check_idle()


SAMPLED = SamplingParams(
    temperature=0.9, top_p=0.95, top_k=50, max_tokens=30, ignore_eos=True, seed=1234, repetition_penalty=1.1, logprobs=0
)


def test_a_sampled_stream_is_the_same_alone_batched_and_handed_over(llama: Path) -> None:
    (prompt,) = prompts(8, (60,))
    others = prompts(9, (20, 90, 45))
    alone = Solo(llama)
    wanted = alone.submit(prompt, SAMPLED)
    alone.run()
    batched = Solo(llama, max_num_batched_tokens=13)
    for other in others:
        batched.submit(other, greedy(40))
    got = batched.submit(prompt, SAMPLED)
    batched.run()
    pair = Pair(llama)
    handed = pair.submit(prompt, SAMPLED)
    pair.run()
    assert got.tokens == wanted.tokens
    assert handed.tokens == wanted.tokens
    assert handed.logprobs[0] == pytest.approx(wanted.logprobs[0], abs=1e-4)
    assert len(handed.logprobs[0]) == 30
    assert handed.stats.transferred_tokens == 60


def test_a_stream_resumes_anywhere_from_its_tokens(llama: Path) -> None:
    (prompt,) = prompts(10, (40,))
    whole = Solo(llama)
    wanted = whole.submit(prompt, SAMPLED)
    whole.run()
    for cut in (1, 7, 29):
        pair = Pair(llama)
        resumed = pair.submit(prompt, SAMPLED, sent=(tuple(wanted.tokens[0][:cut]),))
        pair.run()
        assert resumed.tokens == wanted.tokens


def test_choices_share_the_prompt_and_differ(llama: Path) -> None:
    (prompt,) = prompts(11, (50,))
    params = SamplingParams(temperature=1.0, max_tokens=12, ignore_eos=True, seed=3, n=4)
    solo = Solo(llama)
    many = solo.submit(prompt, params)
    solo.run()
    assert len({tuple(t) for t in many.tokens.values()}) == 4
    pair = Pair(llama)
    handed = pair.submit(prompt, params)
    pair.run()
    assert handed.tokens == many.tokens
    pair.check_idle()
