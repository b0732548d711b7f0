"""A recorded head and draw against the same launched one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from common.engine.batch import BatchRow, SampleRow, build_batch
from common.engine.inputs import PinnedInputs
from common.engine.recorded_head import RecordedHead
from common.engine.sampler import NOT_FINITE, Sampler
from common.types import SamplingParams

pytestmark = pytest.mark.gpu

VOCAB, HIDDEN, TAILS = 5003, 256, 4


class Model:
    def __init__(self, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(1)
        self.weight_VD = torch.randn(VOCAB, HIDDEN, generator=generator).to(device)
        self.tails_BD = torch.randn(TAILS, HIDDEN, generator=generator).to(device)

    def logits(self, hidden_RD: Tensor) -> Tensor:
        return hidden_RD @ self.weight_VD.T

    def read_tail(self, block_ids_R: Tensor) -> Tensor:
        return self.tails_BD.index_select(0, block_ids_R)


def sample(seed: int, **params: Any) -> SampleRow:
    return SampleRow(seed, 0, 3, SamplingParams(max_tokens=9, **params), (1, 2), (3,), frozenset((7,)))


def of_tail(tail: int, *samples: SampleRow) -> BatchRow:
    return BatchRow((), 8, {}, samples, tail_read=tail)


def test_draws_are_those_of_the_launches_one_by_one(cuda: torch.device) -> None:
    model, sampler, stream = Model(cuda), Sampler(VOCAB, cuda), torch.cuda.Stream(cuda)
    head = RecordedHead(model, model, PinnedInputs(cuda), VOCAB, stream)
    head.record()
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.8},
        {"temperature": 1.3, "top_k": 20, "min_p": 0.01},
    ]
    drawn, expected = [], []
    with torch.inference_mode(), torch.cuda.stream(stream):
        for i in range(40):  # under way at the same time
            row, tail = sample(i, **kinds[i % len(kinds)]), i % TAILS
            result = head.draw(build_batch([of_tail(tail, row)], {}))
            assert result is not None
            drawn.append(result)
            expected.append(sampler.sample(model.logits(model.tails_BD[tail : tail + 1]), [row]))
    assert [r.tokens for r in drawn] == [r.tokens for r in expected]
    assert len({r.tokens[0] for r in drawn}) > TAILS
    assert not any(r.failures for r in drawn)


def test_a_row_that_is_not_finite_gives_no_token(cuda: torch.device) -> None:
    model, stream = Model(cuda), torch.cuda.Stream(cuda)
    head = RecordedHead(model, model, PinnedInputs(cuda), VOCAB, stream)
    head.record()
    model.tails_BD[2] = torch.nan
    torch.cuda.synchronize()
    with torch.inference_mode(), torch.cuda.stream(stream):
        result = head.draw(build_batch([of_tail(2, sample(1, temperature=0.0))], {}))
    assert result is not None
    assert result.failures == {0: NOT_FINITE}


def test_what_is_not_recorded_is_left_to_others(cuda: torch.device) -> None:
    model, stream = Model(cuda), torch.cuda.Stream(cuda)
    head = RecordedHead(model, model, PinnedInputs(cuda), VOCAB, stream)
    head.record()
    plain = sample(1)
    for rows in (
        [of_tail(0, plain), of_tail(1, plain)],
        [of_tail(0, plain, plain)],
        [of_tail(0, sample(1, logprobs=2))],
        [of_tail(0, sample(1, repetition_penalty=1.3))],
        [of_tail(0, sample(1, min_tokens=8))],
        [of_tail(0, sample(1, logit_bias=((5, 3.0),)))],
    ):
        with torch.cuda.stream(stream):
            assert head.draw(build_batch(rows, {})) is None
