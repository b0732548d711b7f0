"""Attention over shared rows and the indexer in Triton, against formulas in float64, with fresh random inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from latent_gpu_support import SCALE, LatentCase

from common.kernels import gpu

pytestmark = pytest.mark.gpu

SPANS = {
    "decode": [(37, 1), (5, 1), (90, 1), (0, 1), (63, 1)],
    "verify": [(37, 3), (0, 3), (61, 3)],
    "mixed": [(50, 1), (0, 19), (13, 1), (40, 5)],
}


def sizes(device: torch.device) -> list[tuple[int, int, int]]:
    """(heads, value width, rest): what the interpreter can do in time, and DeepSeek's widths."""
    small = [(6, 24, 8), (20, 40, 0)]
    return [*small, (16, 512, 64), (32, 512, 64), (128, 512, 64), (64, 512, 0)] if device.type == "cuda" else small


def check_rows(
    case: LatentCase, value_dim: int, selected: Any, most: int, tolerance: float, packed: bool = False
) -> None:
    """Results and logarithms of sums by the formula."""
    sums_TH = torch.full(case.q_THD.shape[:2], float("nan"), device=case.q_THD.device)
    out = gpu.sparse_latent.attend(
        case.q_THD,
        case.cache[:, 0, 0],
        case.triton_places(),
        value_dim,
        SCALE,
        most=most,
        selected=None if selected is None else (selected.positions_TK, selected.counts_T),
        log_sums_TH=sums_TH,
        packed=packed,
    )
    want, sums = case.expected(selected)
    case.check(out, want, tolerance)
    assert (sums_TH.double().cpu() - sums).abs().max().item() < tolerance


@pytest.mark.parametrize("spans", SPANS.values(), ids=list(SPANS))
@pytest.mark.parametrize("selects", [False, True], ids=["all", "some"])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_rows_of_all_heads(kernel_device: torch.device, spans: Any, selects: bool, packed: bool) -> None:
    for heads, value_dim, rest in sizes(kernel_device):
        for dtype in (torch.bfloat16, torch.float32) if kernel_device.type == "cuda" else (torch.float32,):
            shape: dict[str, Any] = {"heads": heads, "value_dim": value_dim, "rest": rest, "block_size": 16}
            case = LatentCase(spans, kernel_device, **shape, dtype=dtype, packed=packed)
            selected = case.chosen(33) if selects else None
            most = 33 if selected is not None else case.ctx.max_seq_len
            check_rows(case, value_dim, selected, most, 1e-4 if dtype == torch.float32 else 2e-2, packed)


@pytest.mark.parametrize("shares", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("selects", [False, True], ids=["all", "some"])
def test_any_number_of_shares(kernel_device: torch.device, monkeypatch: Any, shares: int, selects: bool) -> None:
    """Also more than there are positions for: what has none adds nothing."""
    monkeypatch.setattr(gpu.sparse_latent, "_num_shares", lambda *_: shares)
    spans = [(50, 1), (0, 2), (70, 1)]
    case = LatentCase(spans, kernel_device, heads=6, value_dim=24, rest=8, block_size=16, dtype=torch.float32)
    selected = case.chosen(33) if selects else None
    check_rows(case, 24, selected, case.ctx.max_seq_len, 1e-4)


def test_windows_and_empty_first_positions(kernel_device: torch.device) -> None:
    case = LatentCase([(50, 1), (3, 1)], kernel_device, heads=4, value_dim=16, rest=0, first=1, dtype=torch.float32)
    rows = (case.q_THD, case.cache[:, 0, 0], case.triton_places(), 16, SCALE)
    case.check(gpu.sparse_latent.attend(*rows, most=case.ctx.max_seq_len), case.expected()[0], 1e-4)


def select(case: LatentCase, weights_TH: torch.Tensor, top_k: int, packed: bool) -> tuple[torch.Tensor, Any]:
    places = case.triton_places()
    args = (case.q_THD, weights_TH, case.cache[:, 0, 0], places, 0.5)
    scores_TL = gpu.indexer.score(*args, most=case.ctx.max_seq_len, packed=packed)
    return scores_TL, gpu.indexer.top_k(scores_TL, places, top_k, with_slots=True)


@pytest.mark.parametrize("spans", SPANS.values(), ids=list(SPANS))
@pytest.mark.parametrize("ties", [True, False])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_indexer(kernel_device: torch.device, monkeypatch: Any, spans: Any, ties: bool, packed: bool) -> None:
    """Scores by the formula; and of those the best exactly, of equal ones the first, with the slots they lie in."""
    on_gpu = kernel_device.type == "cuda"
    monkeypatch.setattr(gpu.indexer, "_SEGMENT", 64)
    heads, width = (64, 128) if on_gpu else (4, 24)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    case = LatentCase(
        spans, kernel_device, heads=heads, value_dim=width, rest=0, block_size=16, dtype=dtype, packed=packed
    )
    weights_TH = torch.randn(len(case.own), heads, device=kernel_device)
    if ties:  # many scores are equal, many of them 0 or -0
        case.q_THD, weights_TH = case.q_THD.sign(), weights_TH.sign()
        if not packed:
            case.cache.copy_(case.cache.sign())
            case.rows = [r.sign() for r in case.rows]
    for top_k in (5, 33, 48):
        scores_TL, taken = select(case, weights_TH, top_k, packed)
        for t, (s, own) in enumerate(case.places()):
            products = case.q_THD[t].double().cpu() @ case.rows[s][: own + 1].double().T * 0.5
            want = weights_TH[t].double().cpu() @ products.relu()
            got = scores_TL[t, : own + 1].cpu()
            assert (got - want).norm() <= 1e-4 * (products.relu().norm() * weights_TH[t].norm().cpu() + 1)
            best = got.sort(descending=True, stable=True).indices[:top_k].sort().values
            assert int(taken.counts_T[t]) == len(best)
            assert taken.positions_TK[t].tolist() == best.tolist() + [-1] * (top_k - len(best)), case.seed
            table = case.tables.block_tables_SB[s].cpu()
            slots = (table[best // 16] * 16 + best % 16).tolist()
            assert taken.slots_TK[t].tolist() == slots + [-1] * (top_k - len(best))


def test_long_rows_of_scores(kernel_device: torch.device) -> None:
    """Rows of several segments, every kind of float, and rows shorter than what is taken."""
    if kernel_device.type != "cuda":
        pytest.skip("too much for the interpreter")
    lens = [1, 2048, 2049, 5000, 40_000, 65_536, 65_521]
    places = gpu.sparse_latent.Places(
        torch.arange(len(lens) * 1024, dtype=torch.int32, device=kernel_device).view(len(lens), -1),
        torch.arange(len(lens) + 1, dtype=torch.int32, device=kernel_device),
        torch.tensor(lens, dtype=torch.int32, device=kernel_device),
        64,
        1,
    )
    for make in (torch.randn, lambda *s, **k: torch.randint(-40, 40, s, **k).float(), torch.zeros):
        scores = make(len(lens), 65_536, device=kernel_device)
        scores[:, ::7] *= 1e-20
        scores[:, 5::11] *= -1e15
        taken = gpu.indexer.top_k(scores, places, 2048)
        for t, n in enumerate(lens):
            best = scores[t, :n].sort(descending=True, stable=True).indices[:2048].sort().values
            assert torch.equal(taken.positions_TK[t, : len(best)].long(), best)
            assert int(taken.counts_T[t]) == len(best)
