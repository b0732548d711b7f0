"""A step on its way to the other ranks: arrays as they are, rows as columns. No torch.

Ranks need of a row what a runner reads of it: how many tokens it has, its tail blocks, and what its draws depend on.
Tables and tokens lie in the batch's arrays already. Sampling parameters are sent once and then named by number, and
histories only where a draw depends on them, so that a step of 256 sequences costs tens of microseconds.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.engine.batch import Batch, BatchMedia, BatchRow, SampleRow
from common.engine.media import MediaRows
from common.types import SamplingParams

_MAX_PARAMS = 4096

_Rows = tuple[NDArray[np.int32], dict[int, dict[str, Any]]]
_Samples = tuple[NDArray[np.uint64], NDArray[np.int32], dict[int, dict[str, Any]]]


class BatchEncoder:
    """The side of rank 0. Every batch goes to every rank: a number stands for the same parameters on all."""

    def __init__(self) -> None:
        self._numbers: dict[int, tuple[int, SamplingParams]] = {}  # by identity; kept alive, so that it stays theirs

    def encode(self, batch: Batch) -> bytes:
        fresh: dict[int, SamplingParams] = {}
        forget = len(self._numbers) > _MAX_PARAMS
        if forget:
            self._numbers.clear()
        samples = self._samples([s for r in batch.rows for s in r.samples], fresh)
        bare = replace(batch, rows=(), media=_alone(batch.media))
        return pickle.dumps((forget, fresh, _columns(batch.rows), samples, bare), protocol=5)

    def _samples(self, rows: Sequence[SampleRow], fresh: dict[int, SamplingParams]) -> _Samples:
        known = self._numbers
        numbers: list[int] = []
        for s in rows:
            found = known.get(id(s.params))
            if found is None:
                found = known[id(s.params)] = len(known), s.params
                fresh[found[0]] = s.params
            numbers += s.choice, s.output_index, found[0]
        more = {
            i: {"prompt_ids": s.prompt_ids, "output_ids": s.output_ids, "stop_ids": s.stop_ids}
            for i, s in enumerate(rows)
            if s.prompt_ids or s.output_ids or s.output_index < s.params.min_tokens
        }
        seeds = np.array([s.seed for s in rows], np.uint64)
        return seeds, np.array(numbers, np.int32).reshape(-1, 3), more


class BatchDecoder:
    """The side of another rank."""

    def __init__(self) -> None:
        self._params: dict[int, SamplingParams] = {}

    def decode(self, payload: bytes) -> Batch:
        forget, fresh, columns, samples, bare = pickle.loads(payload)  # from the process that started us
        if forget:
            self._params.clear()
        self._params |= fresh
        batch: Batch = bare
        return replace(batch, rows=_rows(columns, self._sample_rows(samples)))

    def _sample_rows(self, samples: _Samples) -> list[SampleRow]:
        seeds, numbers, more = samples
        params = self._params
        nothing: dict[str, Any] = {"prompt_ids": (), "output_ids": (), "stop_ids": frozenset()}
        return [
            SampleRow(seed, choice, output_index, params[number], **more.get(i, nothing))
            for i, (seed, choice, output_index, number) in enumerate(
                zip(seeds.tolist(), *numbers.T.tolist(), strict=True)
            )
        ]


def _alone(media: BatchMedia | None) -> BatchMedia | None:
    """With copies of the rows that the step takes: a pickled slice would bring its whole image, in every chunk."""
    if media is None:
        return None
    return replace(media, parts=[MediaRows(part.first, part.rows_NW.clone()) for part in media.parts])


def _columns(rows: Sequence[BatchRow]) -> _Rows:
    numbers = [n for r in rows for n in (len(r.token_ids), r.start, len(r.samples), r.tail_read, r.tail_write)]
    more = {
        i: {"prompt_logprobs": r.prompt_logprobs, "prompt_targets": r.prompt_targets}
        for i, r in enumerate(rows)
        if r.prompt_logprobs >= 0
    }
    return np.array(numbers, np.int32).reshape(-1, 5), more


def _rows(columns: _Rows, samples: Sequence[SampleRow]) -> list[BatchRow]:
    numbers, more = columns
    rows, first = [], 0
    for i, (count, start, num_samples, tail_read, tail_write) in enumerate(numbers.tolist()):
        drawn = samples[first : first + num_samples]
        first += num_samples
        others = more.get(i, {})
        rows.append(BatchRow(range(count), start, {}, drawn, tail_read=tail_read, tail_write=tail_write, **others))
    return rows
