"""Recorded passes of the multi-token-prediction layer on a GPU: the drafts of passes as they are run, to the token.

In fp32, where what a pass is padded with changes roundings that decide nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from engine_support import prompts
from mtp_support import ALWAYS, MTP, make_mtp

from nanodeploy import LLM, SamplingParams

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("gpu_for_engines")]

TRAINED = Path(__file__).parents[1] / "data" / "mtp-dyck"
OPTIONS: dict[str, Any] = {
    "device": "cuda",
    "dtype": "float32",
    "kv_cache_memory_bytes": 256 << 20,
    "max_model_len": 512,
    "max_num_seqs": 16,
}
KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 1.0},
    {"temperature": 0.9, "top_p": 0.9, "top_k": 20},
    {"temperature": 0.8, "frequency_penalty": 0.7},
    {"logit_bias": ((7, 3.0),)},
)


@dataclass
class Found:
    """`drafts`: of every pass. `query_lens`: new tokens of sequences in recorded passes, in order."""

    tokens: list[list[int]]
    drafts: list[list[tuple[int, ...]]]
    query_lens: list[int]
    shares: list[float]


def run(folder: Path, texts: Sequence[Sequence[int]], *, recorded: bool, always: bool, **options: Any) -> Found:
    found = Found([], [], [], [])
    with LLM(folder, **(OPTIONS | {"speculative_config": MTP} | options)) as llm:
        parts = llm._built.parts
        assert parts.drafting is not None
        assert parts.speculator is not None
        runner: Any = parts.drafting._model
        assert runner.graphs is not None, "drafts are recorded on a GPU"
        if always:
            parts.speculator._cost = ALWAYS
        if recorded:
            replay = runner.graphs.replay
            runner.graphs.replay = lambda batch, size: (
                found.query_lens.append(batch.max_query_len),
                replay(batch, size),
            )[1]
        else:
            runner.graphs = None
        draw = runner.run
        runner.run = lambda hidden, work: (found.drafts.append(draw(hidden, work)), found.drafts[-1])[1]
        params = [
            SamplingParams(**({"temperature": 0.0, "max_tokens": 80, "ignore_eos": True, "seed": i} | KINDS[i % 5]))
            for i in range(len(texts))
        ]
        outputs = llm.generate([list(t) for t in texts], params)
    found.tokens = [o.outputs[0].token_ids for o in outputs]
    found.shares = [o.stats.accepted_draft_tokens / max(o.stats.draft_tokens, 1) for o in outputs]
    return found


@pytest.mark.parametrize("sizes", [(1, 2, 4, 8), (16,)])
@pytest.mark.parametrize("always", [True, False])
def test_recorded_drafts_of_a_trained_layer(sizes: tuple[int, ...], always: bool) -> None:
    """Most are right, so first passes have up to four tokens of a sequence."""
    texts = [(1, *range(5, 5 + 2 * n)) for n in range(1, 12)]
    wanted = run(TRAINED, texts, recorded=False, always=always)
    found = run(TRAINED, texts, recorded=True, always=always, cuda_graph_sizes=sizes)
    assert found.tokens == wanted.tokens
    assert found.drafts == wanted.drafts
    assert {1, 4} <= set(found.query_lens) <= {1, 2, 3, 4}
    assert found.shares[0] > 0.7
    assert len(found.query_lens) > len(found.drafts)


def test_recorded_drafts_of_layers_that_are_never_right(tmp_path: Path) -> None:
    folder, texts = make_mtp(tmp_path / "model", seed=7), prompts(55, (9, 40, 100, 3, 1))
    wanted = run(folder, texts, recorded=False, always=True)
    found = run(folder, texts, recorded=True, always=True)
    assert found.tokens == wanted.tokens
    assert found.drafts == wanted.drafts
    assert len(found.query_lens) > 100


def test_tokens_are_those_without_drafts(tmp_path: Path) -> None:
    texts = [(1, *range(5, 5 + 2 * n)) for n in range(1, 12)]
    found = run(TRAINED, texts, recorded=True, always=True)
    options = OPTIONS | {"speculative_config": {"method": "none"}}
    params = [
        SamplingParams(**({"temperature": 0.0, "max_tokens": 80, "ignore_eos": True, "seed": i} | KINDS[i % 5]))
        for i in range(len(texts))
    ]
    with LLM(TRAINED, **options) as llm:
        plain = llm.generate([list(t) for t in texts], params)
    assert found.tokens == [o.outputs[0].token_ids for o in plain]
