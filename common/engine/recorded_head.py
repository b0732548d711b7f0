"""Head and draw of one row of the tail pool, recorded: a first token waits for them, and for nothing that hides their
launches (`common.engine.first_tokens`). One launch instead of a dozen.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.engine.adjust import edits_of
from common.engine.batch import Batch, SampleRow
from common.engine.inputs import Arrays, Inputs, nbytes_of, view
from common.engine.sampler import SampleResult, packed_draws
from common.kernels.draws import any_truncated, draw_packed
from common.types import SamplingParams

_GREEDY = SampleRow(0, 0, 0, SamplingParams(temperature=0.0, max_tokens=1), (), (), frozenset())


class Head(Protocol):
    def logits(self, hidden_RD: Tensor) -> Tensor:
        """Float32 [R, vocab]."""


class Tails(Protocol):
    def read_tail(self, block_ids_R: Tensor) -> Tensor:
        """[R, hidden]."""


class RecordedHead:
    """Recorded once for draws among all tokens, and once for draws of which some tokens are kept.

    All runs on `stream`, by which memory is reused: `draw` is called with it as the current one.
    """

    def __init__(self, head: Head, tails: Tails, inputs: Inputs, vocab_size: int, stream: torch.cuda.Stream) -> None:
        self._head = head
        self._tails = tails
        self._inputs = inputs
        self._vocab_size = vocab_size
        self._stream = stream
        self._graphs: dict[bool, torch.cuda.CUDAGraph] = {}
        self._drawn: dict[bool, tuple[Tensor, Tensor]] = {}
        self._anything = _arrays(0, packed_draws([_GREEDY]))
        self._memory = torch.zeros(nbytes_of(self._anything), dtype=torch.uint8, device=stream.device)

    @torch.inference_mode()
    def record(self) -> None:
        tensors = view(self._memory, self._anything)
        for truncated in (False, True):
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
            with torch.cuda.stream(self._stream):
                self._inputs.put(self._anything, self._memory)
                for _ in range(2):  # kernels are compiled and workspaces made
                    self._compute(tensors["tail"], tensors["draws"], truncated)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self._stream):
                self._drawn[truncated] = self._compute(tensors["tail"], tensors["draws"], truncated)
            self._graphs[truncated] = graph
        torch.cuda.synchronize()

    def draw(self, batch: Batch) -> SampleResult | None:
        """The token of a batch of one draw from a tail; None for what is not recorded: edits, logprobs, more rows."""
        if len(batch.rows) != 1 or len(batch.rows[0].samples) != 1 or batch.rows[0].tail_read < 0:
            return None
        (sample,) = batch.rows[0].samples
        if sample.params.logprobs is not None or edits_of([sample], self._vocab_size):
            return None
        draws_R6 = packed_draws([sample])
        truncated = any_truncated(draws_R6)
        self._inputs.put(_arrays(batch.rows[0].tail_read, draws_R6), self._memory)
        self._graphs[truncated].replay()
        return SampleResult.of(*self._drawn[truncated], None)

    def _compute(self, tail_R: Tensor, draws_R6: Tensor, truncated: bool) -> tuple[Tensor, Tensor]:
        logits_RV = self._head.logits(self._tails.read_tail(tail_R)).contiguous()
        return draw_packed(logits_RV, draws_R6, truncated=truncated)


def _arrays(tail: int, draws_R6: NDArray[np.int64]) -> Arrays:
    return {"tail": np.array([tail], np.int64), "draws": draws_R6}
