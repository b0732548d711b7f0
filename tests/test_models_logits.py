"""Our models against transformers: fp32 logits at every position, however the work is cut into steps."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models_support import PagedModel
from tiny_models import VOCAB_SIZE, make_llama, make_qwen3, make_qwen3_moe
from torch import Tensor
from transformers import AutoModelForCausalLM

TOLERANCE = 1e-4
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
CONFIGS: dict[str, tuple[Callable[..., Path], dict[str, Any]]] = {
    "llama": (make_llama, {}),
    "llama-tied": (make_llama, {"tie_word_embeddings": True, "num_attention_heads": 9, "num_key_value_heads": 3}),
    "llama-bias": (make_llama, {"attention_bias": True, "mlp_bias": True}),
    "llama-mha-llama3": (make_llama, {"num_key_value_heads": 4, "rope_parameters": LLAMA3}),
    "llama-linear": (
        make_llama,
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    ),
    "qwen3": (make_qwen3, {"tie_word_embeddings": True}),
    "qwen3-yarn": (make_qwen3, {"rope_parameters": YARN, "attention_bias": True}),
    "qwen3-window": (make_qwen3, {"sliding_window": 24, "num_hidden_layers": 4}),
    "qwen3-window-only": (make_qwen3, {"sliding_window": 5, "max_window_layers": 0}),
    "qwen3-moe": (make_qwen3_moe, {"attention_bias": True}),
    "qwen3-moe-not-normalized": (make_qwen3_moe, {"norm_topk_prob": False, "num_experts_per_tok": 1}),
    "qwen3-moe-every-other": (make_qwen3_moe, {"decoder_sparse_step": 2, "num_hidden_layers": 4}),
    "qwen3-moe-dense-layers": (
        make_qwen3_moe,
        {"mlp_only_layers": [0, 2], "num_experts": 40, "num_experts_per_tok": 6, "tie_word_embeddings": True},
    ),
    "qwen3-layer-types": (
        make_qwen3,
        {
            "sliding_window": 32,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        },
    ),
}
_HEAD_DIM = {"llama-tied": 8}


@pytest.fixture(scope="module", params=list(CONFIGS))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    make, overrides = CONFIGS[request.param]
    extra = {"head_dim": _HEAD_DIM.get(request.param, 16)}
    if request.param == "llama-tied":
        extra["hidden_size"] = 72
    return make(tmp_path_factory.mktemp(request.param), seed=len(request.param), **(overrides | extra))


def fresh_prompt(length: int) -> list[int]:
    return torch.randint(3, VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(length)).tolist()


@torch.inference_mode()
def oracle(folder: Path, tokens: list[int]) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model(torch.tensor([tokens])).logits[0]


def check(ours: Tensor, theirs: Tensor) -> None:
    assert ours.dtype == torch.float32
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max().item() < TOLERANCE
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


def test_whole_prompt(checkpoint: Path) -> None:
    tokens = fresh_prompt(77)
    (logits,) = PagedModel(checkpoint).step([(0, tokens)])
    check(logits, oracle(checkpoint, tokens))


def test_chunks_then_single_tokens(checkpoint: Path) -> None:
    tokens = fresh_prompt(90)
    paged = PagedModel(checkpoint, seed=1)
    cuts = [*range(0, 70, 7), *range(70, 91)]
    parts = [paged.step([(0, tokens[a:b])])[0] for a, b in itertools.pairwise(cuts)]
    check(torch.cat(parts), oracle(checkpoint, tokens))


def test_mixed_batches(checkpoint: Path) -> None:
    """Prompts, chunks and decode rows of unequal lengths in the same steps."""
    prompts = {s: fresh_prompt(n) for s, n in enumerate((100, 3, 41, 64, 17, 33))}
    done = dict.fromkeys(prompts, 0)
    got: dict[int, list[Tensor]] = {s: [] for s in prompts}
    paged = PagedModel(checkpoint, seed=2)
    widths = (1, 7, 1, 40, 1, 2, 1, 1)
    turn = 0
    while any(done[s] < len(p) for s, p in prompts.items()):
        work = []
        for s, p in prompts.items():
            n = widths[(turn + s) % len(widths)]
            if done[s] < len(p) and (turn + s) % 4:
                work.append((s, p[done[s] : done[s] + n]))
        for (s, tokens), logits in zip(work, paged.step(work) if work else [], strict=True):
            got[s].append(logits)
            done[s] += len(tokens)
        turn += 1
    for s, p in prompts.items():
        check(torch.cat(got[s]), oracle(checkpoint, p))
