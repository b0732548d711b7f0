"""Whole engines on a GPU, every family: bf16 against fp32 on the CPU, recorded steps against steps as they are run,
batches and overlap against one at a time.

A bf16 answer is judged token by token: the CPU reads prompt and answer once, in fp32, and says what it gives each
token. How far bf16 is off by rounding alone, the CPU's own bf16 says; a GPU, which adds in another order, may be off by
`ROOM` times as much, at the median: where a rounding chooses other experts, single tokens say nothing.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from engine_support import prompts
from families import FAMILIES, Family
from mtp_support import make_mtp
from tiny_models import make_llama, make_qwen3, make_qwen3_5, make_qwen3_moe, make_qwen3_next

from nanodeploy import LLM, SamplingParams

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("gpu_for_engines")]

LENGTHS, COUNT = (1, 17, 100, 300), 24
ROOM = 3.0
LEAST = 0.02  # nats: where the CPU's bf16 happens to be as good as exact
ON_GPU: dict[str, Any] = {
    "device": "cuda",
    "dtype": "bfloat16",
    "kv_cache_memory_bytes": 256 << 20,
    "max_model_len": 512,
    "max_num_seqs": 16,
}
ON_CPU: dict[str, Any] = {"device": "cpu", "max_model_len": 512}


@dataclass(frozen=True)
class Answer:
    tokens: list[int]
    logprobs: list[float]


def generate(folder: Path, texts: Sequence[Sequence[int]], count: int = COUNT, **options: Any) -> list[Answer]:
    """Greedy answers of one engine, all prompts at once."""
    params = options.pop("params", None) or SamplingParams(
        temperature=0.0, max_tokens=count, ignore_eos=True, seed=0, logprobs=0
    )
    with LLM(folder, **options) as llm:
        outputs = [o.outputs[0] for o in llm.generate([list(t) for t in texts], params)]
    return [Answer(o.token_ids, [entry.token_logprobs[0] for entry in o.logprobs]) for o in outputs]


class Judge:
    """What the CPU gives the tokens of an answer, given all before them."""

    def __init__(self, folder: Path, dtype: str, **engine: Any) -> None:
        self._llm = LLM(folder, dtype=dtype, **(ON_CPU | engine))

    def logprobs(self, prompt: Sequence[int], tokens: Sequence[int]) -> tuple[list[float], list[float]]:
        """(of the tokens, of the best in each place)"""
        params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, seed=0, prompt_logprobs=1)
        (output,) = self._llm.generate([[*prompt, *tokens]], params)
        assert output.prompt_logprobs is not None
        own = list(output.prompt_logprobs.token_logprobs[-len(tokens) :])
        return own, list(output.prompt_logprobs.top_logprobs[-len(tokens) :])

    def close(self) -> None:
        self._llm.close()


def off(some: Sequence[float], others: Sequence[float]) -> list[float]:
    return [abs(a - b) for a, b in zip(some, others, strict=True)]


def judge(folder: Path, texts: Sequence[Sequence[int]], answers: Sequence[Answer], **engine: Any) -> None:
    """Logprobs are as near to fp32 as bf16 is, and every token is the best, or as good as."""
    exact, rounded = Judge(folder, "float32", **engine), Judge(folder, "bfloat16", **engine)
    by_rounding: list[float] = []
    errors: list[float] = []
    behind: list[float] = []
    for text, answer in zip(texts, answers, strict=True):
        own, best = exact.logprobs(text, answer.tokens)
        by_rounding += off(own, rounded.logprobs(text, answer.tokens)[0])
        errors += off(own, answer.logprobs)
        behind += off(best, own)
    exact.close()
    rounded.close()
    limit = max(LEAST, ROOM * statistics.median(by_rounding))
    print(json.dumps({"error": statistics.median(errors), "worst": max(errors), "limit": limit}))
    assert statistics.median(errors) <= limit
    assert statistics.median(behind) <= limit


@pytest.mark.parametrize("family", [pytest.param(f, id=f.name) for f in FAMILIES])
def test_a_family_is_as_exact_as_bf16(family: Family, tmp_path: Path) -> None:
    folder = family.configurations[family.quick_configurations[0]](tmp_path / "model")
    texts = prompts(50, LENGTHS)
    engine = {name: value for name, value in family.engine.items() if name != "block_size"}
    judge(folder, texts, generate(folder, texts, **(ON_GPU | engine)), **dict(family.engine))


@pytest.mark.parametrize("family", [pytest.param(f, id=f.name) for f in FAMILIES])
def test_a_family_in_fp32_gives_the_tokens_of_the_cpu(family: Family, tmp_path: Path) -> None:
    """A rounding of bf16 may choose other experts or positions, and then proves little: here nothing is rounded."""
    folder = family.configurations[family.quick_configurations[0]](tmp_path / "model")
    texts = prompts(50, LENGTHS)
    engine = {name: value for name, value in family.engine.items() if name != "block_size"}
    found = generate(folder, texts, **(ON_GPU | engine | {"dtype": "float32"}))
    expected = generate(folder, texts, **(ON_CPU | dict(family.engine) | {"dtype": "float32"}))
    errors = [max(off(a.logprobs, b.logprobs)) for a, b in zip(found, expected, strict=True) if a.tokens == b.tokens]
    print(json.dumps({"equal": len(errors), "error": max(errors, default=0.0)}))
    assert [a.tokens for a in found] == [a.tokens for a in expected]
    assert max(errors) < 1e-3


@pytest.mark.parametrize("make", [make_llama, make_qwen3, make_qwen3_moe, make_qwen3_next, make_qwen3_5])
def test_a_recorded_step_has_the_bits_of_a_step_as_it_is_run(make: Any, tmp_path: Path) -> None:
    folder, texts = make(tmp_path / "model", seed=3), prompts(51, (5, 60, 200, 31))
    sizes = {"cuda_graph_sizes": (len(texts),)}  # other sizes are other products
    recorded = generate(folder, texts, **(ON_GPU | sizes))
    assert recorded == generate(folder, texts, **(ON_GPU | {"enforce_eager": True}))


def test_padding_changes_nothing_that_matters(tmp_path: Path) -> None:
    folder, texts = make_qwen3(tmp_path / "model", seed=4), prompts(52, (5, 60, 200))
    judge(folder, texts, generate(folder, texts, **(ON_GPU | {"cuda_graph_sizes": (16,)})))


@pytest.mark.parametrize("make", [make_qwen3, make_qwen3_moe])
def test_one_at_a_time_and_64_at_once(make: Any, tmp_path: Path) -> None:
    folder = make(tmp_path / "model", seed=5)
    texts = prompts(53, [3 + 5 * i for i in range(64)])
    judge(folder, texts[::8], generate(folder, texts, **(ON_GPU | {"max_num_seqs": 64}))[::8])
    fixed = ON_GPU | {"max_num_seqs": 64, "deterministic": True}
    together = generate(folder, texts, **fixed)
    alone = [generate(folder, [text], **fixed)[0] for text in texts[::16]]
    assert [a.tokens for a in together[::16]] == [a.tokens for a in alone]
    assert together[::16] == alone


def test_overlap_chunks_and_few_blocks_give_the_same_tokens(tmp_path: Path) -> None:
    folder, texts = make_llama(tmp_path / "model", seed=6), prompts(54, [11 * i + 1 for i in range(12)])
    fixed = ON_GPU | {"deterministic": True}
    plain = generate(folder, texts, **(fixed | {"async_scheduling": "off"}))
    few = {"kv_cache_memory_bytes": 2 << 20, "max_model_len": 256, "block_size": 16}
    for options in ({}, {"max_num_batched_tokens": 48}, few):
        assert generate(folder, texts, **(fixed | options)) == plain


@pytest.mark.parametrize("method", ["ngram", "mtp"])
def test_drafts_change_no_token(method: str, tmp_path: Path) -> None:
    if method == "mtp":
        folder, texts = make_mtp(tmp_path / "model", seed=7), prompts(55, (9, 40, 100))
        judge(folder, texts, generate(folder, texts, **(ON_GPU | _drafts(method))))
        return
    folder, texts = make_llama(tmp_path / "model", seed=7), [t * 3 for t in prompts(55, (9, 40))]
    fixed = ON_GPU | {"deterministic": True}
    assert generate(folder, texts, **(fixed | _drafts(method))) == generate(folder, texts, **fixed)


def _drafts(method: str) -> dict[str, Any]:
    return {"speculative_config": {"method": method, "num_speculative_tokens": 3}}


def test_drawn_tokens_are_those_of_their_noise_in_any_batch(tmp_path: Path) -> None:
    folder, texts = make_llama(tmp_path / "model", seed=8), prompts(56, (9, 40, 77))
    params = SamplingParams(temperature=0.8, top_p=0.9, max_tokens=COUNT, ignore_eos=True, seed=5, logprobs=0)
    fixed = ON_GPU | {"deterministic": True, "params": params}
    together = generate(folder, texts, **fixed)
    assert together == [generate(folder, [text], **fixed)[0] for text in texts]


def test_a_closed_engine_leaves_its_memory_to_the_next(tmp_path: Path) -> None:
    """Each takes more than half of the card. One measured scales: its attention went through another's hands."""
    folder = make_llama(tmp_path / "checkpoint", seed=3, head_dim=64)
    for _ in range(2):
        with LLM(folder, device="cuda", dtype="bfloat16", gpu_memory_utilization=0.6, max_num_seqs=4) as llm:
            llm.calibrate_kv(prompts(3, [40]), tmp_path / "scales.json")
