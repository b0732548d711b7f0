"""One engine in this process, and what is measured on it: `nanodeploy.LLM` with prompts of token ids.

    ready -> warm up -> each part in turn; a part that fails says so and the others go on

Times are wall clock around `generate`, so planning, copies and Python count. Step times come from the instants at
which steps ended, of those steps in which all sequences decode.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import psutil
import torch

from benchmarks.gpu.arithmetic import prompt_flops, step_nbytes
from common.kernels.late import late_kernels
from nanodeploy import LLM, SamplingParams

TEMPERATURE = 0.6
TRIM = 16  # steps left out where the batch fills and empties
Prompts = list[list[int]]


@dataclass(frozen=True)
class Sizes:
    """How much work; a dry run has little of everything."""

    batches: tuple[int, ...] = (1, 32, 256)
    context: int = 1024
    step_tokens: int = 257  # of each sequence: 256 steps
    nano: tuple[int, int, int] = (256, 100, 1024)  # sequences, shortest, longest; in and out
    batch: tuple[int, int, int] = (512, 1024, 256)  # sequences, in, out
    prefill: tuple[int, int] = (128, 1024)
    long_prefill: tuple[int, int] = (8, 4096)
    row: int = 130  # long prompts, one after the other; 12 at least
    long: tuple[int, int, int] = (16, 16384, 65)  # sequences, context, out: steps at long context
    contexts: tuple[int, ...] = (4096, 8192, 16384, 32768, 65536)
    contexts_batch: int = 16
    max_num_seqs: int = 512
    max_num_batched_tokens: int = 16384


DRY = Sizes(
    batches=(1, 4),
    context=32,
    step_tokens=41,
    nano=(8, 4, 16),
    batch=(8, 16, 8),
    prefill=(8, 32),
    long_prefill=(2, 64),
    row=12,
    long=(2, 96, 41),
    contexts=(64, 128),
    contexts_batch=2,
    max_num_seqs=16,
    max_num_batched_tokens=256,
)


class Session:
    """An engine and its sizes. `options` are `LLM`'s beside those that all measurements share."""

    def __init__(self, model: str, folder: Path, *, dry_run: bool, options: Mapping[str, Any] | None = None) -> None:
        self.model, self.sizes, self.dry_run = model, DRY if dry_run else Sizes(), dry_run
        longest = max(sum(self.sizes.batch[1:]), 2 * self.sizes.nano[2], self.sizes.long_prefill[1]) + 64
        shared: dict[str, Any] = {
            "load_format": "dummy",
            "dtype": "bfloat16",
            "device": "cpu" if dry_run else "cuda",
            "enable_prefix_caching": False,
            "max_model_len": longest,
            "max_num_seqs": self.sizes.max_num_seqs,
            "max_num_batched_tokens": self.sizes.max_num_batched_tokens,
        }
        if dry_run:
            shared |= {"kv_cache_memory_bytes": 64 << 20, "max_model_len": 512}
        began = time.perf_counter()
        self.llm = LLM(folder, **(shared | dict(options or {})))
        self.ready_s = time.perf_counter() - began
        late_kernels.watch()
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self._random = Random(0)
        self._vocab = 500 if dry_run else 10_000

    def prompts(self, count: int, length: int) -> Prompts:
        return [self.prompt(length) for _ in range(count)]

    def prompt(self, length: int) -> list[int]:
        return [self._random.randrange(2, self._vocab) for _ in range(length)]

    def run(
        self, prompts: Prompts, lengths: Sequence[int], temperature: float = TEMPERATURE
    ) -> tuple[float, list[float]]:
        """Seconds of the whole and the instants, from its begin, at which steps ended."""
        params = [
            SamplingParams(max_tokens=n, ignore_eos=True, temperature=temperature, seed=i)
            for i, n in enumerate(lengths)
        ]
        ends: list[float] = []
        began = time.perf_counter()
        outputs = self.llm.generate(
            prompts, params, progress=lambda done, total: ends.append(time.perf_counter() - began)
        )
        seconds = time.perf_counter() - began
        got = [len(output.outputs[0].token_ids) for output in outputs]
        if got != list(lengths):
            raise RuntimeError(
                f"{sum(g != n for g, n in zip(got, lengths, strict=True))} answers are not as long as asked"
            )
        return seconds, ends

    @property
    def decoder(self) -> Any:
        """`common.models.decoder.DecoderModel`, of an engine in this process."""
        return self.llm._built.parts.runner._model  # type: ignore[attr-defined]

    def steps(self, batch: int, context: int, num_tokens: int, cached: Prompts | None = None) -> dict[str, float]:
        """Milliseconds of a step in which `batch` sequences decode, at `context` tokens and those they gain.

        `cached`: prompts that the prefix cache holds, so that none but their ends are computed.
        """
        self.run(cached or self.prompts(batch, context), [TRIM] * batch)
        filling = 1 if cached else -(-batch * context // self.sizes.max_num_batched_tokens)
        _, ends = self.run(cached or self.prompts(batch, context), [num_tokens] * batch)
        steady = ends[filling + 4 : num_tokens - 4]
        gaps = sorted(b - a for a, b in itertools.pairwise(steady))
        return {
            "mean": 1e3 * (steady[-1] - steady[0]) / (len(steady) - 1),
            "p50": 1e3 * statistics.median(gaps),
            "p99": 1e3 * gaps[int(0.99 * (len(gaps) - 1))],
            "steps": len(gaps),
        }

    def close(self) -> None:
        self.llm.close()


def ready(session: Session) -> dict[str, Any]:
    """Seconds until the engine was there, and from this process's start to the first token; where memory went."""
    session.run([session.prompt(16)], [1])
    first_s = time.time() - psutil.Process().create_time()
    return {"engine_s": session.ready_s, "process_to_first_token_s": first_s, "memory": memory(session)}


def memory(session: Session) -> dict[str, float]:
    """GB by use."""
    built = session.llm._built
    layout = built.ready.layout
    pool = sum(layout.block_nbytes(g.name) * g.num_blocks for g in layout.groups)
    table = {"kv_pool": pool / 1e9, "kv_blocks": layout.groups[0].num_blocks, "kv_tokens": _kv_tokens(session)}
    if torch.cuda.is_available() and not session.dry_run:
        free, total = torch.cuda.mem_get_info()
        table |= {"device": total / 1e9, "free": free / 1e9, "torch_allocated": torch.cuda.memory_allocated() / 1e9}
        table |= {"torch_reserved": torch.cuda.memory_reserved() / 1e9}
    return table


def _kv_tokens(session: Session) -> int:
    group = session.llm._built.ready.layout.groups[0]
    return int(group.num_blocks * group.block_size)


def decode(session: Session) -> dict[str, Any]:
    """Step times by batch size, with the bytes that a step must read."""
    sizes, found = session.sizes, {}
    for batch in sizes.batches:
        step = session.steps(batch, sizes.context, sizes.step_tokens)
        middle = sizes.context + sizes.step_tokens // 2
        found[str(batch)] = step | {"nbytes": step_nbytes(session.config, batch, middle)}
    return found


def prefill(session: Session) -> dict[str, Any]:
    """Prompt tokens/s of many prompts that get one token each; the second of two runs."""
    found = {}
    for name, (count, length) in (("many", session.sizes.prefill), ("long", session.sizes.long_prefill)):
        for _ in range(2):
            seconds, _ = session.run(session.prompts(count, length), [1] * count)
        flops = count * prompt_flops(session.config, length)
        found[name] = {
            "prompts": count,
            "length": length,
            "tokens_per_s": count * length / seconds,
            "tflops": flops / seconds / 1e12,
        }
    return found


def one_prompt(session: Session) -> dict[str, Any]:
    """Milliseconds of one long prompt alone to its first token, median of ten; and once the card is warm of it.

    `sustained_ms`: the last ten of a row without a pause, as a loaded prefill worker computes them.
    """
    length = session.sizes.long_prefill[1]
    seconds = [session.run([session.prompt(length)], [1])[0] for _ in range(session.sizes.row)]
    first, last = seconds[2:12], seconds[-10:]
    return {
        "length": length,
        "ms": 1e3 * statistics.median(first),
        "best_ms": 1e3 * min(first),
        "sustained_ms": 1e3 * statistics.median(last),
    }


def nano(session: Session) -> dict[str, Any]:
    """nano-vllm's own workload: prompts and answers of random lengths, all at once."""
    count, low, high = session.sizes.nano
    random = Random(0)
    prompts = [session.prompt(random.randint(low, high)) for _ in range(count)]
    lengths = [random.randint(low, high) for _ in range(count)]
    seconds, ends = session.run(prompts, lengths)
    return {"tokens": sum(lengths), "seconds": seconds, "tokens_per_s": sum(lengths) / seconds, "steps": len(ends)}


def batch(session: Session) -> dict[str, Any]:
    """Many prompts of one length, all at once."""
    count, length, out = session.sizes.batch
    seconds, ends = session.run(session.prompts(count, length), [out] * count)
    return {"tokens": count * out, "seconds": seconds, "tokens_per_s": count * out / seconds, "steps": len(ends)}


def long_context(session: Session) -> dict[str, Any]:
    """A decode step at long context, and the tokens/s of the whole with its prompts."""
    count, length, out = session.sizes.long
    step = session.steps(count, length, out)
    return step | {"batch": count, "context": length, "tokens_per_s": 1e3 * count / step["mean"]}


def by_context(session: Session) -> dict[str, Any]:
    """Decode step times as the context grows. Wants a prefix cache: each context begins with the one before."""
    sizes, found = session.sizes, {}
    longest = session.prompts(sizes.contexts_batch, max(sizes.contexts))
    for length in sizes.contexts:
        began = time.perf_counter()
        prompts = [prompt[:length] for prompt in longest]
        session.run(prompts, [1] * len(prompts))
        filled = time.perf_counter()
        found[str(length)] = session.steps(len(prompts), length, 49, prompts)
        print(f"{length}: filled in {filled - began:.1f} s, step {found[str(length)]['mean']:.2f} ms", flush=True)
    return found


@torch.inference_mode()
def same_experts(session: Session) -> dict[str, Any]:
    """From here on all tokens go to the same experts: their correction biases differ by more than any score.

    What vLLM's dummy weights do to a model with such biases: it draws those too, and its scores are all near one half.
    """
    slots = [s for s in session.decoder.slots() if s.name.endswith("e_score_correction_bias")]
    for slot in slots:
        slot.target.copy_(torch.linspace(2.0 * len(slot.target), 0.0, len(slot.target)))
    return {"layers": len(slots)}


def drafts(session: Session) -> dict[str, Any]:
    """Step times with 0 to 3 drafts in every step, none of them right; needs an engine that drafts."""
    found = {}
    for count in (0, 1, 2, 3):
        with _forced_drafts(count):
            found[str(count)] = {str(b): session.steps(b, session.sizes.context, 65) for b in session.sizes.batches[:2]}
    return found


@contextlib.contextmanager
def _forced_drafts(count: int) -> Iterator[None]:
    """Every step has `count` drafts, whatever came of earlier ones: random weights are never right."""
    from common.engine.pace import Pace
    from common.engine.speculative import NgramDrafter

    allow, propose = Pace.allow, NgramDrafter.propose
    Pace.allow = lambda self, most, cost: min(most, count)  # type: ignore[method-assign]
    NgramDrafter.propose = lambda self, seq, count: [seq.token_ids[-1]] * count  # type: ignore[method-assign]
    try:
        yield
    finally:
        Pace.allow, NgramDrafter.propose = allow, propose  # type: ignore[method-assign]


PARTS: dict[str, Callable[[Session], dict[str, Any]]] = {
    part.__name__: part
    for part in (
        ready,
        decode,
        prefill,
        one_prompt,
        nano,
        batch,
        long_context,
        by_context,
        drafts,
        same_experts,
    )
}


def measure(
    model: str, folder: Path, parts: Sequence[str], *, dry_run: bool, options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Results by part; one that fails has an `error`. Raises what the engine's start raises."""
    session = Session(model, folder, dry_run=dry_run, options=options)
    found: dict[str, Any] = {}
    try:
        for name in parts:
            began = time.perf_counter()
            try:
                found[name] = PARTS[name](session)
            except Exception as error:  # noqa: BLE001 - one part's failure is a result
                traceback.print_exc()
                found[name] = {"error": f"{type(error).__name__}: {error}"}
            print(f"{model} {name}: {time.perf_counter() - began:.1f} s", flush=True)
        found["late_kernels"] = {"count": late_kernels.count, "seconds": late_kernels.seconds}
    finally:
        session.close()
    return found
