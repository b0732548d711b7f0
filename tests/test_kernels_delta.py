"""The gated delta rule and the operation around it, against their definitions in float64, on every instruction set."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from common.kernels import cpu, delta_ops
from common.kernels.delta_ops import DeltaInputs, DeltaWeights, delta_net
from common.kernels.delta_rule import CHUNK, chunked_rule, recurrent_step

Rule = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Op = Callable[..., Tensor]
FALLBACK = "torch"


def rule_inputs(num_tokens: int, scale: float = 0.1) -> Rule:
    """q, k (of unit length), v, decay and beta of 3 heads; a decay is about -`scale`."""
    q, k = (functional.normalize(torch.randn(num_tokens, 3, 16), dim=-1) for _ in range(2))
    return q, k, torch.randn(num_tokens, 3, 8), -scale * torch.rand(num_tokens, 3), torch.rand(num_tokens, 3)


def defined(given: Rule, state_HKV: Tensor) -> tuple[Tensor, Tensor]:
    """Token by token as the paper writes it, in float64: (outputs, last state)."""
    state = state_HKV.double().clone()
    out = []
    for q, k, v, decay, beta in zip(*(x.double() for x in given), strict=True):
        state = state * decay.exp()[:, None, None]
        said = torch.einsum("hk,hkv->hv", k, state)
        state = state + torch.einsum("hk,hv->hkv", k, (v - said) * beta[:, None])
        out.append(torch.einsum("hk,hkv->hv", q, state))
    return torch.stack(out), state


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


@dataclass(frozen=True)
class Sizes:
    units: int = 2
    per_unit: int = 2
    key_width: int = 16
    value_width: int = 8
    conv_width: int = 4

    @property
    def heads(self) -> int:
        return self.units * self.per_unit

    @property
    def channels(self) -> int:
        return 2 * self.key_width + self.per_unit * self.value_width


SIZES = {
    "small": Sizes(),
    "as released": Sizes(2, 2, 128, 128),
    "odd": Sizes(3, 1, 12, 40, 3),
    "columns left over": Sizes(1, 3, 20, 70, 2),
}


class Net:
    """Random weights, and states of 9 sequences in a pool whose other blocks are NaN."""

    def __init__(self, sizes: Sizes, dtype: torch.dtype, *, fused: bool, scale: float = 1.0) -> None:
        self.sizes, self.dtype, self.fused, self.scale = sizes, dtype, fused, scale
        s = sizes
        self.weights = DeltaWeights(
            taps_GWC=torch.randn(s.units, s.conv_width, s.channels) / 2,
            rate_H=-torch.rand(s.heads) * 4,
            dt_bias_H=torch.randn(s.heads) - 3,
            norm_V=(1 + torch.randn(s.value_width) / 10).to(dtype),
            eps=1e-6,
        )
        conv_shape = (20, 2, s.conv_width - 1, s.units, 1, s.channels)
        self.conv = torch.full(conv_shape, float("nan"), dtype=dtype)[:, 1]
        self.state = torch.full((20, 2, 1, s.heads, 1, s.key_width * s.value_width), float("nan"))[:, 0]
        self.blocks = torch.randperm(20)[:9]
        self.conv[self.blocks] = 0
        self.state[self.blocks] = 0

    def copy(self) -> Net:
        other = Net(self.sizes, self.dtype, fused=self.fused)
        other.weights, other.scale = self.weights, self.scale
        other.conv, other.state, other.blocks = self.conv.clone(), self.state.clone(), self.blocks
        return other

    def rows(self, num_tokens: int) -> Tensor:
        s = self.sizes
        width = s.units * (s.channels + s.per_unit * s.value_width + 2 * s.per_unit)
        return (torch.randn(num_tokens, width) * self.scale).to(self.dtype)

    def views(self, rows: Tensor) -> DeltaInputs:
        """In one of the two orders of checkpoints."""
        s, values = self.sizes, self.sizes.per_unit * self.sizes.value_width
        sizes = (s.key_width, s.key_width, values, values, s.per_unit, s.per_unit)
        if self.fused:
            return DeltaInputs(*rows.view(len(rows), s.units, -1).split_with_sizes(sizes, 2))
        parts = rows.split_with_sizes([s.units * n for n in sizes], 1)
        return DeltaInputs(*(p.view(len(rows), s.units, -1) for p in parts))

    def run(self, work: Sequence[tuple[int, Tensor]], op: Op) -> list[Tensor]:
        """Rows of some sequences in one step."""
        counts = [len(rows) for _, rows in work]
        starts = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)
        blocks = self.blocks[torch.tensor([s for s, _ in work])]
        inputs = self.views(torch.cat([rows for _, rows in work]))
        return list(op(inputs, self.weights, self.conv, self.state, blocks, starts).split(counts))

    def expected(self, rows: Tensor) -> Tensor:
        """Of a whole sequence, in float64."""
        s, w = self.sizes, self.weights
        x = self.views(rows.double())
        channels = torch.cat((x.q_TGK, x.k_TGK, x.v), -1)
        padded = functional.pad(channels, (0, 0, 0, 0, s.conv_width - 1, 0))
        mixed = functional.silu(sum(padded[i : i + len(rows)] * w.taps_GWC[:, i] for i in range(s.conv_width)))
        q, k = (
            functional.normalize(part, dim=-1).repeat_interleave(s.per_unit, 1)
            for part in (mixed[..., : s.key_width], mixed[..., s.key_width : 2 * s.key_width])
        )
        v = mixed[..., 2 * s.key_width :].reshape(len(rows), s.heads, -1)
        a, b = (part.reshape(len(rows), s.heads) for part in (x.a_TGR, x.b_TGR))
        decay = functional.softplus(a + w.dt_bias_H) * w.rate_H
        state = torch.zeros(s.heads, s.key_width, s.value_width)
        out, last = defined((q * s.key_width**-0.5, k, v, decay, b.sigmoid()), state)
        self.last_state = last
        normed = functional.rms_norm(out, (s.value_width,), w.norm_V.double(), w.eps)
        return (normed * functional.silu(x.z.reshape(out.shape))).flatten(1)


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
        x = net.views(rows)
        kept = functional.pad(torch.cat((x.q_TGK, x.k_TGK, x.v), -1), (0, 0, 0, 0, sizes.conv_width - 1, 0))
        assert torch.equal(net.conv[block].squeeze(-2), kept[len(rows) :])
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
