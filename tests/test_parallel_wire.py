"""A step on its way to other ranks: nothing that a runner reads is lost."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import numpy as np
import torch

from common.engine.batch import Batch, BatchRow, SampleRow, build_batch
from common.engine.media import MediaRows
from common.engine.rank_wire import BatchDecoder, BatchEncoder
from common.types import SamplingParams

PLAIN = SamplingParams(temperature=0.0, max_tokens=4)


def row(start: int, samples: tuple[SampleRow, ...] = (), **more: object) -> BatchRow:
    return BatchRow([3, 4], start, {"full": [5, 6, 7, 8]}, samples, states={"state": 2}, **more)


def draw(params: SamplingParams = PLAIN, index: int = 7, **more: object) -> SampleRow:
    whole = {"prompt_ids": (), "output_ids": (), "stop_ids": frozenset()} | more
    return SampleRow(2**64 - 1, 1, index, params, **whole)


def batch_of(*rows: BatchRow) -> Batch:
    return build_batch(rows, {"full": (16, 0)})


def same_arrays(one: Batch, two: Batch) -> None:
    for field in dataclasses.fields(Batch):
        if field.name not in ("rows", "groups", "states_S"):
            assert np.array_equal(getattr(one, field.name), getattr(two, field.name)), field.name
    assert np.array_equal(one.groups["full"].tables_SB, two.groups["full"].tables_SB)
    assert np.array_equal(one.groups["full"].slots_T, two.groups["full"].slots_T)
    assert np.array_equal(one.states_S["state"], two.states_S["state"])


def test_what_a_runner_reads_arrives() -> None:
    strict = SamplingParams(min_tokens=9, frequency_penalty=1.0)
    history = draw(strict, 8, prompt_ids=[1, 2], output_ids=[3], stop_ids=frozenset({2}))
    sent = batch_of(
        row(20, (draw(), history), tail_read=4),
        row(9, prompt_logprobs=2, prompt_targets=[4, 9], tail_write=3),
        row(30, (draw(),), pending=1),
    )
    got = BatchDecoder().decode(BatchEncoder().encode(sent))
    same_arrays(sent, got)
    for one, two in zip(sent.rows, got.rows, strict=True):
        assert len(one.token_ids) == len(two.token_ids)
        for name in ("start", "tail_read", "tail_write", "prompt_logprobs", "prompt_targets"):
            assert getattr(one, name) == getattr(two, name)
        assert list(one.samples) == list(two.samples)


def test_a_chunk_of_an_image_comes_without_the_rest() -> None:
    image_NW = torch.randn(4096, 64)
    sent = batch_of(row(20, media=[MediaRows(0, image_NW[100:102])]))
    payload = BatchEncoder().encode(sent)
    assert len(payload) < image_NW.nbytes / 50
    got = BatchDecoder().decode(payload)
    assert got.media is not None
    (part,) = got.media.parts
    assert torch.equal(part.rows_NW, image_NW[100:102])
    assert got.media.rows_N.tolist() == [0, 1]
    assert sent.media is not None
    assert sent.media.parts[0].rows_NW.data_ptr() == image_NW[100].data_ptr(), "rank 0 itself needs no copy"


def test_parameters_are_sent_once() -> None:
    encoder, decoder = BatchEncoder(), BatchDecoder()
    sent = batch_of(*(row(20, (draw(SamplingParams(seed=i)),)) for i in range(50)))
    first, second = encoder.encode(sent), encoder.encode(sent)
    assert len(second) < len(first) - 1000
    for payload in (first, second):
        got = decoder.decode(payload)
        assert [r.samples[0].params.seed for r in got.rows] == list(range(50))


def test_numbers_are_forgotten_together() -> None:
    encoder, decoder = BatchEncoder(), BatchDecoder()
    for step in range(100):
        params = [SamplingParams(seed=100 * step + i) for i in range(100)]
        got = decoder.decode(encoder.encode(batch_of(*(row(20, (draw(p),)) for p in params))))
        assert [r.samples[0].params for r in got.rows] == params


def test_every_field_of_a_row_is_thought_of() -> None:
    """What ranks read lies in the batch's arrays, or `rank_wire` sends it, or they do not. A new field: say which."""
    in_arrays = {"tables", "media", "rope_positions_3T", "states", "pending"}
    sent = {"token_ids", "start", "samples", "tail_read", "tail_write", "prompt_logprobs", "prompt_targets"}
    first_rank_alone = {"pools"}  # brings rows to the host
    assert set(BatchRow.__struct_fields__) == in_arrays | sent | first_rank_alone
    known = {"seed", "choice", "output_index", "params", "prompt_ids", "output_ids", "stop_ids"}
    assert set(SampleRow.__struct_fields__) == known
    assert replace(batch_of(row(1)), rows=()).rows == ()
