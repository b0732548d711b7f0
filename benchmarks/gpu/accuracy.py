"""What an 8-bit KV cache costs trained models: perplexity of texts over it, beside the same engine's over bf16.

Every key, value and latent row of a text is read back from the cache. Random weights would say nothing of this, so the
models are the two that can be had: the small DeepSeek-V3 of tests/data (latent rows, which carry scales of their own)
and the demo model (keys and values of heads, scales measured before), where it lies in the cache folder or can be
fetched.
"""

from __future__ import annotations

import math
import os
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.report import ROOT
from nanodeploy import LLM, SamplingParams
from services.cli.calibrate import run_calibrate
from services.cli.demo_model import ensure_demo_model
from services.cli.state import cache_root

PIECE = 1024  # tokens
LATENT = ROOT / "tests" / "data" / "mtp-dyck"


def perplexity(llm: LLM, texts: Sequence[Sequence[int]]) -> tuple[float, int]:
    """Of token ids, with how many of them were judged: all but the first of each text."""
    outputs = llm.generate([list(t) for t in texts], SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0))
    found = [o.prompt_logprobs.token_logprobs for o in outputs if o.prompt_logprobs is not None]
    logprobs = [value for values in found for value in values if value is not None]
    assert len(logprobs) == sum(map(len, texts)) - len(texts)
    return math.exp(-sum(logprobs) / len(logprobs)), len(logprobs)


def compare(folder: Path, texts: Sequence[str], size: int, device: str, **fp8: Any) -> dict[str, Any]:
    """Both perplexities of one model, of texts in pieces of `size` tokens. `fp8`: settings with 8 bits alone."""
    found: dict[str, Any] = {"model": folder.name}
    for name, options in (("bf16", {}), ("fp8_e4m3", {"kv_dtype": "fp8_e4m3", **fp8})):
        shared: dict[str, Any] = {"device": device, "dtype": "bfloat16", "max_model_len": size + 1, "max_num_seqs": 8}
        with LLM(folder, kv_cache_memory_bytes=64 << 20, **shared | options) as llm:
            assert llm.tokenizer is not None
            ids = [llm.tokenizer.encode(text) for text in texts]
            pieces = [one[first : first + size] for one in ids for first in range(0, len(one), size)]
            found[name], found["tokens"] = perplexity(llm, pieces)
    return found | {"ratio": found["fp8_e4m3"] / found["bf16"]}


def latent(device: str) -> dict[str, Any]:
    """On sentences of its language that training has not seen."""
    sys.path.append(str(ROOT / "tests"))
    from train_models import LENGTH, SEED, Language

    rng, language = random.Random(SEED + 2), Language.make(SEED)
    texts = [language.sentence(rng, LENGTH)[:LENGTH] for _ in range(64)]
    return compare(LATENT, texts, 2 * LENGTH, device)


def heads(device: str) -> dict[str, Any]:
    """On English that its scales are not measured on."""
    model = ensure_demo_model(cache_root(os.environ))
    text = (ROOT / "tests" / "data" / "public_domain.txt").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as name:
        scales = str(Path(name) / "scales.json")
        run_calibrate(str(model), "", scales, 8192, {"device": device}, Console(quiet=True))
        return compare(model, [text], PIECE, device, kv_scales=scales)


def measure(*, dry_run: bool) -> dict[str, Any]:
    """By kind of cache. In a dry run the latent one alone: the other takes minutes on a CPU."""
    device = "cpu" if dry_run else "cuda"
    found: dict[str, Any] = {"latent": latent(device)}
    if not dry_run:
        try:
            found["heads"] = heads(device)
        except Exception as error:  # noqa: BLE001 - one part's failure is a result
            found["heads"] = {"error": f"{type(error).__name__}: {error}"}
    return found
