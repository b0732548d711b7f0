"""The latent backend of GPUs with the libraries that are there: every way through it, at DeepSeek's widths, against
formulas in float64; recorded steps replayed with other lengths; and whole layers against the CPU's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from latent_gpu_support import LAYERS, SCALE, LatentCase
from torch import Tensor

from common.attention.context import AttentionContext, GroupTables, HostLengths
from common.attention.cpu import CpuBackend
from common.attention.fixed import FixedBackend
from common.attention.flashmla import FlashMlaBackend
from common.attention.latent import Part, on_device
from common.attention.reference import ReferenceBackend
from common.kvcache.layout import KVPlace
from common.layers.base import Build
from common.layers.indexer import Indexer
from common.layers.mla import MLA
from common.layers.mla_spec import IndexerSpec, MLASpec
from common.layers.rope import Rope
from common.layers.rope_spec import RopeSpec
from common.layers.step import MAIN_ROPE, Step

pytestmark = pytest.mark.gpu

TOLERANCE = 2e-2  # of bfloat16 products
DECODE = [(1000, 1), (5, 1), (64, 1), (0, 1), (63, 1), (3000, 1), (127, 1)]


@pytest.fixture
def backend(cuda: torch.device) -> FlashMlaBackend:
    return FlashMlaBackend()


def attend(backend: FlashMlaBackend, case: LatentCase, selected: Any = None) -> Tensor:
    values = slice(0, case.value_dim)
    return backend.attend_rows(
        case.q_THD, case.cache[:, 0], values, case.tables, case.ctx, SCALE, selected, packing=case.packing
    )


@pytest.mark.parametrize("heads", [16, 128, 5])
@pytest.mark.parametrize(
    "spans",
    [DECODE, [(a, 3) for a, _ in DECODE], [(50, 1), (0, 19), (700, 40), (13, 1)]],
    ids=["decode", "verify", "mixed"],
)
@pytest.mark.parametrize("packed", [False, True])
def test_all_positions(backend: FlashMlaBackend, cuda: torch.device, spans: Any, heads: int, packed: bool) -> None:
    case = LatentCase(spans, cuda, heads=heads, packed=packed)
    case.check(attend(backend, case), case.expected()[0], TOLERANCE)
    case.check(attend(backend, case), case.expected()[0], TOLERANCE)  # with what the first layer has left


def test_empty_first_position(backend: FlashMlaBackend, cuda: torch.device) -> None:
    case = LatentCase([(100, 2), (1, 2)], cuda, heads=16, first=1)
    case.check(attend(backend, case), case.expected()[0], TOLERANCE)


@pytest.mark.parametrize("heads", [16, 64, 128])
@pytest.mark.parametrize("spans", [DECODE, [(0, 400), (2000, 300)]], ids=["decode", "prompts"])
@pytest.mark.parametrize("packed", [False, True])
def test_selected_positions(backend: FlashMlaBackend, cuda: torch.device, spans: Any, heads: int, packed: bool) -> None:
    case = LatentCase(spans, cuda, heads=heads, packed=packed)
    for full in (True, False):
        selected = case.chosen(128, full=full)
        case.check(attend(backend, case, selected), case.expected(selected)[0], TOLERANCE)
        case.ctx.scratch.clear()


@pytest.mark.parametrize("packed", [False, True])
def test_selection(backend: FlashMlaBackend, cuda: torch.device, packed: bool) -> None:
    """As the reference backend chooses, where scores are not near to each other: equal products, other weights."""
    spans = [(a, 2) for a, _ in DECODE]
    case = LatentCase(spans, cuda, heads=64, value_dim=128, rest=0, packed=packed)
    weights_TH = torch.randn(len(case.own), 64, device=cuda)
    case.q_THD = case.q_THD.sign()
    args = (case.q_THD, weights_TH, case.cache[:, 0, 0], case.tables, case.ctx, 0.5, 256, case.packing)
    got, want = backend.select(*args), ReferenceBackend().select(*args)
    assert torch.equal(got.counts_T, want.counts_T)
    same = [
        len(set(a[:n].tolist()) & set(b[:n].tolist())) / n
        for a, b, n in zip(got.positions_TK, want.positions_TK, want.counts_T.tolist(), strict=True)
    ]
    assert min(same) > 0.98
    assert bool((got.positions_TK.diff(dim=1)[:, :] > 0)[got.counts_T == 256].all())


@pytest.mark.parametrize(("qk_dim", "v_dim"), [(192, 128), (256, 256)])
@pytest.mark.parametrize("first", [0, 1])
def test_ragged_prompts(backend: FlashMlaBackend, cuda: torch.device, qk_dim: int, v_dim: int, first: int) -> None:
    if not backend.ragged.able(torch.bfloat16, qk_dim, v_dim):
        pytest.skip("FlashInfer's prompts are not to be had here")
    case = LatentCase([(first, 300), (777, 130), (64, 65)], cuda, heads=4, first=first)
    part = Part(slice(0, len(case.own)), case.tables, case.ctx)
    lined_up = part.ragged
    num_positions, heads = lined_up.slots_P.shape[0], 4
    q = torch.randn(len(case.own), heads, qk_dim, device=cuda).bfloat16()
    k, kv = (torch.randn(num_positions, heads, n, device=cuda).bfloat16() for n in (qk_dim, qk_dim + v_dim))
    out = torch.full((len(case.own), heads, v_dim), float("nan"), device=cuda).bfloat16()
    backend.ragged.attend(q, k, kv[..., qk_dim:], part, SCALE, out)
    for t, (s, own) in enumerate(case.places()):
        begin = int(lined_up.key_starts_S1[s])
        seen = slice(begin, begin + own - first + 1)
        scores = torch.einsum("hd,lhd->hl", q[t].double(), k[seen].double()) * SCALE
        want = torch.einsum("hl,lhd->hd", scores.softmax(-1), kv[seen, :, qk_dim:].double())
        assert (out[t].double() - want).norm() < TOLERANCE * want.norm()


@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("selects", [False, True])
def test_replays_with_other_lengths(
    backend: FlashMlaBackend, cuda: torch.device, heads: int, packed: bool, selects: bool
) -> None:
    """A step is recorded as padding, one block; a replay gives, bit by bit, what the same step not recorded gives."""
    cases = [LatentCase([(a + more, 1) for a, _ in DECODE], cuda, heads=heads, packed=packed) for more in (0, 900)]
    first = cases[0]
    width = max(c.tables.block_tables_SB.shape[1] for c in cases)
    tables = torch.zeros(len(DECODE), width, dtype=torch.int32, device=cuda)
    lens = torch.ones(len(DECODE), dtype=torch.int32, device=cuda)
    pool = torch.zeros_like(first.pool if first.pool.shape[0] >= cases[1].pool.shape[0] else cases[1].pool)
    q_THD = torch.zeros_like(first.q_THD)
    index_q = torch.randn(len(DECODE), 64, 128, device=cuda).bfloat16()
    weights_TH = torch.randn(len(DECODE), 64, device=cuda)
    group = GroupTables(tables, torch.zeros(len(DECODE), dtype=torch.int64, device=cuda), 64)
    ctx = replace(
        first.ctx, seq_lens_S=lens, max_seq_len=width * 64, groups={"full": group}, graph=len(DECODE), scratch={}
    )

    def step(ctx: AttentionContext) -> Tensor:
        rows = pool[:, 1]
        selected = None
        if selects:
            index_keys = index_pool[:, 0, 0]
            selected = backend.select(index_q, weights_TH, index_keys, group, ctx, 0.5, 128)
        args = (q_THD, rows[:, 0], slice(0, 512), group, ctx, SCALE, selected)
        return backend.attend_rows(*args, packing=first.packing)

    index_pool = torch.randn(pool.shape[0], 1, 1, 64, index_q.shape[2], device=cuda).bfloat16()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            step(replace(ctx, scratch={}))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(ctx)
    for case in cases:
        tables.zero_()[:, : case.tables.block_tables_SB.shape[1]] = case.tables.block_tables_SB
        lens.copy_(case.ctx.seq_lens_S)
        pool[: case.pool.shape[0]] = case.pool
        q_THD.copy_(case.q_THD)
        out.fill_(float("nan"))
        graph.replay()
        eager = step(replace(ctx, scratch={}))
        assert torch.equal(out, eager)
        if not selects:
            case.check(out, case.expected()[0], TOLERANCE)


# -- layers ------------------------------------------------------------------------------------------------------------

HIDDEN, HEADS, BLOCK = 256, 16, 64
SPEC = MLASpec(q_lora_rank=256, kv_lora_rank=512, nope_dim=128, rope_dim=64, v_dim=128, scale=0.07)
INDEXER = IndexerSpec(num_heads=32, head_dim=128, top_k=128, rope_dim=64, interleaved=False, owners=(True,))
ROPE = RopeSpec()
PLACE, KEYS = KVPlace("mla_latent", "full", 1), KVPlace("indexer_key", "full", 0)


class Paged:
    """A layer with its cache on one device; `step` computes new tokens of some sequences."""

    def __init__(
        self,
        device: torch.device,
        backend: Any,
        indexer: IndexerSpec | None,
        weights: dict[str, Tensor],
        *,
        fixed: bool = False,
    ) -> None:
        build = Build(torch.bfloat16, device, fixed=fixed)
        owned = Indexer(build, HIDDEN, SPEC.q_lora_rank, indexer, KEYS) if indexer else None
        self.layer = MLA(build, HIDDEN, HEADS, SPEC, PLACE, indexer=owned, top_k=indexer.top_k if indexer else 0)
        for slot in self.layer.slots():
            found = weights.setdefault(slot.name, 0.05 * torch.randn(slot.shape) + float("norm.weight" in slot.name))
            slot.target.copy_(found)
        self.layer.derive()
        self.device, self.backend = device, backend
        self.blocks = 40
        self.pools = {
            "mla_latent": torch.full((self.blocks, LAYERS, 1, 1, BLOCK, SPEC.row_dim), float("nan")),
            "indexer_key": torch.full((self.blocks, 1, 1, 1, BLOCK, INDEXER.head_dim), float("nan")),
        }
        self.pools = {name: pool.to(device, torch.bfloat16) for name, pool in self.pools.items()}
        self.rope = Rope(build, ROPE, SPEC.rope_dim, 2048)
        self.done: dict[int, int] = {}

    def region(self, name: str) -> Tensor:
        return self.pools[name]

    def scales(self, name: str) -> None:
        return None

    def step(self, work: list[tuple[int, Tensor]]) -> Tensor:
        counts = [len(x) for _, x in work]
        starts = [self.done.get(s, 0) for s, _ in work]
        positions = torch.cat([torch.arange(a, a + n) for a, n in zip(starts, counts, strict=True)])
        tables_SB = torch.stack([torch.arange(s * 10, s * 10 + 10) for s, _ in work]).int()
        for (s, _), a, n in zip(work, starts, counts, strict=True):
            self.done[s] = a + n
        row_T = torch.repeat_interleave(torch.arange(len(work)), torch.tensor(counts))
        slots_T = tables_SB[row_T, positions // BLOCK].long() * BLOCK + positions % BLOCK
        query_starts = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32).numpy()
        lens = torch.tensor([a + n for a, n in zip(starts, counts, strict=True)], dtype=torch.int32).numpy()
        to = self.device
        tables = GroupTables(tables_SB.to(to), slots_T.to(to), BLOCK, host_tables_SB=tables_SB.numpy())
        ctx = AttentionContext(
            query_starts_S1=on_device(query_starts, to),
            seq_lens_S=on_device(lens, to),
            max_query_len=max(counts),
            max_seq_len=int(lens.max()),
            groups={"full": tables},
            kv=self,
            backend=self.backend,
            host=HostLengths(query_starts, lens),
        )
        positions = positions.to(to)
        step = Step(positions, positions, ctx, {MAIN_ROPE: self.rope(positions)})
        with torch.inference_mode():
            return self.layer(torch.cat([x for _, x in work]).to(to), step).float().cpu()


@pytest.mark.parametrize("sparse", [False, True])
def test_layers_as_on_the_cpu(backend: FlashMlaBackend, cuda: torch.device, sparse: bool) -> None:
    """Prompts, a chunk behind them, decode steps alone and beside a prompt. A choice near its edge may differ."""
    weights: dict[str, Tensor] = {}
    indexer = INDEXER if sparse else None
    one, other = Paged(torch.device("cpu"), CpuBackend(), indexer, weights), Paged(cuda, backend, indexer, weights)
    rounds = [[(0, 200), (1, 90), (2, 5)], [(0, 100), (1, 1)], [(0, 1), (1, 1), (2, 1)], [(2, 1), (3, 150), (1, 3)]]
    for work in rounds:
        xs = [(s, torch.randn(n, HIDDEN).bfloat16()) for s, n in work]
        want, got = one.step(xs), other.step(xs)
        off = (got - want).norm(dim=1) / want.norm(dim=1)
        limit = 0.25 if sparse else 0.04
        assert off.max().item() < limit, (work, off.max())
        assert off.median().item() < 0.03


@pytest.mark.parametrize("sparse", [False, True])
def test_a_fixed_order_gives_the_same_bits_in_any_batch(cuda: torch.device, sparse: bool) -> None:
    """A prompt in one step beside others, in chunks, and token by token."""
    weights: dict[str, Tensor] = {}
    prompt, other = (torch.randn(n, HIDDEN).bfloat16() for n in (150, 90))
    results = []
    for cuts in ([150], [64, 1, 85], [1] * 150):
        paged = Paged(cuda, FixedBackend(), INDEXER if sparse else None, weights, fixed=True)
        out, done = [], 0
        for i, n in enumerate(cuts):
            work = [(0, prompt[done : done + n])]
            if i < 3 and len(cuts) > 1:
                work.append((1, other[30 * i : 30 * i + 30]))
            out.append(paged.step(work)[:n])
            done += n
        results.append(torch.cat(out))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_tokens_that_see_nothing_select_nothing(backend: FlashMlaBackend, cuda: torch.device) -> None:
    case = LatentCase([(3, 1), (0, 1)], cuda, heads=16, value_dim=128, rest=0)
    case.ctx.seq_lens_S.zero_()
    weights_TH = torch.randn(2, 16, device=cuda)
    for most in (4, 0):
        ctx = replace(case.ctx, max_seq_len=most, host=None, scratch={})
        got = backend.select(case.q_THD, weights_TH, case.cache[:, 0, 0], case.tables, ctx, 0.5, 8)
        assert got.counts_T.tolist() == [0, 0]
        assert bool((got.positions_TK == -1).all())
