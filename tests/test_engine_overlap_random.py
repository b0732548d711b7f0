"""Overlapped steps under random cancels, failures and hand-offs: what is answered is right, and no block is handed out
while a step under way writes to it.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from engine_support import Answer, Pair, Solo, greedy, hybrid, llama, prompts, windowed
from structured_support import schema_grammar

from common.engine.batch import Batch, RowMasks
from common.engine.build import BuiltEngine
from common.engine.runner import Pending, StepResult
from common.types import Grammar, GrammarKind, SamplingParams

__all__ = ["hybrid", "llama", "windowed"]

OVERLAP = {"async_scheduling": "on"}
TIGHT = {"max_num_batched_tokens": 24, "max_model_len": 128, "kv_cache_memory_bytes": 192 << 10, "max_num_seqs": 6}
COUNT = 24
KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.9},
    {"temperature": 0.8, "frequency_penalty": 0.7},
    {"stop_token_ids": tuple(range(4, 40))},
    {"n": 3, "temperature": 1.0},
    {"prompt_logprobs": 1},
    {"n": 2, "prompt_logprobs": 1, "temperature": 0.5},
    {"temperature": 1.0, "min_tokens": 3, "stop_token_ids": tuple(range(4, 100))},
    {"temperature": 1.0, "grammar": schema_grammar({"type": "array", "items": {"type": "integer"}, "minItems": 4})},
    {"n": 2, "temperature": 0.7, "grammar": Grammar(kind=GrammarKind.REGEX, source="[a-f ]+(x|yy|zzz)[.!?]")},
]


class Watched:
    """A runner whose steps end late, and fail at times; knows which blocks the steps under way write."""

    def __init__(self, built: BuiltEngine, rng: random.Random, failures: float) -> None:
        self._rng, self._failures = rng, failures
        self._writes: dict[int, dict[str, set[int]]] = {}
        runner = built.parts.runner
        self._forward, self._sample, self._collect = runner.forward, runner.sample, runner.collect
        runner.forward, runner.sample = self.forward, self.sample  # type: ignore[method-assign]
        runner.collect = self.collect  # type: ignore[method-assign]
        if built.parts.beside is not None:
            self._draw_beside = built.parts.beside.draw_beside
            built.parts.beside.draw_beside = self.draw_beside  # type: ignore[method-assign]
        runner.is_done = lambda pending: rng.random() < 0.5  # type: ignore[method-assign]
        for name, pool in built.parts.cache._pools.items():
            pool.allocate = self._guarded(name, pool.allocate)  # type: ignore[method-assign]

    def forward(self, batch: Batch) -> Pending:
        self._fail("launch")
        pending = self._forward(batch)
        writes = {g: set(a.slots_T // a.block_size) for g, a in batch.groups.items()}
        self._writes[id(pending)] = writes | {g: set(ids.tolist()) for g, ids in batch.states_S.items()}
        return pending

    def sample(self, pending: Pending, masks: RowMasks | None = None) -> None:
        try:
            self._fail("sample")
        except MemoryError:
            del self._writes[id(pending)]
            raise
        self._sample(pending, masks)

    def draw_beside(self, batch: Batch, masks: RowMasks | None = None) -> Pending:
        self._fail("draw")
        pending = self._draw_beside(batch, masks)
        self._writes[id(pending)] = {}
        return pending

    def collect(self, pending: Pending) -> StepResult:
        del self._writes[id(pending)]
        self._fail("collect")
        return self._collect(pending)

    def _fail(self, what: str) -> None:
        if self._rng.random() < self._failures:
            raise MemoryError(what)

    def _guarded(self, group: str, allocate: Any) -> Any:
        def guarded(count: int) -> list[int]:
            taken: list[int] = allocate(count)
            assert not any(writes.get(group, set()) & set(taken) for writes in self._writes.values())
            return taken

        return guarded


def asked(seed: int) -> list[tuple[tuple[int, ...], SamplingParams]]:
    """Some prompts begin alike."""
    rng = random.Random(seed)
    texts = prompts(seed, [rng.randrange(1, 40) for _ in range(COUNT)])
    texts = [texts[0] + text if i % 3 == 1 else text for i, text in enumerate(texts)]
    return [(text, greedy(rng.randrange(3, 24), seed=i, **rng.choice(KINDS))) for i, text in enumerate(texts)]


def run(engine: Solo, seed: int) -> tuple[list[Answer], list[Answer]]:
    """All answers, and those that were cancelled in whole or in part. Things happen between steps and inside of one."""
    rng, left = random.Random(seed), asked(seed)
    answers: list[Answer] = []
    cancelled: list[Answer] = []

    def happen() -> None:
        if left and rng.random() < 0.3:
            answers.append(engine.submit(*left.pop(0)))
        going = [a for a in answers if not a.ended]
        if going and rng.random() < 0.05:
            cancelled.append(rng.choice(going))
            engine.cancel(cancelled[-1], rng.choice((None, 0, cancelled[-1].num_choices - 1)))

    engine.decode.engine.while_waiting = happen
    while left or not all(a.ended for a in answers):
        happen()
        engine.step()
    engine.decode.engine.while_waiting = None
    engine.check_idle()
    assert not engine.decode.engine.has_work
    return answers, cancelled


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("failures", [0.0, 0.02])
@pytest.mark.parametrize("make", [Solo, Pair])
@pytest.mark.parametrize("model", ["llama", "windowed", "hybrid"])
def test_what_is_answered_is_right_whatever_happens(
    model: str,
    make: type[Solo],
    failures: float,
    seed: int,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("common.engine.engine.MAX_FAILED_STEPS", 1000)
    folder: Path = request.getfixturevalue(model)
    plain = Solo(folder)
    expected = [plain.submit(*one) for one in asked(seed)]
    plain.run()
    prefill = {"prefill": OVERLAP | {"max_num_batched_tokens": 16}} if make is Pair else {}
    engine = make(folder, **prefill, **OVERLAP, **TIGHT)
    builts = [engine.decode, engine.prefill] if isinstance(engine, Pair) else [engine.decode]
    watched = [Watched(built, random.Random(seed), failures) for built in builts]
    answers, cancelled = run(engine, seed)
    assert not any(w._writes for w in watched)
    for right, answer in zip(expected, answers, strict=True):
        for choice, tokens in answer.tokens.items():
            assert tokens == right.tokens[choice][: len(tokens)]
        if answer.failure is None and answer not in cancelled:
            assert (answer.tokens, answer.finish) == (right.tokens, right.finish)
            assert (answer.prompt_logprobs is None) == (right.prompt_logprobs is None)
    assert failures or not any(a.failure for a in answers)
