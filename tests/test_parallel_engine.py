"""Engines of several ranks make the tokens of one rank alone: every family, in fp32.

Ranks are threads here (`parallel_support`); `test_parallel_process.py` has them as they are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path

import pytest
from engine_support import Answer, Solo, greedy, llama, prompts, reference_tokens, windowed
from families import FAMILIES, Family
from mtp_support import MTP, make_mtp, make_qwen_mtp

from common.config import SpeculativeConfig
from common.engine.batch import RowMasks
from common.engine.rank_runner import FORWARD, RankLoop
from common.engine.structured_masks import MasksUnderWay
from common.errors import ConfigError, RankLostError
from common.types import SamplingParams

__all__ = ["llama", "windowed"]

LENGTHS, COUNT = (40, 17, 1), 12


def answers_of(folder: Path, asked: Sequence[tuple[int, ...]], **engine: object) -> list[list[int]]:
    solo = Solo(folder, **engine)
    try:
        answers = [solo.submit(p, greedy(COUNT)) for p in asked]
        solo.run()
        solo.check_idle()
    finally:
        solo.decode.close()
    return [answer.tokens[0] for answer in answers]


@pytest.mark.parametrize("family", [pytest.param(f, id=f.name) for f in FAMILIES])
def test_two_ranks_make_the_tokens_of_one(family: Family, tmp_path: Path) -> None:
    folder = family.configurations[family.quick_configurations[0]](tmp_path / "checkpoint")
    asked = prompts(1000, LENGTHS)
    assert answers_of(folder, asked, **family.engine, tensor_parallel_size=2) == answers_of(
        folder, asked, **family.engine
    )


def test_a_step_is_launched_before_the_last_is_collected(llama: Path) -> None:
    """Its tokens are on every rank."""
    asked = prompts(8, [20, 50, 7])
    expected = [reference_tokens(llama, prompt, COUNT) for prompt in asked]
    assert answers_of(llama, asked, tensor_parallel_size=2, async_scheduling="on") == expected


def test_four_ranks_share_two_key_heads(llama: Path) -> None:
    asked = prompts(7, [20, 50])
    expected = [reference_tokens(llama, prompt, COUNT) for prompt in asked]
    assert answers_of(llama, asked, tensor_parallel_size=4) == expected


def test_draws_that_depend_on_more_than_logits(llama: Path) -> None:
    """Penalties, bans and histories reach all ranks; a rank that drew another token would go on with another text."""
    (prompt, other) = prompts(9, [30, 12])
    asked = [
        SamplingParams(temperature=0.9, seed=1, max_tokens=20, frequency_penalty=0.5, logprobs=2, prompt_logprobs=1),
        SamplingParams(temperature=0.7, seed=2, max_tokens=20, min_tokens=15, top_p=0.9, n=2, repetition_penalty=1.2),
        SamplingParams(temperature=1.0, seed=3, max_tokens=20, top_k=5, logit_bias=((7, 5.0),), ignore_eos=True),
    ]

    def run(**engine: object) -> list[Answer]:
        solo = Solo(llama, speculative_config=SpeculativeConfig(method="ngram"), **engine)
        try:
            answers = [solo.submit(p, params) for params in asked for p in (prompt, other)]
            solo.run()
        finally:
            solo.decode.close()
        return answers

    for one, two in zip(run(), run(tensor_parallel_size=2), strict=True):
        assert two.tokens == one.tokens
        for choice, logprobs in one.logprobs.items():
            assert two.logprobs[choice] == pytest.approx(logprobs, abs=1e-3)


def fail_one(solo: Solo, prompt: Sequence[int]) -> None:
    """A request whose step fails when all ranks have computed it: its masks are not made in time."""
    made: Future[RowMasks] = Future()
    made.set_exception(TimeoutError())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solo.decode.parts.masks, "begin", lambda plan: MasksUnderWay(made))
        answer = solo.submit(prompt, greedy(4))
        solo.run()
    assert answer.failure is not None


def drafted(folder: Path, *, fails: bool = False, **engine: object) -> tuple[list[list[int]], list[int]]:
    """Answers of an engine that drafts, and how many drafts it made and had right. `fails`: a request before them."""
    asked = prompts(21, [40, 9])
    solo = Solo(folder, speculative_config=SpeculativeConfig(**MTP), **engine)
    try:
        if fails:
            fail_one(solo, asked[0])
        answers = [solo.submit(p, greedy(24, repetition_penalty=1.05 + i / 100)) for i, p in enumerate(asked)]
        solo.run()
        solo.check_idle()
    finally:
        solo.decode.close()
    speculator = solo.decode.parts.speculator
    assert speculator is not None
    return [a.tokens[0] for a in answers], [speculator.num_draft_tokens, *speculator.accepted_per_pos]


@pytest.mark.parametrize("make", [make_mtp, make_qwen_mtp])
def test_drafts_of_the_model_s_own_layer(make: Callable[..., Path], tmp_path: Path) -> None:
    """Every rank runs the layer: the same tokens, and as many drafts that were right."""
    folder = make(tmp_path / "checkpoint")
    one, two = drafted(folder), drafted(folder, tensor_parallel_size=2)
    assert one == two
    assert two[1][0] > 0


@pytest.mark.parametrize("make", [make_mtp, make_qwen_mtp])
def test_ranks_drop_a_step_that_is_not_collected(make: Callable[..., Path], tmp_path: Path) -> None:
    """The draft layer goes on, on every rank, from the rows of the next one."""
    folder = make(tmp_path / "checkpoint")
    assert drafted(folder, fails=True, tensor_parallel_size=2) == drafted(folder, fails=True)


@pytest.mark.parametrize("overlap", ["on", "off"])
def test_ranks_at_rest_do_not_pass_for_hung_after_it(overlap: str, llama: Path) -> None:
    solo = Solo(llama, tensor_parallel_size=2, hang_timeout_s=1.0, async_scheduling=overlap)
    try:
        fail_one(solo, (5, 6, 7))
        time.sleep(2.0)
        (prompt,) = prompts(9, [20])
        answer = solo.submit(prompt, greedy(COUNT))
        solo.run()
    finally:
        solo.decode.close()
    assert answer.tokens[0] == reference_tokens(llama, prompt, COUNT)


def test_an_engine_whose_rank_failed_says_so(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank cannot do a step: the others cannot go on, and the engine ends with the reason."""
    solo = Solo(llama, tensor_parallel_size=2, hang_timeout_s=3.0)
    forward = RankLoop._do

    def fail(self: RankLoop, kind: int, payload: bytes) -> None:
        if kind == FORWARD:
            raise MemoryError("no room for a step")
        forward(self, kind, payload)

    monkeypatch.setattr(RankLoop, "_do", fail)
    solo.submit((5, 6, 7), greedy(4))
    with pytest.raises(RankLostError):
        solo.run()
    with pytest.raises(RankLostError, match="no room for a step"):
        solo.decode.check()
    solo.decode.close()


@pytest.mark.parametrize(
    ("engine", "cause"),
    [
        ({"tensor_parallel_size": 3}, "3 ranks"),
        ({"tensor_parallel_size": 2, "devices": (0,)}, "devices"),
    ],
)
def test_what_ranks_cannot_do_is_refused(llama: Path, engine: dict[str, object], cause: str) -> None:
    with pytest.raises(ConfigError, match=cause):
        Solo(llama, **engine)
