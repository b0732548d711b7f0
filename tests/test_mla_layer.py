"""Multi-head latent attention and the lightning indexer as layers, against plain formulas in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from common.attention.context import AttentionBackend, AttentionContext, GroupTables
from common.attention.cpu import CpuBackend
from common.attention.packed import pack_rows, unpack_rows
from common.attention.reference import ReferenceBackend
from common.kvcache.layout import KVPlace
from common.kvcache.packing import RowPacking
from common.layers import mla as mla_module
from common.layers.base import Build, TensorParallel
from common.layers.indexer import Indexer
from common.layers.mla import MLA
from common.layers.mla_spec import IndexerSpec, MLASpec
from common.layers.rope import Rope
from common.layers.rope_spec import RopeSpec
from common.layers.step import MAIN_ROPE, Step

HIDDEN, HEADS, BLOCK = 48, 6, 16
SPEC = MLASpec(q_lora_rank=40, kv_lora_rank=24, nope_dim=12, rope_dim=8, v_dim=10, scale=0.3, bias=True)
INDEXER = IndexerSpec(num_heads=16, head_dim=20, top_k=30, rope_dim=8, interleaved=False, owners=(True,))
ROPE = RopeSpec()
PLACE, KEYS = KVPlace("mla_latent", "full", 0), KVPlace("indexer_key", "full", 0)
BUILD = Build(torch.float32, torch.device("cpu"))


PACKINGS = {"mla_latent": SPEC.packing, "indexer_key": INDEXER.packing}


class Paged:
    """One sequence after another in blocks of its own; the layer's cache holds NaN elsewhere."""

    def __init__(self, layer: MLA, backend: AttentionBackend, lens: Sequence[int], *, packed: bool = False) -> None:
        self.layer, self.backend = layer, backend
        counts = [-(-n // BLOCK) for n in lens]
        ids = torch.randperm(sum(counts) + 2).int()
        self.tables = [ids[sum(counts[:s]) : sum(counts[: s + 1])] for s in range(len(lens))]
        self.pools = {
            "mla_latent": torch.full((len(ids), 1, 1, 1, BLOCK, SPEC.row_dim), float("nan")),
            "indexer_key": torch.full((len(ids), 1, 1, 1, BLOCK, INDEXER.head_dim), float("nan")),
        }
        if packed:
            for name, packing in PACKINGS.items():
                self.pools[name] = torch.full((len(ids), 1, 1, 1, BLOCK, packing.nbytes), 255, dtype=torch.uint8)
        self.rope = Rope(BUILD, ROPE, SPEC.rope_dim, max(lens))
        self.done = [0] * len(lens)

    def region(self, name: str) -> Tensor:
        return self.pools[name]

    def step(self, work: Sequence[tuple[int, Tensor]]) -> list[Tensor]:
        """`work`: (sequence, its new hidden rows)."""
        counts = [len(x) for _, x in work]
        starts = [self.done[s] for s, _ in work]
        positions = torch.cat([torch.arange(a, a + n) for a, n in zip(starts, counts, strict=True)])
        tables_SB = torch.zeros(len(work), max(len(t) for t in self.tables), dtype=torch.int32)
        for i, (s, x) in enumerate(work):
            tables_SB[i, : len(self.tables[s])] = self.tables[s]
            self.done[s] += len(x)
        row_T = torch.repeat_interleave(torch.arange(len(work)), torch.tensor(counts))
        slots_T = tables_SB[row_T, positions // BLOCK].long() * BLOCK + positions % BLOCK
        ctx = AttentionContext(
            query_starts_S1=torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32),
            seq_lens_S=torch.tensor([self.done[s] for s, _ in work], dtype=torch.int32),
            max_query_len=max(counts),
            max_seq_len=max(self.done),
            groups={"full": GroupTables(tables_SB, slots_T, BLOCK)},
            kv=self,
            backend=self.backend,
        )
        step = Step(positions, positions, ctx, {MAIN_ROPE: self.rope(positions)})
        return list(self.layer(torch.cat([x for _, x in work]), step).split(counts))


def make(
    spec: MLASpec = SPEC, indexer: IndexerSpec | None = None, tp: TensorParallel | None = None
) -> tuple[MLA, dict[str, Tensor]]:
    """The layer with random weights, the same for every rank, and the whole weights by name."""
    build = replace(BUILD, tp=tp or TensorParallel())
    owned = Indexer(build, HIDDEN, spec.q_lora_rank, indexer, KEYS) if indexer else None
    layer = MLA(build, HIDDEN, HEADS, spec, PLACE, indexer=owned, top_k=indexer.top_k if indexer else 0)
    weights: dict[str, Tensor] = {}
    for slot in layer.slots():
        generator = torch.Generator().manual_seed(len(slot.name) * 1000 + sum(slot.shape))
        whole = torch.randn(slot.shape, generator=generator) * 0.3 + float("norm.weight" in slot.name)
        weights[slot.name] = whole.double()
        slot.target.copy_(whole.narrow(slot.dim, slot.start, slot.target.shape[slot.dim]))
    layer.derive()
    return layer, weights


def turned(x: Tensor, interleaved: bool) -> Tensor:
    """Rows of positions 0, 1, ..., [L, H, D], turned by the formula of the paper."""
    half = x.shape[-1] // 2
    angle = torch.arange(len(x)).double()[:, None] * 10000.0 ** (-torch.arange(half).double() / half)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def expected(x: Tensor, w: dict[str, Tensor], spec: MLASpec = SPEC, indexer: IndexerSpec | None = None) -> Tensor:
    x = x.double()
    if spec.q_lora_rank:
        latent_q = normed(x @ w["q_a_proj.weight"].T + w.get("q_a_proj.bias", 0), w["q_a_layernorm.weight"])
        q = (latent_q @ w["q_b_proj.weight"].T).view(len(x), HEADS, -1)
    else:
        q = (x @ w["q_proj.weight"].T).view(len(x), HEADS, -1)
    q_nope, q_rope = q.split([spec.nope_dim, spec.rope_dim], -1)
    both = x @ w["kv_a_proj_with_mqa.weight"].T + w.get("kv_a_proj_with_mqa.bias", 0)
    latent, k_rope = both.split([spec.kv_lora_rank, spec.rope_dim], -1)
    kv = (normed(latent, w["kv_a_layernorm.weight"]) @ w["kv_b_proj.weight"].T).view(len(x), HEADS, -1)
    k_nope, v = kv.split([spec.nope_dim, spec.v_dim], -1)
    scores = torch.einsum("nhd,lhd->hnl", q_nope, k_nope)
    rope_q, rope_k = turned(q_rope, spec.interleaved), turned(k_rope[:, None], spec.interleaved)[:, 0]
    scores = (scores + torch.einsum("nhd,ld->hnl", rope_q, rope_k)) * spec.scale
    hidden = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
    if indexer:
        iq = (latent_q @ w["indexer.wq_b.weight"].T).view(len(x), indexer.num_heads, -1)
        ik = functional.layer_norm(
            x @ w["indexer.wk.weight"].T,
            (indexer.head_dim,),
            w["indexer.k_norm.weight"],
            w["indexer.k_norm.bias"],
            1e-6,
        )
        d = indexer.rope_dim
        iq = torch.cat((turned(iq[..., :d], indexer.interleaved), iq[..., d:]), -1)
        ik = torch.cat((turned(ik[:, None, :d], indexer.interleaved)[:, 0], ik[:, d:]), -1)
        weights = x @ w["indexer.weights_proj.weight"].T
        index = torch.einsum("nh,nhl->nl", weights, torch.einsum("nhd,ld->nhl", iq, ik).relu())
        index = index.masked_fill(hidden, float("-inf"))
        kept = index.topk(min(indexer.top_k, len(x)), -1).indices
        hidden |= torch.ones_like(hidden).scatter(1, kept, False)
    out = torch.einsum("hnl,lhd->nhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v)
    return out.flatten(1) @ w["o_proj.weight"].T + w.get("o_proj.bias", 0)


@pytest.fixture(autouse=True)
def _few_are_absorbed(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that short sequences go both ways."""
    monkeypatch.setattr(mla_module, "MAX_ABSORBED", 16)


@pytest.fixture(params=[ReferenceBackend(), CpuBackend()], ids=lambda b: b.name)
def backend(request: pytest.FixtureRequest) -> AttentionBackend:
    found: AttentionBackend = request.param
    return found


SPECS = {
    "v3": SPEC,
    "plain-q": replace(SPEC, q_lora_rank=0, bias=False),
    "halves": replace(SPEC, interleaved=False, bias=False),
    "wide-values": replace(SPEC, v_dim=26),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@torch.inference_mode()
def test_prompts_chunks_and_tokens_with_strangers(backend: AttentionBackend, spec: MLASpec) -> None:
    layer, weights = make(spec)
    xs = [torch.randn(n, HIDDEN) for n in (70, 21, 3)]
    paged = Paged(layer, backend, [70, 21, 3])
    (a,), (b, c) = paged.step([(0, xs[0][:31])]), paged.step([(1, xs[1][:20]), (0, xs[0][31:38])])
    d, e, f = paged.step([(0, xs[0][38:]), (2, xs[2]), (1, xs[1][20:])])
    for got, x in ((torch.cat((a, c, d)), xs[0]), (torch.cat((b, f)), xs[1]), (e, xs[2])):
        assert (got - expected(x, weights, spec)).abs().max() < 2e-5


@torch.inference_mode()
def test_absorbed_and_expanded_agree(backend: AttentionBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _ = make()
    x = torch.randn(90, HIDDEN)
    results = []
    for most in (0, 1000):
        monkeypatch.setattr(mla_module, "MAX_ABSORBED", most)
        paged = Paged(layer, backend, [90])
        results.append(torch.cat([paged.step([(0, part)])[0] for part in x.split(45)]))
    assert not torch.equal(results[0], results[1])
    assert (results[0] - results[1]).abs().max() < 5e-5


@torch.inference_mode()
def test_heads_and_tokens_may_be_done_a_few_at_a_time(
    backend: AttentionBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four of six heads are expanded at once; queries are absorbed ten at a time."""
    for most, elements, indexer in ((16, 4 * 96 * 30, None), (99, 10 * 6 * 32, None), (16, 10 * 6 * 32, INDEXER)):
        layer, _ = make(indexer=indexer)
        xs = [torch.randn(n, HIDDEN) for n in (90, 33, 5)]
        results = []
        for limit in (1 << 23, elements):
            monkeypatch.setattr(mla_module, "MAX_ABSORBED", most)
            monkeypatch.setattr(mla_module, "_MAX_ELEMENTS", limit)
            paged = Paged(layer, backend, [90, 33, 5])
            paged.step([(1, xs[1][:31])])
            results.append(torch.cat(paged.step([(0, xs[0]), (1, xs[1][31:]), (2, xs[2])])))
        assert torch.equal(*results) or backend.name == "reference"
        assert (results[0] - results[1]).abs().max() < 5e-5


@pytest.mark.parametrize("top_k", [0, 30])
@torch.inference_mode()
def test_a_row_depends_on_its_sequence_alone(top_k: int) -> None:
    """Bitwise, with the CPU kernels: the same new tokens of a sequence, alone and among others."""
    layer, _ = make(indexer=replace(INDEXER, top_k=top_k) if top_k else None)
    xs = [torch.randn(n, HIDDEN) for n in (90, 200, 41)]
    cuts = [[(0, 40), (40, 41), (41, 90)], [(0, 160), (160, 199), (199, 200)], [(0, 20), (20, 40), (40, 41)]]
    together = Paged(layer, CpuBackend(), [90, 200, 41])
    got = [together.step([(s, xs[s][slice(*cuts[s][turn])]) for s in (1, 0, 2)]) for turn in range(3)]
    for i, s in enumerate((1, 0, 2)):
        alone = Paged(layer, CpuBackend(), [len(x) for x in xs])
        for turn in range(3):
            assert torch.equal(alone.step([(s, xs[s][slice(*cuts[s][turn])])])[0], got[turn][i])


@pytest.mark.parametrize("interleaved", [False, True])
@torch.inference_mode()
def test_sparse_attention(backend: AttentionBackend, interleaved: bool) -> None:
    indexer = replace(INDEXER, interleaved=interleaved)
    layer, weights = make(indexer=indexer)
    xs = [torch.randn(n, HIDDEN) for n in (120, 28)]
    want = [expected(x, weights, indexer=indexer) for x in xs]
    paged = Paged(layer, backend, [120, 28])
    got: list[list[Tensor]] = [[], []]
    for cut in ((0, 25), (25, 60), (60, 61), (61, 120)):
        work = [(0, xs[0][slice(*cut)])] + (
            [(1, xs[1][:25])] if cut[0] == 0 else [(1, xs[1][25:26])] if cut[0] == 60 else []
        )
        for (s, _), out in zip(work, paged.step(work), strict=True):
            got[s].append(out)
    assert (torch.cat(got[0]) - want[0]).abs().max() < 2e-5
    assert (torch.cat(got[1]) - want[1][:26]).abs().max() < 2e-5
    assert (want[0] - expected(xs[0], weights)).abs().max() > 0.01


@pytest.mark.parametrize("indexer", [None, INDEXER], ids=["dense", "sparse"])
@torch.inference_mode()
def test_partial_sums_of_ranks_make_the_whole(indexer: IndexerSpec | None) -> None:
    spec = replace(SPEC, bias=False)
    x = torch.randn(60, HIDDEN)

    def run(tp: TensorParallel) -> Tensor:
        paged = Paged(make(spec, indexer, tp)[0], CpuBackend(), [60])
        return torch.cat([paged.step([(0, part)])[0] for part in (x[:50], x[50:])])

    whole = run(TensorParallel())
    partial = [run(TensorParallel(rank, 3, lambda out: out)) for rank in range(3)]
    assert (torch.stack(partial).sum(0) - whole).abs().max() < 1e-5


class Rounding:
    """A backend that stores in float32 what packed rows would hold."""

    name = "rounding"

    def __init__(self, backend: AttentionBackend) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def write_rows(
        self, rows_TW: Tensor, cache: Tensor, tables: GroupTables, packing: RowPacking | None = None
    ) -> None:
        assert packing is None
        (packing,) = (p for p in PACKINGS.values() if p.dim == cache.shape[-1])
        held_TW = unpack_rows(pack_rows(rows_TW, packing), packing, torch.float32)
        self._backend.write_rows(held_TW, cache, tables)


@pytest.mark.parametrize("indexer", [None, INDEXER], ids=["dense", "sparse"])
@torch.inference_mode()
def test_packed_rows(backend: AttentionBackend, indexer: IndexerSpec | None) -> None:
    """Prompts, chunks and tokens give what rows of the same numbers in float32 give, each by its way."""
    if indexer:
        torch.manual_seed(20)  # a near tie at the edge of a selection may fall either way
    layer, weights = make(indexer=indexer)
    xs = [torch.randn(n, HIDDEN) for n in (120, 28)]
    packed = Paged(layer, backend, [120, 28], packed=True)
    plain = Paged(layer, cast(AttentionBackend, Rounding(backend)), [120, 28])
    got: list[Tensor] = []
    for cut in ((0, 25), (25, 60), (60, 61), (61, 120)):
        work = [(0, xs[0][slice(*cut)])] + ([(1, xs[1][: cut[0] + 14])] if cut[0] < 25 else [])
        want = plain.step(work)
        for one, other in zip(packed.step(work), want, strict=True):
            assert (one - other).abs().max() < 2e-5
        got.append(want[0])
    exact = expected(xs[0], weights, indexer=indexer)
    error = (torch.cat(got) - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert 1e-3 < error < (0.5 if indexer else 0.1)  # sparse: another choice is another result


def test_somebody_must_own_the_first_selection() -> None:
    with pytest.raises(ValueError, match="no earlier indexer"):
        replace(INDEXER, owners=(False, True))
