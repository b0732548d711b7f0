"""Where a GPU's memory goes, and what is left for the KV pool: measured, not guessed.

    weights loaded -> the largest step is run once over a pool of its own -> peak read off the allocator
    -> pool = share of the card - weights - peak of a step - recorded steps - what others hold

The largest step that will ever be run has been run then: one that runs out of memory later is a fault, not load.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from common.engine.batch import BatchRow, SampleRow, build_batch
from common.engine.runner import ModelRunner
from common.errors import ConfigError
from common.kvcache.layout import KVLayout, Retention
from common.telemetry import get_logger
from common.types import SamplingParams

log = get_logger(__name__)

GRAPHS_NBYTES = 1 << 30  # kept for recorded steps: they share one memory pool
FEW_ROWS = (1, 2, 16, 32)  # for each kernel of few rows a number that takes it
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


def run_largest_step(
    runner: ModelRunner, layout: KVLayout, *, max_tokens: int, max_seqs: int, max_model_len: int
) -> None:
    """Compute a prompt chunk of `max_tokens` tokens, then draw for `max_seqs` sequences with all that drawing can need.

    Before that for few: products of few rows have kernels of their own (`common.kernels.gpu.linear`), and those of the
    head are in no recorded step. Compiled now, they do not hold up the first requests that come together.
    The tokens are written over one another: the pool need not hold them all.
    """
    torch.cuda.reset_peak_memory_stats()
    length = min(max_tokens, max_model_len)
    num_rows = -(-max_tokens // length)
    tables = {
        g.name: [i % g.num_blocks for i in range(-(-length // g.block_size))]
        for g in layout.groups
        if g.retention is not Retention.SNAPSHOT
    }
    groups = {g.name: (g.block_size, g.window) for g in layout.groups if g.retention is not Retention.SNAPSHOT}
    states = {g.name: 0 for g in layout.groups if g.retention is Retention.SNAPSHOT}
    params = SamplingParams(temperature=0.9, top_p=0.9, logprobs=1)
    draw = SampleRow(0, 0, 0, params, (), (), frozenset())
    token_ids = np.zeros(length, np.int64).tolist()
    rows = [BatchRow(token_ids, 0, tables, (draw,), states=states) for _ in range(num_rows)]
    pending = runner.forward(build_batch(rows, groups))
    runner.sample(pending)
    runner.collect(pending)
    for count in sorted({min(n, max_seqs) for n in (*FEW_ROWS, max_seqs)}):
        ones = [BatchRow([0], 0, tables, (draw,), states=states) for _ in range(count)]
        pending = runner.forward(build_batch(ones, groups))
        runner.sample(pending)
        runner.collect(pending)
    torch.cuda.synchronize()
