"""Speculation: tokens guessed ahead and verified beside everything else in a step (decisions 3 and 13).

    propose -> (one forward, one draw in each place) -> observe how many were right

A draft never decides a token. It stands if and only if it equals the token that sampling yields in its place, so
answers are the same with any drafter and with none; what is here decides about time alone. A step computes the
last confirmed token and its drafts; the keys and values of drafts that were wrong are written over by the next
step before anything reads them, and are never final for the cache.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence as Tokens
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from common.config import SpeculativeConfig
from common.engine.messages import LabelledCounter
from common.engine.pace import Pace, price
from common.engine.sequence import Sequence
from common.telemetry import get_logger

log = get_logger(__name__)

DEFAULT_LOOKUP = (2, 5)
MTP_LAYERS = 1.5  # what a draft of a multi-token-prediction layer costs, head and all, in layers of the model


class Drafter(Protocol):
    name: str
    cost: float
    """Of making one draft, in steps of one sequence."""

    def propose(self, seq: Sequence, count: int) -> Tokens[int]:
        """At most `count` tokens that may follow those of `seq`; none where it knows nothing."""


class NgramDrafter:
    """Prompt lookup (Saxena 2023): what followed the latest earlier place where the text read like its end now.

    The longest end of `least` to `most` tokens that occurs earlier counts. A repetition goes on: where the tokens
    that followed run into the end of the text, the drafts are taken for what comes after it.
    """

    name = "ngram"
    cost = 0.02

    def __init__(self, least: int, most: int) -> None:
        self._least = least
        self._most = most
        self._texts: weakref.WeakKeyDictionary[Sequence, _Text] = weakref.WeakKeyDictionary()

    def propose(self, seq: Sequence, count: int) -> list[int]:
        text = self._texts.get(seq)
        if text is None:
            text = self._texts[seq] = _Text()
        ids_T = text.follow(seq.token_ids)
        start = continuation(ids_T, self._least, self._most)
        if start < 0:
            return []
        drafts: list[int] = ids_T[start : start + count].tolist()
        for i in range(len(drafts), count):
            drafts.append(drafts[start + i - len(ids_T)])
        return drafts


class _Text:
    """A sequence's tokens as an array that grows with it: a search takes microseconds."""

    __slots__ = ("_count", "_ids")

    def __init__(self) -> None:
        self._ids: NDArray[np.int64] = np.empty(0, np.int64)
        self._count = 0

    def follow(self, token_ids: list[int]) -> NDArray[np.int64]:
        n, known = len(token_ids), self._count
        if n > len(self._ids):
            self._ids = np.concatenate([self._ids[:known], np.empty(n + n // 2 + 64 - known, np.int64)])
        self._ids[known:n] = token_ids[known:]
        self._count = n
        return self._ids[:n]


def continuation(ids_T: NDArray[np.int64], least: int, most: int) -> int:
    """Index behind the latest earlier occurrence of the longest end of `least` to `most` tokens; -1: there is none."""
    n = len(ids_T)
    ends = np.flatnonzero(ids_T[: n - 1] == ids_T[n - 1]) + 1
    found = -1
    for length in range(1, min(most, n - 1) + 1):
        if length > 1:
            ends = ends[ends >= length]
            ends = ends[ids_T[ends - length] == ids_T[n - length]]
        if not ends.size:
            break
        if length >= least:
            found = int(ends[-1])
    return found


class Speculator(ABC):
    """Gives each step's sequences their drafts and counts what comes of them; one per engine.

    `cost`: of making one draft, in steps of one sequence.
    """

    def __init__(self, cost: float, max_drafts: int, *, vocab_size: int, max_model_len: int) -> None:
        self.max_drafts = max_drafts
        self._cost = cost
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self.num_drafts = 0
        self.num_draft_tokens = 0
        self.accepted_per_pos = [0] * max_drafts

    @abstractmethod
    def propose(self, seq: Sequence, room: int, num_sequences: int) -> tuple[int, ...]:
        """Drafts for a sequence of which only the last token is to be computed; `room` tokens at most.

        None past the last token that it may have. `num_sequences` run at once.
        """

    def count(self, seq: Sequence, room: int, num_sequences: int) -> int:
        """How many drafts `seq` is to have in its next step, or in the one behind the step that is under way."""
        longest = min(seq.num_prompt + seq.sampling.max_tokens, self._max_model_len)
        most = min(room, self.max_drafts, longest - seq.num_expected - 1)
        if most <= 0:
            return 0
        if seq.pace is None:
            seq.pace = Pace()
        return seq.pace.allow_at(seq.num_expected, most, price(self._cost, num_sequences))

    def expects(self, seqs: Tokens[Sequence], num_sequences: int) -> bool:
        """Is one of `seqs`, each of which gets a token by the step under way, to have drafts behind it?"""
        return any(self.count(seq, self.max_drafts, num_sequences) for seq in seqs)

    def observe(self, seq: Sequence, num_drafts: int, num_accepted: int) -> None:
        """A step has verified drafts of `seq`; the first `num_accepted` stand."""
        assert seq.pace is not None
        seq.pace.observe(num_drafts, num_accepted)
        self.num_drafts += 1
        self.num_draft_tokens += num_drafts
        for i in range(num_accepted):
            self.accepted_per_pos[i] += 1

    @property
    def num_accepted_tokens(self) -> int:
        return sum(self.accepted_per_pos)


class LookedUp(Speculator):
    """Drafts that cost no computation: made when a step is planned."""

    def __init__(self, drafter: Drafter, max_drafts: int, *, vocab_size: int, max_model_len: int) -> None:
        super().__init__(drafter.cost, max_drafts, vocab_size=vocab_size, max_model_len=max_model_len)
        self._drafter = drafter

    def expects(self, seqs: Tokens[Sequence], num_sequences: int) -> bool:
        """Not where the known tokens end in nothing that was there before: a repetition's first may have no drafts."""
        allowed = [seq for seq in seqs if self.count(seq, self.max_drafts, num_sequences)]
        return any(self._drafter.propose(seq, 1) for seq in allowed)

    def propose(self, seq: Sequence, room: int, num_sequences: int) -> tuple[int, ...]:
        count = self.count(seq, room, num_sequences)
        if not count:
            return ()
        drafts = self._drafter.propose(seq, count)
        known = next((i for i, t in enumerate(drafts) if not 0 <= t < self._vocab_size), len(drafts))
        return tuple(drafts[: min(known, count)])  # a prompt may hold places for media, which no token can be


class MadeAhead(Speculator):
    """Drafts that the model made behind the last step (`common.engine.drafting`)."""

    def propose(self, seq: Sequence, room: int, num_sequences: int) -> tuple[int, ...]:
        drafts, seq.drafts = seq.drafts[:room], ()
        return drafts


def lookup_lengths(config: SpeculativeConfig) -> tuple[int, int]:
    """Shortest and longest end of the text to look for. One that is not given is as the other, as in vLLM."""
    least, most = config.prompt_lookup_min, config.prompt_lookup_max
    return (least or most, most or least) if least or most else DEFAULT_LOOKUP


def make_speculator(
    config: SpeculativeConfig, *, num_layers: int, vocab_size: int, max_model_len: int
) -> Speculator | None:
    """The speculator that a config asks for; None for none."""
    if config.method == "none":
        return None
    most = config.num_speculative_tokens
    log.info("speculation is on", method=config.method, max_drafts=most)
    if config.method == "mtp":
        return MadeAhead(MTP_LAYERS / num_layers, most, vocab_size=vocab_size, max_model_len=max_model_len)
    drafter = NgramDrafter(*lookup_lengths(config))
    return LookedUp(drafter, most, vocab_size=vocab_size, max_model_len=max_model_len)


def draft_counters(speculator: Speculator | None) -> dict[str, int]:
    """Counters as in vLLM; zero without speculation."""
    return {
        "spec_decode_num_drafts_total": speculator.num_drafts if speculator else 0,
        "spec_decode_num_draft_tokens_total": speculator.num_draft_tokens if speculator else 0,
        "spec_decode_num_accepted_tokens_total": speculator.num_accepted_tokens if speculator else 0,
    }


def accepted_by_pos(speculator: Speculator | None) -> tuple[LabelledCounter, ...]:
    """The count of right ones, as in vLLM, by place in a step's drafts, the first being 0; none without speculation."""
    if speculator is None:
        return ()
    values = tuple((str(i), float(count)) for i, count in enumerate(speculator.accepted_per_pos))
    return (LabelledCounter("spec_decode_num_accepted_tokens_per_pos_total", "position", values),)
