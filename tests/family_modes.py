"""What an engine may do to a sequence on its way, as modes that each prove they happened, and what came out.

    whole        alone, its prompt in one step
    chunks of 7  alone, at most seven tokens a step
    prefix hit   the first half of its prompt is found in the cache
    preempted    beside others in a pool too small for all: blocks are taken away and the sequence computed again
    handed over  its prompt is computed by one engine and read by another
    strangers    beside greedy and sampled requests that come and go, with steps of mixed prompts and decodes

A mode runs on real engines in this process. `Watch` sees the logits of every position that they compute, in both
engines of a hand-off and again after a preemption, so each is compared with the reference where it was computed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from engine_support import Answer, Pair, Solo, greedy
from engine_support import prompts as random_prompts
from family_oracle import NEAR_TIE, Expected
from torch import Tensor

from common.config import EngineConfig
from common.engine.build import BuiltEngine
from common.engine.scheduler import StepPlan
from common.engine.sizing import size_engine
from common.errors import ConfigError
from common.models.spec import ModelSpec
from common.types import Role, SamplingParams

BLOCK = 16


@dataclass(frozen=True)
class Piece:
    """Tokens of one sequence computed in one step. `logits_TV[i]` follows position `start + i`."""

    start: int
    logits_TV: Tensor
    rows: int  # sequences in that step


class Watch:
    """Every position an engine computes, by request id. `samples`: (position, logits) of each draw."""

    def __init__(self, built: BuiltEngine) -> None:
        self.pieces: dict[str, list[Piece]] = defaultdict(list)
        self.samples: dict[str, list[tuple[int, Tensor]]] = defaultdict(list)
        self._runner = built.parts.runner
        self._forward, self._run_model, self._launch = (
            self._runner.forward,
            self._runner._run_model,
            built.engine._launch,
        )
        self._plan = StepPlan(())
        built.engine._launch = self._on_launch  # type: ignore[method-assign]
        self._runner.forward = self._on_forward  # type: ignore[method-assign]
        self._runner._run_model = self._on_model  # type: ignore[method-assign]

    def _on_launch(self, plan: StepPlan) -> Any:
        self._plan = plan
        return self._launch(plan)

    def _on_model(self, batch: Any) -> Tensor:
        hidden_TD = self._run_model(batch)
        items = [item for item in self._plan.items if item.num_new]
        logits = self._runner._model.logits(hidden_TD).split([item.num_new for item in items])
        for item, rows in zip(items, logits, strict=True):
            piece = Piece(item.start, rows.clone(), len(self._plan.items))
            self.pieces[item.seq.label].append(piece)
        return hidden_TD

    def _on_forward(self, batch: Any) -> Any:
        pending = self._forward(batch)
        drawn = [item for item, row in zip(self._plan.items, batch.rows, strict=True) if row.samples]
        for index, item in enumerate(drawn):
            assert pending.logits_RV is not None
            self.samples[item.seq.label].append((item.start + item.num_new - 1, pending.logits_RV[index].clone()))
        return pending


@dataclass
class Run:
    """Answers to the prompts of a mode in order, and those who watched."""

    answers: list[Answer]
    watches: tuple[Watch, ...]
    happened: dict[str, int] = field(default_factory=dict)

    def pieces(self, index: int) -> list[Piece]:
        label = f"r{self.answers[index].slot}"  # type: ignore[attr-defined]
        return [piece for watch in self.watches for piece in watch.pieces.get(label, ())]

    def rows(self, index: int) -> list[tuple[int, Tensor]]:
        """(position, logits) of everything computed for a prompt and its answer."""
        label = f"r{self.answers[index].slot}"  # type: ignore[attr-defined]
        rows = [(piece.start + i, row) for piece in self.pieces(index) for i, row in enumerate(piece.logits_TV)]
        return rows + [row for watch in self.watches for row in watch.samples.get(label, ())]


@dataclass
class Cell:
    """A mode over some prompts. `error`: the largest difference of a logit, over `positions` comparisons of a row."""

    prompts: int = 0
    tokens: int = 0
    positions: int = 0
    error: float = 0.0
    mismatches: list[dict[str, Any]] = field(default_factory=list)
    near_ties: list[dict[str, Any]] = field(default_factory=list)
    happened: dict[str, int] = field(default_factory=dict)

    def add(self, index: int, expected: Expected, run: Run) -> None:
        """Compare an answer; past a token that differs there is nothing more to compare."""
        got = run.answers[index]
        assert got.failure is None
        equal = self.compare_tokens(expected, got.tokens[0])
        seen: set[int] = set()
        for position, logits in run.rows(index):
            if position < len(expected.prompt) + equal:
                seen.add(position)
                self.positions += 1
                self.error = max(self.error, (logits - expected.logits_PV[position]).abs().max().item())
        first = got.stats.cached_tokens
        wanted = range(first, len(expected.prompt) + min(equal, len(expected.tokens) - 1))
        assert seen.issuperset(wanted), f"positions without logits: {sorted(set(wanted) - seen)}"

    def compare_tokens(self, expected: Expected, tokens: Sequence[int]) -> int:
        """How many are equal, from the first on."""
        self.prompts += 1
        pairs = zip(expected.tokens, tokens, strict=True)
        equal = next((i for i, (one, other) in enumerate(pairs) if one != other), len(tokens))
        self.tokens += min(equal + 1, len(tokens))
        if equal < len(tokens):
            gap = expected.gaps[equal]
            place = {"prompt_tokens": len(expected.prompt), "output_index": equal, "gap": gap}
            (self.near_ties if gap < NEAR_TIE else self.mismatches).append(place)
        return equal


def run_whole(folder: Path, prompts: Sequence[tuple[int, ...]], count: int, engine: dict[str, Any]) -> Run:
    solo = Solo(folder, **{"enable_prefix_caching": False} | engine)
    run = Run([], (Watch(solo.decode),))
    _one_by_one(solo, run, prompts, count)
    for index, prompt in enumerate(prompts):
        assert [len(p.logits_TV) for p in run.pieces(index)] == [len(prompt)] + [1] * (count - 1)
    return run


def run_chunks(folder: Path, prompts: Sequence[tuple[int, ...]], count: int, engine: dict[str, Any]) -> Run:
    solo = Solo(folder, **{"enable_prefix_caching": False} | engine | {"max_num_batched_tokens": 7})
    run = Run([], (Watch(solo.decode),))
    _one_by_one(solo, run, prompts, count)
    for index, prompt in enumerate(prompts):
        whole, rest = divmod(len(prompt), 7)
        chunks = [7] * whole + [rest] * (rest > 0)
        assert [len(p.logits_TV) for p in run.pieces(index)] == chunks + [1] * (count - 1)
    run.happened["chunks"] = sum(-(-len(p) // 7) for p in prompts)
    return run


def run_prefix(folder: Path, prompts: Sequence[tuple[int, ...]], count: int, engine: dict[str, Any]) -> Run:
    solo = Solo(folder, **engine)
    run = Run([], (Watch(solo.decode),))
    for prompt in prompts:
        solo.run(solo.submit(prompt[: -(-len(prompt) // 2)], greedy(1)))
    _one_by_one(solo, run, prompts, count)
    for index, prompt in enumerate(prompts):
        cached = run.answers[index].stats.cached_tokens
        assert cached == run.pieces(index)[0].start
        assert cached < len(prompt)
        run.happened["cached_tokens"] = run.happened.get("cached_tokens", 0) + cached
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i]))
    assert 0 < run.answers[longest].stats.cached_tokens < len(prompts[longest]) - 1
    return run


def run_preempted(folder: Path, prompts: Sequence[tuple[int, ...]], count: int, engine: dict[str, Any]) -> Run:
    longest = -(-(max(map(len, prompts)) + count) // BLOCK) * BLOCK
    tight = {"enable_prefix_caching": False, "max_num_batched_tokens": 64} | engine
    tight |= {"max_model_len": longest, "max_num_seqs": 8}
    solo = Solo(folder, **tight, kv_cache_memory_bytes=int(1.15 * least_bytes(folder, **tight)))
    run = Run([], (Watch(solo.decode),))
    first, *others = sorted(prompts, key=len, reverse=True)
    # the longest takes nearly all; short ones beside it grow until there is no room
    answers = {p: solo.submit(p, greedy(count)) for p in (first, *reversed(others))}
    run.answers = [answers[p] for p in prompts]
    solo.run()
    solo.check_idle()
    run.happened["preemptions"] = sum(a.stats.preemptions for a in run.answers)
    assert run.happened["preemptions"] > 0
    for i in range(len(prompts)):
        computed = [p.start + k for p in run.pieces(i) for k in range(len(p.logits_TV))]
        again = len(computed) - len(set(computed))
        assert (again > 0) == (run.answers[i].stats.preemptions > 0)
        run.happened["computed_again"] = run.happened.get("computed_again", 0) + again
    return run


def run_handed_over(folder: Path, prompts: Sequence[tuple[int, ...]], count: int, engine: dict[str, Any]) -> Run:
    pair = Pair(folder, prefill={**engine, "max_num_batched_tokens": 64}, **engine)
    run = Run([], (Watch(pair.prefill), Watch(pair.decode)))
    _one_by_one(pair, run, prompts, count)
    prefill, decode = run.watches
    for answer, prompt in zip(run.answers, prompts, strict=True):
        label = f"r{answer.slot}"  # type: ignore[attr-defined]
        assert answer.stats.fallback == ""
        assert answer.stats.transferred_tokens == len(prompt)
        assert sum(len(p.logits_TV) for p in prefill.pieces[label]) == len(prompt)
        assert min(p.start for p in decode.pieces[label]) == len(prompt)
    run.happened["transferred_tokens"] = sum(a.stats.transferred_tokens for a in run.answers)
    return run


def run_strangers(folder: Path, prompts: Sequence[tuple[int, ...]], count: int, engine: dict[str, Any]) -> Run:
    solo = Solo(folder, **engine | {"max_num_batched_tokens": 48})
    run = Run([], (Watch(solo.decode),))
    strangers = random_prompts(99, (5, 40, 90, 23, 61))
    sampled = [
        SamplingParams(temperature=0.5 + i / 4, top_p=0.9, max_tokens=10 + 13 * i, ignore_eos=True, seed=i, n=1 + i % 2)
        for i in range(len(strangers))
    ]
    for stranger, params in zip(strangers[:2], sampled[:2], strict=True):
        solo.submit(stranger, params)
    for i, prompt in enumerate(prompts):
        for _ in range(3):
            solo.step()
        run.answers.append(solo.submit(prompt, greedy(count)))
        if 2 + i < len(strangers):
            solo.submit(strangers[2 + i], sampled[2 + i])
    solo.run()
    solo.check_idle()
    assert all(a.failure is None for a in solo.answers.by_slot.values())
    for i in range(len(prompts)):
        assert max(p.rows for p in run.pieces(i)) > 2, "it was alone"
    run.happened["largest_batch"] = max(p.rows for i in range(len(prompts)) for p in run.pieces(i))
    return run


Mode = Callable[[Path, Sequence[tuple[int, ...]], int, dict[str, Any]], Run]
MODES: dict[str, Mode] = {
    "whole": run_whole,
    "chunks of 7": run_chunks,
    "prefix hit": run_prefix,
    "preempted": run_preempted,
    "handed over": run_handed_over,
    "strangers": run_strangers,
}


def run_cell(mode: str, folder: Path, expected: Sequence[Expected], engine: dict[str, Any]) -> Cell:
    """Put the prompts of `expected` through a mode and compare all that comes out."""
    count = len(expected[0].tokens)
    run = MODES[mode](folder, [e.prompt for e in expected], count, engine)
    cell = Cell(happened=run.happened)
    for index, one in enumerate(expected):
        cell.add(index, one, run)
    return cell


@cache
def least_bytes(folder: Path, **engine: Any) -> int:
    """The smallest KV pool that an engine of these settings starts with."""
    spec = ModelSpec.from_folder(folder)
    low, high = 0, 1 << 30

    def enough(nbytes: int) -> bool:
        config = EngineConfig(model=str(folder), dtype="float32", kv_cache_memory_bytes=nbytes, **engine)
        try:
            size_engine(config, spec, Role.DECODE)
        except ConfigError:
            return False
        return True

    assert enough(high)
    while high - low > 64:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _one_by_one(solo: Solo, run: Run, prompts: Sequence[tuple[int, ...]], count: int) -> None:
    for prompt in prompts:
        run.answers.append(solo.submit(prompt, greedy(count)))
        solo.run(run.answers[-1])
    solo.check_idle()
