"""Where a GPU's memory goes, and what is left for the KV pool: measured, not guessed.

    weights loaded -> the largest step and a draft layer's largest pass are run once over a pool of their own, and
    small ones -> peak read off the allocator
    -> pool = share of the card - weights - peak of a step - recorded steps - what others hold

The largest step that will ever be run has been run then: one that runs out of memory later is a fault, not load. And
so has one for each kernel that a step's sizes choose: none is compiled while requests wait. What has no room before
that (`room_for`), or leaves none for a pool, is a refused start.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from common.engine.batch import BatchRow, RowMasks, SampleRow, build_batch
from common.engine.draft_runner import DraftRunner
from common.engine.drafting import FIRST
from common.engine.runner import PROMPT_LOGPROB_ROWS, ModelRunner
from common.errors import ConfigError
from common.kvcache.layout import GroupSpec, KVLayout, Retention
from common.telemetry import get_logger
from common.types import SamplingParams

log = get_logger(__name__)

GRAPHS_NBYTES = 1 << 30  # kept for recorded steps: they share one memory pool
NEW = (1, 2, 3, 4, 5, 6, 7)  # new tokens of a sequence, and powers of two up to a step's
FEW = 64  # so few new tokens may see all that a sequence can have: a start is to be short
_MIB = 1 << 20


@dataclass(frozen=True)
class GpuMemory:
    """Bytes of one card. `others`: what is neither ours nor free, the driver's context and libraries among it."""

    total: int
    others: int
    weights: int
    step_peak: int
    graphs: int

    def pool_nbytes(self, utilization: float) -> int:
        """What `gpu_memory_utilization` leaves for the KV pool. ConfigError if that is nothing."""
        taken = self.others + self.weights + self.step_peak + self.graphs
        left = int(self.total * utilization) - taken
        if left <= 0:
            raise ConfigError(
                f"no memory is left for a KV cache: of {self.total // _MIB} MiB, {utilization:.0%} may be used; "
                f"{self.describe()}",
                param="gpu_memory_utilization",
            )
        return left

    def describe(self) -> str:
        parts = {"weights": self.weights, "a step": self.step_peak, "graphs": self.graphs, "others": self.others}
        return ", ".join(f"{name} {nbytes // _MIB} MiB" for name, nbytes in parts.items())


@contextmanager
def room_for(what: str, param: str) -> Iterator[None]:
    """An engine whose GPU has no room for something does not start: ConfigError with torch's account of the memory.

    `param`: the setting that this is most likely up to.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        account = str(error).partition(" If reserved")[0]
        raise ConfigError(f"the GPU has no room for {what}: {account}", param=param) from error


def give_memory_back() -> None:
    """What nothing in this process uses any more becomes free for it and for others, tensors in cycles included."""
    gc.collect()
    torch.cuda.empty_cache()


def weights_nbytes() -> int:
    """Bytes that are allocated now; called when the model is there and nothing else."""
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def measure(weights: int, *, graphs: int, beside: int = 0) -> GpuMemory:
    """After the largest step was run: its peak above the weights, and what others hold.

    `graphs`: bytes that recorded steps will take. `beside`: those of the peak that the step needs in this measurement
    alone.
    """
    peak = torch.cuda.max_memory_allocated() - beside
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    others = total - free - torch.cuda.memory_reserved()
    return GpuMemory(total, max(others, 0), weights, max(peak - weights, 0), graphs)


def run_steps(
    runner: ModelRunner,
    layout: KVLayout,
    *,
    max_tokens: int,
    max_seqs: int,
    longest: int,
    max_model_len: int,
    max_draws: int = 1,
) -> None:
    """Compute the largest step, and then small ones, so that no kernel is compiled while requests wait.

    The largest is a prompt chunk of `max_tokens` tokens, in sequences of up to `longest`; draws follow for `max_seqs`
    sequences with all that drawing can need, a grammar's masks too, then `max_draws` of each, as where drafts are
    verified, and for as many rows as a prompt's log probabilities are computed for at once.

    Kernels are chosen by how many sequences a step has, by how many new tokens, whether as many of each, and by how
    many tokens these see, `max_model_len` at most: each range that has a kernel of its own holds a power of two. The
    tokens are written over one another: the pool need not hold them all.
    """
    torch.cuda.reset_peak_memory_stats()
    length = min(max_tokens, longest)
    held = [g for g in layout.groups if g.retention is not Retention.SNAPSHOT]
    groups = {g.name: (g.block_size, g.window) for g in held}
    states = {g.name: 0 for g in layout.groups if g.retention is Retention.SNAPSHOT}
    params = SamplingParams(temperature=0.9, top_p=0.9, logprobs=1)
    draw = SampleRow(0, 0, 0, params, (), (), frozenset())

    def compute(new: Sequence[int], seen: int, draws: int = 1) -> None:
        """A sequence with `n` new tokens for each n of `new`, of which the last sees `seen` with itself.

        `draws`: from the last rows of each, as where drafts are verified.
        """
        tables = {g.name: _table(g, seen) for g in held}
        rows = [BatchRow([0] * n, seen - n, tables, (draw,) * draws, states=states) for n in new]
        pending = runner.forward(build_batch(rows, groups))
        assert pending.logits_RV is not None
        count, vocab_size = pending.logits_RV.shape
        runner.sample(pending, RowMasks(np.arange(count), np.full((count, -(-vocab_size // 32)), -1, np.int32)))
        runner.collect(pending)

    compute([length] * -(-max_tokens // length), length)
    for count in sorted({*powers(max_seqs), max_seqs}):
        compute([1] * count, length)
        if count > 1:
            compute([1] * (count - 1) + [2], max(length, 2))
    if max_draws > 1:
        compute([max_draws] * max(1, min(max_seqs, max_tokens // max_draws)), max(length, max_draws), max_draws)
    for num_new in _new_tokens(length):
        compute([num_new], max_model_len if num_new <= FEW else length, min(num_new, PROMPT_LOGPROB_ROWS))
    for seen in powers(max_model_len, 16):
        for new in ([1], [2], [1, 2]):
            compute(new, seen)
    torch.cuda.synchronize()


def powers(most: int, least: int = 1) -> list[int]:
    """Powers of two from `least`, itself one, to `most`, if that is no less."""
    return [1 << n for n in range(least.bit_length() - 1, most.bit_length())]


def _new_tokens(most: int, *others: int) -> list[int]:
    """Of a sequence, those that `run_steps` computes, up to `most`."""
    return sorted(n for n in {*NEW, *powers(most), *others} if n <= most)


def _table(group: GroupSpec, seen: int) -> list[int]:
    """Blocks for `seen` tokens, the same ones again where there are not so many."""
    return [i % group.num_blocks for i in range(-(-seen // group.block_size))]


@room_for("the draft layer", "max_num_batched_tokens")
def run_draft_layer(drafts: DraftRunner, group: GroupSpec, *, longest: int, max_model_len: int) -> None:
    """As `run_steps`, of the draft layer's passes as they are run, the largest among them. `group`: of its cache."""

    def compute(num_new: int, seen: int) -> None:
        drafts.compute(num_new, seen - num_new, _table(group, seen))

    most = min(longest, max_model_len - FIRST)
    for num_new in _new_tokens(most, most):
        compute(num_new, max_model_len if num_new <= FEW else num_new + FIRST)
    for seen in powers(max_model_len, 16):
        for num_new in (1, 2):
            compute(num_new, seen)
    torch.cuda.synchronize()
