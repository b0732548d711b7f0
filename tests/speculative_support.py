"""Drafters for tests: they know what will come, or the opposite, and draft whether it pays or not."""

from __future__ import annotations

import random
from collections.abc import Collection
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field
from typing import Any

from engine_support import Answer, Solo

from common.engine.sequence import Sequence
from common.types import FinishReason, SamplingParams

NGRAM = {"method": "ngram", "num_speculative_tokens": 4}
Key = tuple[tuple[int, ...], SamplingParams, int]


@dataclass(frozen=True)
class Outcome:
    """All that a client sees of one request."""

    tokens: dict[int, list[int]]
    finish: dict[int, FinishReason]
    logprobs: dict[int, list[float]]

    @classmethod
    def of(cls, answer: Answer) -> Outcome:
        assert answer.failure is None, answer.failure
        return cls(answer.tokens, answer.finish, answer.logprobs)


def check_mixture(running: Tokens[tuple[Answer, Outcome]], cancelled: Collection[int]) -> None:
    """All have ended, with the tokens that were wanted; those of `cancelled` with a beginning of them."""
    for index, (answer, wanted) in enumerate(running):
        assert answer.failure is None
        for choice, tokens in wanted.tokens.items():
            got = answer.tokens.get(choice, [])
            assert got == (tokens[: len(got)] if index in cancelled else tokens)
            if index not in cancelled:
                assert answer.finish[choice] == wanted.finish[choice]


@dataclass
class TestDrafter:
    """Right with probability `share`, drawn for each token; what it has not seen it cannot know."""

    __test__ = False
    share: float = 1.0
    cost: float = -1.0  # below any share: drafts whatever comes of it
    name: str = "test"
    rng: random.Random = field(default_factory=lambda: random.Random(7))
    known: dict[Key, list[int]] = field(default_factory=dict)
    asked: int = 0

    def learn(self, prompt: Tokens[int], params: SamplingParams, outcome: Outcome) -> None:
        for choice, tokens in outcome.tokens.items():
            self.known[tuple(prompt), params, choice] = tokens

    def propose(self, seq: Sequence, count: int) -> list[int]:
        self.asked += 1
        key = (tuple(seq.token_ids[: seq.num_prompt]), seq.sampling, seq.choice)
        coming = self.known.get(key, [])[seq.num_output : seq.num_output + count]
        return [t if self.rng.random() < self.share else (t + 1) % 512 for t in coming]


def use(solo: Solo, drafter: Any) -> None:
    """Replace the drafter of an engine that speculates."""
    speculator = solo.decode.parts.speculator
    assert speculator is not None
    speculator._drafter = drafter
