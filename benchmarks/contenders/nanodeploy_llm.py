"""Our own engine, offline: `from nanodeploy import LLM`. Arguments: model folder, dtype, threads."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from benchmarks.contenders.child import Generate, Ids, serve
from nanodeploy import LLM, SamplingParams, __version__

KV_BYTES = 2 << 30  # of every engine of ours in this benchmark


def load() -> tuple[dict[str, str], Generate]:
    model, dtype, threads = sys.argv[1:4]
    llm = LLM(model, dtype=dtype, num_threads=int(threads), kv_cache_memory_bytes=KV_BYTES)

    def generate(prompts: Sequence[Ids], max_tokens: int) -> list[Ids]:
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        return [output.outputs[0].token_ids for output in llm.generate(prompts, params)]

    return {"nanodeploy": __version__, "torch": torch.__version__, "dtype": dtype}, generate


if __name__ == "__main__":
    serve(load)
