"""Engines with `deterministic`: tokens and logprobs are the same to the bit, whatever else is computed with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from engine_support import prompts

from nanodeploy import LLM, SamplingParams

pytestmark = pytest.mark.gpu

COUNT = 24
LENGTHS = [5, 130, 64, 1, 300, 33, 70, 257, 128, 17] + [20 + 7 * i for i in range(54)]
SIZES: dict[str, Any] = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 384}
FAMILIES: dict[str, Callable[..., Path]] = {
    "llama": tiny_models.make_llama,
    "qwen3": tiny_models.make_qwen3,
    "qwen3_moe": tiny_models.make_qwen3_moe,
    "qwen3_next": lambda folder, **_: tiny_models.make_qwen3_next(folder),
    "qwen3_5": lambda folder, **_: tiny_models.make_qwen3_5(folder),
    "deepseek_v3": lambda folder, **_: tiny_models.make_deepseek_v3(folder),
    "deepseek_v32": lambda folder, **_: tiny_models.make_deepseek_v32(folder),
}
Answers = list[tuple[list[int], list[float]]]


def params(index: int) -> SamplingParams:
    kind = ({"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.9, "top_k": 50})[index % 3]
    return SamplingParams(max_tokens=COUNT, ignore_eos=True, seed=index, logprobs=0, **kind)


def answer(llm: LLM, given: Sequence[tuple[int, ...]], indices: Sequence[int]) -> Answers:
    outputs = llm.generate([list(given[i]) for i in indices], [params(i) for i in indices])
    return [(o.outputs[0].token_ids, [p.token_logprobs[0] for p in o.outputs[0].logprobs]) for o in outputs]


@pytest.fixture(scope="module", params=list(FAMILIES))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    return FAMILIES[request.param](tmp_path_factory.mktemp(request.param), **SIZES)


def make(folder: Path, **options: Any) -> LLM:
    common: dict[str, Any] = {
        "device": "cuda",
        "dtype": "bfloat16",
        "deterministic": True,
        "kv_cache_memory_bytes": 1 << 28,
        "cuda_graph_sizes": (1, 4, 16, 64),
        "max_num_seqs": 64,
    }
    return LLM(folder, **common | options)


def test_tokens_and_logprobs_do_not_depend_on_the_step(folder: Path) -> None:
    given = prompts(3, LENGTHS)
    everything = range(len(given))
    llm = make(folder)
    together = answer(llm, given, everything)
    assert answer(llm, given, everything) == together  # prompts come from the cache
    del llm
    alone = make(folder, enable_prefix_caching=False)
    assert [answer(alone, given, [i])[0] for i in range(12)] == together[:12]
    del alone
    for options in (
        {"max_num_batched_tokens": 50, "enforce_eager": True},
        {"max_num_seqs": 7, "cuda_graph_sizes": (8,)},
        {"speculative_config": {"method": "ngram", "prompt_lookup_min": 1}},
        {"async_scheduling": "off", "block_size": 16},
    ):
        assert answer(make(folder, **options), given, everything) == together, options
