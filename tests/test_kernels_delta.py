"""The gated delta rule and the operation around it, against their definitions in float64, on every instruction set."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from delta_support import SIZES, Net, Op, Sizes, defined
from torch import Tensor
from torch.nn import functional

from common.kernels import cpu, delta_ops
from common.kernels.delta_ops import delta_net
from common.kernels.delta_rule import CHUNK, chunked_rule, recurrent_step

Rule = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
FALLBACK = "torch"


def rule_inputs(num_tokens: int, scale: float = 0.1) -> Rule:
    """q, k (of unit length), v, decay and beta of 3 heads; a decay is about -`scale`."""
    q, k = (functional.normalize(torch.randn(num_tokens, 3, 16), dim=-1) for _ in range(2))
    return q, k, torch.randn(num_tokens, 3, 8), -scale * torch.rand(num_tokens, 3), torch.rand(num_tokens, 3)


def close(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    assert got.shape == want.shape
    assert (got - want).abs().max() < tolerance


@pytest.mark.parametrize("scale", [0.0, 0.1, 30.0], ids=["nothing forgotten", "some", "almost all"])
@pytest.mark.parametrize("num_tokens", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7])
def test_chunks(num_tokens: int, scale: float) -> None:
    given, state = rule_inputs(num_tokens, scale), torch.randn(3, 16, 8)
    want, last = defined(given, state)
    close(chunked_rule(*given, state), want)
    close(state, last)


def test_steps_of_several_sequences() -> None:
    sequences = [rule_inputs(40) for _ in range(5)]
    states = torch.randn(5, 3, 16, 8)
    want = [defined(s, state) for s, state in zip(sequences, states, strict=True)]
    got = []
    for t in range(40):
        q, k, v, decay, beta = (torch.stack([s[i][t] for s in sequences]) for i in range(5))
        got.append(recurrent_step(q, k, v, decay, beta, states))
    close(torch.stack(got, 1), torch.stack([out for out, _ in want]))
    close(states, torch.stack([last for _, last in want]))


@pytest.fixture(params=[FALLBACK, *cpu.available()], ids=lambda isa: getattr(isa, "name", isa).lower())
def op(request: pytest.FixtureRequest) -> Op:
    if request.param == FALLBACK:
        return delta_ops._delta_net
    return lambda *args: delta_net(*args, isa=request.param)


@pytest.fixture(params=[1, 3], ids=lambda n: f"{n}threads")
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_the_operation(op: Op, sizes: Sizes, fused: bool) -> None:
    """Prompts in random pieces, side by side; and the states that they leave."""
    net = Net(sizes, torch.float32, fused=fused)
    prompts = {s: net.rows(n) for s, n in enumerate((1, 2, 3, 30, 75, 131))}
    done = dict.fromkeys(prompts, 0)
    got: dict[int, list[Tensor]] = {s: [] for s in prompts}
    while left := [s for s in prompts if done[s] < len(prompts[s])]:
        chosen = random.sample(left, random.randint(1, len(left)))
        work = [(s, prompts[s][done[s] : done[s] + random.choice((1, 1, 2, 40, 90))]) for s in chosen]
        for (s, rows), out in zip(work, net.run(work, op), strict=True):
            got[s].append(out)
            done[s] += len(rows)
    for s, rows in prompts.items():
        close(torch.cat(got[s]), net.expected(rows), 1e-4)
        block = net.blocks[s]
        close(net.state[block].view(net.last_state.shape), net.last_state, 1e-4)
        assert torch.equal(net.conv[block].squeeze(-2), net.kept_after(rows))
    others = [b for b in range(20) if b not in net.blocks[:6]]
    assert net.conv[others].isnan().sum() == 11 * net.conv[0].numel()
    assert net.state[others].isnan().sum() == 11 * net.state[0].numel()


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_bits_depend_on_the_sequence_alone(sizes: Sizes, dtype: torch.dtype, fused: bool) -> None:
    """Not on the batch, the cuts, the threads; and the tiles that a long prompt goes through in are cuts too."""
    for isa in cpu.available():
        whole = Net(sizes, dtype, fused=fused)
        pieces, batch = whole.copy(), whole.copy()

        def op(*args: object, isa: cpu.Isa = isa) -> Tensor:
            return delta_net(*args, isa=isa)  # type: ignore[arg-type]

        rows = whole.rows(700)
        assert all(delta_ops._fits(whole.views(rows[:n]), whole.weights, whole.conv, whole.state) for n in (1, 2, 700))
        strangers = [(s, whole.rows(n)) for s, n in enumerate((3, 1, 60, 1), 1)]
        (want,) = whole.run([(0, rows)], op)
        assert want.dtype == dtype
        cuts = sorted({0, 700, *random.sample(range(1, 700), 12), 1, 2, 699})
        got = [pieces.run([(0, rows[a:b])], op)[0] for a, b in itertools.pairwise(cuts)]
        assert torch.equal(torch.cat(got), want)
        assert torch.equal(batch.run([*strangers[:2], (0, rows), *strangers[2:]], op)[2], want)
        for other in (pieces, batch):
            assert torch.equal(other.state[other.blocks[0]], whole.state[whole.blocks[0]])
            assert torch.equal(other.conv[other.blocks[0]], whole.conv[whole.blocks[0]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_are_rounded_once(dtype: torch.dtype) -> None:
    for isa in cpu.available():
        net = Net(SIZES["as released"], dtype, fused=False)
        rows = net.rows(50)
        (got,) = net.run([(0, rows)], lambda *args, isa=isa: delta_net(*args, isa=isa))
        want = net.expected(rows)
        assert ((got - want).abs() <= want.abs() * torch.finfo(dtype).eps + 1e-4).all()


def test_extremes(op: Op) -> None:
    """Huge inputs close gates and forget everything; nothing overflows."""
    net = Net(SIZES["small"], torch.float32, fused=False, scale=200.0)
    net.weights = replace(net.weights, rate_H=torch.full((4,), -16.0))
    rows = net.rows(40)
    (got,) = net.run([(0, rows)], op)
    assert got.isfinite().all()
    close(got, net.expected(rows), 2e-2)
