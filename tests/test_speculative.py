"""Speculation decides about time alone: answers are those without it, whatever is drafted and whatever happens."""

from __future__ import annotations

import functools
import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from engine_support import Answer, Pair, Solo, greedy, llama, prompts, reference_tokens, windowed
from hypothesis import given, settings
from hypothesis import strategies as st
from speculative_support import NGRAM, Outcome, TestDrafter, check_mixture, use

from common.engine.messages import EngineLoad, LabelledCounter
from common.types import FinishReason, SamplingParams

__all__ = ["llama", "windowed"]

Request = tuple[tuple[int, ...], SamplingParams]

COUNT = 24
TIGHT = {
    "llama": 115_000,
    "windowed": 150_000,
    "hybrid": 160_000,
}  # blocks for a third of the sequences: running them all preempts
DRAFTERS = {"right": 1.0, "wrong": 0.0, "mixed": 0.7}


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Delta nets, whose state a wrong draft would change for good, beside a layer that attends."""
    return tiny_models.make_qwen3_5(tmp_path_factory.mktemp("hybrid"), seed=6)


def sampled(**more: Any) -> SamplingParams:
    return SamplingParams(**({"temperature": 0.9, "max_tokens": COUNT, "ignore_eos": True, "seed": 5} | more))


PENALTIES = {"repetition_penalty": 1.2, "presence_penalty": 0.6, "frequency_penalty": 0.4}


@functools.cache
def requests(folder: Path) -> tuple[Request, ...]:
    """Every sampling parameter that depends on the place or on what came before."""
    given = prompts(70, (33, 16, 70, 5, 47, 90, 21, 1, 40, 18))
    stop = reference_tokens(folder, given[5], COUNT)[10]
    return (
        (given[0], greedy(COUNT, logprobs=2)),
        (given[1], sampled(logprobs=0)),
        (given[2], sampled(top_p=0.9, top_k=40, min_p=0.01, logprobs=3, **PENALTIES)),
        (given[3], greedy(COUNT, **PENALTIES)),
        (given[4], sampled(n=3)),
        (given[5], greedy(COUNT, stop_token_ids=(stop,))),
        (given[6], greedy(COUNT, stop_token_ids=tuple(range(0, 512, 3)), min_tokens=13)),
        (given[7], sampled(temperature=1.5, logit_bias=((7, 4.0), (9, -100.0), (11, 3.0)))),
        (given[8], greedy(COUNT, prompt_logprobs=1, logprobs=0)),
        (given[9], sampled(max_tokens=1)),
    )


@functools.cache
def expected(folder: Path) -> tuple[Outcome, ...]:
    """The answers of an engine that drafts nothing."""
    solo = Solo(folder)
    answers = [solo.submit(*request) for request in requests(folder)]
    solo.run()
    return tuple(Outcome.of(a) for a in answers)


def drafter_of(folder: Path, share: float, seed: int = 7) -> TestDrafter:
    drafter = TestDrafter(share, rng=random.Random(seed))
    for request, outcome in zip(requests(folder), expected(folder), strict=True):
        drafter.learn(*request, outcome)
    return drafter


def check(folder: Path, answers: list[Answer]) -> None:
    for answer, wanted in zip(answers, expected(folder), strict=True):
        got = Outcome.of(answer)
        assert got.tokens == wanted.tokens
        assert got.finish == wanted.finish
        assert got.logprobs.keys() == wanted.logprobs.keys()
        for choice, logprobs in wanted.logprobs.items():
            assert got.logprobs[choice] == pytest.approx(logprobs, abs=1e-4)
            assert len(got.logprobs[choice]) == len(wanted.tokens[choice])


@pytest.mark.parametrize("model", ["llama", "windowed", "hybrid"])
@pytest.mark.parametrize(("chunked", "tight"), list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("drafter", [*DRAFTERS, "ngram"])
def test_answers_are_those_without_speculation(
    request: pytest.FixtureRequest, model: str, chunked: bool, tight: bool, drafter: str
) -> None:
    folder: Path = request.getfixturevalue(model)
    options: dict[str, Any] = {"max_num_batched_tokens": 7} if chunked else {}
    if tight:
        options |= {"max_model_len": 128, "kv_cache_memory_bytes": TIGHT[model], "max_num_seqs": 8}
    solo = Solo(folder, speculative_config=NGRAM, **options)
    if drafter in DRAFTERS:
        use(solo, drafter_of(folder, DRAFTERS[drafter]))
    first = [solo.submit(*one) for one in requests(folder)]
    solo.run()
    again = [solo.submit(*one) for one in requests(folder)]  # from what the first ones left in the prefix cache
    solo.run()
    check(folder, first)
    check(folder, again)
    speculator = solo.decode.parts.speculator
    assert speculator is not None
    if drafter != "ngram":
        assert speculator.num_draft_tokens > 100
    if drafter in ("wrong", "right"):
        assert speculator.num_accepted_tokens == DRAFTERS[drafter] * speculator.num_draft_tokens
    if tight and not chunked:
        assert sum(a.stats.preemptions for a in (*first, *again)) > 0
    solo.check_idle()


@pytest.mark.parametrize("model", ["llama", "windowed", "hybrid"])
@pytest.mark.parametrize("drafter", [*DRAFTERS])
def test_a_prompt_handed_over_is_drafted_on_like_any_other(
    request: pytest.FixtureRequest, model: str, drafter: str
) -> None:
    folder: Path = request.getfixturevalue(model)
    pair = Pair(folder, prefill={"speculative_config": NGRAM}, speculative_config=NGRAM, max_num_batched_tokens=20)
    assert pair.prefill.parts.speculator is None
    use(pair, drafter_of(folder, DRAFTERS[drafter]))
    answers = [pair.submit(*one) for one in requests(folder)]
    pair.run()
    check(folder, answers)
    assert sum(a.stats.transferred_tokens for a in answers) > 200
    pair.check_idle()


def test_right_drafts_save_their_steps_and_wrong_ones_cost_none(llama: Path) -> None:
    (prompt,) = prompts(71, (40,))
    steps = {}
    wanted = reference_tokens(llama, prompt, 101)
    for share in (1.0, 0.0):
        solo = Solo(llama, speculative_config=NGRAM)
        drafter = TestDrafter(share)
        drafter.learn(prompt, greedy(101), Outcome({0: wanted}, {}, {}))
        use(solo, drafter)
        before = solo.decode.engine.steps
        answer = solo.submit(prompt, greedy(101))
        solo.run()
        assert answer.tokens[0] == wanted
        steps[share] = solo.decode.engine.steps - before
    assert steps[0.0] == 101
    assert steps[1.0] == 1 + 100 // 5


def test_acceptance_is_told_per_request_and_in_the_load(llama: Path) -> None:
    (prompt, other) = prompts(80, (20, 30))
    params = sampled(n=2, max_tokens=11)
    plain = Solo(llama)
    wanted = plain.submit(prompt, params)
    plain.run()
    solo = Solo(llama, speculative_config=NGRAM | {"num_speculative_tokens": 2})
    drafter = TestDrafter()
    drafter.learn(prompt, params, Outcome.of(wanted))
    use(solo, drafter)
    answer, undrafted = solo.submit(prompt, params), solo.submit(other, greedy(5))
    loads: list[EngineLoad] = []
    take = solo.on_decode
    solo.on_decode = lambda m: loads.append(m) if isinstance(m, EngineLoad) else take(m)  # type: ignore[method-assign]
    solo.run()
    solo.clock.advance(2.0)  # type: ignore[attr-defined]
    solo.step()
    # a token of the prompt's step, then 3 + 3 + 3, then the last one, which needs no draft: twice
    assert (answer.stats.drafts, answer.stats.draft_tokens, answer.stats.accepted_draft_tokens) == (6, 12, 12)
    assert (undrafted.stats.drafts, undrafted.stats.accepted_draft_tokens) == (0, 0)
    counters = dict(loads[-1].counters)
    assert counters["spec_decode_num_drafts_total"] == 6.0
    assert counters["spec_decode_num_draft_tokens_total"] == counters["spec_decode_num_accepted_tokens_total"] == 12.0
    (by_pos,) = loads[-1].labelled
    assert by_pos == LabelledCounter(
        "spec_decode_num_accepted_tokens_per_pos_total", "position", (("0", 6.0), ("1", 6.0))
    )


def test_a_drafter_that_always_fails_is_soon_left_alone(llama: Path) -> None:
    (prompt,) = prompts(72, (30,))
    wanted = reference_tokens(llama, prompt, 400)
    solo = Solo(llama, speculative_config=NGRAM)
    drafter = TestDrafter(0.0, cost=0.02)
    drafter.learn(prompt, greedy(400), Outcome({0: wanted}, {}, {}))
    use(solo, drafter)
    answer = solo.submit(prompt, greedy(400))
    solo.run()
    assert answer.tokens[0] == wanted
    speculator = solo.decode.parts.speculator
    assert speculator is not None
    assert speculator.num_accepted_tokens == 0
    assert speculator.num_draft_tokens <= 24
    assert 8 <= drafter.asked <= 18, "it is tried again now and then"


def test_what_was_accepted_is_cached_and_what_was_not_is_not(llama: Path) -> None:
    """The next turn of a conversation finds as much as without speculation, and its keys are right."""
    (prompt, more) = prompts(73, (20, 9))
    wanted = reference_tokens(llama, prompt, 60)
    cached = []
    for share in (None, 1.0, 0.0, 0.5):
        solo = Solo(llama, speculative_config=NGRAM)
        drafter = TestDrafter(share or 0.0)
        if share is not None:
            drafter.learn(prompt, greedy(60), Outcome({0: wanted}, {}, {}))
        use(solo, drafter)
        first = solo.submit(prompt, greedy(60))
        solo.run()
        assert first.tokens[0] == wanted
        turn = (*prompt, *wanted, *more)
        second = solo.submit(turn, greedy(10))
        solo.run()
        assert second.tokens[0] == reference_tokens(llama, turn, 10)
        cached.append(second.stats.cached_tokens)
    assert cached == [64] * 4, "79 tokens had their keys computed: four blocks, the token before the last one ended it"


def test_a_stop_token_in_the_middle_of_right_drafts_ends_there(llama: Path) -> None:
    (prompt,) = prompts(74, (25,))
    wanted = reference_tokens(llama, prompt, 30)
    for at in range(2, 12):
        stop = wanted[at]
        end = wanted.index(stop)
        solo = Solo(llama, speculative_config=NGRAM)
        params = greedy(30, stop_token_ids=(stop,), logprobs=0)
        drafter = TestDrafter()
        drafter.learn(prompt, params, Outcome({0: wanted}, {}, {}))
        use(solo, drafter)
        answer = solo.submit(prompt, params)
        solo.run()
        assert answer.tokens[0] == wanted[: end + 1]
        assert len(answer.logprobs[0]) == end + 1
        assert answer.finish[0] is FinishReason.STOP
        assert solo.decode.parts.requests.tokens_out == end + 1
        solo.check_idle()


@pytest.mark.parametrize("room", [1, 2, 3, 5])
def test_drafts_never_pass_the_models_length(llama: Path, room: int) -> None:
    (prompt,) = prompts(75, (40,))
    wanted = reference_tokens(llama, prompt, 24)
    solo = Solo(llama, speculative_config=NGRAM | {"num_speculative_tokens": room % 4 + 1}, max_model_len=40 + room)
    drafter = TestDrafter()
    drafter.learn(prompt, greedy(100), Outcome({0: wanted}, {}, {}))
    use(solo, drafter)
    answer = solo.submit(prompt, greedy(100))
    solo.run()
    assert answer.tokens[0] == wanted[:room]
    assert answer.finish[0] is FinishReason.LENGTH


def test_a_draft_outside_the_vocabulary_is_dropped(llama: Path) -> None:
    (prompt,) = prompts(76, (40,))

    class Mad(TestDrafter):
        def propose(self, seq: Any, count: int) -> list[int]:
            return [3, 512, 5, -1][:count]

    solo = Solo(llama, speculative_config=NGRAM)
    use(solo, Mad())
    answer = solo.submit(prompt, greedy(COUNT))
    solo.run()
    assert answer.tokens[0] == reference_tokens(llama, prompt, COUNT)


def test_a_row_that_fails_behind_right_drafts_fails_in_its_place(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens before it arrive, as they do without speculation."""
    (prompt,) = prompts(77, (30,))
    wanted = reference_tokens(llama, prompt, 30)
    got = []
    for speculates in (False, True):
        solo = Solo(llama, speculative_config=NGRAM if speculates else {})
        if speculates:
            drafter = TestDrafter()
            drafter.learn(prompt, greedy(30), Outcome({0: wanted}, {}, {}))
            use(solo, drafter)
        sampler = solo.decode.parts.runner._sampler
        sample = sampler.sample

        def broken(logits: Any, rows: Any, masks: Any = None, sample: Any = sample) -> Any:
            logits = logits.clone()
            for i, row in enumerate(rows):
                if row.output_index == 13:
                    logits[i] = float("nan")
            return sample(logits, rows, masks)

        monkeypatch.setattr(sampler, "sample", broken)
        answer = solo.submit(prompt, greedy(30))
        solo.run()
        assert answer.failure is not None
        got.append((answer.tokens[0], answer.failure))
        solo.check_idle()
    assert got[0] == got[1]
    assert got[0][0] == wanted[:13]


def test_a_guess_preempts_nobody(llama: Path) -> None:
    """With every block in use, drafts are left out rather than taken from another sequence."""
    wanted = {p: reference_tokens(llama, p, 60) for p in prompts(78, (40, 40, 40))}
    preempted = []
    for speculates in (False, True):
        solo = Solo(
            llama,
            speculative_config=NGRAM if speculates else {},
            kv_cache_memory_bytes=175_000,
            max_model_len=128,
            max_num_seqs=3,
            enable_prefix_caching=False,
        )
        if speculates:
            drafter = TestDrafter(0.0)
            for prompt, tokens in wanted.items():
                drafter.learn(prompt, greedy(60), Outcome({0: tokens}, {}, {}))
            use(solo, drafter)
        answers = [solo.submit(p, greedy(60)) for p in wanted]
        solo.run()
        assert [a.tokens[0] for a in answers] == list(wanted.values())
        preempted.append(sum(a.stats.preemptions for a in answers))
    assert preempted[0] == preempted[1]


def test_a_repeating_text_is_drafted_from_itself(llama: Path) -> None:
    """The bias makes greedy output repeat; the n-gram drafter sees it."""
    (prompt,) = prompts(79, (30,))
    params = greedy(80, logit_bias=((7, 100.0),))
    solo = Solo(llama, speculative_config={"method": "ngram", "num_speculative_tokens": 3})
    answer = solo.submit(prompt, params)
    solo.run()
    assert answer.tokens[0] == [7] * 80
    assert solo.decode.engine.steps < 35


@settings(max_examples=12)
@given(seed=st.integers(0, 2**32))
def test_any_mixture_of_requests_drafts_and_events(llama: Path, seed: int) -> None:
    """Requests come, resume and are cancelled at random beside drafts that are right at random."""
    rng = random.Random(seed)
    options: dict[str, Any] = {"max_num_batched_tokens": rng.choice((5, 13, 64, 2048))}
    if rng.random() < 0.5:
        options |= {"max_model_len": 128, "kv_cache_memory_bytes": TIGHT["llama"], "max_num_seqs": rng.choice((3, 8))}
    solo = Solo(llama, speculative_config=NGRAM | {"num_speculative_tokens": rng.randint(1, 4)}, **options)
    drafter = drafter_of(llama, rng.random(), seed)
    drafter.cost = rng.choice((drafter.cost, 0.02))
    use(solo, drafter)
    asked = list(zip(requests(llama), expected(llama), strict=True))
    running: list[tuple[Answer, Outcome]] = []
    cancelled: set[int] = set()
    for _ in range(rng.randint(5, 25)):
        (prompt, params), wanted = rng.choice(asked)
        more: dict[str, Any] = {}
        if params.max_tokens > 1 and params.n == 1 and params.logprobs is None and rng.random() < 0.4:
            more["sent"] = (tuple(wanted.tokens[0][: rng.randrange(len(wanted.tokens[0]))]),)
        running.append((solo.submit(prompt, params, **more), wanted))
        for _ in range(rng.randint(0, 6)):
            solo.step()
        if rng.random() < 0.2:
            index = rng.randrange(len(running))
            solo.cancel(running[index][0])
            cancelled.add(index)
    solo.run()
    check_mixture(running, cancelled)
    solo.check_idle()
