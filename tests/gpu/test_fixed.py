"""Kernels of `--deterministic`: right, and the same to the bit whatever else a step holds."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::RuntimeWarning")]  # the interpreter's numpy


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def no_bfloat16_in_interpreter(device: torch.device, dtype: torch.dtype) -> None:
    if device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16")


@pytest.mark.parametrize(("rows", "columns", "width"), [(1, 32, 64), (5, 70, 200), (66, 130, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_is_right(
    kernel_device: torch.device, rows: int, columns: int, width: int, dtype: torch.dtype, bias: bool
) -> None:
    from common.kernels.gpu import fixed

    no_bfloat16_in_interpreter(kernel_device, dtype)
    x, weight = randn(rows, 2 * width, seed=1, dtype=dtype), randn(columns, width, seed=2, dtype=dtype)
    added = randn(columns, seed=3, dtype=dtype) if bias else None
    args = (
        x.to(kernel_device)[:, :width],
        weight.to(kernel_device),
        None if added is None else added.to(kernel_device),
    )
    got = fixed.linear(*args, torch.float32).cpu()
    wanted = x[:, :width].double() @ weight.double().T + (added.double() if added is not None else 0.0)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-3)
    if dtype != torch.float16:
        assert torch.equal(fixed.linear(*args, dtype).cpu(), got.to(dtype))


@pytest.mark.parametrize(
    ("columns", "width"), [(6144, 4096), (4096, 12288), (1024, 3072), (9728, 2560), (151936, 1024)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_row_of_a_product_does_not_depend_on_the_others(
    cuda: torch.device, columns: int, width: int, dtype: torch.dtype
) -> None:
    from common.kernels.gpu import fixed

    counts = (
        (1, 2, 16, 63, 64, 65, 200, 1024, 1025) if columns > 100_000 else (1, 2, 16, 63, 64, 65, 200, 1024, 1025, 5000)
    )
    x, weight = (
        randn(counts[-1], width, seed=4, dtype=dtype).to(cuda),
        randn(columns, width, seed=5, dtype=dtype).to(cuda),
    )
    whole = fixed.linear(x, weight, None, torch.float32)
    torch.testing.assert_close(whole[:70], x[:70].float() @ weight.float().T, rtol=1e-2, atol=0.5)
    for count in counts:
        first = (counts[-1] - count) // 3
        part = fixed.linear(x[first : first + count], weight, None, torch.float32)
        assert torch.equal(part, whole[first : first + count]), count


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("sizes", [(64, 8, 2048, 768), (8, 2, 512, 1024)])
def test_a_token_of_experts_does_not_depend_on_the_others(
    cuda: torch.device, fp8: bool, sizes: tuple[int, int, int, int]
) -> None:
    from common.kernels.expert_weights import ExpertWeights
    from common.kernels.fp8_ops import linear_fp8, quantise_weight
    from common.kernels.moe_ops import swiglu_moe

    num_experts, top_k, hidden_size, size = sizes
    gate_up = randn(num_experts, 2 * size, hidden_size, seed=7, dtype=torch.bfloat16).to(cuda) * hidden_size**-0.5
    down = randn(num_experts, hidden_size, size, seed=8, dtype=torch.bfloat16).to(cuda) * size**-0.5
    experts = ExpertWeights(gate_up, down, None, None)
    if fp8:
        (gate_up, gate_up_scales), (down, down_scales) = quantise_weight(gate_up), quantise_weight(down)
        experts = ExpertWeights(gate_up, down, gate_up_scales, down_scales)
    tokens = 3000
    x = randn(tokens, hidden_size, seed=9, dtype=torch.bfloat16).to(cuda)
    ids = torch.rand(tokens, num_experts, generator=torch.Generator().manual_seed(1)).argsort(-1)[:, :top_k].to(cuda)
    weights = torch.rand(tokens, top_k, generator=torch.Generator().manual_seed(2)).to(cuda)
    whole = swiglu_moe(x, ids, weights, experts, fixed=True)
    for count in (1, 3, 17, 64, 65, 500, 1200):
        part = slice((tokens - count) // 3, (tokens - count) // 3 + count)
        assert torch.equal(swiglu_moe(x[part], ids[part], weights[part], experts, fixed=True), whole[part]), count
        if experts.gate_up_scales is not None:
            weight = gate_up[0], experts.gate_up_scales[0]
            assert torch.equal(linear_fp8(x[part], *weight, fixed=True), linear_fp8(x, *weight, fixed=True)[part])


@dataclass(frozen=True)
class Model:
    """Shape of attention. `window`, `first`: see `common.attention.context.GroupTables`."""

    heads: int
    units: int
    width: int
    block_size: int = 16
    window: int = 0
    first: int = 0


class Cached:
    """Sequences whose keys and values lie in shuffled blocks of a cache that otherwise holds NaN."""

    def __init__(
        self, model: Model, lens: Sequence[int], device: torch.device, dtype: torch.dtype, kv_dtype: torch.dtype
    ) -> None:
        self.model, self.lens, self.device = model, list(lens), device
        size = model.block_size
        widest = -(-max(lens) // size)
        ids = torch.randperm(len(lens) * widest, generator=torch.Generator().manual_seed(6)).int() + 1
        self.tables = ids.view(len(lens), widest)
        shape = (len(ids) + 1, 2, model.units, size, model.width)
        self.cache = torch.full(shape, torch.nan).to(kv_dtype)
        self.q, self.kv = [], []
        for s, n in enumerate(lens):
            self.q.append(randn(n, model.heads, model.width, seed=10 + s, dtype=dtype))
            self.kv.append(randn(2, n, model.units, model.width, seed=100 + s, dtype=torch.float32).to(kv_dtype))
            at = torch.arange(n)
            for part in range(2):
                self.cache[self.tables[s, at // size].long(), part, :, at % size] = self.kv[s][part]
        self.on_device = self.cache.to(device)

    def attend(self, parts: Sequence[tuple[int, int, int]], lanes: int = 0, max_seq_len: int = 0) -> list[Tensor]:
        """One step. `parts`: (sequence, first new token, end of the new ones)."""
        from common.kernels.gpu import fixed_attention

        starts = [0, *itertools.accumulate(end - first for _, first, end in parts)]
        out = fixed_attention.attend(
            torch.cat([self.q[s][first:end] for s, first, end in parts]).to(self.device),
            self.on_device,
            self.tables[[s for s, _, _ in parts]].to(self.device),
            torch.tensor(starts, dtype=torch.int32, device=self.device),
            torch.tensor([end for _, _, end in parts], dtype=torch.int32, device=self.device),
            max_query_len=max(end - first for _, first, end in parts),
            max_seq_len=max_seq_len or max(end for _, _, end in parts),
            window=self.model.window,
            first=self.model.first,
            scale=0.1,
            k_scale=0.5,
            v_scale=2.0,
            lanes=lanes,
        )
        return [out[a:b].cpu() for a, b in itertools.pairwise(starts)]

    def wanted(self, s: int) -> Tensor:
        """In float64."""
        m, n = self.model, self.lens[s]
        k, v = (x.double().repeat_interleave(m.heads // m.units, 1) for x in self.kv[s])
        score = torch.einsum("qhd,khd->hqk", self.q[s].double(), k) * 0.1 * 0.5
        q_at, k_at = torch.arange(n)[:, None], torch.arange(n)
        seen = (k_at <= q_at) & (k_at >= m.first)
        if m.window:
            seen &= k_at > q_at - m.window
        return torch.einsum("hqk,khd->qhd", score.masked_fill(~seen, -torch.inf).softmax(-1), v) * 2.0


MODELS = [
    Model(4, 2, 32),
    Model(7, 1, 48, window=70),
    Model(2, 2, 64, block_size=64, first=3),
    Model(32, 8, 128, block_size=64),
]


def in_chunks(lens: Sequence[int], sizes: Sequence[int]) -> list[list[tuple[int, int, int]]]:
    """Steps in which sequences advance by so many tokens, a sequence alone, two together, and so on."""
    done: list[int] = [0] * len(lens)
    steps: list[list[tuple[int, int, int]]] = []
    while going := [s for s, n in enumerate(lens) if done[s] < n]:
        i = len(steps)
        steps.append([])
        for s in going[: 1 + i % len(lens)]:
            end = min(lens[s], done[s] + sizes[(i + s) % len(sizes)])
            steps[-1].append((s, done[s], end))
            done[s] = end
    return steps


@pytest.mark.parametrize("model", MODELS, ids=str)
@pytest.mark.parametrize(
    "dtypes", ["float32 float32", "float16 float16", "bfloat16 bfloat16", "bfloat16 float8_e4m3fn"]
)
def test_attention_is_right_and_the_same_in_every_step(kernel_device: torch.device, model: Model, dtypes: str) -> None:
    dtype, kv_dtype = (getattr(torch, name) for name in dtypes.split())
    no_bfloat16_in_interpreter(kernel_device, dtype)
    small = kernel_device.type == "cpu"
    if small and model.heads > 8:
        pytest.skip("takes the interpreter long")
    lens = (300, 5, 131) if small else (1500, 5, 131, 257, 256, 700)
    cached = Cached(model, lens, kernel_device, dtype, kv_dtype)
    whole = cached.attend([(s, model.first, n) for s, n in enumerate(lens)], lanes=1)
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3}.get(dtype, 3e-2)
    for s, got in enumerate(whole):
        wanted = cached.wanted(s)[model.first :]
        torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance)
    for sizes in ((97, 64, 160), (3, 41)) if small else ((97, 64, 300), (5, 41, 1), (1,)):
        out = [torch.full_like(part, torch.nan) for part in whole]
        left = [n - model.first for n in lens]
        for i, step in enumerate(in_chunks(left, sizes)):
            parts = [(s, a + model.first, b + model.first) for s, a, b in step]
            for (s, a, b), got in zip(step, cached.attend(parts, lanes=(0, 2, 3)[i % 3]), strict=True):
                out[s][a:b] = got
        for s, got in enumerate(out):
            assert torch.equal(got, whole[s]), (sizes, s, (got != whole[s]).nonzero()[:5])


def test_a_graph_takes_lengths_from_its_tensors(cuda: torch.device) -> None:
    from common.kernels.gpu import fixed_attention

    cached = Cached(MODELS[3], (900, 30, 260), cuda, torch.bfloat16, torch.bfloat16)
    q = torch.zeros(3, 32, 128, dtype=torch.bfloat16, device=cuda)
    lens = torch.ones(3, dtype=torch.int32, device=cuda)
    starts, tables = torch.arange(4, dtype=torch.int32, device=cuda), cached.tables.to(cuda)

    def run() -> Tensor:
        return fixed_attention.attend(
            q,
            cached.on_device,
            tables,
            starts,
            lens,
            max_query_len=1,
            max_seq_len=900,
            window=0,
            first=0,
            scale=0.1,
            k_scale=0.5,
            v_scale=2.0,
        )

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for ends in ((900, 30, 260), (1, 2, 3), (256, 29, 257)):
        q.copy_(torch.stack([cached.q[s][end - 1] for s, end in enumerate(ends)]))
        lens.copy_(torch.tensor(ends))
        graph.replay()
        for s, end in enumerate(ends):
            (alone,) = cached.attend([(s, end - 1, end)])
            assert torch.equal(out[s].cpu(), alone[0])
