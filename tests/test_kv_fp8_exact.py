"""What an 8-bit KV cache costs a real model: SmolLM2's perplexity on texts that it is not calibrated on.

Run by `make test-exact`. Perplexity is our own engine's (`prompt_logprobs`), so every key and value of a text is read
back from the cache. The figures go into the table of docs/models.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from family_report import record
from identity_support import model
from rich.console import Console

from benchmarks.gpu.accuracy import PIECE, perplexity
from benchmarks.report import environment
from nanodeploy import LLM
from services.cli.calibrate import run_calibrate

__all__ = ["model"]

pytestmark = [pytest.mark.exact, pytest.mark.timeout(1800)]

TEXT = Path(__file__).parent / "data" / "public_domain.txt"
MEMORY = 64 << 20  # bytes of KV


def judged(folder: Path, **engine: Any) -> tuple[float, int, int]:
    """Perplexity of the text, with the number of its tokens and of the engine's blocks."""
    with LLM(folder, kv_cache_memory_bytes=MEMORY, max_model_len=PIECE + 1, max_num_seqs=8, **engine) as llm:
        assert llm.tokenizer is not None
        ids = llm.tokenizer.encode(TEXT.read_text(encoding="utf-8"))
        found, tokens = perplexity(llm, [ids[first : first + PIECE] for first in range(0, len(ids), PIECE)])
        return found, tokens, llm._built.parts.layout.group("full").num_blocks


def test_perplexity_is_within_one_percent_of_bf16(model: Path, tmp_path: Path) -> None:
    started = environment("torch", "transformers")
    scales = tmp_path / "scales.json"
    assert run_calibrate(str(model), "", str(scales), 8192, {}, Console(quiet=True)) == 0
    plain, tokens, blocks = judged(model, dtype="bfloat16")
    row = {"name": "SmolLM2", "model": model.name, "kv_dtype": "fp8_e4m3", "tokens": tokens}
    fp8, _, more_blocks = judged(model, dtype="bfloat16", kv_dtype="fp8_e4m3", kv_scales=str(scales))
    row |= {"perplexity": fp8, "reference_perplexity": plain, "blocks_ratio": more_blocks / blocks}
    record(started, kv=[row])
    assert fp8 <= 1.01 * plain
    assert more_blocks >= 1.95 * blocks
