"""Draws as arrays of numbers: what is packed is what was meant."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from common.engine import sampler
from common.engine.batch import SampleRow
from common.kernels.draws import COLUMNS, DrawKind, any_truncated, draw_packed, noise_keys, pack_draws, unpack_draws
from common.kernels.sampling import Draw, draw_rows, noise_key
from common.types import SamplingParams

WHOLE = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}


def random_rows(count: int) -> list[SampleRow]:
    rng = random.Random(1)
    return [
        SampleRow(
            rng.getrandbits(64),
            rng.randrange(128),
            rng.randrange(1 << 20),
            SamplingParams(
                temperature=rng.choice((0.0, 1e-3, 0.7, 100.0)),
                top_k=rng.choice((-1, 0, 5)),
                top_p=rng.choice((1.0, 0.9)),
                min_p=rng.choice((0.0, 0.1)),
            ),
            (),
            (),
            frozenset(),
        )
        for _ in range(count)
    ]


def test_rows_are_packed_as_they_are_drawn() -> None:
    rows = random_rows(200)
    packed = sampler.packed_draws(rows)
    assert packed.shape == (200, COLUMNS)
    for row, draw, kind in zip(rows, unpack_draws(packed), packed[:, 5], strict=True):
        meant = sampler._draw(row)
        p = row.params
        assert draw.temperature == meant.temperature
        if kind == DrawKind.GREEDY:
            assert p.temperature == 0
            continue
        assert draw == meant
        assert (kind == DrawKind.PLAIN) == (p.top_k <= 0 and p.top_p == 1 and p.min_p == 0)


def test_keys_of_many_places_are_those_of_each() -> None:
    rng = random.Random(2)
    places = [(rng.getrandbits(64), rng.randrange(128), rng.randrange(1 << 30)) for _ in range(300)]
    columns = (np.array(column, np.uint64) for column in zip(*places, strict=True))
    assert noise_keys(*columns).tolist() == [noise_key(*place) for place in places]


@pytest.mark.parametrize(
    ("draw", "truncated"),
    [
        (Draw(1, 0.0, 5, 0.5, 0.5), False),
        (Draw(1, 1.0, **WHOLE), False),
        (Draw(1, 1.0, **WHOLE | {"top_k": 1}), True),
        (Draw(1, 1.0, **WHOLE | {"top_p": 0.99}), True),
        (Draw(1, 1.0, **WHOLE | {"min_p": 0.01}), True),
    ],
)
def test_only_limits_that_count_are_truncation(draw: Draw, truncated: bool) -> None:
    packed = pack_draws([Draw(7, 1.0, **WHOLE), draw])
    assert any_truncated(packed) is truncated
    assert unpack_draws(packed)[1] == draw


def test_packed_draws_give_the_same_tokens_and_zeros_are_greedy() -> None:
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(3))
    draws = [sampler._draw(row) for row in random_rows(50)]
    token_ids_R, status_R = draw_packed(logits, torch.from_numpy(pack_draws(draws)))
    wanted_ids_R, wanted_status_R = draw_rows(logits, draws)
    assert torch.equal(token_ids_R, wanted_ids_R)
    assert torch.equal(status_R, wanted_status_R)
    greedy, _ = draw_packed(logits, torch.zeros(50, COLUMNS, dtype=torch.int64))
    assert torch.equal(greedy, logits.argmax(-1))
