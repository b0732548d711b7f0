"""Gated delta nets in Triton against their definition in float64: token by token, in chunks, and mixtures."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from delta_support import SIZES, Net, Sizes
from torch import Tensor
from torch.nn import functional

from common.kernels import gpu
from common.kernels.delta_ops import UNIT_EPS, DeltaInputs, DeltaWeights, is_regular
from common.kernels.delta_rule import chunked_rule

pytestmark = pytest.mark.gpu

FEW = 16
LENGTHS = (1, 2, FEW, FEW + 1, 64, 150)


def narrow(device: torch.device, lengths: Sequence[int], dtype: torch.dtype) -> tuple[int, ...]:
    """Those of `lengths` that can be tested: Triton's interpreter multiplies bfloat16 as whole numbers."""
    one_by_one = device.type == "cpu" and dtype == torch.bfloat16
    return tuple(n for n in lengths if n <= FEW or not one_by_one)


@pytest.fixture(autouse=True)
def device(kernel_device: torch.device) -> Iterator[None]:
    with kernel_device:
        yield


class Kernels:
    """As `delta_net`; `fixed`: token by token, whatever the lengths."""

    def __init__(self, *, fixed: bool = False) -> None:
        self._fixed = fixed

    def __call__(
        self, inputs: DeltaInputs, weights: DeltaWeights, conv: Tensor, state: Tensor, blocks: Tensor, starts: Tensor
    ) -> Tensor:
        assert is_regular(inputs, weights, conv, state)
        shared: dict[str, Any] = {}
        longest = int(starts.diff().max())
        return gpu.delta.delta_net(
            inputs,
            weights,
            conv,
            state,
            blocks,
            starts,
            unit_eps=UNIT_EPS,
            max_query_len=longest,
            fixed=self._fixed,
            shared=shared,
        )


def check(net: Net, sequence: int, rows: Tensor, got: Tensor, tolerance: float) -> None:
    """Results, state and kept inputs of a whole sequence; `tolerance` beside one of 1 in size."""
    want, block = net.expected(rows), net.blocks[sequence]
    assert got.dtype == net.dtype
    off = (got.double() - want).abs()
    assert bool((off <= tolerance * (1 + want.abs())).all()), f"off by {off.max()}"
    state = net.state[block].view(net.last_state.shape)
    off = (state - net.last_state).abs()
    assert bool((off <= tolerance * (1 + net.last_state.abs())).all()), f"a state is off by {off.max()}"
    assert torch.equal(net.conv[block].squeeze(-2), net.kept_after(rows))


@pytest.mark.parametrize("fixed", [False, True], ids=["by length", "fixed"])
@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_prompts_in_pieces_side_by_side(sizes: Sizes, fused: bool, fixed: bool) -> None:
    net, op = Net(sizes, torch.float32, fused=fused), Kernels(fixed=fixed)
    prompts = {s: net.rows(n) for s, n in enumerate(LENGTHS)}
    got: dict[int, list[Tensor]] = {s: [] for s in prompts}
    done = dict.fromkeys(prompts, 0)
    while left := [s for s in prompts if done[s] < len(prompts[s])]:
        chosen = random.sample(left, random.randint(1, len(left)))
        work = [(s, prompts[s][done[s] : done[s] + random.choice((1, 2, 40, 90))]) for s in chosen]
        for (s, rows), out in zip(work, net.run(work, op), strict=True):
            got[s].append(out)
            done[s] += len(rows)
    for s, rows in prompts.items():
        check(net, s, rows, torch.cat(got[s]), 1e-4 if fixed else 1e-3)  # three products of tf32 for one of fp32
    others = [b for b in range(20) if b not in net.blocks[: len(prompts)].tolist()]
    for memory in (net.conv, net.state):
        assert memory[others].isnan().sum() == 11 * memory[0].numel()


@pytest.mark.parametrize(("dtype", "eps"), [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)])
@pytest.mark.parametrize("sizes", [SIZES["as released"], SIZES["odd"]], ids=["as released", "odd"])
def test_narrow_types(sizes: Sizes, dtype: torch.dtype, eps: float, kernel_device: torch.device) -> None:
    """One by one all but the result is fp32; chunks multiply narrow numbers."""
    net = Net(sizes, dtype, fused=False)
    work = [(s, net.rows(n)) for s, n in enumerate(narrow(kernel_device, LENGTHS, dtype))]
    for (s, rows), got in zip(work, net.run(work, Kernels()), strict=True):
        check(net, s, rows, got, (2 if len(rows) <= FEW else 16) * eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_depend_on_the_sequence_alone(dtype: torch.dtype, kernel_device: torch.device) -> None:
    """On its cuts, but for those of the fixed way; not on others of the step."""
    for fixed, count in itertools.product((False, True), narrow(kernel_device, (3, 40), dtype)):
        op, whole = Kernels(fixed=fixed), Net(SIZES["as released"], dtype, fused=True)
        batch, pieces = whole.copy(), whole.copy()
        rows = whole.rows(count)
        strangers = [(s, whole.rows(n)) for s, n in enumerate(narrow(kernel_device, (3, 1, 20, 1), dtype), 1)]
        (want,) = whole.run([(0, rows)], op)
        assert torch.equal(batch.run([*strangers[:2], (0, rows), *strangers[2:]], op)[2], want)
        others = [batch]
        if fixed or count <= FEW:
            cuts = sorted({0, count, *random.sample(range(1, count), 2)})
            got = [pieces.run([(0, rows[a:b])], op)[0] for a, b in itertools.pairwise(cuts)]
            assert torch.equal(torch.cat(got), want)
            others.append(pieces)
        for other in others:
            assert torch.equal(other.state[other.blocks[0]], whole.state[whole.blocks[0]])
            assert torch.equal(other.conv[other.blocks[0]], whole.conv[whole.blocks[0]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_token_that_comes_again_and_again(dtype: torch.dtype) -> None:
    """Equal keys that are all learnt and never forgotten: powers of such a system are as large as 1e18."""
    net = Net(SIZES["small"], dtype, fused=False)
    net.weights = replace(net.weights, rate_H=torch.full((4,), -1e-6))
    rows = net.rows(1).repeat(200, 1)
    net.views(rows).b_TGR.fill_(6.0)
    (got,) = net.run([(0, rows)], Kernels())
    check(net, 0, rows, got, 1e-3 if dtype == torch.float32 else 2.0**-6)


@pytest.mark.filterwarnings("ignore:overflow")  # the interpreter's: a gate that is shut
def test_extremes() -> None:
    """Huge inputs close gates and forget everything; nothing overflows."""
    for fixed in (False, True):
        net = Net(SIZES["small"], torch.float32, fused=False, scale=200.0)
        net.weights = replace(net.weights, rate_H=torch.full((4,), -16.0))
        rows = net.rows(70)
        (got,) = net.run([(0, rows)], Kernels(fixed=fixed))
        assert got.isfinite().all()
        assert (got - net.expected(rows)).abs().max() < 2e-2


@pytest.mark.parametrize("query_len", [1, 3])
def test_a_recorded_step_with_padding(query_len: int, cuda: torch.device) -> None:
    """Padding sequences share a block; replays read other blocks and inputs than the recording did."""
    net, op = Net(SIZES["as released"], torch.bfloat16, fused=True), Kernels()
    eager = net.copy()
    padding = next(b for b in range(20) if b not in net.blocks)
    net.conv[padding], net.state[padding] = 0, 0
    rows, blocks = net.rows(5 * query_len).clone(), torch.full((5,), padding)
    starts = torch.arange(0, 5 * query_len + 1, query_len, dtype=torch.int32)
    inputs, shared = net.views(rows), {}

    def step() -> Tensor:
        return gpu.delta.delta_net(
            inputs, net.weights, net.conv, net.state, blocks, starts,
            unit_eps=UNIT_EPS, max_query_len=query_len, fixed=False, shared=shared,
        )  # fmt: skip

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for _ in range(4):
        chosen = random.sample(range(9), 3)
        new = net.rows(3 * query_len)
        blocks[:3] = net.blocks[chosen]
        rows[: len(new)] = new
        graph.replay()
        want = eager.run([(s, new[i * query_len : (i + 1) * query_len]) for i, s in enumerate(chosen)], op)
        assert torch.equal(out[: len(new)], torch.cat(want))
    for s in range(9):
        assert torch.equal(net.state[net.blocks[s]], eager.state[eager.blocks[s]])
        assert torch.equal(net.conv[net.blocks[s]], eager.conv[eager.blocks[s]])
    assert net.state[padding].isfinite().all()


def test_chunks_are_nearly_as_exact_as_the_reference() -> None:
    """With the state that a long prompt leaves, beside torch in fp32 and the same inputs."""
    net = Net(SIZES["as released"], torch.float32, fused=False)
    rows = net.rows(300)
    (got,) = net.run([(0, rows)], Kernels())
    want = net.expected(rows)
    s, w = net.sizes, net.weights
    x = net.views(rows)
    channels = functional.pad(torch.cat((x.q_TGK, x.k_TGK, x.v), -1), (0, 0, 0, 0, s.conv_width - 1, 0))
    mixed = functional.silu(sum(channels[i : i + 300] * w.taps_GWC[:, i] for i in range(s.conv_width)))
    q, k = (
        functional.normalize(mixed[..., i * s.key_width : (i + 1) * s.key_width], dim=-1).repeat_interleave(
            s.per_unit, 1
        )
        for i in range(2)
    )
    v = mixed[..., 2 * s.key_width :].reshape(300, s.heads, -1)
    decay = functional.softplus(x.a_TGR.reshape(300, s.heads) + w.dt_bias_H) * w.rate_H
    state = torch.zeros(s.heads, s.key_width, s.value_width)
    out = chunked_rule(q * s.key_width**-0.5, k, v, decay, x.b_TGR.reshape(300, s.heads).sigmoid(), state)
    out = functional.rms_norm(out, (s.value_width,), w.norm_V, w.eps) * functional.silu(x.z.reshape(out.shape))
    theirs, ours = ((y.flatten(1).double() - want).abs().max() for y in (out, got))
    assert ours <= 32 * theirs + 1e-5
