"""DeepSeek-V4 in an engine: its entries and windows through hand-offs, prefix hits, preemption and drafts.

Everything that it keeps is by position, in one full group and up to three window groups, so the engine knows nothing of
it. What could go wrong lies where an entry is not complete: at the end of a prompt, and where drafts are taken back.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engine_support import PEER, Pair, Solo, greedy, prompts, reference_tokens
from family_modes import least_bytes
from speculative_support import NGRAM, Outcome, TestDrafter, use
from tiny_models import make_deepseek_v4

COUNT = 12
RATES = {"compressed_sparse_attention": 4, "heavily_compressed_attention": 16}


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Entries of 4 and of 128 tokens: groups full, window and window_csa, full blocks of 128."""
    return make_deepseek_v4(tmp_path_factory.mktemp("long"), seed=5, kinds="wch", sliding_window=128)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Entries of 4 and of 16 tokens beside a window of 24: four groups of four lengths."""
    return make_deepseek_v4(
        tmp_path_factory.mktemp("short"), seed=6, kinds="chc", sliding_window=24, compress_rates=RATES, index_topk=4
    )


@pytest.mark.parametrize("name", ["long", "short"])
@pytest.mark.parametrize("blocks", [(16, 16), (32, 16), (16, 48)])
def test_a_prompt_of_any_length_is_handed_over(
    name: str, blocks: tuple[int, int], request: pytest.FixtureRequest
) -> None:
    """Lengths around the ends of entries, blocks and windows; sides of equal and of different block sizes."""
    folder = request.getfixturevalue(name)
    prefill, decode = ({"block_size": size, "enable_prefix_caching": False} for size in blocks)
    pair = Pair(folder, prefill=prefill | {"max_num_batched_tokens": 50}, **decode)
    for prompt in prompts(40, (1, 2, 3, 4, 5, 7, 15, 16, 17, 31, 126, 127, 128, 129, 130, 255, 257, 300)):
        answer = pair.submit(prompt, greedy(COUNT))
        pair.run(answer)
        assert answer.stats.fallback == ""
        assert answer.stats.transferred_tokens == len(prompt)
        assert answer.tokens[0] == reference_tokens(folder, prompt, COUNT)
    pair.check_idle()


@pytest.mark.parametrize("name", ["long", "short"])
@pytest.mark.parametrize("after", [1, 3, 5, 7])
def test_what_a_lost_prefill_worker_has_sent_is_gone_on_from(
    name: str, after: int, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(name)
    pair = Pair(folder, prefill={"max_num_batched_tokens": 40}, max_num_batched_tokens=60)
    (prompt,) = prompts(41, (310,))
    answer = pair.submit(prompt, greedy(COUNT))
    for _ in range(after):
        pair.step()
        pair.network.step()
    pair.kill_prefill()
    pair.run(answer)
    assert answer.tokens[0] == reference_tokens(folder, prompt, COUNT)
    pair.check_idle()


@pytest.mark.parametrize("name", ["long", "short"])
def test_prompts_that_begin_alike_share_blocks_wherever_they_part(name: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    pair = Pair(folder, prefill={"max_num_batched_tokens": 64})
    first, other = prompts(42, (300, 300))
    hits = []
    for common in (0, 128, 129, 200, 256, 270, 300):
        prompt = first[:common] + other[: 300 - common]
        for prefill in (PEER, 0):  # what one engine lacks is handed over; then it has it
            answer = pair.submit(prompt, greedy(COUNT), prefill)
            pair.run(answer)
            assert answer.tokens[0] == reference_tokens(folder, prompt, COUNT)
            hits.append(answer.stats.cached_tokens)
    assert sum(hit > 0 for hit in hits) >= 5
    assert max(hits) >= 256
    pair.check_idle()


@pytest.mark.parametrize("name", ["long", "short"])
def test_sequences_that_are_pushed_out_are_computed_again(name: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    tight: dict[str, Any] = {"max_model_len": 320, "max_num_batched_tokens": 64, "max_num_seqs": 8}
    nbytes = int(1.2 * least_bytes(folder, **tight))
    solo = Solo(folder, **tight, kv_cache_memory_bytes=nbytes)
    given = prompts(43, (250, 120, 90, 60, 17))
    answers = [solo.submit(p, greedy(40)) for p in given]
    solo.run()
    assert sum(a.stats.preemptions for a in answers) > 0
    for prompt, answer in zip(given, answers, strict=True):
        assert answer.tokens[0] == reference_tokens(folder, prompt, 40)
    solo.check_idle()


@pytest.mark.parametrize("name", ["long", "short"])
@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_drafts_that_are_taken_back_leave_nothing(name: str, share: float, request: pytest.FixtureRequest) -> None:
    """A wrong draft completes entries and fills windows with what was never said."""
    folder = request.getfixturevalue(name)
    given = prompts(44, (3, 100, 121, 250))
    params = greedy(40, logprobs=0)
    plain = Solo(folder)
    expected = {p: plain.submit(p, params) for p in given}
    plain.run()
    pair = Pair(folder, prefill={"max_num_batched_tokens": 64}, speculative_config=NGRAM)
    drafter = TestDrafter(share)
    for prompt, answer in expected.items():
        assert answer.tokens[0] == reference_tokens(folder, prompt, 40)
        drafter.learn(prompt, params, Outcome.of(answer))
    use(pair, drafter)
    for way in ({}, {"prefill": 0}):
        got = {p: pair.submit(p, params, **way) for p in given}
        pair.run()
        for prompt, answer in got.items():
            assert answer.tokens == expected[prompt].tokens
            assert answer.logprobs == expected[prompt].logprobs
    assert drafter.asked > 0
    pair.check_idle()
