"""The sampler on the device against the one on the CPU: what requests change of their logits, tokens, logprobs."""

from __future__ import annotations

import math
import random
import warnings
from typing import Any

import pytest
import torch
from mask_support import pack_bits, row_masks

from common.engine.batch import SampleRow
from common.engine.sampler import Sampler
from common.kernels.masks import forbid
from common.types import SamplingParams

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::RuntimeWarning")]  # the interpreter's numpy

VOCAB = 151936


def random_row(rng: random.Random, index: int) -> SampleRow:
    params: dict[str, Any] = {"temperature": rng.choice((0.0, 0.7, 1.0)), "max_tokens": 100}
    if rng.random() < 0.4:
        params |= {"top_k": rng.choice((0, 20)), "top_p": rng.choice((0.9, 1.0)), "min_p": rng.choice((0.0, 0.05))}
    if rng.random() < 0.4:
        params |= {"repetition_penalty": rng.choice((0.7, 1.3))}
    if rng.random() < 0.4:
        params |= {"presence_penalty": 0.5, "frequency_penalty": -0.3}
    if rng.random() < 0.3:
        params |= {"logit_bias": tuple((rng.randrange(VOCAB + 9), rng.uniform(-20, 20)) for _ in range(30))}
    if rng.random() < 0.3:
        params |= {"min_tokens": 50}
    if rng.random() < 0.3:
        params |= {"logprobs": rng.choice((0, 1, 20))}
    prompt, output = ([rng.randrange(-1, VOCAB + 3) for _ in range(40)] for _ in range(2))
    return SampleRow(
        rng.getrandbits(64), index % 3, index, SamplingParams(**params), prompt, output, frozenset((2, 9, 7))
    )


@pytest.mark.parametrize("masked", ["", "all", "some"])
@pytest.mark.parametrize("seed", [1, 2])
def test_tokens_and_logprobs_equal_the_cpu(cuda: torch.device, masked: str, seed: int) -> None:
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    rows = [random_row(rng, i) for i in range(70)]
    logits = torch.randn(len(rows), VOCAB, generator=generator) * 4
    logits[5, 100] = math.nan
    masks = None
    if masked:
        allowed = torch.rand(len(rows), VOCAB, generator=generator) < 0.1
        allowed[3] = False
        masks = row_masks(allowed, range(0, len(rows), 1 if masked == "all" else 3))
    wanted = Sampler(VOCAB, "cpu").sample(logits, rows, masks)
    on_device = logits.to(cuda)
    sampler = Sampler(VOCAB, cuda)
    results = [sampler.sample(on_device, rows, masks) for _ in range(4)]
    assert torch.equal(on_device.cpu(), logits) or logits.isnan().any()
    for got in results:
        assert got.tokens == wanted.tokens == got.token_ids_R.tolist()
        assert got.failures == wanted.failures
        for mine, theirs in zip(got.logprobs, wanted.logprobs, strict=True):
            assert (mine is None) == (theirs is None)
            if mine is not None and theirs is not None:
                assert mine.top_ids == theirs.top_ids
                assert mine.token_logprobs == pytest.approx(theirs.token_logprobs, abs=1e-5, nan_ok=True)
                assert mine.top_logprobs == pytest.approx(theirs.top_logprobs, abs=1e-5, nan_ok=True)


def test_nothing_waits_for_the_device(cuda: torch.device) -> None:
    rng = random.Random(3)
    rows = [random_row(rng, i) for i in range(16)]
    logits, sampler = torch.randn(len(rows), VOCAB, device=cuda), Sampler(VOCAB, cuda)
    for _ in range(4):  # kernels are compiled, the ring of pinned memory is full
        sampler.sample(logits, rows).tokens  # noqa: B018
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        result = sampler.sample(logits, rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(result.tokens) == len(rows)


@pytest.mark.parametrize("vocab", [31, 32, 1000, 9000])
def test_masks_of_bits(kernel_device: torch.device, vocab: int) -> None:
    from common.kernels.gpu import masks

    allowed = torch.rand(3, vocab, generator=torch.Generator().manual_seed(vocab)) < 0.5
    logits, rows = torch.randn(5, vocab), torch.tensor([4, 0, 3])
    wanted = logits.clone()
    wanted[rows] = wanted[rows].masked_fill(~allowed, -torch.inf)
    words = pack_bits(allowed)
    got = logits.to(kernel_device)
    masks.forbid(got, rows.to(kernel_device), words.to(kernel_device))
    assert torch.equal(got.cpu(), wanted)
    forbid(logits, rows, words)
    assert torch.equal(logits, wanted)
