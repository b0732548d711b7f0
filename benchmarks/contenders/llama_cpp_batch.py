"""llama.cpp over its low-level batch interface: each prompt a stream of its own, all streams in each decode call.

The high-level `Llama` of llama-cpp-python runs one sequence at a time, so this talks to `llama_decode` with batches,
as llama.cpp's own server does: prompts packed up to `N_BATCH` tokens a call, then a token of every stream a step,
sampled greedily in C. Runs in the environment of `llama_env`. Arguments: GGUF file, threads.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import llama_cpp as _llama
from child import Generate, Ids, serve

llama: Any = _llama

N_BATCH = 2048  # tokens a call
CELL = 256  # llama.cpp rounds the cache of a stream up to this


class Streams:
    """A context for so many sequences of so many tokens; made anew when the shape changes."""

    def __init__(self, model: Any, threads: int, num_streams: int, num_tokens: int) -> None:
        params = llama.llama_context_default_params()
        params.n_ctx = num_streams * -(-num_tokens // CELL) * CELL
        params.n_batch = N_BATCH
        params.n_ubatch = 512
        params.n_seq_max = num_streams
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = False
        params.no_perf = True
        self.shape = (num_streams, num_tokens)
        self.context = llama.llama_init_from_model(model, params)
        if not self.context:
            raise RuntimeError(f"no context for {num_streams} x {num_tokens} tokens")
        self.batch = llama.llama_batch_init(N_BATCH, 0, 1)
        self.sampler = llama.llama_sampler_init_greedy()

    def close(self) -> None:
        llama.llama_sampler_free(self.sampler)
        llama.llama_batch_free(self.batch)
        llama.llama_free(self.context)

    def clear(self) -> None:
        llama.llama_memory_clear(llama.llama_get_memory(self.context), False)

    def add(self, token: int, position: int, stream: int, wanted: bool) -> None:
        batch, index = self.batch, self.batch.n_tokens
        batch.token[index] = token
        batch.pos[index] = position
        batch.n_seq_id[index] = 1
        batch.seq_id[index][0] = stream
        batch.logits[index] = wanted
        batch.n_tokens = index + 1

    def decode(self) -> dict[int, int]:
        """Run the batch and empty it: the next token of each stream that wanted one."""
        batch = self.batch
        status = llama.llama_decode(self.context, batch)
        if status:
            raise RuntimeError(f"llama_decode gave {status}")
        drawn = {
            batch.seq_id[i][0]: llama.llama_sampler_sample(self.sampler, self.context, i)
            for i in range(batch.n_tokens)
            if batch.logits[i]
        }
        batch.n_tokens = 0
        return drawn


def load() -> tuple[dict[str, str], Generate]:
    path, threads = sys.argv[1], int(sys.argv[2])
    llama.llama_log_set(_QUIET, None)
    llama.llama_backend_init()
    params = llama.llama_model_default_params()
    params.n_gpu_layers = 0
    model = llama.llama_model_load_from_file(path.encode(), params)
    if not model:
        raise RuntimeError(f"llama.cpp cannot load {path}")
    made: list[Streams] = []

    def generate(prompts: Sequence[Ids], max_tokens: int) -> list[Ids]:
        shape = (len(prompts), max(len(p) for p in prompts) + max_tokens)
        if not made or made[0].shape[0] != shape[0] or made[0].shape[1] < shape[1]:
            for old in made:
                old.close()
            made[:] = [Streams(model, threads, *shape)]
        return _run(made[0], prompts, max_tokens)

    about = {
        "llama-cpp-python": importlib.metadata.version("llama-cpp-python"),
        "weights": Path(path).name,
        "features": llama.llama_print_system_info().decode(),
    }
    return about, generate


def _run(streams: Streams, prompts: Sequence[Ids], max_tokens: int) -> list[Ids]:
    streams.clear()
    rows: list[Ids] = [[] for _ in prompts]

    def take(drawn: dict[int, int]) -> None:
        for stream, token in drawn.items():
            rows[stream].append(token)

    for stream, prompt in enumerate(prompts):
        for position, token in enumerate(prompt):
            streams.add(token, position, stream, wanted=position == len(prompt) - 1)
            if streams.batch.n_tokens == N_BATCH:
                take(streams.decode())
    if streams.batch.n_tokens:
        take(streams.decode())
    for step in range(max_tokens - 1):
        for stream, prompt in enumerate(prompts):
            streams.add(rows[stream][-1], len(prompt) + step, stream, wanted=True)
        take(streams.decode())
    return rows


@llama.llama_log_callback
def _QUIET(level: int, text: bytes, data: object) -> None:  # noqa: N802 - kept alive as long as the module
    if level == 4:  # errors
        sys.stderr.write(text.decode(errors="replace"))


if __name__ == "__main__":
    serve(load)
