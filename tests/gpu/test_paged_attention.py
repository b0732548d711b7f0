"""Our kernel for few new tokens against plain torch, with NaN behind each sequence's keys."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from common.kernels import gpu

pytestmark = pytest.mark.gpu


@dataclass
class Case:
    """`slots`: items to aim for, few so that sequences are cut in several ways."""

    sequences: int
    heads: int
    units: int
    width: int
    size: int
    num_new: int = 1
    window: int = 0
    first: int = 0
    slots: int = 6
    longest: int = 700


CASES = [
    Case(3, 8, 2, 128, 64),
    Case(5, 4, 4, 64, 16, slots=40),
    Case(2, 8, 1, 256, 64, num_new=4, first=3, longest=300),
    Case(4, 6, 2, 128, 16, num_new=3, window=100, slots=3),
    Case(1, 16, 1, 128, 64, slots=16, longest=2000),
    Case(4, 8, 2, 128, 64, window=1, longest=300),
    Case(9, 7, 1, 64, 64, num_new=2, window=33, slots=2, longest=200),
    Case(2, 16, 1, 128, 32, num_new=4, slots=9),
    Case(3, 6, 2, 16, 16),
    Case(2, 32, 1, 32, 16, num_new=4),
]


def expected(q_THD: Tensor, pool: Tensor, tables_SB: Tensor, lens_S: Tensor, case: Case, scale: float) -> Tensor:
    rows = []
    for s, length in enumerate(lens_S.tolist()):
        blocks = pool[tables_SB[s, : -(-length // case.size)].long()].float()
        keys, values = (blocks[:, i].transpose(1, 2).flatten(0, 1)[:length] for i in (0, 1))
        for t in range(case.num_new):
            own = length - case.num_new + t
            low = max(case.first, own + 1 - case.window if case.window else 0)
            seen = slice(low, own + 1)
            k, v = (x[seen].repeat_interleave(case.heads // case.units, 1) for x in (keys, values))
            scores = torch.einsum("hd,lhd->hl", q_THD[s * case.num_new + t].float(), k) * scale
            rows.append(torch.einsum("hl,lhd->hd", scores.softmax(-1), v))
    return torch.stack(rows)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_attend(kernel_device: torch.device, dtype: torch.dtype, case: Case) -> None:
    if kernel_device.type == "cpu" and dtype != torch.float16:
        pytest.skip("the interpreter multiplies no bf16")
    own, device = gpu.paged_attention, kernel_device
    computed = torch.float16 if dtype == torch.float16 else torch.bfloat16
    least = case.num_new + case.first
    lens_S = (torch.randint(0, case.longest, (case.sequences,)) + least).int()
    tables_SB = torch.zeros(case.sequences, -(-int(lens_S.max()) // case.size) + 1, dtype=torch.int32)
    needed = [-(-n // case.size) for n in lens_S.tolist()]
    shape = (sum(needed) + 1, 2, case.units, case.size, case.width)
    pool = torch.full(shape, float("nan"))
    order = (torch.randperm(sum(needed)) + 1).tolist()  # block 0, where tables say nothing, is NaN
    for s, count in enumerate(needed):
        lowest = max(0, int(lens_S[s]) - case.num_new + 1 - case.window) if case.window else 0
        for b in range(lowest // case.size, count):
            block, held = order.pop(), min(case.size, int(lens_S[s]) - b * case.size)
            tables_SB[s, b] = block
            pool[block, :, :, :held] = torch.randn(2, case.units, held, case.width)
            if b == 0 and case.first:
                pool[block, :, :, : case.first] = float("nan")
    pool, tables_SB, lens_S = pool.to(dtype).to(device), tables_SB.to(device), lens_S.to(device)
    q_THD = torch.randn(case.sequences * case.num_new, case.heads + 2, case.width, device=device).to(computed)
    q_THD, scale = q_THD[:, : case.heads], case.width**-0.5
    seen = own.Seen(case.num_new, case.window, case.first)
    rows = case.num_new * case.heads // case.units
    space = own.workspace(case.sequences, case.units, case.width, rows, case.slots, device)
    items = own.schedule(lens_S, seen, case.width, case.slots)
    want = expected(q_THD, pool, tables_SB, lens_S, case, scale) * 0.5
    results = []
    for turn in range(3):
        out_THD = torch.full(q_THD.shape, float("nan"), dtype=computed, device=device)
        places = (pool[:, 0], pool[:, 1], tables_SB, items, seen, space)
        own.attend(q_THD, *places, out_THD, scale, 0.5, scheduled=turn > 0)
        results.append(out_THD)
        assert float((out_THD.float() - want).norm() / want.norm()) < 5e-3
        assert int(space.counters.abs().sum()) == 0
    assert all(torch.equal(results[0], r) for r in results)
