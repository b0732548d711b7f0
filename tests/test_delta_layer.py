"""The gated delta rule and its layer, against their definitions in float64 and against themselves in other cuts."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from models_support import CPU, PagedModel
from tiny_models import VOCAB_SIZE, make_qwen3_5, make_qwen3_next
from torch import Tensor
from torch.nn import functional

from common.attention.cpu import CpuBackend
from common.layers.base import Build
from common.layers.delta_rule import CHUNK, chunked_rule, recurrent_step
from common.layers.delta_spec import DeltaSpec
from common.layers.gated_delta import CausalConv, Heads
from common.layers.rms_norm import RMSNorm
from common.layers.rope import Rope
from common.layers.rope_spec import RopeSpec

HEADS, KEYS, VALUES = 3, 16, 8
BUILD = Build(torch.float32, CPU)
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def inputs(num_tokens: int, scale: float = 0.1) -> Inputs:
    """q, k (of unit length), v, decay and beta; a decay is about -`scale`."""
    q, k = (functional.normalize(torch.randn(num_tokens, HEADS, KEYS), dim=-1) for _ in range(2))
    v = torch.randn(num_tokens, HEADS, VALUES)
    return q, k, v, -scale * torch.rand(num_tokens, HEADS), torch.rand(num_tokens, HEADS)


def defined(given: Inputs, state_HKV: Tensor) -> tuple[Tensor, Tensor]:
    """Token by token as the paper writes it, in float64: (outputs, last state)."""
    state = state_HKV.double().clone()
    out = []
    for q, k, v, decay, beta in zip(*(x.double() for x in given), strict=True):
        state = state * decay.exp()[:, None, None]
        said = torch.einsum("hk,hkv->hv", k, state)
        state = state + torch.einsum("hk,hv->hkv", k, (v - said) * beta[:, None])
        out.append(torch.einsum("hk,hkv->hv", q, state))
    return torch.stack(out), state


def close(got: Tensor, want: Tensor) -> None:
    assert (got - want).abs().max() < 1e-5


@pytest.mark.parametrize("scale", [0.0, 0.1, 30.0], ids=["nothing forgotten", "some", "almost all"])
@pytest.mark.parametrize("num_tokens", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7])
def test_many_tokens(num_tokens: int, scale: float) -> None:
    given, state = inputs(num_tokens, scale), torch.randn(HEADS, KEYS, VALUES)
    want, last = defined(given, state)
    close(chunked_rule(*given, state), want)
    close(state, last)


def test_single_tokens_of_several_sequences() -> None:
    rows, steps = 5, 40
    sequences = [inputs(steps) for _ in range(rows)]
    states = torch.randn(rows, HEADS, KEYS, VALUES)
    want = [defined(s, state) for s, state in zip(sequences, states, strict=True)]
    got = []
    for t in range(steps):
        q, k, v, decay, beta = (torch.stack([s[i][t] for s in sequences]) for i in range(5))
        got.append(recurrent_step(q, k, v, decay, beta, states))
    close(torch.stack(got, 1), torch.stack([out for out, _ in want]))
    close(states, torch.stack([last for _, last in want]))


def test_any_cut_gives_the_same() -> None:
    given, first = inputs(200), torch.randn(HEADS, KEYS, VALUES)
    want, last = defined(given, first)
    for size in (1, 7, 64, 100):
        state = first.clone()
        parts = [chunked_rule(*(x[a : a + size] for x in given), state) for a in range(0, 200, size)]
        close(torch.cat(parts), want)
        close(state, last)


@pytest.mark.parametrize("width", [2, 4])
def test_convolution(width: int) -> None:
    """In one pass over all inputs, with zeros before the first; and in batches."""
    heads = Heads(DeltaSpec((True,), 2, 4, 3, 5, width), 0, 2)
    conv, channels = CausalConv(BUILD, heads), sum(heads.widths)
    weight = torch.randn(channels, 1, width)
    for slot in conv.own_slots():
        slot.target.copy_(weight.narrow(0, slot.start, slot.target.shape[0]))
    x_NC = torch.randn(20, channels)
    want = functional.silu(functional.conv1d(x_NC.T, weight, padding=width - 1, groups=channels)[:, :20]).T
    close(conv(torch.cat((torch.zeros(width - 1, channels), x_NC))), want)
    windows = x_NC.unfold(0, width, 1).transpose(1, 2)
    assert torch.equal(conv(windows)[:, 0], conv(x_NC))


def test_zero_centred_norms_add_one_in_fp32() -> None:
    norm = RMSNorm(Build(torch.bfloat16, CPU), 64, 1e-6, zero_centred=True)
    (slot,) = norm.own_slots()
    weight = torch.randn(64) * 1e-3
    slot.target.copy_(weight)
    norm.derive()
    x = torch.randn(5, 64).bfloat16()
    want = functional.rms_norm(x.float(), (64,), 1 + weight, 1e-6)
    assert torch.equal(norm(x), want.bfloat16())


def test_equal_positions_of_three_axes_are_the_plain_rotation() -> None:
    """Of a part of each head, by sections, as Qwen3.5's are: in text every axis counts alike."""
    spec, positions = RopeSpec(sections=(11, 11, 10), rotary_dim=64), torch.randint(0, 500, (40,))
    plain = Rope(BUILD, RopeSpec(), 64, 500)(positions)
    for got, want in zip(Rope(BUILD, spec, 64, 500)(positions.expand(3, -1)), plain, strict=True):
        assert torch.equal(got, want)


@pytest.fixture(scope="module", params=["qwen3_next", "qwen3_5"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    make = make_qwen3_next if request.param == "qwen3_next" else make_qwen3_5
    return make(tmp_path_factory.mktemp(request.param), seed=5)


def tokens_of(length: int, seed: int) -> list[int]:
    return torch.randint(3, VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_does_not_depend_on_its_batch(folder: Path, dtype: str) -> None:
    """To the bit: the same cuts give the same logits alone and beside others."""
    sequences = {s: tokens_of(90, s) for s in range(7)}
    cuts = {s: [0, 20 + 3 * s, 21 + 3 * s, 60, *range(61, 91)] for s in sequences}
    together, turns = PagedModel(folder, dtype=dtype, backend=CpuBackend(), seed=3), len(cuts[0]) - 1
    got: dict[int, list[Tensor]] = {s: [] for s in sequences}
    for turn in range(turns):
        work = [(s, tokens[cuts[s][turn] : cuts[s][turn + 1]]) for s, tokens in sequences.items()]
        work = work[turn % 7 :] + work[: turn % 7]
        for (s, _), logits in zip(work, together.step(work), strict=True):
            got[s].append(logits)
    for s, tokens in sequences.items():
        alone = PagedModel(folder, dtype=dtype, backend=CpuBackend())
        want = [alone.step([(0, tokens[a:b])])[0] for a, b in itertools.pairwise(cuts[s])]
        assert torch.equal(torch.cat(got[s]), torch.cat(want))


def test_a_state_is_of_one_sequence(folder: Path) -> None:
    """Others' blocks, which hold NaN, are neither read nor written."""
    paged = PagedModel(folder)
    paged.step([(s, tokens_of(10 + s, s)) for s in range(3)])
    used = sorted(paged._states["state"].values())
    for region in ("gdn_conv", "gdn_recurrent"):
        rows = paged.pool.region(region)
        spoiled = rows.isnan().flatten(1).all(1)
        assert spoiled.sum() == len(rows) - 3
        assert not rows[used].isnan().any()
