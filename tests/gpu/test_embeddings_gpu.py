"""Vectors of an embedding checkpoint on a GPU: transformers' in fp32, but for what bf16 rounds away."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from embedding_support import cut, reference_vector
from engine_support import Answer, Solo, prompts
from numpy.typing import NDArray

from common.types import FinishReason, MonotonicClock, Pooling, SamplingParams

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
LEAST_COSINE = 0.998  # the CPU's own bf16 has 0.9997 at the worst
OPTIONS: dict[str, Any] = {"dtype": "bfloat16", "kv_cache_memory_bytes": 256 << 20, "max_model_len": 512}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    return tiny_models.make_qwen3_embedding(tmp_path_factory.mktemp("embedding"), seed=3)


def embed(solo: Solo, texts: list[tuple[int, ...]], dimensions: int = 0) -> list[Answer]:
    asked = [solo.submit(text, SamplingParams(max_tokens=1, seed=0), pooling=Pooling(dimensions)) for text in texts]
    solo.run(*asked)
    return asked


def vector(answer: Answer) -> NDArray[np.float32]:
    assert answer.finish == {0: FinishReason.STOP}, answer.failure
    return np.frombuffer(answer.vector, "<f4")


@pytest.mark.parametrize("overlap", ["on", "off"])
def test_batches_chunks_and_cached_prefixes(folder: Path, overlap: str) -> None:
    solo = Solo(
        folder, MonotonicClock(), device=DEVICE, max_num_batched_tokens=256, async_scheduling=overlap, **OPTIONS
    )
    texts = prompts(1, (1, 2, 17, 64, 65, 129, 300, 500, 512, 33))
    first = embed(solo, texts)
    again = embed(solo, [*texts, (*texts[7][:448], 9)])  # the last: one new token behind what is cached
    worst = 1.0
    for text, answer in zip([*texts, *texts, (*texts[7][:448], 9)], [*first, *again], strict=True):
        found = vector(answer)
        assert np.linalg.norm(found) == pytest.approx(1, abs=1e-5)
        worst = min(worst, float(found @ reference_vector(folder, text)))
    assert worst > LEAST_COSINE
    assert again[-1].stats.cached_tokens == 448
    (short,) = embed(solo, texts[6:7], 16)
    assert float(vector(short) @ cut(reference_vector(folder, texts[6]), 16)) > LEAST_COSINE
    solo.check_idle()
    solo.decode.close()
