"""States of recurrent layers through an engine's life: where they are kept, found, moved, lost and made again.

Tokens are always those of transformers; what these tests add is that the way to them was the one that was meant.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from engine_support import PEER, Answer, Pair, Solo, abort_after, greedy, hybrid, prompts, reference_tokens
from speculative_support import TestDrafter, use

from common.kvtransfer.memory import Fault
from common.types import SamplingParams

__all__ = ["hybrid"]

COUNT = 10
SMALL_CHUNKS = {"max_num_batched_tokens": 32}
STATE_NBYTES = 3 * (3 * 2 * 40 * 4 + 4 * 16 * 8 * 4)  # layers of a convolution's and a rule's state
(PROMPT,) = prompts(20, (100,))


def settle(solo: Solo, answer: Answer, folder: Path, prompt: tuple[int, ...] = PROMPT) -> Answer:
    solo.run(answer)
    assert answer.failure is None
    assert answer.tokens[0] == reference_tokens(folder, prompt, len(answer.tokens[0]))
    return answer


def ask(solo: Solo, folder: Path, prompt: tuple[int, ...], count: int = COUNT) -> int:
    """Tokens of the prompt that were found in the cache, the answer being right."""
    return settle(solo, solo.submit(prompt, greedy(count)), folder, prompt).stats.cached_tokens


def made(solo: Solo) -> tuple[int, int]:
    """Copies of states cached, and not for lack of room."""
    cache = solo.decode.parts.cache
    return cache.snapshots.checkpoints_made, cache.snapshots.checkpoints_skipped


def few_states(number: int, **more: Any) -> dict[str, Any]:
    """Options of an engine with so many blocks for states: they get half of the memory."""
    nbytes = 2 * (number * STATE_NBYTES + 8500)
    return {"kv_cache_memory_bytes": nbytes, "max_model_len": 112 if number < 4 else 192, "max_num_seqs": 8} | more


def num_states(solo: Solo) -> int:
    return next(s.total for s in solo.decode.parts.cache.ledger() if s.group == "state")


def test_the_next_turn_goes_on_from_the_end_of_the_last_prompt(hybrid: Path) -> None:
    solo = Solo(hybrid)
    assert ask(solo, hybrid, PROMPT) == 0
    assert made(solo) == (1, 0)
    turn = (*PROMPT, *reference_tokens(hybrid, PROMPT, COUNT), *prompts(21, (50,))[0])
    assert ask(solo, hybrid, turn) == 96
    assert ask(solo, hybrid, turn) == 144  # 160 tokens: the last one is computed in any case
    assert ask(solo, hybrid, PROMPT) == 96
    solo.check_idle()


def test_a_prefix_is_kept_when_it_is_met_for_the_second_time(hybrid: Path) -> None:
    solo = Solo(hybrid)
    shared = PROMPT[:50]
    others = [(*shared, *p) for p in prompts(22, (40, 45, 61))]
    assert ask(solo, hybrid, PROMPT) == 0
    assert ask(solo, hybrid, others[0]) == 0
    assert made(solo) == (3, 0)  # two ends, and the prefix
    assert ask(solo, hybrid, others[1]) == 48
    assert ask(solo, hybrid, others[2]) == 48
    solo.check_idle()


def test_a_long_prompt_is_kept_at_intervals(hybrid: Path) -> None:
    solo = Solo(hybrid, state_snapshot_interval=64)
    long, other = prompts(23, (300, 90))
    assert ask(solo, hybrid, long) == 0
    assert made(solo) == (5, 0)  # 64, 128, 192, 256, 288
    assert ask(solo, hybrid, (*long[:200], *other)) == 192
    assert ask(solo, hybrid, long[:130]) == 128
    solo.check_idle()


@pytest.mark.parametrize("caching", [True, False])
def test_a_preempted_sequence_goes_on_from_the_best_copy(hybrid: Path, caching: bool) -> None:
    """Or from nothing, where nothing is cached; its own blocks found again without a copy do not mislead it."""
    tight = {"max_model_len": 192, "kv_cache_memory_bytes": 150_000, "max_num_seqs": 6}
    solo = Solo(hybrid, enable_prefix_caching=caching, **tight)
    given = prompts(5, (150, 47, 33, 16, 1, 70))
    answers = [solo.submit(p, greedy(24)) for p in given]
    solo.run()
    for prompt, answer in zip(given, answers, strict=True):
        assert answer.tokens[0] == reference_tokens(hybrid, prompt, 24)
    assert sum(a.stats.preemptions for a in answers) > 0
    assert (made(solo)[0] > 0) == caching
    solo.check_idle()


def test_sequences_wait_for_a_state_as_they_do_for_blocks(hybrid: Path) -> None:
    solo = Solo(hybrid, **few_states(3))
    assert num_states(solo) == 3
    given = prompts(24, (20, 70, 33, 50, 41, 64, 90))
    answers = [solo.submit(p, greedy(COUNT)) for p in given]
    solo.step()
    assert len(solo.decode.parts.scheduler.running) <= 3
    solo.run()
    for prompt, answer in zip(given, answers, strict=True):
        assert answer.tokens[0] == reference_tokens(hybrid, prompt, COUNT)
    assert made(solo)[1] > 0
    solo.check_idle()


def test_one_sequence_and_its_hit_fit_into_the_fewest_states(hybrid: Path) -> None:
    solo = Solo(hybrid, **few_states(2))
    assert num_states(solo) == 2
    for expected in (0, 96, 96):
        assert ask(solo, hybrid, PROMPT) == expected
    solo.check_idle()


def test_all_choices_are_drawn_from_the_same_prompt(hybrid: Path) -> None:
    params = SamplingParams(temperature=0.9, seed=4, n=3, max_tokens=COUNT, ignore_eos=True)
    alone = Solo(hybrid, enable_prefix_caching=False)
    want = alone.submit(PROMPT, params)
    alone.run(want)
    solo, pair = Solo(hybrid), Pair(hybrid)
    for engine in (solo, pair):
        answer = engine.submit(PROMPT, params)
        engine.run(answer)
        assert answer.tokens == want.tokens
        assert len(set(map(tuple, answer.tokens.values()))) == 3
        engine.check_idle()


def test_a_resumed_answer_goes_on(hybrid: Path) -> None:
    expected = reference_tokens(hybrid, PROMPT, 40)
    solo = Solo(hybrid)
    for sent in (1, 13, 39):
        answer = solo.submit(PROMPT, greedy(40), sent=(tuple(expected[:sent]),))
        solo.run(answer)
        assert answer.tokens[0] == expected
    assert answer.stats.cached_tokens == 100  # the copy of its own end, met again
    pair = Pair(hybrid)
    answer = pair.submit(PROMPT, greedy(40), sent=(tuple(expected[:13]),))
    pair.run(answer)
    assert answer.tokens[0] == expected
    assert answer.stats.transferred_tokens == 100
    for engine in (solo, pair):
        engine.check_idle()


def test_prompt_logprobs_are_of_the_whole_prompt(hybrid: Path) -> None:
    solo = Solo(hybrid)
    ask(solo, hybrid, PROMPT)
    answer = solo.submit(PROMPT, greedy(COUNT, prompt_logprobs=0))
    settle(solo, answer, hybrid)
    assert answer.stats.cached_tokens == 0
    assert answer.prompt_logprobs is not None
    assert len(answer.prompt_logprobs.token_logprobs) == len(PROMPT) - 1


@pytest.mark.parametrize("blocks", [(16, 16), (48, 32), (16, 64)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_state_is_handed_over(hybrid: Path, blocks: tuple[int, int], dtype: str) -> None:
    """At the end of the prompt, wherever the reader and the owner begin; tokens are those of one engine."""
    alone = Solo(hybrid, dtype=dtype, enable_prefix_caching=False)
    pair = Pair(
        hybrid, prefill=SMALL_CHUNKS | {"block_size": blocks[0], "dtype": dtype}, block_size=blocks[1], dtype=dtype
    )
    given = prompts(6, (1, 16, 33, 70, 150))
    given += [(*given[3], *given[2]), (*given[4][:64], *given[3])]
    for prompt in given:
        want, got = alone.submit(prompt, greedy(24)), pair.submit(prompt, greedy(24))
        alone.run(want)
        pair.run(got)
        assert got.stats.fallback == ""
        assert got.stats.transferred_tokens == len(prompt)
        assert got.tokens[0] == want.tokens[0]
        if dtype == "float32":
            assert got.tokens[0] == reference_tokens(hybrid, prompt, 24)
    moved = [e for e in pair.events if getattr(e, "group", "") == "state"]
    assert [e.start_position + 1 for e in moved] == [len(p) for p in given]
    assert blocks[1] > 32 or made(pair)[0] > 0
    assert pair.prefill.parts.cache.snapshots.checkpoints_made > 0
    pair.check_idle()


def test_a_reader_with_a_copy_of_its_own_asks_for_the_rest(hybrid: Path) -> None:
    pair = Pair(hybrid)
    assert ask(pair, hybrid, PROMPT[:70]) == 0
    settle(pair, pair.submit(PROMPT[:70], greedy(COUNT), prefill=0), hybrid, PROMPT[:70])
    answer = settle(pair, pair.submit(PROMPT, greedy(COUNT)), hybrid)
    assert (answer.stats.cached_tokens, answer.stats.transferred_tokens) == (64, 36)
    assert answer.stats.remote_cached_tokens == 0
    pair.check_idle()


def test_the_turn_after_a_hand_over_goes_on_from_the_first_tokens_of_the_answer(hybrid: Path) -> None:
    pair = Pair(hybrid)
    ask(pair, hybrid, PROMPT, 24)
    assert made(pair) == (1, 0)
    turn = (*PROMPT, *reference_tokens(hybrid, PROMPT, 24), *prompts(26, (30,))[0])
    answer = settle(pair, pair.submit(turn, greedy(COUNT)), hybrid, turn)
    assert (answer.stats.cached_tokens, answer.stats.transferred_tokens) == (112, 154 - 112)
    assert ask(pair, hybrid, PROMPT[:96], 20) == 0
    assert made(pair) == (3, 0)  # at 112, 160 and, though the prompt ends at a whole block, at 112 of another answer
    pair.check_idle()


@pytest.mark.parametrize("cached", [False, True], ids=["from nothing", "from a copy"])
@pytest.mark.parametrize("fault", [Fault.FAIL, Fault.CORRUPT, Fault.SHORT, Fault.MISPLACE, Fault.EARLY])
@pytest.mark.parametrize("group", ["full", "state", "tail"])
def test_a_bad_read_is_a_recompute_never_a_token(hybrid: Path, group: str, fault: Fault, cached: bool) -> None:
    pair = Pair(hybrid, prefill=SMALL_CHUNKS)
    if cached:
        ask(pair, hybrid, PROMPT[:50])
        settle(pair, pair.submit(PROMPT[:50], greedy(COUNT), prefill=0), hybrid, PROMPT[:50])
    hit: list[int] = []

    def fault_for(read_id: int, pieces: Any) -> Fault:
        wanted = not hit and pieces[0].group == group
        hit.extend([read_id] * wanted)
        return fault if wanted else Fault.NONE

    pair.network.fault_for = fault_for
    answer = settle(pair, pair.submit(PROMPT, greedy(COUNT)), hybrid)
    assert hit
    assert answer.stats.fallback in ("digest_mismatch", "read_failed")
    assert answer.stats.cached_tokens == (48 if cached else 0)
    assert answer.stats.computed_tokens == 100 - answer.stats.cached_tokens
    pair.network.fault_for = lambda read_id, pieces: Fault.NONE
    pair.check_idle()


def test_a_read_that_never_ends_keeps_its_block_and_nobody_else_s(hybrid: Path) -> None:
    pair = Pair(hybrid, handoff={"read_timeout_s": 2.0, "progress_timeout_s": 60.0})
    pair.network.fault_for = lambda read_id, pieces: Fault.STUCK if pieces[0].group == "state" else Fault.NONE
    answer = pair.submit(PROMPT, greedy(COUNT))
    for _ in range(8):
        pair.step()
    assert not answer.tokens
    in_flight = {s.group: s.in_flight for s in pair.decode.parts.cache.ledger()}
    assert in_flight == {"full": 0, "state": 1, "tail": 0}
    pair.clock.advance(2.1)
    settle(pair, answer, hybrid)
    assert answer.stats.fallback == "read_timeout"
    assert not pair.decode.parts.reader.usable(PEER)
    pair.clock.advance(60.0)
    pair.check_idle()


@pytest.mark.parametrize("after", range(8))
def test_a_prefill_worker_killed_at_any_moment_is_invisible(hybrid: Path, after: int) -> None:
    pair = Pair(hybrid, prefill=SMALL_CHUNKS)
    pair.network.held = True
    answer = pair.submit(PROMPT, greedy(COUNT))
    for _ in range(after):
        pair.step()
        pair.network.step()
    pair.kill_prefill()
    settle(pair, answer, hybrid)
    pair.check_idle()


@pytest.mark.parametrize("steps", range(9))
def test_an_abort_in_every_state_gives_everything_back(hybrid: Path, steps: int) -> None:
    pair = Pair(hybrid, prefill=SMALL_CHUNKS, max_num_batched_tokens=32)
    bystander = abort_after(pair, steps, PROMPT, COUNT)
    settle(pair, bystander, hybrid, PROMPT[:50])
    pair.check_idle()


def test_a_storm_with_few_states_on_both_sides(hybrid: Path) -> None:
    """Everything at once: waits, preemptions, hits, branches, hand-offs, cancels; and all is given back."""
    rng = random.Random(7)
    pair = Pair(hybrid, prefill=few_states(5, max_num_seqs=4) | SMALL_CHUNKS, **few_states(5, max_num_seqs=6))
    stems = prompts(25, (40, 80, 64))
    for round_ in range(4):
        given = [(*rng.choice(stems)[: rng.randint(1, 80)], *p) for p in prompts(30 + round_, range(5, 65, 6))]
        answers = [pair.submit(p, greedy(COUNT), prefill=rng.choice((0, PEER))) for p in given]
        for _ in range(rng.randint(0, 9)):
            pair.step()
        dropped = rng.sample(answers, 3)
        for answer in dropped:
            pair.cancel(answer)
        pair.run(*answers)
        for prompt, answer in zip(given, answers, strict=True):
            if answer not in dropped:
                assert answer.failure is None
                assert answer.tokens[0] == reference_tokens(hybrid, prompt, COUNT)
    pair.check_idle()


def test_wrong_drafts_leave_no_trace_in_what_is_cached(hybrid: Path) -> None:
    """The next turn goes on from a copy of the state; drafts of the first answer were wrong at every step."""
    solo = Solo(hybrid, speculative_config={"method": "ngram", "num_speculative_tokens": 4})
    use(solo, TestDrafter(0.0, known=_Anything()))
    turn = PROMPT
    for _ in range(3):
        ask(solo, hybrid, turn, 2 * COUNT)
        turn = (*turn, *reference_tokens(hybrid, turn, 2 * COUNT), *prompts(len(turn), (37,))[0])
    speculator = solo.decode.parts.speculator
    assert speculator is not None
    assert speculator.num_draft_tokens > 20
    assert speculator.num_accepted_tokens <= speculator.num_draft_tokens / 4
    assert ask(solo, hybrid, turn) > len(PROMPT)
    solo.check_idle()


class _Anything(dict[Any, list[int]]):
    """Tokens to be wrong about, for any request."""

    def get(self, key: Any, default: Any = None) -> list[int]:
        return [3] * 64
