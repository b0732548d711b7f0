"""Masks of a step: which tokens grammars allow in each of its draws, made by a thread while the device computes.

    start(constraints of the step) -> (forward) -> get -> sampler

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
from common.engine.constraint import Constraint

_TIMEOUT_S = 60.0  # grammars' limits end each mask long before
_MAX_THREADS = 8


class Place(NamedTuple):
    """Draw `row` of a step follows the tokens of a sequence, and one row further each follows another of `drafts`."""

    constraint: Constraint
    row: int
    drafts: Sequence[int]


class MaskBuilder:
    """Owns the threads. `num_words`: of a mask as the tokenizer makes it; the model's has those of `vocab_size`."""

    def __init__(self, vocab_size: int) -> None:
        self._num_words = -(-vocab_size // 32)
        self._thread: ThreadPoolExecutor | None = None
        self._executor: LLExecutor | None = None

    def start(self, places: Sequence[Place], num_words: int) -> Future[RowMasks]:
        """The constraints may not change until it is done."""
        if self._thread is None:
            cores = len(os.sched_getaffinity(0))
            self._thread = ThreadPoolExecutor(1, "masks")
            self._executor = LLExecutor(num_threads=max(1, min(_MAX_THREADS, cores // 2)))
        return self._thread.submit(self._make, places, num_words)

    @staticmethod
    def get(masks: Future[RowMasks]) -> RowMasks:
        return masks.result(_TIMEOUT_S)

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)

    def _make(self, places: Sequence[Place], num_words: int) -> RowMasks:
        rows = [row for place in places for row in range(place.row, place.row + 1 + len(place.drafts))]
        words_GW = np.full((len(rows), num_words), -1, np.int32)
        first, plain, drafted = 0, [], []
        firsts = []
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
        if num_words > self._num_words:
            words_GW = np.ascontiguousarray(words_GW[:, : self._num_words])
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
                plain[0][0].constraint.error = str(error)
        _find_errors([place for place, _ in plain])

    def _fill_drafted(self, place: Place, at: int, words_GW: NDArray[np.int32]) -> None:
        assert self._executor is not None
        count, num_words = words_GW.shape
        work = [(place.constraint.matcher, at, list(place.drafts))]
        try:
            self._executor.unsafe_compute_mask_ptr_with_draft_token(work, words_GW.ctypes.data, num_words * 4, count)
        except ValueError as error:
            place.constraint.error = str(error)
        _find_errors([place])


def _find_errors(places: Sequence[Place]) -> None:
    for place in places:
        if not place.constraint.error and place.constraint.matcher.is_error():
            place.constraint.error = place.constraint.matcher.get_error()
