"""Draws on the device against the CPU's, token by token."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from common.kernels import cpu
from common.kernels.draws import any_truncated, draw_packed, pack_draws, to_device
from common.kernels.sampling import Draw, DrawStatus, draw_rows, draw_rows_native, draw_rows_torch, top_rows

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::RuntimeWarning")]  # the interpreter's numpy

TEMPERATURES = (0.0, 1.0, 0.3, 2.5, 1e-3, 100.0, 1e-30)


def make_draws(rng: random.Random, rows: int, vocab: int) -> list[Draw]:
    top_k = (0, 0, 0, 1, 2, 5, 50, vocab // 3, vocab - 1, vocab, 10 * vocab)
    top_p = (1.0, 1.0, 0.95, 0.9, 0.5, 0.01, 1e-6, 0.999, 0.999999)
    min_p = (0.0, 0.0, 0.0, 0.1, 0.5, 1.0, 1e-5)
    return [
        Draw(rng.getrandbits(64), *(rng.choice(choices) for choices in (TEMPERATURES, top_k, top_p, min_p)))
        for _ in range(rows)
    ]


def make_logits(rng: random.Random, rows: int, vocab: int) -> Tensor:
    """Rows of all sorts: flat and steep, with ties, with tokens that are not allowed, and some that must fail."""
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(rng.getrandbits(32)))
    for row in logits:
        row.mul_(rng.choice((0.01, 1.0, 3.0, 10.0)))
        kind = rng.randrange(12)
        if kind < 3:
            row.round_()
        elif kind == 3:
            row.fill_(rng.choice((0.0, -7.0)))
        elif kind == 4:
            row.add_(20.0)
        elif kind == 5:
            row[rng.randrange(vocab)] = rng.choice((math.nan, math.inf))
        elif kind == 6:
            row.fill_(-math.inf)
            row[rng.randrange(vocab) :: max(vocab // 3, 1)] = 1.0
        if kind in (1, 7):
            row[rng.randrange(3) :: 3] = -math.inf
        if kind == 8:
            row.fill_(-math.inf)
    return logits


def expected(logits_RV: Tensor, draws: Sequence[Draw]) -> tuple[Tensor, Tensor]:
    return draw_rows_native(logits_RV, draws) if cpu.library() is not None else draw_rows_torch(logits_RV, draws)


def check(logits_RV: Tensor, draws: Sequence[Draw], device: torch.device, **sizes: int) -> None:
    from common.kernels.gpu import sampling

    packed = pack_draws(draws)
    token_ids_R, status_R = sampling.draw_packed(
        logits_RV.to(device), to_device(packed, device), truncated=any_truncated(packed), **sizes
    )
    wanted_ids_R, wanted_status_R = expected(logits_RV, draws)
    wrong = [
        (draw, got, want)
        for draw, got, want in zip(draws, token_ids_R.tolist(), wanted_ids_R.tolist(), strict=True)
        if got != want
    ]
    assert not wrong
    assert status_R.tolist() == wanted_status_R.tolist()


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(
    ("vocab", "sizes"), [(1, {}), (130, {"tile": 64, "room": 32}), (700, {"tile": 256, "room": 64}), (5000, {})]
)
def test_tokens_equal_the_cpu(kernel_device: torch.device, seed: int, vocab: int, sizes: dict[str, int]) -> None:
    rng = random.Random(seed * vocab)
    rows = 12 if kernel_device.type == "cpu" else 2000
    check(make_logits(rng, rows, vocab), make_draws(rng, rows, vocab), kernel_device, **sizes)


@pytest.mark.parametrize("vocab", [32000, 151936, 262144])
def test_tokens_equal_the_cpu_in_large_vocabularies(cuda: torch.device, vocab: int) -> None:
    rng = random.Random(vocab)
    for rows in (1, 300):
        check(make_logits(rng, rows, vocab), make_draws(rng, rows, vocab), cuda)


@pytest.mark.parametrize("kind", [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 0.6, "top_p": 0.95}])
def test_rows_of_one_kind(kernel_device: torch.device, kind: dict[str, float]) -> None:
    rng = random.Random(len(str(kind)))
    rows, vocab = (8, 300) if kernel_device.type == "cpu" else (500, 151936)
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(3)) * 4
    draws = [Draw(rng.getrandbits(64), **{"top_k": 0, "top_p": 1.0, "min_p": 0.0} | kind) for _ in range(rows)]
    check(logits, draws, kernel_device)


def test_zeros_are_greedy_and_strides_are_any(kernel_device: torch.device) -> None:
    from common.kernels.gpu import sampling

    wide = torch.randn(5, 2, 300, generator=torch.Generator().manual_seed(4)).to(kernel_device)
    draws_R6 = torch.zeros(5, 6, dtype=torch.int64, device=kernel_device)
    token_ids_R, status_R = sampling.draw_packed(wide[:, 1], draws_R6, truncated=False, tile=64)
    assert token_ids_R.tolist() == wide[:, 1].argmax(-1).tolist()
    assert status_R.tolist() == [DrawStatus.OK] * 5


def test_a_graph_draws_what_its_buffer_says(cuda: torch.device) -> None:
    rng, rows, vocab = random.Random(5), 40, 32000
    logits = torch.randn(rows, vocab, device=cuda)
    static_R6 = torch.zeros(rows, 6, dtype=torch.int64, device=cuda)
    draw_packed(logits, static_R6)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        token_ids_R, status_R = draw_packed(logits, static_R6)
    for _ in range(3):
        draws = make_draws(rng, rows, vocab)
        logits.copy_(make_logits(rng, rows, vocab))
        static_R6.copy_(to_device(pack_draws(draws), cuda))
        graph.replay()
        wanted_ids_R, wanted_status_R = expected(logits.cpu(), draws)
        assert token_ids_R.tolist() == wanted_ids_R.tolist()
        assert status_R.tolist() == wanted_status_R.tolist()
        assert torch.equal(draw_rows(logits, draws)[0], token_ids_R)


def test_top_rows_equal_the_cpu(cuda: torch.device) -> None:
    logits = make_logits(random.Random(6), 60, 5000)
    wanted, got = top_rows(logits, 20), top_rows(logits.to(cuda), 20)
    torch.testing.assert_close(got[0].cpu(), wanted[0], equal_nan=True, rtol=1e-12, atol=1e-12)
    assert torch.equal(got[1].cpu(), wanted[1])
    torch.testing.assert_close(got[2].cpu(), wanted[2], equal_nan=True, rtol=0, atol=0)
