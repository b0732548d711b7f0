"""Layers of models with delta nets: parts of their own, and that a sequence's numbers are its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models_support import CPU, PagedModel
from tiny_models import VOCAB_SIZE, make_qwen3_5, make_qwen3_next
from torch import Tensor
from torch.nn import functional

from common.attention.cpu import CpuBackend
from common.layers.base import Build
from common.layers.delta_spec import DeltaSpec
from common.layers.gated_delta import CausalConv, Heads
from common.layers.rms_norm import RMSNorm
from common.layers.rope import Rope
from common.layers.rope_spec import RopeSpec

BUILD = Build(torch.float32, CPU)


@pytest.mark.parametrize("first", [0, 1])
def test_taps_by_key_head(first: int) -> None:
    """A rank's, of [all queries | all keys | all values]."""
    spec = DeltaSpec((True,), 3, 6, 4, 5, 4)
    conv = CausalConv(BUILD, Heads(spec, first, 2))
    weight = torch.randn(3 * 4 * 2 + 6 * 5, 1, 4)
    for slot in conv.own_slots():
        assert slot.shape == weight.shape
        slot.target.copy_(weight.narrow(0, slot.start, slot.target.shape[0]))
    conv.derive()
    q, k, v = weight[:12], weight[12:24], weight[24:]
    for unit in range(2):
        head = first + unit
        want = torch.cat((q[4 * head :][:4], k[4 * head :][:4], v[10 * head :][:10]))
        assert torch.equal(conv.taps_GWC[unit], want[:, 0].T)


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
def test_a_row_depends_on_its_sequence_alone(folder: Path, dtype: str) -> None:
    """To the bit: not on others in the batch, nor on where its steps are cut."""
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
        (want,) = PagedModel(folder, dtype=dtype, backend=CpuBackend()).step([(0, tokens)])
        assert torch.equal(torch.cat(got[s]), want)


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
