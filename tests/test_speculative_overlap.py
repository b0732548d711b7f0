"""Engines that speculate plan ahead where no drafts are to come: the same tokens, drafts where they pay, and no block
handed out while what follows a step writes to it.
"""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from engine_support import Answer, Solo, greedy, llama, prompts, reference_tokens
from mtp_support import MTP, DraftWatch, make_mtp
from speculative_support import NGRAM, check_mixture, use
from test_mtp import TRAINED, check_drafts
from test_speculative import drafter_of, expected, requests

from common.engine.batch import Batch
from common.engine.build import BuiltEngine
from common.engine.drafting import DraftWork
from common.engine.pace import Pace
from common.engine.runner import Pending, StepResult
from common.types import SamplingParams

__all__ = ["llama"]

OVERLAP = {"async_scheduling": "on"}
TIGHT: dict[str, Any] = {"max_model_len": 128, "kv_cache_memory_bytes": 110_000, "max_num_seqs": 8}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mtp(tmp_path_factory.mktemp("mtp"), seed=4)


def launches(solo: Solo) -> list[str]:
    """What the engine asks of its runner, from now on."""
    order: list[str] = []
    runner = solo.decode.parts.runner
    forward, collect = runner.forward, runner.collect
    runner.forward = lambda batch: (order.append("launch"), forward(batch))[1]  # type: ignore[method-assign]
    runner.collect = lambda pending: (order.append("collect"), collect(pending))[1]  # type: ignore[method-assign]
    return order


def ahead(order: list[str]) -> int:
    """Steps that were launched before the one before was collected."""
    under_way = itertools.accumulate(1 if what == "launch" else -1 for what in order)
    return sum(count == 2 for count in under_way)


def check_all(solo: Solo, folder: Path) -> None:
    """All requests of `test_speculative`; those with penalties, which no step is planned ahead of, at the end."""
    pairs = list(zip(requests(folder), expected(folder), strict=True))
    for penalized in (False, True):
        some = [(one, wanted) for one, wanted in pairs if (one[1].presence_penalty != 0) == penalized]
        running = [(solo.submit(*one), wanted) for one, wanted in some]
        solo.run()
        check_mixture(running, ())
        assert all(answer.logprobs.keys() == wanted.logprobs.keys() for answer, wanted in running)


@pytest.mark.parametrize("method", ["ngram", "mtp"])
def test_steps_without_drafts_overlap_as_if_there_were_no_speculation(
    method: str, model: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, config = (llama, NGRAM) if method == "ngram" else (model, MTP)
    monkeypatch.setattr(Pace, "allow", lambda self, most, cost: 0)
    orders = []
    for options in ({}, {"speculative_config": config}):
        solo = Solo(folder, **OVERLAP, **options)
        orders.append(launches(solo))
        given = prompts(15, (20, 7, 33))
        asked = [solo.submit(p, greedy(n)) for p, n in zip(given, (40, 3, 20), strict=True)]
        solo.run()
        for prompt, answer, n in zip(given, asked, (40, 3, 20), strict=True):
            assert answer.tokens[0] == reference_tokens(folder, prompt, n)
        solo.check_idle()
    assert orders[0] == orders[1]
    assert ahead(orders[1]) > 30


def test_a_text_that_repeats_nothing_is_planned_ahead_and_one_that_does_is_drafted(llama: Path) -> None:
    solo = Solo(llama, speculative_config=NGRAM, **OVERLAP)
    speculator = solo.decode.parts.speculator
    assert speculator is not None
    order = launches(solo)
    (prompt,) = prompts(16, (20,))
    solo.run(solo.submit(prompt, SamplingParams(temperature=1.5, seed=1, max_tokens=30, ignore_eos=True)))
    assert ahead(order) > 10
    before = speculator.num_accepted_tokens
    bias = tuple((t, 100.0) for t in (7,))
    again = solo.submit(prompt, greedy(30, logit_bias=bias))
    solo.run(again)
    assert again.tokens[0] == [7] * 30
    assert speculator.num_accepted_tokens - before > 15
    solo.check_idle()


@pytest.mark.parametrize("tight", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.7])
def test_answers_of_overlapped_steps_are_those_without_speculation(llama: Path, share: float, tight: bool) -> None:
    solo = Solo(
        llama, speculative_config=NGRAM, **OVERLAP, **(TIGHT | {"kv_cache_memory_bytes": 115_000} if tight else {})
    )
    drafter = drafter_of(llama, share)
    drafter.cost = 0.05  # wrong ones are given up
    use(solo, drafter)
    solo.decode.parts.speculator._cost = 0.05  # type: ignore[union-attr]
    order = launches(solo)
    for _ in range(2):
        check_all(solo, llama)
    assert ahead(order) > 0 or share
    solo.check_idle()


@pytest.mark.parametrize("always", [False, True])
@pytest.mark.parametrize("mode", ["plain", "chunked", "tight"])
def test_answers_with_the_models_own_drafts(model: Path, mode: str, always: bool) -> None:
    options: dict[str, Any] = {"plain": {}, "chunked": {"max_num_batched_tokens": 7}, "tight": TIGHT}[mode]
    solo = Solo(model, speculative_config=MTP, **OVERLAP, **options)
    DraftWatch(solo.decode, always=always)
    order = launches(solo)
    for _ in range(2):
        check_all(solo, model)
    assert ahead(order) > 0 or always
    solo.check_idle()


def test_rows_that_waited_behind_steps_planned_ahead_are_the_references(model: Path) -> None:
    solo = Solo(model, speculative_config=MTP, **OVERLAP)
    watch, order = DraftWatch(solo.decode, always=False), launches(solo)
    given = prompts(98, (20, 33, 7))
    answers = [solo.submit(p, greedy(64)) for p in given]
    solo.run()
    for prompt, answer in zip(given, answers, strict=True):
        assert answer.tokens[0] == reference_tokens(model, prompt, 64)
    assert ahead(order) > 30
    check_drafts(model, watch, 10)
    watch.drafts.clear()
    follow = solo.submit(given[0] + tuple(answers[0].tokens[0]) + given[1][:5], greedy(4))
    solo.run()
    assert follow.stats.cached_tokens == 80
    check_drafts(model, watch, 1)
    solo.check_idle()


def test_a_trained_layer_drafts_on_with_overlap() -> None:
    plain, solo = Solo(TRAINED), Solo(TRAINED, speculative_config=MTP, **OVERLAP)
    asked = [SamplingParams(temperature=t, seed=3, max_tokens=200, ignore_eos=True) for t in (0.0, 1.0)]
    wanted, got = ([s.submit((1, *range(5, 12)), one) for one in asked] for s in (plain, solo))
    plain.run()
    solo.run()
    assert [a.tokens for a in got] == [a.tokens for a in wanted]
    assert got[0].stats.accepted_draft_tokens / got[0].stats.draft_tokens > 0.7
    assert solo.decode.engine.steps < 0.6 * plain.decode.engine.steps


class Device:
    """What steps that are not collected write, and what follows them; on a GPU it may all still be to come."""

    def __init__(self, built: BuiltEngine) -> None:
        self.late = 0  # rows and keeps that a step under way was before
        self._writes: dict[int, set[int]] = defaultdict(set)
        self._latest = 0
        runner, drafting = built.parts.runner, built.parts.drafting
        assert drafting is not None
        self._forward, self._collect, self._wait = runner.forward, runner.collect, runner.wait
        self._draft = drafting._model.run
        runner.forward, runner.collect, runner.wait = self.forward, self.collect, self.wait  # type: ignore[method-assign]
        drafting._model.run = self.draft  # type: ignore[method-assign]
        pool = built.parts.cache._pools["full"]
        self._allocate = pool.allocate
        pool.allocate = self.allocate  # type: ignore[method-assign]

    def forward(self, batch: Batch) -> Pending:
        pending = self._forward(batch)
        self._latest = id(pending)
        self._writes[id(pending)] |= set((batch.groups["full"].slots_T // 16).tolist())
        return pending

    def collect(self, pending: Pending) -> StepResult:
        self._writes.pop(id(pending), None)
        return self._collect(pending)

    def wait(self) -> None:
        self._writes.clear()
        self._wait()

    def draft(self, hidden: object, work: DraftWork) -> list[tuple[int, ...]]:
        blocks = {place.block_id for _, place in work.kept} | {b for row in work.rows for b in row.table}
        if any(row.num_drafts for row in work.rows):
            self._writes.clear()  # the host waits for what is drawn
        else:
            self.late += self._latest in self._writes
            self._writes[self._latest] |= blocks
        return self._draft(hidden, work)

    def allocate(self, count: int) -> list[int]:
        taken = self._allocate(count)
        assert not any(writes & set(taken) for writes in self._writes.values())
        return taken


@pytest.mark.parametrize("seed", range(6))
def test_no_block_is_handed_out_while_what_follows_a_step_writes_to_it(model: Path, seed: int) -> None:
    rng = random.Random(seed)
    options = TIGHT | {"kv_cache_memory_bytes": rng.choice((110_000, 200_000)), "enable_prefix_caching": False}
    solo = Solo(model, speculative_config=MTP, **OVERLAP, **options)
    device = Device(solo.decode)
    asked: list[tuple[Answer, tuple[int, ...], int, bool]] = []
    for prompt in prompts(seed, [rng.randrange(1, 60) for _ in range(24)]):
        count = rng.randrange(1, 50)
        answer = solo.submit(prompt, greedy(count))
        cancelled = rng.random() < 0.2
        asked.append((answer, prompt, count, cancelled))
        for _ in range(rng.randrange(8)):
            solo.step()
        if cancelled:
            solo.cancel(answer)
    solo.run(*(answer for answer, *_, cancelled in asked if not cancelled))
    solo.run()
    for answer, prompt, count, cancelled in asked:
        assert cancelled or answer.tokens[0] == reference_tokens(model, prompt, count)
    assert device.late > 5
    solo.check_idle()


def test_ranks_follow_steps_that_are_planned_ahead(model: Path) -> None:
    solo = Solo(model, speculative_config=MTP, tensor_parallel_size=2, **OVERLAP)
    order = launches(solo)
    given = prompts(97, (20, 33, 7))
    answers = [solo.submit(p, greedy(40)) for p in given]
    solo.run()
    for prompt, answer in zip(given, answers, strict=True):
        assert answer.tokens[0] == reference_tokens(model, prompt, 40)
    assert ahead(order) > 10
    solo.check_idle()
