"""The sampler against a slow reference in plain Python, alone and in batches."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from mask_support import row_masks
from torch import Tensor

from common.engine import logprobs as logprobs_module
from common.engine import sampler as sampler_module
from common.engine.batch import RowMasks, SampleRow
from common.engine.sampler import Sampler
from common.kernels import cpu, sampling
from common.types import SamplingParams

VOCAB = 1000


@pytest.fixture(autouse=True, params=["torch", *(isa.name for isa in cpu.available())])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    draw, top = sampling.draw_rows_torch, sampling.top_rows_torch
    if name != "torch":
        draw = functools.partial(sampling.draw_rows_native, isa=cpu.Isa[name])
        top = functools.partial(sampling.top_rows_native, isa=cpu.Isa[name])
    monkeypatch.setattr(sampler_module, "draw_rows", draw)
    monkeypatch.setattr(logprobs_module, "top_rows", top)
    return name


def make_row(
    *,
    seed: int = 7,
    choice: int = 0,
    output_index: int = 0,
    prompt_ids: Sequence[int] = (),
    output_ids: Sequence[int] = (),
    stop_ids: Sequence[int] = (),
    **params: Any,
) -> SampleRow:
    sampling_params = SamplingParams(max_tokens=1000, **params)
    return SampleRow(seed, choice, output_index, sampling_params, prompt_ids, output_ids, frozenset(stop_ids))


def make_logits(rows: int, vocab: int = VOCAB, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def f32(x: float) -> float:
    return torch.tensor(x, dtype=torch.float32).item()


def adjusted_reference(logits: list[float], row: SampleRow, allowed: Sequence[bool] | None) -> list[float]:
    p, x = row.params, list(logits)
    for token, bias in dict(p.logit_bias).items():
        x[token] = f32(x[token] + f32(bias))
    if row.output_index < p.min_tokens:
        for token in row.stop_ids:
            x[token] = -math.inf
    if allowed is not None:
        x = [v if ok else -math.inf for v, ok in zip(x, allowed, strict=True)]
    if p.repetition_penalty != 1.0:
        for token in {*row.prompt_ids, *row.output_ids}:
            penalty = f32(p.repetition_penalty)
            x[token] = f32(x[token] / penalty if x[token] > 0 else x[token] * penalty)
    for token, count in Counter(row.output_ids).items():
        x[token] = f32(x[token] - f32(p.presence_penalty + p.frequency_penalty * count))
    return x


def token_reference(logits: Tensor, row: SampleRow, allowed: Sequence[bool] | None = None) -> int:
    p = row.params
    x = adjusted_reference(logits.tolist(), row, allowed)
    order = sorted(range(len(x)), key=lambda t: (-x[t], t))
    if p.temperature == 0:
        return order[0]
    if p.top_k > 0:
        order = order[: p.top_k]
    weight = [math.exp((x[t] - x[order[0]]) / p.temperature) for t in order]
    total, before, kept = math.fsum(weight), 0.0, []
    for t, w in zip(order, weight, strict=True):
        if kept and (before >= p.top_p * total and p.top_p < 1):
            break
        before += w
        if w >= p.min_p or not kept:
            kept.append(t)
    key = sampling.noise_key(row.seed, row.choice, row.output_index)
    return max(kept, key=lambda t: x[t] / p.temperature + sampling.gumbel_reference(key, t))


PARAMS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 2.5},
    {"temperature": 1e-3},
    {"temperature": 100.0},
    {"top_k": 1},
    {"top_k": 5, "temperature": 3.0},
    {"top_k": 50},
    {"top_k": 5000},
    {"top_k": -1},
    {"top_p": 0.01},
    {"top_p": 0.5},
    {"top_p": 0.95, "temperature": 4.0},
    {"top_p": 0.999, "temperature": 50.0},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"min_p": 0.01, "temperature": 5.0},
    {"top_k": 40, "top_p": 0.9, "min_p": 0.02, "temperature": 2.0},
    {"repetition_penalty": 1.7, "prompt_ids": (1, 2, 3, 1), "output_ids": (9, 9, 4), "output_index": 3},
    {"repetition_penalty": 0.5, "prompt_ids": tuple(range(50)), "temperature": 0.0},
    {"presence_penalty": 1.5, "output_ids": (9, 9, 4), "output_index": 3, "temperature": 0.5},
    {"frequency_penalty": -1.9, "output_ids": (9, 9, 9, 4), "output_index": 4},
    {"logit_bias": ((3, 5.0), (700, -2.5)), "temperature": 0.7},
    {"min_tokens": 4, "stop_ids": (5, 6), "output_index": 3},
]


@pytest.mark.parametrize("params", PARAMS, ids=str)
def test_tokens_equal_the_plain_reference(params: dict[str, Any]) -> None:
    logits = make_logits(6, seed=len(str(params)))
    rows = [make_row(seed=2**63 + i, choice=i % 2, **params) for i in range(6)]
    result = Sampler(VOCAB, "cpu").sample(logits, rows)
    assert result.token_ids_R.dtype == torch.int64
    assert result.token_ids_R.tolist() == [token_reference(x, row) for x, row in zip(logits, rows, strict=True)]
    assert result.failures == {}
    assert result.logprobs == [None] * 6


@pytest.mark.parametrize("vocab", [1, 2, 31, 32, 33, 4097])
@pytest.mark.parametrize("ties", [False, True])
def test_any_vocabulary_size_gives_the_tokens_of_the_reference(vocab: int, ties: bool) -> None:
    rows = [
        make_row(seed=i, temperature=t, top_k=k, top_p=p, min_p=m)
        for i, (t, k, p, m) in enumerate(
            (t, k, p, m) for t in (0.1, 1.0, 9.0) for k in (0, 3, 40) for p in (0.3, 0.97, 1.0) for m in (0.0, 0.2)
        )
    ]
    logits = make_logits(len(rows), vocab, seed=vocab)
    if ties:
        logits = logits.round()
        logits[:, ::5] = -math.inf
        logits[:, vocab // 2] = 1.0
    tokens = Sampler(vocab, "cpu").sample(logits, rows).token_ids_R.tolist()
    if vocab <= 33:
        assert tokens == [token_reference(x, row) for x, row in zip(logits, rows, strict=True)]
    draws = [sampler_module._draw(row) for row in rows]
    assert tokens == sampling.draw_rows_torch(logits, draws)[0].tolist()


def mixed_rows() -> list[SampleRow]:
    return [make_row(seed=100 + i, **{"output_index": i, **params}) for i, params in enumerate(PARAMS)]


def test_a_row_draws_the_same_alone_in_a_batch_and_in_another_order() -> None:
    rows, logits, sampler = mixed_rows(), make_logits(len(PARAMS)), Sampler(VOCAB, "cpu")
    together = sampler.sample(logits, rows).token_ids_R.tolist()
    alone = [sampler.sample(logits[i : i + 1], [row]).token_ids_R.item() for i, row in enumerate(rows)]
    backwards = sampler.sample(logits.flip(0), rows[::-1]).token_ids_R.tolist()[::-1]
    assert together == alone == backwards


def test_logits_are_left_as_they_are_and_need_not_be_contiguous() -> None:
    rows, wide = mixed_rows(), make_logits(len(PARAMS), 2 * VOCAB)
    strided, before = wide[:, ::2], wide.clone()
    tokens = Sampler(VOCAB, "cpu").sample(strided, rows).token_ids_R
    assert torch.equal(wide, before)
    assert torch.equal(tokens, Sampler(VOCAB, "cpu").sample(strided.contiguous(), rows).token_ids_R)


@pytest.mark.parametrize(
    "params", [{"temperature": 1.0}, {"temperature": 0.6}, {"top_p": 0.8}, {"top_k": 6}, {"min_p": 0.1}], ids=str
)
def test_frequencies_follow_the_distribution(implementation: str, params: dict[str, Any]) -> None:
    draws, vocab = 1000 if implementation == "torch" else 8000, 16
    logits = make_logits(1, vocab, seed=3, scale=1.0)
    rows = [make_row(seed=11, output_index=i % 100, choice=i // 100, **params) for i in range(draws)]
    tokens = Sampler(vocab, "cpu").sample(logits.expand(draws, vocab), rows).token_ids_R
    p = rows[0].params
    weight, order = (logits[0].double() / p.temperature).softmax(0).sort(descending=True)
    keep = torch.ones(vocab, dtype=torch.bool)
    keep[p.top_k or vocab :] = False
    keep &= (weight.cumsum(0) - weight < p.top_p) & (weight >= p.min_p * weight[0])
    expected = torch.zeros(vocab).double()
    expected[order[keep]] = weight[keep] / weight[keep].sum() * draws
    seen = tokens.bincount(minlength=vocab).double()
    assert seen[expected == 0].sum() == 0
    alive = expected > 0
    chi2 = ((seen - expected)[alive].square() / expected[alive]).sum().item()
    freedom = int(alive.sum()) - 1
    assert chi2 < freedom + 3.5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("implementation", ["torch"], indirect=True)
def test_noise_of_places_and_choices_is_unrelated() -> None:
    ids = torch.arange(4000)
    keys = [sampling.noise_key(s, c, i) for s in (0, 1) for c in (0, 1) for i in (0, 1)]
    g = sampling.gumbel_torch(keys, ids)
    assert len(set(keys)) == 8
    assert (torch.corrcoef(g) - torch.eye(8)).abs().max() < 0.06
    assert g.mean().item() == pytest.approx(0.5772, abs=0.02)
    assert g.var().item() == pytest.approx(math.pi**2 / 6, abs=0.05)


@pytest.mark.parametrize("implementation", ["torch"], indirect=True)
def test_noise_is_the_documented_function() -> None:
    assert sampling.mix64(0) == 0
    assert sampling.mix64(sampling.C1) == 0xE220A8397B1DCDAF  # first output of splitmix64 seeded with 0
    assert sampling.noise_key(-1, 0, 0) == sampling.noise_key(2**64 - 1, 0, 0)
    for key in (0, 1, 2**63, 2**64 - 1, sampling.noise_key(5, 1, 9)):
        ids = torch.tensor([0, 1, 2, 49151, 262143])
        expected = [sampling.gumbel_reference(key, t) for t in ids.tolist()]
        assert sampling.gumbel_torch([key], ids)[0].tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("temperature", [5e-324, 1e-308, 1e-30])
@pytest.mark.parametrize("params", [{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}], ids=str)
def test_the_smallest_temperatures_take_the_best_token(params: dict[str, Any], temperature: float) -> None:
    logits = make_logits(6, 200, seed=4, scale=5.0)
    rows = [make_row(seed=i, temperature=temperature, **params) for i in range(6)]
    assert Sampler(200, "cpu").sample(logits, rows).tokens == logits.argmax(-1).tolist()


def test_greedy_ties_go_to_the_lowest_id() -> None:
    logits = torch.zeros(2, VOCAB)
    logits[0, [700, 31, 900]] = 5.0
    assert Sampler(VOCAB, "cpu").sample(logits, [make_row(temperature=0.0)] * 2).token_ids_R.tolist() == [31, 0]


@pytest.mark.parametrize("params", [{"top_k": 2}, {"top_p": 0.9}, {"top_k": 3, "top_p": 0.6}], ids=str)
def test_ties_at_the_edge_of_truncation_go_to_the_lowest_ids(params: dict[str, Any]) -> None:
    logits = torch.full((300, VOCAB), -20.0)
    logits[:, [900, 31, 700]] = 5.0
    if "top_p" in params and "top_k" not in params:
        logits[:, 900] = 2.0
    rows = [make_row(output_index=i, **params) for i in range(300)]
    assert set(Sampler(VOCAB, "cpu").sample(logits, rows).token_ids_R.tolist()) == {31, 700}


def test_logprobs_are_of_the_raw_distribution() -> None:
    logits = make_logits(4)
    rows = [
        make_row(logprobs=3, temperature=0.2, top_k=2, logit_bias=((17, 100.0),)),
        make_row(),
        make_row(logprobs=0, temperature=0.0),
        make_row(logprobs=20, repetition_penalty=1.5, prompt_ids=range(100)),
    ]
    result = Sampler(VOCAB, "cpu").sample(logits, rows)
    expected = torch.log_softmax(logits, dim=-1)
    tokens = result.token_ids_R.tolist()
    assert tokens[0] == 17
    for r, top_n in ((0, 3), (2, 0), (3, 20)):
        got = result.logprobs[r]
        assert got is not None
        assert got.token_logprobs == (pytest.approx(expected[r, tokens[r]].item(), abs=1e-6),)
        top = expected[r].topk(top_n)
        assert (got.top_n, got.top_ids) == (top_n, tuple(top.indices.tolist()))
        assert got.top_logprobs == pytest.approx(top.values.tolist(), abs=1e-6)
    assert result.logprobs[1] is None


def test_top_logprobs_ties_are_listed_by_id() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, [40, 4, 400, 44]] = 1.0
    got = Sampler(VOCAB, "cpu").sample(logits, [make_row(logprobs=3)]).logprobs[0]
    assert got is not None
    assert got.top_ids == (4, 40, 44)


def test_prompt_logprobs_follow_the_targets() -> None:
    logits = make_logits(5)
    expected = torch.log_softmax(logits, dim=-1)
    got = logprobs_module.prompt_logprobs(logits, torch.tensor([3, 1, 4, 1, 5]), 2).get()
    assert got.token_logprobs == pytest.approx([expected[i, t].item() for i, t in enumerate([3, 1, 4, 1, 5])], abs=1e-6)
    top = expected.topk(2)
    assert (got.top_n, got.top_ids) == (2, tuple(top.indices.flatten().tolist()))
    assert got.top_logprobs == pytest.approx(top.values.flatten().tolist(), abs=1e-6)


def test_min_tokens_holds_stop_tokens_back_until_reached() -> None:
    logits = torch.zeros(3, VOCAB)
    logits[:, 8] = 50.0
    rows = [make_row(min_tokens=2, stop_ids=(8, 5000), output_index=i) for i in range(3)]
    tokens = Sampler(VOCAB, "cpu").sample(logits, rows).token_ids_R.tolist()
    assert 8 not in tokens[:2]
    assert tokens[2] == 8


def test_extreme_bias_bans_and_forces() -> None:
    logits = make_logits(400, seed=5)
    top = logits.argmax(dim=-1).tolist()
    banned = [make_row(output_index=i, logit_bias=((top[i], -100.0),)) for i in range(200)]
    forced = [make_row(output_index=i, logit_bias=((123, 100.0), (10**6, 100.0))) for i in range(200)]
    tokens = Sampler(VOCAB, "cpu").sample(logits, banned + forced).token_ids_R.tolist()
    assert all(t != best for t, best in zip(tokens[:200], top[:200], strict=True))
    assert set(tokens[200:]) == {123}


def test_penalties_ignore_ids_past_the_vocabulary() -> None:
    logits = make_logits(1)
    plain = make_row(repetition_penalty=1.4, presence_penalty=0.5, prompt_ids=[3, 4], output_ids=[5], output_index=1)
    more = make_row(
        repetition_penalty=1.4, presence_penalty=0.5, prompt_ids=[3, 4, VOCAB + 7], output_ids=[5, -1], output_index=1
    )
    sampler = Sampler(VOCAB, "cpu")
    assert torch.equal(sampler.sample(logits, [plain]).token_ids_R, sampler.sample(logits, [more]).token_ids_R)


@pytest.mark.parametrize("masked", [range(len(PARAMS)), range(0, len(PARAMS), 3), [5]])
def test_a_grammar_mask_limits_each_row_by_itself(masked: Sequence[int]) -> None:
    rows = mixed_rows()
    logits = make_logits(len(rows), seed=9)
    allowed = torch.rand(len(rows), VOCAB, generator=torch.Generator().manual_seed(1)) < 0.2
    result = Sampler(VOCAB, "cpu").sample(logits, rows, row_masks(allowed, masked))
    allowed[[r for r in range(len(rows)) if r not in masked]] = True
    expected = [token_reference(x, r, a) for x, r, a in zip(logits, rows, allowed.tolist(), strict=True)]
    assert result.token_ids_R.tolist() == expected


def test_a_row_with_nothing_left_fails_alone() -> None:
    rows, logits, sampler = mixed_rows(), make_logits(len(PARAMS)), Sampler(VOCAB, "cpu")
    expected = sampler.sample(logits, rows).token_ids_R.tolist()
    for bad in (0, 1, 12, 15, len(rows) - 1):
        allowed = torch.ones(len(rows), VOCAB, dtype=torch.bool)
        allowed[bad] = False
        result = sampler.sample(logits, rows, row_masks(allowed, range(len(rows))))
        assert list(result.failures) == [bad]
        assert "no token is allowed" in result.failures[bad]
        assert result.token_ids_R.tolist() == [*expected[:bad], -1, *expected[bad + 1 :]]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 501, VOCAB - 1])
def test_logits_that_are_no_numbers_fail_alone(value: float, place: int) -> None:
    rows, logits, sampler = mixed_rows(), make_logits(len(PARAMS)), Sampler(VOCAB, "cpu")
    expected = sampler.sample(logits, rows).token_ids_R.tolist()
    for bad in (0, 1, 12):
        broken = logits.clone()
        broken[bad, place] = value
        result = sampler.sample(broken, rows)
        assert result.failures == {bad: "the model's logits are not finite numbers"}
        assert result.token_ids_R.tolist() == [*expected[:bad], -1, *expected[bad + 1 :]]


def test_wrong_shapes_are_refused() -> None:
    sampler = Sampler(VOCAB, "cpu")
    with pytest.raises(ValueError, match="logits must be float32"):
        sampler.sample(make_logits(2), [make_row()])
    with pytest.raises(ValueError, match="logits must be float32"):
        sampler.sample(make_logits(1).double(), [make_row()])
    words = np.full((1, VOCAB // 32 + 1), -1, np.int32)
    for rows, wrong in (
        ([0], words[:, 1:]),
        ([0], words.astype(np.int64)),
        ([0, 0], words),
        ([1], words),
        ([-1], words),
    ):
        with pytest.raises(ValueError, match="masks"):
            sampler.sample(make_logits(1), [make_row()], RowMasks(np.array(rows), wrong))
