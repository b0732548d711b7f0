"""Masks of a step: which tokens grammars allow in each of its draws, made by a thread while the device computes.

    begin(plan) -> (forward) -> get -> sampler

A mask is a row of bits, token t at bit t % 32 of word t // 32. Only draws of sequences with a grammar have one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from llguidance import LLExecutor
from numpy.typing import NDArray

from common.engine.batch import RowMasks
from common.engine.constraint import Constraint, Vocabulary
from common.engine.scheduler import StepPlan
from common.engine.sequence import Phase

_TIMEOUT_S = 60.0  # grammars' limits end each mask long before
_MAX_THREADS = 8


class Place(NamedTuple):
    """Draw `row` of a step follows the tokens of a sequence, and one row further each follows another of `drafts`."""

    constraint: Constraint
    row: int
    drafts: Sequence[int]


class MasksUnderWay(NamedTuple):
    made: Future[RowMasks] | None

    def get(self) -> RowMasks | None:
        """None: the step has no grammar."""
        return None if self.made is None else self.made.result(_TIMEOUT_S)


class StepMasks:
    """Owns the threads, which are there from the first mask on."""

    def __init__(self, vocabulary: Vocabulary | None) -> None:
        self._vocabulary = vocabulary
        self._thread: ThreadPoolExecutor | None = None
        self._executor: LLExecutor | None = None

    def begin(self, plan: StepPlan) -> MasksUnderWay | None:
        """For a step that is not launched yet; None if one of its grammars waits for a token under way."""
        if any(item.seq.constraint is not None and item.draws and item.seq.num_pending for item in plan.items):
            return None
        return self.begin_late(plan)

    def begin_late(self, plan: StepPlan) -> MasksUnderWay:
        """All tokens before the step are known. The constraints may not change until the masks are made."""
        places, row = [], 0
        for item in plan.items:
            if not item.draws:
                continue
            seq = item.seq
            if seq.constraint is not None and seq.phase is Phase.RUNNING and not seq.constraint.ended:
                assert seq.constraint.num_followed == seq.num_output
                places.append(Place(seq.constraint, row, item.drafts))
            row += 1 + len(item.drafts)
        return MasksUnderWay(self._start(places) if places else None)

    def _start(self, places: Sequence[Place]) -> Future[RowMasks]:
        assert self._vocabulary is not None
        if self._thread is None:
            cores = len(os.sched_getaffinity(0))
            self._thread = ThreadPoolExecutor(1, "masks")
            self._executor = LLExecutor(num_threads=max(1, min(_MAX_THREADS, cores // 2)))
        return self._thread.submit(self._make, places, self._vocabulary.num_words)

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)

    def _make(self, places: Sequence[Place], num_words: int) -> RowMasks:
        rows = [row for place in places for row in range(place.row, place.row + 1 + len(place.drafts))]
        words_GW = np.full((len(rows), num_words), -1, np.int32)
        first, firsts = 0, list[int]()
        plain: list[tuple[Place, int]] = []
        drafted: list[tuple[Place, int]] = []
        for place in places:
            firsts.append(first)
            if not place.constraint.error:
                (drafted if place.drafts else plain).append((place, first))
            first += 1 + len(place.drafts)
        self._fill(plain, words_GW)
        for place, at in drafted:
            self._fill_drafted(place, at, words_GW)
        unsigned = words_GW.view(np.uint32)
        for place, at in zip(places, firsts, strict=True):
            for row in range(at, at + 1 + len(place.drafts)):
                place.constraint.finish_mask(unsigned[row])
        assert self._vocabulary is not None
        used = -(-self._vocabulary.vocab_size // 32)
        if num_words > used:  # the tokenizer has more tokens than the model
            words_GW = np.ascontiguousarray(words_GW[:, :used])
        return RowMasks(np.array(rows, np.int64), words_GW)

    def _fill(self, plain: Sequence[tuple[Place, int]], words_GW: NDArray[np.int32]) -> None:
        if not plain:
            return
        assert self._executor is not None
        count, num_words = words_GW.shape
        matchers = [(place.constraint.matcher, at) for place, at in plain]
        try:
            self._executor.unsafe_compute_mask_ptr(matchers, words_GW.ctypes.data, num_words * 4, count)
        except ValueError as error:
            if len(plain) > 1:  # whose fault is it?
                for one in plain:
                    self._fill([one], words_GW)
            else:
                plain[0][0].constraint.fail(str(error))
        _find_errors([place for place, _ in plain])

    def _fill_drafted(self, place: Place, at: int, words_GW: NDArray[np.int32]) -> None:
        assert self._executor is not None
        count, num_words = words_GW.shape
        work = [(place.constraint.matcher, at, list(place.drafts))]
        try:
            self._executor.unsafe_compute_mask_ptr_with_draft_token(work, words_GW.ctypes.data, num_words * 4, count)
        except ValueError as error:
            place.constraint.fail(str(error))
        _find_errors([place])


def _find_errors(places: Sequence[Place]) -> None:
    for place in places:
        if not place.constraint.error and place.constraint.matcher.is_error():
            place.constraint.fail()
