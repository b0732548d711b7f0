"""The full identity matrix: fifty prompts of 1 to 2,000 tokens, three ways, every combination of toggles.

Run by `make test-exact`; an hour or so on two cores. In fp32 all tokens must be those of transformers. Where one
is not, the answer is compared no further, and it counts as a near-tie only if the reference's own choice was less
than `REORDERING` ahead of its second: a sum in another order may decide that. Near-ties are listed, not hidden. In
bf16 the tokens pass the teacher-forced check. Tables go to benchmarks/results/identity-<date>.json and .md; runs of
the same day, commit and machine, even side by side, fill one table, so that parts can be run apart.
"""

from __future__ import annotations

import fcntl
import functools
import itertools
import json
import operator
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
from identity_prompts import make_prompts, spread
from identity_support import BLOCK_NBYTES, WAYS, Got, Prompt, Way, model, open_way, oracle
from teacher_forced import EQUAL, LIMIT, Greedy, Oracle

from benchmarks.report import RESULTS, environment, write_json
from common.text.tokenizer import Tokenizer

__all__ = ["model", "oracle"]

pytestmark = [pytest.mark.exact, pytest.mark.timeout(4 * 3600)]

NUM_PROMPTS, LONGEST, COUNT = 50, 2000, 24
NUM_WAVES = 5  # prompts of every length in each; sent at once
REORDERING = 1e-4  # logits
FITS, TIGHT = 512 * BLOCK_NBYTES, 130 * BLOCK_NBYTES  # a wave, or little more than the longest prompt
ENGINE: dict[str, Any] = {"max_model_len": 2048, "max_num_seqs": 16}
CONFIGS = tuple(itertools.product((False, True), repeat=2))


@dataclass
class Cell:
    """One way with one setting of the toggles."""

    way: str
    prefix: bool
    chunked: bool
    preempted: bool
    prompts: int = 0
    tokens: int = 0
    mismatches: int = 0
    near_ties: list[dict[str, Any]] = field(default_factory=list)
    cached_tokens: int = 0
    computed_tokens: int = 0
    transferred_tokens: int = 0
    preemptions: int = 0
    fallbacks: int = 0
    seconds: float = 0.0

    def add(self, number: int, expected: Greedy, got: Got) -> None:
        self.prompts += 1
        for name in ("cached_tokens", "computed_tokens", "transferred_tokens", "preemptions"):
            setattr(self, name, getattr(self, name) + got.stats[name])
        self.fallbacks += got.stats["fallback"] != ""
        pairs = zip(expected.tokens, got.tokens, strict=True)
        first = next((i for i, (one, other) in enumerate(pairs) if one != other), None)
        self.tokens += COUNT if first is None else first + 1
        if first is None:
            return
        gap = expected.gaps[first]
        place = {"prompt": number, "position": first, "gap": gap}
        if gap < REORDERING:
            self.near_ties.append(place)
        else:
            self.mismatches += 1
            print(f"mismatch {place}: {expected.tokens[first]} expected, {got.tokens[first]} got")


@dataclass
class Results:
    started: dict[str, object]
    cells: list[Cell] = field(default_factory=list)
    bf16: list[dict[str, Any]] = field(default_factory=list)

    def write(self) -> None:
        name = f"identity-{str(self.started['date'])[:10]}"
        RESULTS.mkdir(exist_ok=True)
        with _locked(RESULTS):
            environment, before = self._earlier(RESULTS / f"{name}.json")
            cells = _merged(before.get("float32", []), [asdict(cell) for cell in self.cells])
            bf16 = _merged(before.get("bfloat16", []), self.bf16)
            write_json(name, {"environment": environment, "float32": cells, "bfloat16": bf16})
            lines = ["# Identity of the demo model's greedy tokens", ""]
            lines += [f"{key}: {value}  " for key, value in environment.items()]
            lines += ["", "## float32, against transformers", "", *_table(cells)]
            lines += ["", f"## bfloat16, teacher-forced (equal within {EQUAL} logits, none beyond {LIMIT})", ""]
            lines += _table(bf16)
            (RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def _earlier(self, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a run of this commit on this machine has written, with its environment."""
        if path.is_file():
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            environment = found["environment"]
            if all(environment.get(key) == self.started[key] for key in ("commit", "cpu", "cores", "torch")):
                return environment, found
        return self.started, {}


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)


def _merged(before: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """In order of way and toggles; of two rows of the same, the later."""
    keys = ("way", "chunked", "preempted", "prefix")
    known = {tuple(row.get(key, False) for key in keys): row for row in [*before, *rows]}
    return [known[key] for key in sorted(known, key=lambda key: (WAYS.index(key[0]), *key[1:]))]


def _table(rows: Sequence[dict[str, Any]]) -> list[str]:
    if not rows:
        return ["not run"]
    shown = [{k: len(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows]
    head = f"| {' | '.join(name.replace('_', ' ') for name in shown[0])} |"
    words = {True: "on", False: "off"}
    body = [f"| {' | '.join(words[v] if isinstance(v, bool) else str(v) for v in row.values())} |" for row in shown]
    return [head, "|---" * len(shown[0]) + "|", *body]


@pytest.fixture(scope="module")
def prompts(model: Path) -> list[Prompt]:
    return make_prompts(Tokenizer.load(model), spread(NUM_PROMPTS, LONGEST), seed=2)


@pytest.fixture(scope="module")
def results(model: Path) -> Iterator[Results]:
    found = Results(environment("torch", "transformers", model=model.name, prompts=NUM_PROMPTS, tokens_each=COUNT))
    yield found
    found.write()


def waves(prompts: Sequence[Prompt]) -> list[list[tuple[int, Prompt]]]:
    """Each with its longest prompt first, then from the shortest on: in a tight pool these run beside it and grow."""
    found = [list(enumerate(prompts))[first::NUM_WAVES] for first in range(NUM_WAVES)]
    return [[wave[-1], *wave[:-1]] for wave in found]


def run_cell(way: Way, cell: Cell, prompts: Sequence[Prompt], oracle: Oracle) -> None:
    """A prefix hit is half of a prompt, brought into the cache right before."""
    salt = f"{cell.chunked} {cell.preempted}" if cell.prefix else ""
    for wave in waves(prompts):
        started = time.monotonic()
        if cell.prefix:
            way.answer([p[: len(p) // 2] for _, p in wave if len(p) >= 32], salt, max_tokens=1)
        answers = way.answer([p for _, p in wave], salt, max_tokens=COUNT)
        cell.seconds = round(cell.seconds + time.monotonic() - started, 1)
        for (number, prompt), got in zip(wave, answers, strict=True):
            s = got.stats
            assert s["cached_tokens"] + s["computed_tokens"] + s["transferred_tokens"] == len(prompt)
            cell.add(number, oracle.greedy(prompt, COUNT), got)


@pytest.mark.parametrize(("chunked", "preempted"), CONFIGS)
@pytest.mark.parametrize("name", WAYS)
def test_fp32_tokens_are_those_of_transformers(
    name: str,
    chunked: bool,
    preempted: bool,
    tmp_path: Path,
    model: Path,
    prompts: list[Prompt],
    oracle: Oracle,
    results: Results,
) -> None:
    config = {
        "dtype": "float32",
        "max_num_batched_tokens": 96 if chunked else 4096,
        "kv_cache_memory_bytes": TIGHT if preempted else FITS,
        **ENGINE,
    }
    cells = [Cell(name, prefix, chunked, preempted) for prefix in (False, True)]
    with open_way(name, tmp_path, model, min_remote_tokens=1, **config) as way:
        for cell in cells:
            results.cells.append(cell)
            run_cell(way, cell, prompts, oracle)
    for cell in cells:
        assert cell.mismatches == 0
        assert cell.fallbacks == 0
        assert (cell.preemptions > 0) == preempted
        assert (cell.cached_tokens > 0) == cell.prefix
        assert (cell.transferred_tokens > 0) == (name == "separated")
    assert cells[0].prompts == cells[1].prompts == NUM_PROMPTS


@pytest.mark.parametrize("name", WAYS)
def test_bf16_tokens_pass_the_teacher_forced_check(
    name: str, tmp_path: Path, model: Path, prompts: list[Prompt], oracle: Oracle, results: Results
) -> None:
    answers: dict[int, Got] = {}
    with open_way(name, tmp_path, model, dtype="auto", kv_cache_memory_bytes=FITS, **ENGINE) as way:
        for wave in waves(prompts):
            got = way.answer([p for _, p in wave], max_tokens=COUNT)
            answers |= zip((number for number, _ in wave), got, strict=True)
    judged = functools.reduce(operator.add, (oracle.score(p, answers[i].tokens) for i, p in enumerate(prompts)))
    results.bf16.append(
        {
            "way": name,
            "prompts": len(prompts),
            "tokens": len(judged.behind),
            "not_the_reference's_own": judged.others,
            "near_ties": judged.near_ties,
            "furthest_behind": round(max(judged.behind), 4),
            "transferred_tokens": sum(got.stats["transferred_tokens"] for got in answers.values()),
            "fallbacks": sum(got.stats["fallback"] != "" for got in answers.values()),
        }
    )
    assert judged.passed
    assert results.bf16[-1]["fallbacks"] == 0
    assert bool(results.bf16[-1]["transferred_tokens"]) == (name == "separated")
