"""Rows in 8 bits with their own scales: the bytes, what is lost by them, and attention over them.

Fresh random inputs on every run; on the reference backend and on every instruction set of the CPU kernels.
"""

from __future__ import annotations

import random
import struct
from dataclasses import replace
from typing import cast

import pytest
import torch
from test_attention_latent import BACKENDS, SPANS, Case, select
from torch import Tensor

from common.attention.context import AttentionBackend, GroupTables, Selection
from common.attention.cpu import CpuBackend
from common.attention.packed import pack_rows, unpack_rows
from common.attention.reference import ReferenceBackend
from common.kernels import cpu
from common.kvcache.packing import RowPacking

DEEPSEEK, KEY = RowPacking(512, 64), RowPacking(128)
PACKINGS = [DEEPSEEK, KEY, RowPacking(24, 8), RowPacking(33, 7), RowPacking(200, 0), RowPacking(300, 20)]
NAN_BYTES = 255  # a scale of such bytes is NaN


def make_name(backend: AttentionBackend) -> str:
    return cast(CpuBackend, backend)._isa.name.lower() if backend.name == "cpu" else backend.name


@pytest.fixture(params=BACKENDS, ids=make_name)
def backend(request: pytest.FixtureRequest) -> AttentionBackend:
    found: AttentionBackend = request.param
    return found


@pytest.fixture(params=PACKINGS, ids=lambda p: f"{p.latent_dim}+{p.rope_dim}")
def packing(request: pytest.FixtureRequest) -> RowPacking:
    found: RowPacking = request.param
    return found


@pytest.fixture(autouse=True)
def seed() -> int:
    """Shown where a test fails."""
    found = random.randrange(2**31)
    torch.manual_seed(found)
    return found


def random_rows(packing: RowPacking, count: int = 40) -> Tensor:
    """Tiles of all magnitudes, outliers among them, and one of zeros."""
    rows_TW = torch.randn(count, packing.dim) * 10.0 ** torch.empty(count, 1).uniform_(-6, 6)
    rows_TW[::3] *= 1 + 1000 * (torch.rand(rows_TW[::3].shape) < 0.02)
    rows_TW[::7, : packing.latent_dim] *= 10.0 ** torch.empty(1).uniform_(-3, 3)
    rows_TW[1, :128] = 0.0
    rows_TW[2] = torch.zeros(packing.dim).copysign(rows_TW[2])
    return rows_TW


def empty(packing: RowPacking, num_blocks: int, block_size: int = 16) -> Tensor:
    """A cache among other layers' whose numbers are NaN."""
    pool = torch.full((num_blocks, 3, 1, block_size, packing.nbytes), NAN_BYTES, dtype=torch.uint8)
    return pool[:, 1:2]


def test_bytes_of_a_row() -> None:
    """As FlashMLA has them: 512 float8, 4 float32, 64 bfloat16."""
    assert (DEEPSEEK.scales_at, DEEPSEEK.rope_at, DEEPSEEK.nbytes) == (512, 528, 656)
    assert (KEY.scales_at, KEY.nbytes) == (128, 136)  # of which 132 say something
    row = torch.zeros(1, 576)
    row[0, 0], row[0, 1], row[0, 127] = 448.0, -1.0, 2.0**-9
    row[0, 128], row[0, 129] = 3.0, 0.5
    row[0, 300] = -449.0
    row[0, 512], row[0, 575] = 1.5, -2.0
    data = bytes(pack_rows(row, DEEPSEEK)[0].numpy())
    assert data[:2] + data[127:130] == bytes([0x7E, 0xB8, 0x01, 0x7C, 0x68])
    assert data[300] == 0xF6  # -224 * 2 is next to -449
    assert struct.unpack("<4f", data[512:528]) == (1.0, 2.0**-7, 2.0, 2.0**-13)
    assert data[528:530] + data[654:656] == bytes([0xC0, 0x3F, 0x00, 0xC0])
    assert not any(data[2:127])
    assert not any(data[530:654])


def test_rows_are_whole_words_and_unequal_forms_have_unequal_names() -> None:
    names = set()
    for latent in range(1, 400, 7):
        for rope in (0, 1, 2, 31, 64):
            packing = RowPacking(latent, rope)
            assert packing.nbytes % 8 == 0
            assert 0 <= packing.nbytes - (latent + 4 * -(-latent // 128) + 2 * rope) < 3 + 8
            names.add(packing.scale_format)
    assert len(names) == len(range(1, 400, 7)) * 5


def test_what_is_lost(packing: RowPacking, seed: int) -> None:
    """A sixteenth of a number at most, or 2^-17 of the largest in its tile; the rope part is rounded."""
    rows_TW = random_rows(packing)
    packed = pack_rows(rows_TW, packing)
    got_TW = unpack_rows(packed, packing, torch.float32)
    assert torch.equal(got_TW[:, packing.latent_dim :], rows_TW[:, packing.latent_dim :].bfloat16().float())
    for first in range(0, packing.latent_dim, 128):
        tile, got = (x[:, first : min(first + 128, packing.latent_dim)].double() for x in (rows_TW, got_TW))
        largest = tile.abs().amax(1, keepdim=True).clamp(min=448e-4)
        error = (got - tile).abs()
        assert (error <= torch.maximum(tile.abs() / 16, largest * 2.0**-17)).all(), seed
        at = packing.scales_at + first // 128 * 4
        scale = packed[:, at : at + 4].contiguous().view(torch.float32).double()
        assert torch.equal(scale, 2.0 ** scale.log2().round())
        assert (scale >= largest / 448 * (1 - 1e-6)).all()
        assert (scale < largest / 224 * (1 + 1e-6)).all()
        moderate = tile.abs() > largest * 2.0**-14
        assert (error[moderate] / tile.abs()[moderate]).square().mean().sqrt() < 0.03


def test_both_common_types_hold_the_numbers_exactly(packing: RowPacking) -> None:
    packed = pack_rows(random_rows(packing), packing)
    assert torch.equal(
        unpack_rows(packed, packing, torch.bfloat16).float(), unpack_rows(packed, packing, torch.float32)
    )
    again = pack_rows(unpack_rows(packed, packing, torch.bfloat16), packing)
    assert torch.equal(unpack_rows(again, packing, torch.float32), unpack_rows(packed, packing, torch.float32))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_tile_that_is_not_finite_stays_so(backend: AttentionBackend, value: float) -> None:
    rows_TW = torch.randn(3, 576)
    rows_TW[1, 200] = value
    cache = empty(DEEPSEEK, 2)
    tables = GroupTables(torch.tensor([[1]], dtype=torch.int32), torch.arange(16, 19), 16)
    backend.write_rows(rows_TW, cache, tables, DEEPSEEK)
    got = backend.read_rows(cache, torch.tensor([1]), torch.float32, DEEPSEEK)[:3]
    assert got[1, 128:256].isnan().all()
    got[1, 128:256] = 0.0
    assert got.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_written_and_read(backend: AttentionBackend, packing: RowPacking, dtype: torch.dtype) -> None:
    """The same bytes by each backend; others' are left alone."""
    rows_TW = torch.cat((random_rows(packing, 33), torch.randn(33, 3)), 1).clamp(-6e4, 6e4).to(dtype)
    rows_TW = rows_TW[:, : packing.dim]
    slots_T = torch.randperm(5 * 32)[:33]
    cache = empty(packing, 5, 32)
    before = cache.clone()
    backend.write_rows(rows_TW, cache, GroupTables(torch.zeros(1, 5, dtype=torch.int32), slots_T, 32), packing)
    before[slots_T // 32, 0, 0, slots_T % 32] = pack_rows(rows_TW, packing)
    assert torch.equal(cache, before)
    ids = torch.tensor([3, 0, 4, 1])
    want = unpack_rows(cache[ids, 0, 0].flatten(0, 1), packing, dtype)
    got = backend.read_rows(cache, ids, dtype, packing)
    assert got.dtype == dtype
    assert torch.equal(got.nan_to_num(nan=7.0), want.nan_to_num(nan=7.0))


@pytest.mark.parametrize("isa", cpu.available(), ids=lambda isa: isa.name.lower())
def test_every_byte_is_read_as_torch_reads_it(isa: cpu.Isa) -> None:
    packing = RowPacking(256)
    cache = empty(packing, 1)
    scales = torch.tensor([2.0**-13, 2.0**20]).view(torch.uint8)
    cache[0, 0, 0, :, :256] = torch.arange(256, dtype=torch.uint8)
    cache[0, 0, 0, :, 256:264] = scales
    got = CpuBackend(isa).read_rows(cache, torch.tensor([0]), torch.float32, packing)
    want = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    want[:128] *= 2.0**-13
    want[128:] *= 2.0**20
    torch.testing.assert_close(got, want.expand(16, -1), rtol=0, atol=0, equal_nan=True)


class PackedCase(Case):
    """A case whose rows are packed; `plain`: the same with what they hold as bfloat16."""

    def __init__(self, spans: list[tuple[int, int]], packing: RowPacking, **more: object) -> None:
        values = slice(0, packing.latent_dim)
        super().__init__(spans, width=packing.dim, values=values, **more)  # type: ignore[arg-type]
        self.packing, size = packing, self.tables.block_size
        self.plain = self.cache.new_full(self.cache.shape, float("nan"), dtype=torch.bfloat16)
        self.cache = empty(packing, self.plain.shape[0], size)
        for s, (a, n) in enumerate(spans):
            block_ids = self.tables.block_tables_SB[s].long()
            positions = torch.arange(a + n)
            place = (block_ids[positions // size], 0, 0, positions % size)
            packed = pack_rows(self.rows[s][:, 0], packing)
            self.cache[place] = packed
            self.rows[s] = unpack_rows(packed, packing, torch.bfloat16)[:, None]
            self.plain[place] = self.rows[s][:, 0]

    def attend(self, backend: AttentionBackend, selected: Selection | None = None) -> Tensor:
        self.ctx.scratch.clear()
        rows, given = self.cache[:, 0], (self.values, self.tables, self.ctx, 0.3, selected)
        return backend.attend_rows(self.q_THD, rows, *given, packing=self.packing)

    def attend_plain(self, backend: AttentionBackend, selected: Selection | None = None) -> Tensor:
        self.ctx.scratch.clear()
        return backend.attend_rows(self.q_THD, self.plain[:, 0], self.values, self.tables, self.ctx, 0.3, selected)


@pytest.mark.parametrize("spans", SPANS, ids=["first", "prompt", "decode", "chunks", "mixed"])
@pytest.mark.parametrize("form", [RowPacking(24, 8), RowPacking(33, 7), RowPacking(256, 20)])
def test_attention(backend: AttentionBackend, spans: list[tuple[int, int]], form: RowPacking) -> None:
    case = PackedCase(spans, form)
    case.check(backend, tolerance=3e-5)
    case.check(backend, case.chosen(33), tolerance=3e-5)


@pytest.mark.parametrize("heads", [1, 5, 64, 53])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("isa", cpu.available(), ids=lambda isa: isa.name.lower())
def test_kernels_give_what_they_give_for_the_same_numbers_in_bfloat16(
    isa: cpu.Isa, dtype: torch.dtype, heads: int
) -> None:
    """To the bit, so all that holds of any chunk and batch of those holds here."""
    backend = CpuBackend(isa)
    case = PackedCase([(700, 1), (3, 1), (21, 40), (0, 9)], DEEPSEEK, heads=heads, dtype=dtype)
    assert torch.equal(case.attend(backend), case.attend_plain(backend))
    chosen = case.chosen(150)
    assert torch.equal(case.attend(backend, chosen), case.attend_plain(backend, chosen))
    windowed = replace(case.tables, window=37)
    case.tables = windowed
    assert torch.equal(case.attend(backend), case.attend_plain(backend))


def test_log_sums(backend: AttentionBackend) -> None:
    case = PackedCase([(90, 2), (0, 20)], RowPacking(40, 8))
    sums, plain = torch.empty(2, 22, 6)
    given = case.values, case.tables, case.ctx, 0.3, None
    backend.attend_rows(case.q_THD, case.cache[:, 0], *given, sums, packing=case.packing)
    case.ctx.scratch.clear()
    backend.attend_rows(case.q_THD, case.plain[:, 0], *given, plain)
    torch.testing.assert_close(sums, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [128, 40, 64])
def test_selection(backend: AttentionBackend, dtype: torch.dtype, width: int) -> None:
    """What the same keys in bfloat16 give, by the same backend."""
    form = RowPacking(width)
    case = PackedCase([(3000, 2), (300, 1), (1023, 3), (40, 30)], form, heads=20, dtype=dtype)
    weights_TH = torch.randn(len(case.own), 20)
    case.ctx.scratch.clear()
    given = case.tables, case.ctx, 0.25, 48
    found = backend.select(case.q_THD, weights_TH, case.cache[:, 0, 0], *given, form)
    case.cache = case.plain
    want = select(case, backend, weights_TH, 48)
    assert torch.equal(found.positions_TK, want.positions_TK)
    assert torch.equal(found.counts_T, want.counts_T)


def test_most_of_a_selection_survives_eight_bits() -> None:
    """DeepSeek-V3.2's indexer, 64 heads of 128: of the best 256 among 2048 random keys."""
    backend = CpuBackend()
    case = Case([(2047, 1)], heads=64, width=128, values=slice(0, 128))
    packed = PackedCase([(2047, 1)], KEY, heads=64)
    block_ids = packed.tables.block_tables_SB[0].long()
    packed.cache[block_ids, 0, 0] = pack_rows(case.rows[0][:, 0], KEY).view(-1, 16, KEY.nbytes)
    weights_TH = torch.randn(1, 64)
    exact = set(select(case, backend, weights_TH, 256).positions_TK[0].tolist())
    given = packed.tables, packed.ctx, 0.25, 256
    found = backend.select(case.q_THD, weights_TH, packed.cache[:, 0, 0], *given, KEY).positions_TK[0]
    kept = len(exact & set(found.tolist())) / 256
    assert kept > 0.93, kept


def test_the_reference_reads_no_other_blocks() -> None:
    case = PackedCase([(100, 1), (20, 3)], RowPacking(24, 8))
    seen = ReferenceBackend().attend_rows(
        case.q_THD, case.cache[:, 0], case.values, case.tables, case.ctx, 0.3, packing=case.packing
    )
    assert seen.isfinite().all()
    assert (seen - case.expected()).abs().max() < 3e-5
