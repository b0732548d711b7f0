"""The demo model gives the same greedy tokens whichever way a prompt takes, and those of transformers.

Six prompts go through offline generate, a cluster without and one with a prefill worker. What may happen to a sequence
is toggled: its beginning is found in the cache or not, its prompt is computed in one step or in several, it is
preempted and computed again or not. The rows are a pairwise table of way and toggles: any two of them meet in all
combinations. Each row shows by its statistics that this did happen. `test_identity_exact.py` does the same for fifty
prompts and all combinations of everything.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from identity_prompts import make_prompts
from identity_support import BLOCK_NBYTES, WAYS, Got, Prompt, Way, model, open_way, oracle, text_of
from teacher_forced import Oracle

from common.text.tokenizer import Tokenizer

__all__ = ["model", "oracle"]

SHORT, LONG = (42, 53, 60), (108, 120, 200)  # tokens: in one step, in several
COUNT = 12
WARM = 32  # tokens of a prompt that are in the cache before it comes, where a row wants a prefix hit
ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "max_num_batched_tokens": 64,
    "max_model_len": 224,
    "kv_cache_memory_bytes": 15 * BLOCK_NBYTES + (1 << 19),  # too little for three long or six short ones at once
    "max_num_seqs": 6,
    "num_threads": 1,
}
BF16: dict[str, Any] = {
    "dtype": "auto",
    "max_model_len": 256,
    "kv_cache_memory_bytes": 64 << 20,
    "max_num_seqs": 6,
    "num_threads": 1,
}
SAMPLED: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "top_k": 50, "repetition_penalty": 1.1, "seed": 1234}


@dataclass(frozen=True)
class Row:
    prefix: bool
    chunked: bool
    preempted: bool


ROWS = {
    "offline": (Row(prefix=False, chunked=False, preempted=True), Row(prefix=True, chunked=True, preempted=False)),
    "decode-only": (Row(prefix=False, chunked=True, preempted=False), Row(prefix=True, chunked=False, preempted=True)),
    "separated": (Row(prefix=True, chunked=False, preempted=False), Row(prefix=False, chunked=True, preempted=True)),
}


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Tokenizer:
    return Tokenizer.load(model)


@pytest.fixture(scope="module")
def prompts(tokenizer: Tokenizer) -> list[Prompt]:
    return make_prompts(tokenizer, [*SHORT, *LONG], seed=1)


@pytest.fixture(scope="module")
def sampled() -> dict[Prompt, list[int]]:
    """Sampled answers of the way that comes first, for the others to equal."""
    return {}


@pytest.fixture(scope="module", params=WAYS)
def way(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Way]:
    with open_way(request.param, tmp_path_factory.mktemp("way"), model, min_remote_tokens=8, **ENGINE) as opened:
        yield opened


def waves(row: Row, prompts: Sequence[Prompt]) -> list[list[Prompt]]:
    """What is sent at once: a preempted row needs more than the pool holds."""
    chosen = list(prompts[len(SHORT) :] if row.chunked else prompts[: len(SHORT)])
    if not row.preempted:
        return [[p] for p in chosen]
    return [chosen if row.chunked else chosen * 2]


def run_row(way: Way, row: Row, prompts: Sequence[Prompt]) -> list[tuple[Prompt, Got]]:
    salt = str(row) if row.prefix else ""
    answers: list[tuple[Prompt, Got]] = []
    for wave in waves(row, prompts):
        if row.prefix:
            way.answer([p[:WARM] for p in dict.fromkeys(wave)], salt, max_tokens=1)
        answers += zip(wave, way.answer(wave, salt, max_tokens=COUNT), strict=True)
    return answers


@pytest.mark.parametrize("turn", [0, 1])
def test_greedy_tokens_are_those_of_transformers(
    way: Way, turn: int, prompts: list[Prompt], oracle: Oracle, tokenizer: Tokenizer
) -> None:
    row = ROWS[way.name][turn]
    answers = run_row(way, row, prompts)
    for prompt, got in answers:
        expected = oracle.greedy(prompt, COUNT)
        assert got.tokens == expected.tokens, f"smallest gap {min(expected.gaps)}"
        assert got.text == text_of(tokenizer, prompt, expected.tokens)
        s = got.stats
        assert s["cached_tokens"] + s["computed_tokens"] + s["transferred_tokens"] == s["prompt_tokens"] == len(prompt)
        assert s["fallback"] == ""
    check_row(row, [got for _, got in answers[: len(SHORT)]], separated=way.name == "separated")
    assert (sum(got.stats["preemptions"] for _, got in answers) > 0) == row.preempted


def test_a_sampled_stream_with_a_seed_is_the_same_alone_batched_and_handed_over(
    way: Way, prompts: list[Prompt], sampled: dict[Prompt, list[int]], oracle: Oracle
) -> None:
    prompt, *others = prompts[: len(SHORT)]
    (alone,) = way.answer([prompt], max_tokens=COUNT, **SAMPLED)
    _, batched, _ = way.answer([others[0], prompt, others[1]], max_tokens=COUNT, **SAMPLED)
    assert alone.tokens == batched.tokens == sampled.setdefault(prompt, alone.tokens)
    assert alone.tokens != oracle.greedy(prompt, COUNT).tokens
    assert (
        bool(alone.stats["transferred_tokens"])
        == bool(batched.stats["transferred_tokens"])
        == (way.name == "separated")
    )


@pytest.mark.parametrize("name", WAYS)
def test_tokens_of_the_default_dtype_pass_the_teacher_forced_check(
    name: str, tmp_path: Path, model: Path, prompts: list[Prompt], oracle: Oracle
) -> None:
    with open_way(name, tmp_path, model, **BF16) as way:
        answers = way.answer(prompts, max_tokens=COUNT)
    assert [got.stats["fallback"] for got in answers] == [""] * len(answers)
    assert all(bool(got.stats["transferred_tokens"]) == (name == "separated") for got in answers)
    judged = functools.reduce(operator.add, (oracle.score(p, a.tokens) for p, a in zip(prompts, answers, strict=True)))
    print(
        f"{name}: {judged.others} of {len(judged.behind)} tokens are others, the worst {max(judged.behind):.3f} behind"
    )
    assert judged.passed


def test_the_teacher_forced_check_fails_a_wrong_token(prompts: list[Prompt], oracle: Oracle) -> None:
    tokens = oracle.greedy(prompts[0], COUNT).tokens
    assert oracle.score(prompts[0], tokens).others == 0
    wrong = [*tokens[:5], tokens[0], *tokens[6:]]
    assert not oracle.score(prompts[0], wrong).passed


def check_row(row: Row, answers: Sequence[Got], *, separated: bool) -> None:
    """Each prompt came the way that the row wants."""
    for got in answers:
        s = got.stats
        assert s["cached_tokens"] >= WARM if row.prefix else s["cached_tokens"] == 0
        new = s["transferred_tokens"] if separated else s["computed_tokens"]
        assert new == s["prompt_tokens"] - s["cached_tokens"]
        assert (new > ENGINE["max_num_batched_tokens"]) == row.chunked
        assert s["transport"].startswith("ucx/") == separated
        assert s["prefill_worker"] == ("prefill-0" if separated else "")
