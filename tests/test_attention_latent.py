"""Attention over rows of key and value, and the indexer's choice, against dense formulas in float64.

Fresh random inputs on every run; on the reference backend and on every instruction set of the CPU kernels.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from test_attention_reference import NoPool
from torch import Tensor

from common.attention.context import AttentionBackend, AttentionContext, GroupTables, HostLengths, Selection
from common.attention.cpu import CpuBackend
from common.attention.latent import Part, split
from common.attention.reference import ReferenceBackend
from common.kernels import cpu

BACKENDS = [ReferenceBackend(), *(CpuBackend(isa) for isa in cpu.available())]
SPANS = [
    [(0, 1)],
    [(0, 40)],
    [(37, 1), (5, 1), (200, 1), (0, 1), (63, 1)],
    [(16, 16), (7, 30), (0, 2)],
    [(50, 1), (0, 19), (13, 1), (90, 25), (300, 1), (600, 1)],
]


@pytest.fixture(
    params=BACKENDS,
    ids=lambda b: b.name if b.name == "reference" else b._isa.name.lower(),  # type: ignore[attr-defined]
)
def backend(request: pytest.FixtureRequest) -> AttentionBackend:
    found: AttentionBackend = request.param
    return found


@pytest.fixture
def threads() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


class Case:
    """Rows of some sequences in shuffled blocks of a pool that holds NaN elsewhere."""

    def __init__(
        self,
        spans: list[tuple[int, int]],
        *,
        heads: int = 6,
        units: int = 1,
        width: int = 24,
        values: slice = slice(0, 16),
        row_width: int = 0,
        block_size: int = 16,
        dtype: torch.dtype = torch.float32,
        kv_dtype: torch.dtype | None = None,
        first: int = 0,
    ) -> None:
        """`spans`: (tokens cached before, new tokens) of each sequence; `width`: of queries and keys.

        Positions below `first` hold nothing.
        """
        self.seed = random.randrange(2**31)
        torch.manual_seed(self.seed)
        self.spans, self.values, kv_dtype = spans, values, kv_dtype or dtype
        self.first = first
        counts = [n for _, n in spans]
        row_width = row_width or max(width, values.stop)
        self.rows = [torch.randn(a + n, units, row_width).to(kv_dtype) for a, n in spans]
        self.q_THD = torch.randn(sum(counts), heads, width).to(dtype)
        blocks = [-(-(a + n) // block_size) for a, n in spans]
        ids = torch.randperm(sum(blocks) + 3).tolist()
        pool = torch.full((len(ids), 3, units, block_size, row_width), float("nan"), dtype=kv_dtype)
        self.cache = pool[:, 1:2]
        tables = torch.zeros(len(spans), max(blocks), dtype=torch.int32)
        slots = []
        for s, (a, n) in enumerate(spans):
            held = [ids.pop() for _ in range(blocks[s])]
            tables[s, : len(held)] = torch.tensor(held)
            for p in range(first, a + n):
                self.cache[held[p // block_size], 0, :, p % block_size] = self.rows[s][p]
            slots += [held[p // block_size] * block_size + p % block_size for p in range(a, a + n)]
        self.tables = GroupTables(tables, torch.tensor(slots), block_size, first=first)
        self.ctx = AttentionContext(
            query_starts_S1=torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32),
            seq_lens_S=torch.tensor([a + n for a, n in spans], dtype=torch.int32),
            max_query_len=max(counts),
            max_seq_len=max(a + n for a, n in spans),
            groups={"full": self.tables},
            kv=NoPool(),
            backend=ReferenceBackend(),
        )
        self.own = [p for a, n in spans for p in range(a, a + n)]  # position of each token
        self.sequence = [s for s, (_, n) in enumerate(spans) for _ in range(n)]

    def chosen(self, most: int) -> Selection:
        """A random few of what each token sees."""
        positions_TK = torch.full((len(self.own), most), -1, dtype=torch.int32)
        counts_T = torch.empty(len(self.own), dtype=torch.int32)
        for t, own in enumerate(self.own):
            some = sorted(random.sample(range(own + 1), random.randrange(1, min(own + 1, most) + 1)))
            positions_TK[t, : len(some)] = torch.tensor(some)
            counts_T[t] = len(some)
        return Selection(positions_TK, counts_T)

    def attend(self, backend: AttentionBackend, selected: Selection | None = None) -> Tensor:
        self.ctx.scratch.clear()
        return backend.attend_rows(self.q_THD, self.cache[:, 0], self.values, self.tables, self.ctx, 0.3, selected)

    def expected(self, selected: Selection | None = None) -> Tensor:
        out = []
        for t, (s, own) in enumerate(zip(self.sequence, self.own, strict=True)):
            seen = torch.arange(self.first, own + 1)
            if selected is not None:
                seen = selected.positions_TK[t, : int(selected.counts_T[t])].long()
            rows = self.rows[s][seen].double().repeat_interleave(self.q_THD.shape[1] // self.rows[s].shape[1], dim=1)
            scores = torch.einsum("hd,lhd->hl", self.q_THD[t].double(), rows[..., : self.q_THD.shape[2]]) * 0.3
            out.append(torch.einsum("hl,lhd->hd", scores.softmax(-1), rows[..., self.values]))
        return torch.stack(out)

    def check(self, backend: AttentionBackend, selected: Selection | None = None, tolerance: float = 5e-6) -> None:
        got, want = self.attend(backend, selected), self.expected(selected)
        assert got.shape == want.shape
        assert got.dtype == self.q_THD.dtype
        error = (got.double() - want).abs().max().item()
        assert error < tolerance, f"off by {error} with seed {self.seed}"


@pytest.mark.parametrize("spans", SPANS, ids=["first", "prompt", "decode", "chunks", "mixed"])
def test_latent_rows(backend: AttentionBackend, spans: list[tuple[int, int]]) -> None:
    case = Case(spans)
    case.check(backend)
    case.check(backend, case.chosen(33))


@pytest.mark.parametrize("spans", [[(1, 1)], [(20, 1), (17, 40)], [(530, 3), (1, 20)]], ids=["second", "mixed", "far"])
def test_positions_that_hold_nothing_are_not_seen(backend: AttentionBackend, spans: list[tuple[int, int]]) -> None:
    Case(spans, first=1).check(backend)


@pytest.mark.parametrize("heads", [1, 5, 64, 128, 53])
@pytest.mark.parametrize(("width", "values", "block_size"), [(40, slice(0, 33), 16), (20, slice(0, 12), 48)])
def test_any_number_of_heads_shares_a_row(
    backend: AttentionBackend, heads: int, width: int, values: slice, block_size: int
) -> None:
    case = Case([(70, 1), (3, 1), (21, 40)], heads=heads, width=width, values=values, block_size=block_size)
    case.check(backend, tolerance=2e-5)
    case.check(backend, case.chosen(9), tolerance=2e-5)


@pytest.mark.parametrize("values", [slice(24, 40), slice(24, 56), slice(24, 48)])
def test_rows_of_keys_and_values_per_head(backend: AttentionBackend, values: slice) -> None:
    """As expanded latents are: a value may be narrower or wider than a key."""
    case = Case([(0, 90), (40, 3), (10, 1)], heads=4, units=4, values=values)
    case.check(backend)
    case.check(backend, case.chosen(100))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_types(backend: AttentionBackend, dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    tolerance = max({torch.float32: 5e-6, torch.float16: 8e-3, torch.bfloat16: 6e-2}[t] for t in (dtype, kv_dtype))
    case = Case([(100, 1), (30, 20), (3, 1), (600, 2)], dtype=dtype, kv_dtype=kv_dtype)
    case.check(backend, tolerance=tolerance)
    case.check(backend, case.chosen(200), tolerance)


@pytest.mark.usefixtures("threads")
def test_everything_selected_is_dense(backend: AttentionBackend) -> None:
    case = Case([(1100, 1), (500, 30), (0, 4)], heads=80)
    counts_T = torch.tensor(case.own, dtype=torch.int32) + 1
    everything = torch.arange(1101, dtype=torch.int32).expand(len(case.own), -1).contiguous()
    dense, sparse = case.attend(backend), case.attend(backend, Selection(everything, counts_T))
    if backend.name == "cpu":
        assert torch.equal(dense, sparse)
    assert (dense - sparse).abs().max() < 1e-5


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("isa", cpu.available(), ids=lambda isa: isa.name.lower())
def test_a_token_gets_the_same_bits_in_any_chunk_and_batch(isa: cpu.Isa) -> None:
    backend = CpuBackend(isa)
    whole = Case([(0, 700), (0, 90), (0, 1)], heads=64)
    some = whole.chosen(150)
    dense, sparse = whole.attend(backend), whole.attend(backend, some)
    for first, count in ((699, 1), (0, 700), (130, 17), (512, 188), (63, 2)):
        tokens = slice(first, first + count)
        part = Case([(first, count)], heads=64)
        for p in range(first + count):
            part.cache[part.tables.block_tables_SB[0, p // 16].long(), 0, :, p % 16] = whole.rows[0][p]
        part.q_THD = whole.q_THD[tokens]
        assert torch.equal(part.attend(backend), dense[tokens])
        chosen = Selection(some.positions_TK[tokens], some.counts_T[tokens])
        assert torch.equal(part.attend(backend, chosen), sparse[tokens])


def test_write_rows(backend: AttentionBackend) -> None:
    case = Case([(7, 30), (0, 2), (12, 1)], kv_dtype=torch.bfloat16)
    packed = torch.randn(33, 30)
    before = case.cache.clone()
    backend.write_rows(packed[:, 3:27], case.cache, case.tables)
    for t, (s, own) in enumerate(zip(case.sequence, case.own, strict=True)):
        block = int(case.tables.block_tables_SB[s, own // 16])
        before[block, 0, 0, own % 16] = packed[t, 3:27].bfloat16()
    assert torch.equal(case.cache.nan_to_num(nan=-1.0), before.nan_to_num(nan=-1.0))


def select(case: Case, backend: AttentionBackend, weights_TH: Tensor, top_k: int) -> Selection:
    case.ctx.scratch.clear()
    return backend.select(case.q_THD, weights_TH, case.cache[:, 0, 0], case.tables, case.ctx, 0.25, top_k)


def index_scores(case: Case, weights_TH: Tensor, t: int) -> Tensor:
    keys = case.rows[case.sequence[t]][: case.own[t] + 1, 0].double()
    return weights_TH[t].double() @ (case.q_THD[t].double() @ keys.T * 0.25).relu()


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("spans", [*SPANS, [(3000, 2), (1023, 3), (2047, 40)]])
@pytest.mark.parametrize(("dtype", "heads"), [(torch.float32, 20), (torch.bfloat16, 20), (torch.bfloat16, 120)])
def test_select_takes_the_best(
    backend: AttentionBackend, spans: list[tuple[int, int]], dtype: torch.dtype, heads: int
) -> None:
    case = Case(spans, heads=heads, width=64, values=slice(0, 32), dtype=dtype)
    weights_TH = torch.randn(len(case.own), heads + 1)[:, 1:]
    found = select(case, backend, weights_TH, 48)
    for t, own in enumerate(case.own):
        count = min(48, own + 1)
        assert found.counts_T[t] == count
        taken = found.positions_TK[t, :count].long()
        assert (found.positions_TK[t, count:] == -1).all()
        assert (taken.diff() > 0).all()
        assert taken[0] >= 0
        assert taken[-1] <= own
        scores = index_scores(case, weights_TH, t)
        left = torch.ones(own + 1, dtype=torch.bool).index_fill_(0, taken, False)
        if left.any():
            assert scores[taken].min() > scores[left].max() - 1e-4 * heads / 20


@pytest.mark.parametrize("top_k", [1, 7, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_scores_go_to_lower_positions(backend: AttentionBackend, dtype: torch.dtype, top_k: int) -> None:
    """Small whole numbers: scores are exact, and most of them, zeros of both signs too, occur many times."""
    case = Case([(300, 3), (1500, 1), (0, 20)], heads=3, width=32, values=slice(0, 16), dtype=dtype)
    for s, rows in enumerate(case.rows):
        rows.copy_(torch.randint(-1, 2, rows.shape))
        for p in range(rows.shape[0]):
            case.cache[case.tables.block_tables_SB[s, p // 16].long(), 0, :, p % 16] = rows[p]
    case.q_THD = torch.randint(-1, 2, case.q_THD.shape).to(dtype)
    weights_TH = torch.randint(-2, 3, (len(case.own), 3)).float()
    weights_TH[0] = -1.0
    found = select(case, backend, weights_TH, top_k)
    for t, own in enumerate(case.own):
        scores = index_scores(case, weights_TH, t).tolist()
        best = sorted(sorted(range(own + 1), key=lambda p: (-scores[p], p))[:top_k])
        assert found.positions_TK[t, : len(best)].tolist() == best


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("isa", cpu.available(), ids=lambda isa: isa.name.lower())
def test_a_selection_depends_on_its_sequence_alone(isa: cpu.Isa, dtype: torch.dtype) -> None:
    backend = CpuBackend(isa)
    whole = Case([(0, 600), (40, 9)], heads=16, width=32, values=slice(0, 32), dtype=dtype)
    weights_TH = torch.randn(len(whole.own), 16)
    found = select(whole, backend, weights_TH, 100)
    for first, count in ((599, 1), (90, 200), (0, 300)):
        part = Case([(first, count)], heads=16, width=32, values=slice(0, 32), dtype=dtype)
        for p in range(first + count):
            part.cache[part.tables.block_tables_SB[0, p // 16].long(), 0, :, p % 16] = whole.rows[0][p]
        part.q_THD = whole.q_THD[first : first + count]
        again = select(part, backend, weights_TH[first : first + count], 100)
        assert torch.equal(again.positions_TK, found.positions_TK[first : first + count])


def test_a_step_is_split_by_each_sequence_alone() -> None:
    case = Case([(50, 1), (0, 19), (200, 1), (13, 2), (190, 25), (0, 30)])
    parts = split(case.tables, case.ctx, max_absorbed=2, top_k=150)
    assert parts.absorbed is not None
    assert parts.expanded is not None
    assert parts.sparse is not None
    numbers = torch.arange(len(case.own))
    assert parts.absorbed.take(numbers).tolist() == [0, *range(21, 23)]
    assert parts.expanded.take(numbers).tolist() == [*range(1, 20), *range(48, 78)]
    assert parts.sparse.take(numbers).tolist() == [20, *range(23, 48)]
    assert split(case.tables, case.ctx, 2, 150) is parts

    def attend(part: Part) -> Tensor:
        q_THD = part.take(case.q_THD)
        return ReferenceBackend().attend_rows(q_THD, case.cache[:, 0], case.values, part.tables, part.ctx, 0.3)

    want = case.expected()
    for part in (parts.absorbed, parts.expanded, parts.sparse):
        assert (attend(part) - part.take(want)).abs().max() < 5e-6
    gathered = parts.expanded.gathered
    rows = case.cache[gathered.block_ids_N, 0]
    again = replace(parts.expanded, tables=gathered.tables)
    got = ReferenceBackend().attend_rows(
        again.take(case.q_THD), rows, case.values, again.tables, replace(again.ctx, scratch={}), 0.3
    )
    assert (got - parts.expanded.take(want)).abs().max() < 5e-6


@pytest.mark.parametrize("max_tokens", [1, 7, 40, 1000])
def test_a_part_in_bands(max_tokens: int) -> None:
    case = Case([(50, 1), (0, 19), (200, 1), (13, 2), (190, 25), (0, 30)])
    part = split(case.tables, case.ctx, max_absorbed=2, top_k=150).expanded
    assert part is not None
    bands = part.bands(max_tokens)
    assert part.bands(max_tokens) is bands
    assert len(bands) == -(-49 // max_tokens)
    q_THD, want = part.take(case.q_THD), part.take(case.expected())
    for band in bands:
        got = ReferenceBackend().attend_rows(
            band.take(q_THD), case.cache[:, 0], case.values, band.tables, band.ctx, 0.3
        )
        assert (got - band.take(want)).abs().max() < 5e-6
    assert sum(len(band.take(q_THD)) for band in bands) == 49


@pytest.mark.parametrize("max_positions", [1, 80, 300, 9999])
def test_a_part_in_lots_of_sequences(max_positions: int) -> None:
    """Positions lined up one after the other, without those below the first, are the same rows as in blocks."""
    case = Case([(50, 3), (2, 19), (200, 3), (13, 5), (190, 25), (0, 30)], first=0)
    part = split(case.tables, case.ctx, max_absorbed=2).expanded
    assert part is not None
    lots = part.lots(max_positions)
    assert part.lots(max_positions) is lots
    sizes = [int(lot.ctx.seq_lens_S.sum()) for lot in lots]
    assert all(n <= max_positions or len(lot.ctx.seq_lens_S) == 1 for n, lot in zip(sizes, lots, strict=True))
    assert len(lots) == {1: 6, 80: 5, 300: 2, 9999: 1}[max_positions]
    pieces, seen = [], []
    for lot in lots:
        lined_up = lot.ragged
        rows = case.cache[lined_up.slots_P // 16, 0, 0, lined_up.slots_P % 16]
        pieces += rows.split(torch.from_numpy(lined_up.key_starts_S1).diff().tolist())
        seen += lot.take(torch.arange(len(case.own))).tolist()
    assert seen == list(range(len(case.own)))
    assert all(torch.equal(piece, rows[:, 0]) for piece, rows in zip(pieces, case.rows, strict=True))


def test_a_prompt_alone_is_new() -> None:
    part = split(*(lambda c: (c.tables, c.ctx))(Case([(0, 30), (0, 9)], first=0)), max_absorbed=2).expanded
    assert part is not None
    assert part.ragged.is_new
    later = split(*(lambda c: (c.tables, c.ctx))(Case([(1, 30), (1, 9)], first=1)), max_absorbed=2).expanded
    assert later is not None
    assert later.ragged.is_new
    assert later.ragged.key_starts_S1.tolist() == [0, 30, 39]


def test_lengths_of_the_host_are_taken_and_a_recorded_step_is_one_part() -> None:
    case = Case([(50, 1), (20, 1)])
    host = HostLengths(case.ctx.query_starts_S1.numpy().copy(), case.ctx.seq_lens_S.numpy().copy())
    case.ctx.seq_lens_S.fill_(-1)
    ctx = replace(case.ctx, host=host, scratch={})
    parts = split(case.tables, ctx, max_absorbed=2, top_k=30)
    assert parts.absorbed is not None
    assert parts.sparse is not None
    assert parts.sparse.ctx.host is not None
    assert parts.sparse.ctx.host.seq_lens_S.tolist() == [51]
    recorded = replace(case.ctx, graph=2, scratch={})
    assert split(case.tables, recorded, 2).absorbed == Part(slice(0, 2), case.tables, recorded)
    sparse = split(case.tables, recorded, 2, 30).sparse
    assert sparse == Part(slice(0, 2), case.tables, recorded)
    assert sparse.bands(1) == (sparse,)


def test_a_step_of_one_kind_is_not_copied() -> None:
    case = Case([(50, 1), (200, 1)])
    parts = split(case.tables, case.ctx, max_absorbed=2)
    assert parts.absorbed is not None
    assert parts.expanded is parts.sparse is None
    assert parts.absorbed.tables is case.tables
    assert parts.absorbed.take(case.q_THD).data_ptr() == case.q_THD.data_ptr()


@pytest.mark.parametrize("spans", SPANS)
@pytest.mark.parametrize("window", [0, 5, 40])
def test_log_sums_join_what_disjoint_rows_gave(
    backend: AttentionBackend, threads: object, spans: list[tuple[int, int]], window: int
) -> None:
    case = Case(spans, heads=56, width=24, values=slice(0, 24))
    tables = replace(case.tables, window=window)
    ctx, shape = replace(case.ctx, scratch={}), case.q_THD.shape[:2]
    chosen = case.chosen(20)
    for selected in (None, *([] if window else [chosen])):
        got = torch.empty(shape)
        given = case.q_THD, case.cache[:, 0], case.values, tables, ctx, 0.3, selected
        out = backend.attend_rows(*given, log_sums_TH=got)
        torch.testing.assert_close(out, backend.attend_rows(*given), rtol=1e-5, atol=1e-5)
        for t, (s, own) in enumerate(zip(case.sequence, case.own, strict=True)):
            seen = torch.arange(max(0, own + 1 - window) if window else 0, own + 1)
            if selected is not None:
                seen = selected.positions_TK[t, : int(selected.counts_T[t])].long()
            scores = case.q_THD[t].double() @ case.rows[s][seen, 0].double().T * 0.3
            torch.testing.assert_close(got[t].double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)
