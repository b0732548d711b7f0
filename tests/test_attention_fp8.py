"""An 8-bit cache of keys and values: float8_e4m3fn times a scale, by every backend and instruction set."""

from __future__ import annotations

import pytest
import torch
from test_attention_reference import Case
from torch import Tensor

from common.attention import cpu as cpu_attention
from common.attention import reference
from common.attention.context import AttentionBackend, GroupTables
from common.attention.cpu import CpuBackend
from common.attention.reference import ReferenceBackend
from common.kernels import cpu
from common.kvcache.scales import KVScales, scales_hash

FLOAT8 = torch.float8_e4m3fn
SCALES = KVScales(k=0.01, v=0.02)
SPANS = [(100, 1), (30, 20), (3, 1), (600, 2), (0, 70)]


@pytest.fixture(params=[*cpu.available(), None], ids=lambda isa: "reference" if isa is None else isa.name.lower())
def backend(request: pytest.FixtureRequest) -> AttentionBackend:
    return ReferenceBackend() if request.param is None else CpuBackend(request.param)


def stored(x: Tensor, scale: float) -> Tensor:
    return (x.float() / scale).clamp(-448, 448).to(FLOAT8)


class Fp8Case(Case):
    """Keys and values that are float8 numbers times a scale: what is read back is exactly what was written."""

    def __init__(self, spans: list[tuple[int, int]], **more: object) -> None:
        super().__init__(spans, **more)  # type: ignore[arg-type]
        self.k = [stored(k, SCALES.k).float() * torch.tensor(SCALES.k) for k in self.k]
        self.v = [stored(v, SCALES.v).float() * torch.tensor(SCALES.v) for v in self.v]
        scale = torch.tensor([SCALES.k, SCALES.v]).view(1, 2, 1, 1, 1)
        whole = torch.full((self.cache.shape[0], 3, *self.cache.shape[1:]), float("nan"), dtype=FLOAT8)
        whole[:, 1] = (self.cache.float() / scale).clamp(-448, 448).to(FLOAT8)
        self.cache = whole[:, 1]

    def attend(self, backend: AttentionBackend, scale: float = 0.3) -> Tensor:
        new = [(k[a:], v[a:]) for k, v, (a, _) in zip(self.k, self.v, self.spans, strict=True)]
        k, v = torch.cat([k for k, _ in new]), torch.cat([v for _, v in new])
        backend.write(k, v, self.cache, self.tables, SCALES)
        self.ctx.scratch.clear()
        return backend.attend(self.q_THD, self.cache, self.tables, self.ctx, scale, SCALES)


@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize(("width", "heads"), [(16, (6, 2)), (24, (4, 4)), (64, (9, 3)), (128, (8, 1)), (8, (48, 1))])
def test_against_dense(backend: AttentionBackend, width: int, heads: tuple[int, int], window: int) -> None:
    case = Fp8Case(SPANS, width=width, heads=heads, window=window)
    error = (case.attend(backend).double() - case.expected(0.3)).abs().max().item()
    assert error < 1e-5, f"off by {error} with seed {case.seed}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_queries_of_other_types(backend: AttentionBackend, dtype: torch.dtype) -> None:
    case = Fp8Case(SPANS)
    expected = case.expected(0.3)
    case.q_THD = case.q_THD.to(dtype)
    case.k, case.v = [k.to(dtype) for k in case.k], [v.to(dtype) for v in case.v]
    got = case.attend(backend)
    assert got.dtype == dtype
    assert (got.double() - expected).abs().max().item() < 4e-2


@pytest.mark.parametrize("isa", cpu.available(), ids=lambda isa: isa.name.lower())
@pytest.mark.parametrize(("heads", "width"), [((6, 2), 32), ((4, 4), 24), ((8, 1), 64)])
def test_a_token_gets_the_same_bits_in_any_chunk_and_batch(isa: cpu.Isa, heads: tuple[int, int], width: int) -> None:
    """Few rows are multiplied as they are read, many are unpacked first."""
    backend = CpuBackend(isa)
    whole = Fp8Case([(0, 700), (0, 90), (0, 1)], heads=heads, width=width)
    expected = whole.attend(backend)
    for first, count in ((699, 1), (130, 17), (512, 188), (513, 2), (63, 3)):
        part = Fp8Case([(first, count)], heads=heads, width=width)
        part.k[0], part.v[0] = whole.k[0][: first + count], whole.v[0][: first + count]
        for p in range(first):
            block = part.tables.block_tables_SB[0, p // 16].long()
            part.cache[block, 0, :, p % 16] = stored(part.k[0][p], SCALES.k)
            part.cache[block, 1, :, p % 16] = stored(part.v[0][p], SCALES.v)
        part.q_THD = whole.q_THD[first : first + count]
        assert torch.equal(part.attend(backend), expected[first : first + count])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_number_is_stored_as_torch_rounds_it(backend: AttentionBackend, dtype: torch.dtype) -> None:
    """All numbers of float8, those half way between two, those beyond the largest, and others."""
    numbers = torch.arange(256, dtype=torch.uint8).view(FLOAT8).float()
    finite = numbers[~numbers.isnan()].sort().values
    halves = (finite[:-1] + finite[1:]) / 2
    edges = torch.tensor([448.0, 449.0, 464.0, 480.0, 1e30, float("inf"), -float("inf"), 1e-9, -1e-9, 2.0**-10])
    x = torch.cat([numbers, halves, edges, torch.randn(500) * 0.01, torch.randn(500) * 100])
    x = x[: x.numel() // 32 * 32].to(dtype).view(-1, 2, 16)
    count = x.shape[0]
    tables = GroupTables(torch.zeros(1, 1, dtype=torch.int32), torch.arange(count), 16)
    for scales in (KVScales(k=1.0, v=0.3), KVScales(k=7.0, v=2.0**-20)):
        cache = torch.zeros(-(-count // 16), 2, 2, 16, 16, dtype=FLOAT8)
        backend.write(x, x, cache, tables, scales)
        for part, scale in enumerate((scales.k, scales.v)):
            got = cache[:, part].transpose(1, 2).flatten(0, 1)[:count]
            want = stored(x, scale)
            assert torch.equal(got.float().isnan(), want.float().isnan())
            same = (got.view(torch.uint8) == want.view(torch.uint8)) | want.float().isnan()
            assert bool(same.all())


@pytest.mark.parametrize("new", [1, 30])
def test_a_value_that_is_no_number_is_seen(backend: AttentionBackend, new: int) -> None:
    case = Fp8Case([(50, new)], heads=(2, 2))
    case.v[0][50 - 1 + new, 0, 3] = float("nan")
    out = case.attend(backend)
    assert out[-1].isnan().nonzero().tolist() == [[0, 3]]


def test_float8_is_not_touched_without_scales(backend: AttentionBackend) -> None:
    case = Fp8Case([(20, 3)])
    k, v = case.k[0][20:], case.v[0][20:]
    with pytest.raises(AssertionError):
        backend.write(k, v, case.cache, case.tables)
    with pytest.raises(AssertionError):
        backend.attend(case.q_THD, case.cache, case.tables, case.ctx, 0.3)
    plain = Case([(20, 3)])
    with pytest.raises(AssertionError):
        backend.write(k, v, plain.cache, plain.tables, SCALES)


def test_both_backends_declare_it() -> None:
    assert "float8_e4m3fn" in cpu_attention.capability().kv_dtypes
    assert "float8_e4m3fn" in reference.capability().kv_dtypes
    assert "float8_e4m3fn" not in cpu_attention.capability().dtypes


def test_scales_are_float32_and_positive() -> None:
    assert KVScales(k=0.1, v=1).k == torch.tensor(0.1).item()
    assert scales_hash([KVScales(k=0.1, v=1)]) == scales_hash([KVScales(k=torch.tensor(0.1).item(), v=1.0)])
    assert scales_hash([KVScales(k=1, v=2)]) != scales_hash([KVScales(k=2, v=1)])
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="v scale"):
            KVScales(k=1.0, v=bad)
